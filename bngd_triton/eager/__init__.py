"""The definition in plain PyTorch: statistics, factors, update, rounding; also the CPU path."""
