"""`BNGD`, the optimizer: options, state and dispatch; the arithmetic is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .clocks import Clocks
from .engine.groups import check_joining, flatten_groups
from .engine.step import Stepper, count_micro_batch, make_all_state
from .foreign import check_own, refuse_arguments
from .options import Granularity, MasterWeights, Nonfinite, Normalizer, Options
from .standstill import Standstill
from .state import GradStats, Records, grad_stats
from .state_dicts import COUNTS, asks_for_state, loading, named_parameters
from .summed_gradients import SummedGradients
from .tensors import lasting_when_inferring

if TYPE_CHECKING:
    # typing has it from Python 3.11 on; a checker then refuses any argument there
    from typing_extensions import Never


class BNGD(Optimizer):
    """Batch-normalised gradient descent: every batch's gradient is standardised before it is used.

    For each slice ``g`` of each gradient:

        g     <- -g if maximize
        v     <- g - centering * mean(g)
        ghat  <- v / (rms(v) + eps)                    # (g - mean) / (std + eps) if centering = 1
        m     <- momentum * m + (1 - momentum) * ghat
        u     <- momentum * m + (1 - momentum) * ghat if nesterov else m
        theta <- (1 - lr * weight_decay) * theta - lr * u

    so the RMS of a step without decay is at most ``lr`` under the z-score (entries at most
    ``sqrt(3) * lr`` under the CDF), whatever the size of the gradient. Steps do not shrink near an
    optimum: a schedule that takes ``lr`` to 0 is part of the method.

    Args:
        params: parameters, named parameters, or groups (dicts); every option but `flatten` and
            `fused` can be set per group.
        lr: in units of the parameters, see above; a float or a 0-dim tensor.
        momentum: weight of the past in the moving average of ``ghat``, in [0, 1). The average
            starts at 0; with 0 there is no buffer.
        nesterov: look one step of momentum ahead.
        weight_decay: decoupled; each step multiplies the parameters by ``1 - lr * weight_decay``.
        eps: added to the RMS, in the gradient's units. 0 is allowed and safe.
        granularity: ``"row"``, one slice per output unit (index of dimension 0) of a parameter with
            two or more dimensions; ``"tensor"``, one per parameter; ``"global"``, one for all
            parameters of the group that have a gradient.
        normalizer: ``"zscore"``, or ``"cdf"``: ``sqrt(3) * (2 * Phi(ghat) - 1)``, whose entries
            are bounded by sqrt(3).
        centering: share of the mean that is removed, in [0, 1]; 0 is RMS normalisation.
        center_1d: centre parameters with fewer than two dimensions too.
        nonfinite: what an inf or NaN does to its slice: ``"skip"`` leaves parameters and momentum
            as they are and counts it in `skipped`; ``"propagate"`` gives NaN as torch.optim does;
            ``"raise"`` names the parameter before anything changes (reads every gradient once
            more, and synchronises).
        maximize: ascend.
        master_weights: what keeps the bits that a step of a bfloat16 or float16 parameter would
            lose. ``"split"``: a float32 master, for bfloat16 as an int16 remainder beside the
            parameter. ``"stochastic"``: nothing is kept, steps are rounded stochastically. None:
            rounded to nearest, so that small steps vanish. Without effect on wider parameters.
        momentum_dtype: of the momentum buffer: None for float32 (float64 for float64 parameters)
            or `torch.bfloat16`, half the memory.
        accumulation_steps: K micro-batches to a step. Call `step` after each of them: its gradient
            is normalised by itself and enters momentum with weight ``(1 - momentum) / K``, and
            every K-th call moves the parameters. A window that an epoch's end leaves unfinished
            goes on with the next epoch's first micro-batches.
        seed: of stochastic rounding.
        flatten: move the parameters that the kernels serve into flat buffers: None where it is
            safe, False nowhere, True everywhere or an error, but for frozen ones. Who holds on to
            a parameter's memory needs False, or makes the optimizer first: docs/training.md.
        fused: None uses the kernels for float16, bfloat16 and float32 parameters on a GPU that
            Triton serves and `reference.step_` for the rest; False never uses them; True is an
            error for a parameter to be trained that they cannot serve. Under TRITON_INTERPRET=1,
            True serves parameters on the CPU.

    Raises:
        ValueError: an option is out of bounds.
        RuntimeError: ``fused=True`` or ``flatten=True`` cannot be served; says why.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = BNGD(model.parameters(), lr=1e-2, granularity="row")
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()

    Note:
        Unlike `torch.optim.SGD`, momentum averages normalised gradients with weight
        ``1 - momentum``, so its checkpoints do not load here.

        Sharded parameters (DTensor: FSDP2, tensor parallelism) are normalised by the statistics of
        the whole tensor; every rank must step the same parameters. `skipped` and `grad_stats` speak
        of the slices of which this rank holds a part.
    """

    fused: bool | None
    flatten: bool | None
    # torch.amp.GradScaler leaves its scale and what it found to `step`, which does not wait for it
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *surplus: Never,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        granularity: Granularity = "row",
        normalizer: Normalizer = "zscore",
        centering: float = 1.0,
        center_1d: bool = False,
        nonfinite: Nonfinite = "skip",
        maximize: bool = False,
        master_weights: MasterWeights | None = "split",
        momentum_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        seed: int = 0,
        flatten: bool | None = None,
        fused: bool | None = None,
        **foreign: Never,
    ) -> None:
        refuse_arguments(surplus, foreign, {"flatten": flatten, "fused": fused})
        options = Options(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, eps=eps,
            granularity=granularity, normalizer=normalizer, centering=centering,
            center_1d=center_1d, nonfinite=nonfinite, maximize=maximize,
            master_weights=master_weights, momentum_dtype=momentum_dtype,
            accumulation_steps=accumulation_steps, seed=seed,
        )  # fmt: skip
        self.fused = fused
        self.flatten = flatten
        self._forget()
        self._records = Records()
        self._release: Any = None
        defaults = {field.name: getattr(options, field.name) for field in fields(options)}
        self._constructed = False
        super().__init__(params, defaults)
        flatten_groups(self.flatten, self.fused, enumerate(self.param_groups))
        self._constructed = True

    @classmethod
    def article(cls, params: Iterable[Any], lr: float | Tensor) -> BNGD:
        """The article's own variant: every gradient centred, no momentum, ``eps=1e-8``.

        Args:
            params: as for the class.
            lr: as for the class.
        """
        return cls(params, lr, momentum=0.0, granularity="tensor", center_1d=True, eps=1e-8)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the constructor's.

        Args:
            param_group: ``{"params": ...}`` and any of the per-group options.
        """
        whole = {"flatten": self.flatten, "fused": self.fused}
        check_own(param_group, len(self.param_groups), whole)
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        for count in COUNTS:
            group.setdefault(count, 0)
        try:
            check_joining(self.fused, group, index)
            if self._constructed:
                flatten_groups(self.flatten, self.fused, [(index, group)])
        except Exception:
            del self.param_groups[index]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: a group's option, changed since, is out of bounds; a gradient or a buffer
                does not fit its parameter.
            TypeError: a gradient, or a parameter that has one, is sparse, complex or not of a
                supported dtype.
            FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
        """
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._outside_graphs(self)
        except BaseException:
            # a GradScaler takes back what it left here only after a step that returns
            if self.__dict__.pop("found_inf", None) is not None:
                self.__dict__.pop("grad_scale", None)
            raise
        return loss

    @lasting_when_inferring
    def _step(self) -> None:
        if not self.state and asks_for_state(self):
            make_all_state(self)
            return
        if self._release is None:
            self._stepper.step(self)
        else:
            self._release.finish()
        if self._stepper.windowed:
            self._summed.look(self.param_groups)
            count_micro_batch(self.param_groups)
        if self._stepper.rounding:
            for clock in self._clocks.values():
                clock.add_(1)
        self._standstill.look()

    @property
    def skipped(self) -> int:
        """Slices left as they were because of an inf or NaN, so far. Reading it synchronises."""
        return self._records.skipped()

    def grad_stats(self) -> dict[str, GradStats]:
        """Mean, spread and skips of every parameter's last gradient, by parameter name.

        They come from the step itself: no gradient is read again, and nothing waits for the
        device until a value is read. Parameters that have not had a gradient are left out.
        """
        rows = [group["granularity"] == "row" for group in self.param_groups]
        return {
            name: grad_stats(record, scalar=not rows[index] or param.dim() < 2)
            for index, name, param in named_parameters(self.param_groups)
            if (record := self._records.get(param)) is not None
        }

    def sync_hyperparameters(self) -> None:
        """Write every group's options to the tables that the kernels read.

        `step` does so itself. Call it before replaying a CUDA graph in which `step` was captured,
        for options changed since; a tensor `lr` on the device needs no call.

        Raises:
            ValueError: an option is out of bounds.
            RuntimeError: an option changed that no replay can follow; nothing was written.
        """
        self._stepper.sync(self)

    @lasting_when_inferring
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of `state_dict`; options come with it, `fused` and `flatten` do not.

        State keeps the dtype in which it was saved (torch's own loader would cast it to the
        parameter's), moves to the parameter's device and is copied. An option that the checkpoint
        lacks stays as it is. Whatever fails, a hook of the user's included, nothing has changed.

        Args:
            state_dict: from any BNGD optimizer over parameters of the same shapes.

        Raises:
            ValueError: the checkpoint is another optimizer's, or does not fit.
        """
        with loading(self):
            super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint; groups that round stochastically note how often they have done so."""
        self._clocks.note(self.param_groups)
        return super().state_dict()

    def _forget(self) -> None:
        """Drop what can be made again; it holds addresses and must not be copied or saved."""
        self._stepper = Stepper()
        self._standstill = Standstill(self)
        self._summed = SummedGradients()
        self._clocks = Clocks()
        # a compiled training step breaks its graph here, and nothing in it depends on an option's
        # value; made here, since it imports a second's worth that any optimizer of torch imports
        self._outside_graphs = torch.compiler.disable(BNGD._step)

    def __getstate__(self) -> dict[str, Any]:
        self._clocks.note(self.param_groups)
        state: dict[str, Any] = super().__getstate__()
        return {**state, "fused": self.fused, "flatten": self.flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        lacking = {"fused": None, "flatten": None, "_release": None, "_records": Records()}
        self.__dict__.update(lacking | self.__dict__)
        self._constructed = True
        for group in self.param_groups:
            for count in COUNTS:
                group.setdefault(count, 0)
            for field in fields(Options):
                self.defaults.setdefault(field.name, field.default)
                group.setdefault(field.name, self.defaults[field.name])
