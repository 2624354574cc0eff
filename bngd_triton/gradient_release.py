"""Gradient release: a parameter moves as soon as backward has its gradient, which is then freed.

The z-score of a gradient needs nothing from the others, so the memory of all gradients shrinks to
that of the few which exist at the same time.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from .eager.eager_step import apply_
from .engine.collect import check_group
from .engine.step import closing_of, inputs_of, member, prepare_state
from .fp32_weights import check_pair
from .kernels.fused_step import FusedStep
from .kernels.plan import capturing
from .optimizer import BNGD
from .options import Options
from .records import SKIPPED, StepInputs
from .state_dicts import named_parameters
from .tensors import is_sharded


def release_gradients(
    model: nn.Module, optimizer: BNGD, *, grad_scaler: GradScaler | None = None
) -> GradientRelease:
    """Step each parameter of a model inside backward, and free its gradient.

    The training loop stays as it is: `optimizer.step` and `optimizer.zero_grad` are still called,
    once for each backward, and find nothing left to do but to count the step. Weights are those of
    training without release, bit for bit. With a `GradScaler`, a tensor whose own gradient has an
    inf or NaN is skipped, not the whole step: the others have moved when it is found. The scaler
    learns of it in ``scaler.step(optimizer)`` and lowers its scale as always. Clipping gradients,
    or reading ``p.grad`` after backward, finds no gradients.

    Args:
        model: holds every parameter of `optimizer`.
        optimizer: of any options but ``granularity="global"`` and ``nonfinite="raise"``.
        grad_scaler: the scaler whose `scale` the loss goes through.

    Returns:
        A handle; its `remove` ends the release.

    Raises:
        TypeError: the arguments are not a module and a `BNGD`.
        ValueError: an option or a parameter cannot be served.
        RuntimeError: the model is replicated or sharded, or the optimizer is released already.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = BNGD(model.parameters(), lr=1e-2)
        >>> handle = release_gradients(model, optimizer)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
    """
    check_pair(model, optimizer)
    if optimizer._release is not None:
        raise RuntimeError("this optimizer's gradients are released already; remove() that first")
    inside = set(map(id, model.parameters()))
    _refuse_wrappers(model.modules(), inside)
    for _, name, param in named_parameters(optimizer.param_groups):
        if id(param) not in inside:
            raise ValueError(f"{name} is not a parameter of the model; give the whole model")
        if is_sharded(param):
            raise RuntimeError(
                f"{name} is sharded (DTensor), and its statistics need all ranks at once; "
                "train without gradient release"
            )
        if param.requires_grad and not param.is_leaf:
            raise ValueError(f"{name} is not a leaf; its gradient cannot be released")
    return GradientRelease(optimizer, grad_scaler)


def _refuse_wrappers(objects: Iterable[Any], params: set[int]) -> None:
    """Refuse parameters whose gradients some module among the objects reduces over processes."""
    for module in objects:
        name = type(module).__name__
        if name not in ("DistributedDataParallel", "FullyShardedDataParallel"):
            continue
        if any(id(param) in params for param in module.parameters()):
            raise RuntimeError(
                f"{name} writes the reduced gradient back after backward: a parameter would move "
                "by the gradient of its own rank; train without gradient release"
            )


class GradientRelease:
    """A running gradient release; see `release_gradients`."""

    def __init__(self, optimizer: BNGD, grad_scaler: GradScaler | None) -> None:
        for index in range(len(optimizer.param_groups)):
            _check_options(optimizer, index)
        self._optimizer = optimizer
        self._scaler = grad_scaler
        self._steps: dict[Tensor, FusedStep] = {}
        self._looked = False
        # moved by a backward that no `step` has followed yet
        self._moved: set[Tensor] = set()
        self._skipped: dict[Tensor, Tensor] = {}
        optimizer._release = self
        # hooks must not keep it alive
        move = weakref.WeakMethod(self._move)

        def moving(param: Tensor) -> None:
            if (alive := move()) is not None:
                alive(param)

        # group and name; making a group's names takes longer than a parameter's other checks
        self._places = {
            param: (index, name) for index, name, param in named_parameters(optimizer.param_groups)
        }
        self._keys = {param: key for key, param in enumerate(self._places)}
        self._handles = [
            param.register_post_accumulate_grad_hook(moving)
            for param in self._places
            if param.requires_grad
        ]

    def remove(self) -> None:
        """End the release: gradients stay after backward, and `optimizer.step` moves again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None

    @torch.no_grad()
    def _move(self, param: Tensor) -> None:
        """Step one parameter by its complete gradient, and free that."""
        optimizer, grad = self._optimizer, param.grad
        if grad is None:
            return
        if capturing(param.device):
            raise RuntimeError(
                "a backward pass with gradient release cannot be captured in a CUDA graph: its "
                "gradients do not stay; remove() the release first"
            )
        # a refused gradient must not be there for the next step
        param.grad = None
        if not self._looked and dist.is_available() and dist.is_initialized():
            # the model inside a wrapper does not know of it, nor one that is wrapped later
            _refuse_wrappers(gc.get_objects(), set(map(id, self._places)))
        self._looked = True
        index, name = self._places[param]
        if param in self._moved:
            raise RuntimeError(
                f"{name} has moved since the last optimizer.step(): released gradients are not "
                "summed over several backward passes; call step() after each (with "
                "accumulation_steps=K for micro-batches), or remove() the release"
            )
        options = _check_options(optimizer, index)
        (fused,) = check_group(optimizer, [param], [param], [grad], [name], options, finite=[False])
        prepare_state(optimizer, [param], options)
        inputs = self._inputs_of(index, param.device)
        mine = member(optimizer, param, grad, options, 0, self._keys[param])
        if self._scaler is not None and param not in self._skipped:
            self._skipped[param] = mine.record[:, SKIPPED].clone()
        if fused and param.numel():
            step = FusedStep.fitting([self._steps.get(param)], [mine], [options])
            step.update([mine], [options], inputs)
            self._steps[param] = step
        else:
            apply_([mine], options, inputs)
        self._moved.add(param)

    def _inputs_of(self, index: int, device: torch.device) -> StepInputs:
        """As for a step of one group, alone."""
        closing = closing_of([self._optimizer.param_groups[index]])
        clocks = {device: self._optimizer._clocks[device][index : index + 1]}
        scaler = self._scaler
        scale = scaler._scale if scaler is not None and scaler.is_enabled() else None
        return StepInputs(closing, clocks, scale)

    def finish(self) -> None:
        """What is left for `optimizer.step`: windows to close, parameters that had no hook."""
        optimizer = self._optimizer
        if self._scaler is None and "found_inf" in optimizer.__dict__:
            raise RuntimeError(
                "a GradScaler steps an optimizer whose gradients are released without it; call "
                "release_gradients(model, optimizer, grad_scaler=scaler)"
            )
        optimizer._stepper.replay = None
        optimizer._stepper.lay_out_and_step(optimizer, inputs_of(optimizer), self._moved)
        self._moved.clear()
        if self._scaler is not None and self._scaler.is_enabled():
            self._report(self._scaler)

    def _report(self, scaler: GradScaler) -> None:
        """Leave what was skipped where the scaler's own check would have."""
        found: dict[torch.device, Tensor] = {}
        for param, before in self._skipped.items():
            record = self._optimizer._records[param]
            new = (record[:, SKIPPED] > before).any().float().reshape(1)
            found[param.device] = torch.maximum(found.get(param.device, new), new)
        self._skipped.clear()
        state = scaler._per_optimizer_states[id(self._optimizer)]
        state["found_inf_per_device"] = found


def _check_options(optimizer: BNGD, index: int) -> Options:
    options = Options.of(optimizer.param_groups[index])
    if options.granularity == "global":
        raise ValueError(
            f"param_groups[{index}] has granularity='global', which needs all gradients at once; "
            "use 'tensor' or 'row' with gradient release"
        )
    if options.nonfinite == "raise":
        raise ValueError(
            f"param_groups[{index}] has nonfinite='raise', but other parameters would have moved "
            "when an inf is found; use 'skip' with gradient release"
        )
    return options
