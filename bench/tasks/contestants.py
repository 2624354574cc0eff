"""The optimizers: one rate each, the rest as its library gives it, without weight decay."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from bngd_triton import BNGD

CLIP = 1.0


class Contestant(NamedTuple):
    """An optimizer.

    Attributes:
        title: in tables.
        centre: the rate that a sweep starts at.
        default: the library's own rate; None where it has none.
        build: makes the optimizers of a model at a rate.
        clip: the norm that gradients are clipped to; None for none.
        applies: whether the optimizer has work in a model that others do not do for it.
    """

    title: str
    centre: float
    default: float | None
    build: Callable[[nn.Module, float], list[Optimizer]]
    clip: float | None = None
    applies: Callable[[nn.Module], bool] = lambda _: True


def _of(kind: Callable[..., Any], **options: Any) -> Callable[[nn.Module, float], list[Optimizer]]:
    return lambda model, lr: [kind(model.parameters(), lr=lr, weight_decay=0.0, **options)]


def _hidden(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that Muon is made for: neither embeddings nor the last layer's."""
    ends = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    ends |= set(list(model.parameters())[-2:])
    return [p for p in model.parameters() if p.ndim == 2 and p not in ends]


def _muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for hidden matrices, AdamW for the rest, at one rate as `match_rms_adamw` is meant."""
    hidden = _hidden(model)
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    match = "match_rms_adamw"
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn=match),
        AdamW(rest, lr=lr, weight_decay=0.0),
    ]


def _optimi(name: str) -> Callable[[nn.Module, float], list[Optimizer]]:
    """One of torch-optimi's, which is needed only by those that train with it."""

    def build(model: nn.Module, lr: float) -> list[Optimizer]:
        kind = getattr(importlib.import_module("optimi"), name)
        return [kind(model.parameters(), lr=lr, weight_decay=0.0, triton=False)]

    return build


def _default(kind: Callable[..., Any]) -> float:
    return float(inspect.signature(kind).parameters["lr"].default)


def _bngd(title: str, **options: Any) -> Contestant:
    return Contestant(title, 4.6e-3, _default(BNGD), _of(BNGD, **options))


_sgd, _adamw = _of(SGD, momentum=0.9), _of(AdamW)
CONTESTANTS = {
    "sgd": Contestant("SGD", 0.1, _default(SGD), _sgd),
    "sgd-clip": Contestant("SGD, clip 1", 0.1, _default(SGD), _sgd, CLIP),
    "adamw": Contestant("AdamW", 4.6e-3, _default(AdamW), _adamw),
    "adamw-clip": Contestant("AdamW, clip 1", 4.6e-3, _default(AdamW), _adamw, CLIP),
    "lion": Contestant("Lion", 1e-3, None, _optimi("Lion")),
    "muon": Contestant(
        "Muon and AdamW",
        4.6e-3,
        _default(torch.optim.Muon),
        _muon,
        applies=lambda model: bool(_hidden(model)),
    ),
    "stable-adamw": Contestant(
        "StableAdamW",
        4.6e-3,
        None,
        _optimi("StableAdamW"),
    ),
    "bngd-tensor": _bngd("BNGD tensor", granularity="tensor"),
    "bngd-row": _bngd("BNGD row", granularity="row"),
    "bngd-row-1d": _bngd("BNGD row, center_1d", granularity="row", center_1d=True),
    "bngd-row-rms": _bngd("BNGD row, centering 0", granularity="row", centering=0.0),
    "bngd-global": _bngd("BNGD global", granularity="global"),
}


def state_bytes(optimizers: Iterable[Optimizer], model: nn.Module) -> float:
    """Bytes of state per parameter that is trained."""
    held = {
        id(value): value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values()) / sum(p.numel() for p in model.parameters())
