"""The command `bngd demo`."""
