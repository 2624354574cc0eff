"""The tasks: what is trained, on which data, and what is scored.

Every task has three parts of data: one to train on, one that chooses rates ("choice") and one that
chooses nothing ("test"). A seed decides the initial weights and the order of the batches.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks import networks


class Run(NamedTuple):
    """One training: the loss of its next batch, and the score of a part of the data."""

    model: nn.Module
    loss: Callable[[], Tensor]
    score: Callable[[str], float]


class Task(NamedTuple):
    """A problem.

    Attributes:
        title: in tables.
        steps: of a training.
        higher: whether a higher score is better (accuracy in %); otherwise it is a loss.
        start: makes what a seed decides.
    """

    title: str
    steps: int
    higher: bool
    start: Callable[[int], Run]


def _batches(n: int, size: int, seed: int) -> Callable[[], Tensor]:
    """Row numbers of shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Tensor] = []

    def following() -> Tensor:
        if not waiting:
            order = torch.randperm(n, generator=generator)
            waiting.extend(order[: n - n % size].view(-1, size).flip(0))
        return waiting.pop()

    return following


@cache
def _digits() -> dict[str, tuple[Tensor, Tensor]]:
    """1797 pictures of 8 x 8, shuffled once: 1000 to train on, 347 to choose by, 450 to test."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2024))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    parts = zip(x.split([1000, 347, 450]), y.split([1000, 347, 450]), strict=True)
    return dict(zip(("train", "choice", "test"), parts, strict=True))


def _classify(build: Callable[[], nn.Module], seed: int) -> Run:
    torch.manual_seed(seed)
    model = build()
    x, y = _digits()["train"]
    batch = _batches(len(x), 50, seed)

    def loss() -> Tensor:
        rows = batch()
        return F.cross_entropy(model(x[rows]), y[rows])

    def score(part: str) -> float:
        x, y = _digits()[part]
        return 100 * float((model(x).argmax(1) == y).float().mean())

    return Run(model, loss, score)


def _autoencode(seed: int) -> Run:
    torch.manual_seed(seed)
    model = networks.mlp([64, 128, 32, 8, 32, 128, 64])
    x = _digits()["train"][0]
    batch = _batches(len(x), 50, seed)

    def loss() -> Tensor:
        rows = x[batch()]
        return F.mse_loss(model(rows), rows)

    def score(part: str) -> float:
        x = _digits()[part][0]
        return float(F.mse_loss(model(x), x))

    return Run(model, loss, score)


@cache
def _text() -> tuple[dict[str, Tensor], int]:
    """The help texts that ship with Python, as numbers of characters, and how many there are."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    text = "".join(c for c in text if c.isascii())
    known = sorted(set(text))
    number = {c: i for i, c in enumerate(known)}
    codes = torch.tensor([number[c] for c in text])
    n = len(codes)
    parts = codes.split([n - 2 * (n // 10), n // 10, n // 10])
    return dict(zip(("train", "choice", "test"), parts, strict=True)), len(known)


CONTEXT = 64


def transformer(
    seed: int, width: int = 64, batch: int = 8, dtype: torch.dtype = torch.float32
) -> Run:
    """Next characters of Python's help, by a transformer of two layers; the loss is in nats."""
    torch.manual_seed(seed)
    parts, known = _text()
    model = networks.Transformer(known, CONTEXT, width).to(dtype)
    generator = torch.Generator().manual_seed(seed)

    def windows(codes: Tensor, at: Tensor) -> Tensor:
        return codes[at[:, None] + torch.arange(CONTEXT + 1)]

    def loss_of(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())

    def loss() -> Tensor:
        codes = parts["train"]
        at = torch.randint(len(codes) - CONTEXT - 1, (batch,), generator=generator)
        return loss_of(windows(codes, at))

    def score(part: str) -> float:
        codes = parts[part]
        at = torch.arange(0, len(codes) - CONTEXT - 1, 257)
        return loss_of(windows(codes, at)).item()

    return Run(model, loss, score)


def _adding(seed: int) -> Run:
    """The sum of two marked numbers of 20, one in each half (Arjovsky, Shah and Bengio, 2016)."""
    torch.manual_seed(seed)
    model = networks.Irnn(inputs=2, hidden=64)

    def sequences(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = torch.rand(n, 20, generator=generator)
        marks = torch.zeros(n, 20)
        for half in (0, 10):
            at = torch.randint(half, half + 10, (n, 1), generator=generator)
            marks.scatter_(1, at, 1.0)
        return torch.stack([values, marks], 2), (values * marks).sum(1)

    generator = torch.Generator().manual_seed(seed)
    held_back = {"choice": 10**6, "test": 10**6 + 1}

    def loss() -> Tensor:
        x, y = sequences(32, generator)
        return F.mse_loss(model(x), y)

    def score(part: str) -> float:
        x, y = sequences(1000, torch.Generator().manual_seed(held_back[part]))
        return float(F.mse_loss(model(x), y))

    return Run(model, loss, score)


@cache
def _diabetes() -> dict[str, tuple[Tensor, Tensor]]:
    """442 patients, ten columns; columns and target standardised."""
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2024))
    x, y = ((part - part.mean(0)) / part.std(0) for part in (x[order], y[order]))
    parts = zip(x.split([262, 90, 90]), y.split([262, 90, 90]), strict=True)
    return dict(zip(("train", "choice", "test"), parts, strict=True))


def _regress(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Linear(10, 1)
    x, y = _diabetes()["train"]
    batch = _batches(len(x), 32, seed)

    def loss() -> Tensor:
        rows = batch()
        return F.mse_loss(model(x[rows])[:, 0], y[rows])

    def score(part: str) -> float:
        x, y = _diabetes()[part]
        return float(F.mse_loss(model(x)[:, 0], y))

    return Run(model, loss, score)


EXPLODING = partial(networks.deep, layers=20, gain=2.0)
VANISHING = partial(networks.deep, layers=30, gain=1.0)
TASKS = {
    "transformer": Task("character transformer, nats", 300, False, transformer),
    "transformer-bf16": Task(
        "the same, bfloat16 weights", 300, False, partial(transformer, dtype=torch.bfloat16)
    ),
    "cnn": Task("CNN, digits, %", 160, True, partial(_classify, networks.cnn)),
    "cnn-bn": Task("CNN with BatchNorm, %", 160, True, partial(_classify, networks.cnn_bn)),
    "gru": Task("GRU, digits by rows, %", 200, True, partial(_classify, networks.Gru)),
    "exploding": Task("20 layers that explode, %", 300, True, partial(_classify, EXPLODING)),
    "vanishing": Task("30 layers that vanish, %", 200, True, partial(_classify, VANISHING)),
    "autoencoder": Task("autoencoder, digits, MSE", 400, False, _autoencode),
    "adding": Task("adding problem, MSE", 1000, False, _adding),
    "regression": Task("linear regression, diabetes, MSE", 200, False, _regress),
}


def worst(task: Task) -> float:
    """The score of a training that ended in NaN or worse."""
    return 0.0 if task.higher else math.inf
