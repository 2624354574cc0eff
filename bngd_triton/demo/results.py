"""What a demo trains, and what its runs gave."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SCALES = tuple(10.0**power for power in range(-12, 16, 3))


@dataclass(frozen=True)
class Settings:
    """What a demo trains.

    Attributes:
        device: where.
        seed: of the split, the weights and the order of the batches.
        epochs: of the exploding network.
        target_loss: a run stops after the first epoch whose mean training loss is below it.
        scales: the factors of the loss in the second experiment.
        scale_epochs: of the second experiment.
    """

    device: str = "cpu"
    seed: int = 0
    epochs: int = 15
    target_loss: float | None = None
    scales: tuple[float, ...] = SCALES
    scale_epochs: int = 20


# a tenth of the epochs
QUICK = Settings(epochs=5, scales=SCALES[::3], scale_epochs=5)


@dataclass
class Run:
    """What one training run gave so far; lists have one entry per finished epoch.

    Attributes:
        optimizer: the name of its arm.
        lr: learning rate at the start; it falls linearly to 0.
        clip: bound of the gradient's norm, or None.
        loss_scale: the factor of the loss before `backward`.
        status: "running", "finished", "target loss", "not finite" or "interrupted".
        first_loss: of the first batch, before any step.
        losses: mean training loss, without the factor.
        accuracies: on the test rows, in percent.
        grad_norms: smallest and largest norm of the gradient, before clipping.
    """

    optimizer: str
    lr: float
    clip: float | None
    loss_scale: float
    status: str = "running"
    first_loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


@dataclass
class Results:
    """The runs of both experiments, unfinished ones included."""

    exploding: list[Run] = field(default_factory=list)
    loss_scale: list[Run] = field(default_factory=list)
