"""From parameter groups to one step: what is collected, who serves it, what is replayed."""
