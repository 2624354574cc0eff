"""The arms of the benchmark: each optimizer, how it stores what it keeps, and what it must move."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.kernels import prepared
from bngd_triton.kernels.tuning import Tuning

from . import compiled

MOMENTUM = 0.9
# calls before a capture
WARM_UP = 3
# the rivals' Triton kernels compute program_id * BLOCK in 32 bits
SIGNED = 2**31 - 1


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
    """

    label: str
    param: torch.dtype
    momentum: torch.dtype
    low: int = 0


STORAGES = {
    storage.label: storage
    for storage in (
        Storage("fp32", torch.float32, torch.float32),
        Storage("bf16", torch.bfloat16, torch.bfloat16),
        Storage("bf16-fp32m", torch.bfloat16, torch.float32),
        Storage("bf16-split", torch.bfloat16, torch.float32, low=2),
    )
}

Groups = list[dict[str, list[Parameter]]]


class Stepper:
    """An optimizer over one set of buffers.

    Args:
        step: takes one step.
        state: the tensors kept for each parameter with more than one entry, after a step.

    Attributes:
        first_steps: steps that `first` takes.
    """

    first_steps = 1

    def __init__(self, step: Callable[[], Any], state: Callable[[], Iterator[list[Tensor]]]):
        self.step = step
        self.state = state

    def first(self) -> None:
        """The first steps, which may prepare what later ones use."""
        self.step()

    def check(self) -> None:
        """Raise `UnavailableError` where the steps so far were not those of the arm's name."""


class TunedStepper(Stepper):
    """BNGD whose plan is laid out with other sizes or in another form than the device's."""

    def __init__(self, optimizer: BNGD, tuning: Mapping[str, Any]):
        super().__init__(optimizer.step, lambda: _state(optimizer))
        self.optimizer = optimizer
        self.tuning = tuning

    def first(self) -> None:
        usual = prepared.tuning_for

        def forced(device: torch.device) -> Tuning:
            return replace(usual(device), **self.tuning)

        with mock.patch.object(prepared, "tuning_for", forced):
            self.step()
        self.check()

    def check(self) -> None:
        # a plan that is laid out anew takes the device's sizes: nothing is forced after `first`
        fused = self.optimizer._stepper.prepared
        for device in fused._devices if fused else ():
            found = {name: getattr(device.plan.tuning, name) for name in self.tuning}
            if found != self.tuning:
                raise UnavailableError(f"stepped with {label(found)}, not {label(self.tuning)}")


class GraphStepper(Stepper):
    """Another stepper, captured once it has taken its first step."""

    first_steps = 1 + WARM_UP

    def __init__(self, inner: Stepper):
        super().__init__(inner.step, inner.state)
        self.inner = inner

    def first(self) -> None:
        self.inner.first()
        self.step = capture(self.inner.step)


