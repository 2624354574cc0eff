"""How well optimizers train: ten small tasks without a download, each optimizer at its best rate."""
