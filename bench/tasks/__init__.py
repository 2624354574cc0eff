"""How well optimizers train: ten small tasks, each optimizer at its best rate."""