def capture(step: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call; makes `WARM_UP` calls itself."""
    # warm up on a side stream, as torch asks: lazy initialisation must not be captured
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison.

    Attributes:
        name: as in the results.
        build: makes it for groups of parameters that have gradients, or raises `UnavailableError`.
        rule: the float64 computation that the gate holds it to, a name in `gate.RULES`.
        buffers: kept per parameter and as large, read and written once a step.
        again: bytes per element that are read or written a second time, by the arm's storage;
            None where nobody counted.
        captures: whether a step can go into a CUDA graph.
        most_entries: of a tensor; beyond it the arm would read memory that is not there, after
            which nothing else of the process runs. None where there is no such bound.
    """

    name: str
    build: Callable[[Groups, Storage, float], Stepper]
    rule: str
    buffers: int = 1
    again: Callable[[Storage], int] | None = lambda _: 0
    captures: bool = False
    most_entries: int | None = None

    def bytes_once(self, storage: Storage) -> int:
        """Bytes per element of a step that touches every tensor once."""
        param = storage.param.itemsize
        return 3 * param + 2 * self.buffers * storage.momentum.itemsize + 2 * storage.low

    def bytes_issued(self, storage: Storage) -> int | None:
        """Bytes per element that the arm asks for, most of which an L2 may serve the second time.

        An upper bound for BNGD: tensors that fit in registers are read once.
        """
        return None if self.again is None else self.bytes_once(storage) + self.again(storage)


def _state(optimizer: Any) -> Iterator[list[Tensor]]:
    """The buffers of each parameter that has more than one entry, in the parameters' order."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.numel() > 1:
                # flashoptim wraps its buffers
                kept = [getattr(value, "data", None) for value in optimizer.state[param].values()]
                yield [t for t in kept if isinstance(t, Tensor) and t.shape == param.shape]


def _bngd(
    *,
    tuning: Mapping[str, Any] | None = None,
    graph: bool = False,
    eager: bool = False,
    **options: Any,
) -> Callable[[Groups, Storage, float], Stepper]:
    def build(groups: Groups, storage: Storage, lr: float) -> Stepper:
        device = groups[0]["params"][0].device
        if graph and device.type != "cuda":
            raise UnavailableError(f"CUDA graphs need a GPU, this is {device.type}")
        # the default never runs kernels on the CPU, a dry run must
        fused_option = False if eager else True if device.type == "cpu" else None
        more = dict(options, fused=fused_option, **BNGD_OPTIONS[storage.label])
        optimizer = BNGD(groups, lr=lr, momentum=MOMENTUM, **more)
        if tuning:
            return TunedStepper(optimizer, tuning)
        plain = Stepper(optimizer.step, lambda: _state(optimizer))
        return GraphStepper(plain) if graph else plain

    return build


BNGD_OPTIONS: Mapping[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"momentum_dtype": torch.bfloat16, "master_weights": None},
    "bf16-fp32m": {"master_weights": None},
    "bf16-split": {"master_weights": "split"},
}


def _torch(name: str, **options: Any) -> Callable[[Groups, Storage, float], Stepper]:
    def build(groups: Groups, storage: Storage, lr: float) -> Stepper:
        optimizer = getattr(torch.optim, name)(groups, lr=lr, **options)
        return Stepper(optimizer.step, lambda: _state(optimizer))

    return build


def _rival(module: str, name: str, **options: Any) -> Callable[[Groups, Storage, float], Stepper]:
    def build(groups: Groups, storage: Storage, lr: float) -> Stepper:
        if groups[0]["params"][0].device.type != "cuda":
            raise UnavailableError(f"the Triton kernels of {module} need a GPU")
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise UnavailableError(f"cannot import {module}: {_line(error)}") from error
        optimizer = getattr(found, name)(groups, lr=lr, **options)
        return Stepper(optimizer.step, lambda: _state(optimizer))

    return build


def _compile(groups: Groups, storage: Storage, lr: float) -> Stepper:
    params = [param for group in groups for param in group["params"]]
    # inductor compiles the whole list as one graph: minutes at some hundred tensors
    if len(params) > compiled.MOST_TENSORS:
        raise UnavailableError(
            f"{len(params)} tensors are more than the {compiled.MOST_TENSORS} compiled in one graph"
        )
    if storage.low:
        raise UnavailableError("the compiled formulation has no split master")
    momenta = [torch.zeros_like(param, dtype=storage.momentum) for param in params]
    step = compiled.stepper(params, momenta, lr=lr, momentum=MOMENTUM)
    return Stepper(step, lambda: ([m] for m in momenta if m.numel() > 1))


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def _gradient(storage: Storage) -> int:
    return storage.param.itemsize


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bngd", _bngd(), "bngd", again=_gradient, captures=True),
        Arm("torch-sgd-fused", _torch("SGD", momentum=MOMENTUM, fused=True), "sgd", captures=True),
        Arm(
            "bngd-two-launch", _bngd(tuning={"form": "two-launch"}), "bngd", again=_gradient,
            captures=True,
        ),
        Arm(
            "bngd-single-launch", _bngd(tuning={"form": "single-launch"}), "bngd", again=_gradient,
            captures=True,
        ),
        Arm("bngd-pdl", _bngd(tuning={"pdl": True}), "bngd", again=_gradient, captures=True),
        Arm("bngd-direct", _bngd(tuning={"direct": True}), "bngd", again=_gradient, captures=True),
        Arm("bngd-graph", _bngd(graph=True), "bngd", again=_gradient),
        Arm("bngd-row", _bngd(granularity="row"), "bngd-row", again=_gradient, captures=True),
        Arm(
            "bngd-global", _bngd(granularity="global"), "bngd-global", again=_gradient,
            captures=True,
        ),
        Arm("eager", _bngd(eager=True, flatten=False), "bngd", again=None),
        Arm("compile", _compile, "bngd", again=_gradient, captures=True),
        # m *= c, m += g, p -= lr * m: m is read twice and written once more than needed
        Arm(
            "torch-sgd-foreach", _torch("SGD", momentum=MOMENTUM, foreach=True), "sgd",
            again=lambda s: 3 * s.momentum.itemsize, captures=True,
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


def tuned(tuning: Mapping[str, Any], **options: Any) -> Arm:
    """BNGD with other sizes or in another form: the arm that `label` names.

    Args:
        tuning: fields of `Tuning` and their values; the device's are kept for the others.
        options: of `BNGD`.
    """
    build = _bngd(tuning=tuning, **options)
    return Arm(label(tuning), build, "bngd", again=_gradient, captures=True)


def label(tuning: Mapping[str, Any]) -> str:
    """``form=single-launch,wave=4194304``; ``usual`` where nothing is changed."""
    return ",".join(f"{name}={value}" for name, value in tuning.items()) or "usual"


def grouped(params: Sequence[Parameter], groups: int) -> Groups:
    """Parameters in `groups` groups of equal length, as optimizers take them."""
    size = -(-len(params) // groups)
    return [{"params": list(params[at : at + size])} for at in range(0, len(params), size)]


def check_storage(stepper: Stepper, arm: Arm, storage: Storage) -> None:
    """Raise `UnavailableError` unless the arm, after a step, keeps what the label says."""
    for kept in stepper.state():
        wide = [tensor.dtype for tensor in kept[: arm.buffers]]
        low = sum(tensor.dtype.itemsize for tensor in kept[arm.buffers :])
        if wide != [storage.momentum] * arm.buffers or low != storage.low:
            found = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in kept)
            raise UnavailableError(f"does not store {storage.label}: it keeps {found or 'nothing'}")


def start(
    arm: Arm, params: Sequence[Parameter], groups: int, storage: Storage, lr: float
) -> Stepper:
    """Build an arm and take its first step; `UnavailableError` for whatever goes wrong."""
    try:
        stepper = arm.build(grouped(params, groups), storage, lr)
        stepper.first()
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {_line(error)}") from error
    check_storage(stepper, arm, storage)
    return stepper
