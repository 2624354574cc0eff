"""The arms of the benchmark: each optimizer, how it stores what it keeps, and what it must move."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.kernels import fused_step
from bngd_triton.kernels.devices import Tuning

MOMENTUM = 0.9
# the rivals' Triton kernels compute program_id * BLOCK in 32 bits
SIGNED = 2**31 - 1
# inductor compiles the whole list as one graph: a minute at 161 tensors, by reports on it
MOST_COMPILED = 400

Groups = list[dict[str, list[Parameter]]]


class UnavailableError(Exception):
    """Why an arm cannot run here, in one line."""


@dataclass(frozen=True)
class Storage:
    """One `dtype` label.

    Attributes:
        label: as in the results.
        param: of parameters and gradients.
        momentum: of every buffer that is as large as its parameter.
        low: bytes per element of the master weight's low part.
        options: of BNGD, that store so.
    """

    label: str
    param: torch.dtype
    momentum: torch.dtype
    low: int
    options: Mapping[str, Any]


_BF16 = torch.bfloat16
STORAGES = {
    storage.label: storage
    for storage in (
        Storage("fp32", torch.float32, torch.float32, 0, {}),
        Storage("bf16", _BF16, _BF16, 0, {"momentum_dtype": _BF16, "master_weights": None}),
        Storage("bf16-fp32m", _BF16, torch.float32, 0, {"master_weights": None}),
        Storage("bf16-split", _BF16, torch.float32, 2, {}),
    )
}


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison.

    Attributes:
        name: as in the results.
        build: makes it for groups of parameters, in a storage, with a rate.
        rule: the float64 computation that the gate holds it to, a name in `gate.RULES`.
        buffers: kept per parameter and as large, read and written once a step.
        again: bytes per element that are read or written a second time, by the arm's storage;
            None where nobody counted.
        most_entries: of a tensor; beyond it the arm would read memory that is not there.
        tuning: fields of `Tuning` in the place of the device's, while the first step is laid out.
    """

    name: str
    build: Callable[[Groups, Storage, float], Any]
    rule: str
    buffers: int = 1
    again: Callable[[Storage], int] | None = lambda _: 0
    most_entries: int | None = None
    tuning: tuple[tuple[str, Any], ...] = ()

    def bytes_once(self, storage: Storage) -> int:
        """Bytes per element of a step that touches every tensor once."""
        param = storage.param.itemsize
        return 3 * param + 2 * self.buffers * storage.momentum.itemsize + 2 * storage.low

    def bytes_issued(self, storage: Storage) -> int | None:
        """Bytes per element that the arm asks for, most of which an L2 may serve the second time.

        An upper bound for BNGD: tensors that fit in registers are read once.
        """
        return None if self.again is None else self.bytes_once(storage) + self.again(storage)


def _bngd(*, eager: bool = False, **more: Any) -> Callable[[Groups, Storage, float], BNGD]:
    def build(groups: Groups, storage: Storage, lr: float) -> BNGD:
        # the default never runs kernels on the CPU, a dry run must
        on_cpu = groups[0]["params"][0].device.type == "cpu"
        fused = False if eager else True if on_cpu else None
        options = {"granularity": "tensor", **more, **storage.options}
        return BNGD(groups, lr=lr, momentum=MOMENTUM, fused=fused, **options)

    return build


def _torch(name: str, **options: Any) -> Callable[[Groups, Storage, float], Any]:
    return lambda groups, _, lr: getattr(torch.optim, name)(groups, lr=lr, **options)


def _rival(module: str, name: str, **options: Any) -> Callable[[Groups, Storage, float], Any]:
    def build(groups: Groups, storage: Storage, lr: float) -> Any:
        if groups[0]["params"][0].device.type != "cuda":
            raise UnavailableError(f"the Triton kernels of {module} need a GPU")
        return getattr(importlib.import_module(module), name)(groups, lr=lr, **options)

    return build


class _Compiled:
    """The formulation that `torch.compile` turns into the best kernels: the rival without any."""

    def __init__(self, groups: Groups, storage: Storage, lr: float):
        params = [param for group in groups for param in group["params"]]
        if len(params) > MOST_COMPILED:
            raise UnavailableError(f"{len(params)} tensors are more than {MOST_COMPILED}")
        self.param_groups = groups
        self.state = {p: {"momentum": torch.zeros_like(p, dtype=storage.momentum)} for p in params}
        self.lr = torch.tensor(lr, dtype=torch.float32, device=params[0].device)
        # on the CPU it is tried, not compiled
        backend = "eager" if params[0].device.type == "cpu" else "inductor"
        self.run = torch.compile(self._move, backend=backend, fullgraph=True, dynamic=False)

    @staticmethod
    def _move(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: Tensor) -> None:
        for param, grad, buffer in zip(params, grads, momenta):
            wide = grad.float()
            if grad.dim() < 2:
                ghat = wide / (wide.square().mean().sqrt() + 1e-8)
            else:
                variance, mean = torch.var_mean(wide, correction=0)
                ghat = (wide - mean) / (variance.sqrt() + 1e-8)
            moved = buffer.float() * MOMENTUM + ghat * (1 - MOMENTUM)
            buffer.copy_(moved)
            param.copy_(param.float() - lr * moved)

    @torch.no_grad()
    def step(self) -> None:
        params = list(self.state)
        momenta = [entry["momentum"] for entry in self.state.values()]
        self.run([p.detach() for p in params], [p.grad for p in params], momenta, self.lr)


