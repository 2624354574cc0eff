"""The command `bngd verify`: the definition in float64, the bounds, cases and verdicts."""
