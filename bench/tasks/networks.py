"""The networks of the tasks, none of over 120 000 parameters at the sizes that are trained."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def deep(layers: int, gain: float) -> nn.Sequential:
    """ReLU layers of 64, weights of std gain / sqrt(64): each layer scales by gain / sqrt(2)."""
    model = mlp([64] * (layers + 1) + [10])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return model


def cnn(norm: bool = False) -> nn.Sequential:
    """Three convolutions over pictures of 8 x 8."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=not norm))
        layers += [nn.BatchNorm2d(width)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def cnn_bn() -> nn.Sequential:
    """The same with BatchNorm."""
    return cnn(norm=True)


class Gru(nn.Module):
    """Reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 64) to (batch, 10)."""
        return self.head(self.cell(x.view(-1, 8, 8))[0][:, -1])


class Irnn(nn.Module):
    """A ReLU recurrence that starts as the identity (Le, Jaitly and Hinton, 2015)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(hidden, 1)
        for name, param in self.named_parameters():
            nn.init.normal_(param, 0.0, 1e-3)
            if "bias" in name:
                nn.init.zeros_(param)
        nn.init.eye_(self.cell.weight_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, inputs) to (batch,)."""
        return self.head(self.cell(x)[0][:, -1])[:, 0]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 16
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, time, 3, self.heads, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Two pre-norm layers with heads of 16."""

    def __init__(self, known: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(known, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, known)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, 0.0, 0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """(batch, time) to (batch, time, known)."""
        x = self.tokens(codes) + self.places(torch.arange(codes.shape[1]))
        return self.head(self.norm(self.blocks(x)))