def _gradient(storage: Storage) -> int:
    return storage.param.itemsize


def _ours(name: str, rule: str = "bngd", **options: Any) -> Arm:
    return Arm(name, _bngd(**options), rule, again=_gradient)


ARMS = {
    arm.name: arm
    for arm in (
        _ours("bngd"),
        _ours("bngd-row", "bngd-row", granularity="row"),
        _ours("bngd-global", "bngd-global", granularity="global"),
        Arm("bngd-eager", _bngd(eager=True), "bngd", again=None),
        Arm("compile", _Compiled, "bngd", again=_gradient),
        Arm("torch-sgd-fused", _torch("SGD", momentum=MOMENTUM, fused=True), "sgd"),
        # m *= c, m += g, p -= lr * m: m is read twice and written once more than needed
        Arm(
            "torch-sgd-foreach", _torch("SGD", momentum=MOMENTUM, foreach=True), "sgd",
            again=lambda s: 3 * s.momentum.itemsize,
        ),
        Arm("torch-adamw-fused", _torch("AdamW", weight_decay=0.0, fused=True), "adam", 2),
        Arm(
            "optimi-sgd",
            _rival("optimi", "SGD", momentum=MOMENTUM, triton=True, kahan_sum=False), "sgd",
            most_entries=SIGNED,
        ),
        # its second kernel reads both moments again
        Arm(
            "optimi-stableadamw",
            _rival("optimi", "StableAdamW", weight_decay=0.0, triton=True, kahan_sum=False),
            "stableadamw", 2, again=lambda s: 2 * s.momentum.itemsize, most_entries=SIGNED,
        ),
        Arm(
            "flashoptim-sgd",
            _rival(
                "flashoptim", "FlashSGD", momentum=MOMENTUM, quantize=False, master_weight_bits=None
            ),
            "sgd", most_entries=SIGNED,
        ),
    )
}  # fmt: skip


def tuned(name: str, tuning: Mapping[str, Any]) -> Arm:
    """One of our arms with other sizes or in another form: ``bngd:form=single-launch``."""
    if unknown := set(tuning) - set(Tuning.__dataclass_fields__):
        raise ValueError(f"Tuning has no field {', '.join(sorted(unknown))}")
    sample = Tuning(form="")
    for field, value in tuning.items():
        kind = type(getattr(sample, field))
        if type(value) is not kind:
            raise ValueError(f"Tuning.{field} is of type {kind.__name__}, got {value!r}")
    label = ",".join(f"{field}={value}" for field, value in tuning.items())
    return replace(ARMS[name], name=f"{name}:{label}", tuning=tuple(tuning.items()))


def grouped(params: Sequence[Parameter], groups: int) -> Groups:
    """Parameters in `groups` groups of equal length, as optimizers take them."""
    size = -(-len(params) // groups)
    return [{"params": list(params[at : at + size])} for at in range(0, len(params), size)]


def start(
    arm: Arm, params: Sequence[Parameter], groups: int, storage: Storage, lr: float
) -> Callable[[], Any]:
    """Build an arm and take its first step; `UnavailableError` for whatever goes wrong.

    Returns:
        Takes another step.
    """
    usual = fused_step.tuning_for

    def forced(device: torch.device) -> Tuning:
        return replace(usual(device), **dict(arm.tuning))

    if arm.most_entries and max(param.numel() for param in params) > arm.most_entries:
        raise UnavailableError("a tensor has more entries than its 32-bit indices reach")
    try:
        with mock.patch.object(fused_step, "tuning_for", forced):
            optimizer = arm.build(grouped(params, groups), storage, lr)
            optimizer.step()
    except UnavailableError:
        raise
    # a rival may raise anything; it must not cost the others
    except Exception as error:
        line = (str(error).strip() or "no message").partition("\n")[0][:200]
        raise UnavailableError(f"{type(error).__name__}: {line}") from error
    _check_storage(optimizer, arm, storage)
    return optimizer.step  # type: ignore[no-any-return]


def _check_storage(optimizer: Any, arm: Arm, storage: Storage) -> None:
    """Raise `UnavailableError` unless the arm, after a step, keeps what the label says."""
    for param in (p for group in optimizer.param_groups for p in group["params"] if p.numel() > 1):
        # flashoptim wraps its buffers
        state = [getattr(value, "data", None) for value in optimizer.state[param].values()]
        held = [t for t in state if isinstance(t, Tensor) and t.shape == param.shape]
        wide = [tensor.dtype for tensor in held[: arm.buffers]]
        low = sum(tensor.dtype.itemsize for tensor in held[arm.buffers :])
        if wide != [storage.momentum] * arm.buffers or low != storage.low:
            found = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in held)
            raise UnavailableError(f"does not store {storage.label}: it keeps {found or 'nothing'}")
