"""The two learning problems of `bngd demo`, on scikit-learn's bundled digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

HIDDEN_LAYERS = 20
TRAIN_ROWS = 1347


class Split(NamedTuple):
    """Rows and labels for training and for the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def exploding_task(seed: int) -> tuple[Split, nn.Sequential]:
    """Shuffled digits and the network whose activations grow by sqrt(2) a layer."""
    rows = generator(seed)
    x, y = _digits()
    order = torch.randperm(len(x), generator=rows)
    x, y = x[order], y[order]
    split = Split(x[:TRAIN_ROWS], y[:TRAIN_ROWS], x[TRAIN_ROWS:], y[TRAIN_ROWS:])
    model = _mlp([64] * (HIDDEN_LAYERS + 1) + [10])
    for layer in _linear_layers(model):
        nn.init.normal_(layer.weight, 0.0, 2 / math.sqrt(layer.in_features), generator=rows)
        nn.init.zeros_(layer.bias)
    return split, model


def loss_scale_task(seed: int) -> tuple[Split, nn.Sequential]:
    """Digits in their own order, standardised by the half to train on, and a small network."""
    x, y = _digits()
    half = len(x) // 2
    std, mean = torch.std_mean(x[:half], dim=0, correction=0)
    x = torch.where(std > 0, (x - mean) / std, 0.0)
    model = _mlp([64, 64, 10])
    weights = generator(seed)
    for layer in _linear_layers(model):
        bound = 1 / math.sqrt(layer.in_features)
        for param in layer.parameters():
            nn.init.uniform_(param, -bound, bound, generator=weights)
    return Split(x[:half], y[:half], x[half:], y[half:]), model


def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def generator(seed: int) -> torch.Generator:
    """One for all that a seed decides."""
    return torch.Generator().manual_seed(seed)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))
