"""`BNGD`, the optimizer: options, state and dispatch; the arithmetic is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import reference
from .buffers import flatten_, momentum_like, why_not_flat
from .checkpoint import BUFFER, check_state_dict, parameter_names, place_state
from .checks import Options, check_parameter, check_step, check_tensors
from .kernels.launch import why_not
from .kernels.plan import capturing
from .kernels.prepared import FusedStep, Member, new_counter
from .steady import Steady


class _Work(NamedTuple):
    """What one group asks of a step: its parameters that have a gradient."""

    options: Options
    params: list[Tensor]
    grads: list[Tensor]
    names: list[str]
    # for each parameter, whether the kernels serve it
    fused: list[bool]


class BNGD(Optimizer):
    r"""Batch-normalised gradient descent: every batch's gradient is standardised before it is used.

    For each slice :math:`g` of each gradient::

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
        granularity: ``"tensor"``, one slice per parameter; ``"row"``, one per output unit (index
            of dimension 0) of a parameter with two or more dimensions; ``"global"``, one for all
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
        flatten: move the parameters that the kernels serve into flat buffers: None where it is
            safe, False nowhere, True everywhere or an error. Views made earlier with ``p.data``,
            and CUDA graphs captured earlier, would keep the old memory: make the optimizer first.
        fused: None uses the kernels for float16, bfloat16 and float32 parameters on a GPU that
            Triton serves and `reference.step_` for the rest; False never uses them; True is an
            error for a parameter that they cannot serve. Under TRITON_INTERPRET=1, True serves
            parameters on the CPU.

    Raises:
        ValueError: an option is out of bounds.
        TypeError: a parameter is sparse, complex or not of a supported float dtype.
        RuntimeError: ``fused=True`` or ``flatten=True`` cannot be served; says why.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = BNGD(model.parameters(), lr=1e-2, granularity="row")
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()

    Note:
        Unlike `torch.optim.SGD`, momentum averages normalised gradients with weight
        ``1 - momentum``, so its checkpoints do not load here. Sharded (DTensor) parameters are
        not supported yet.
    """

    fused: bool | None
    flatten: bool | None
    _prepared: FusedStep | None
    _steady: Steady | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        granularity: str = "tensor",
        normalizer: str = "zscore",
        centering: float = 1.0,
        center_1d: bool = False,
        nonfinite: str = "skip",
        maximize: bool = False,
        flatten: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = Options(
            lr, momentum, nesterov, weight_decay, eps, granularity, normalizer, centering,
            center_1d, nonfinite, maximize,
        )  # fmt: skip
        for name, value in (("flatten", flatten), ("fused", fused)):
            if value not in (None, True, False):
                raise ValueError(f"{name} must be None, True or False, got {value!r}")
        self.fused = fused
        self.flatten = flatten
        self._forget()
        self._skipped: dict[torch.device, Tensor] = {}
        defaults = {field.name: getattr(options, field.name) for field in fields(options)}
        self._constructed = False
        super().__init__(params, defaults)
        self._flatten(list(enumerate(self.param_groups)))
        self._constructed = True

    @classmethod
    def article(cls, params: Iterable[Any], lr: float | Tensor) -> BNGD:
        """The article's own variant: every gradient centred, no momentum, ``eps=1e-8``.

        Args:
            params: as for the class.
            lr: as for the class.
        """
        return cls(params, lr, momentum=0.0, center_1d=True, eps=1e-8)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the constructor's.

        Args:
            param_group: ``{"params": ...}`` and any of the per-group options.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            options = Options.of(group)
            names = parameter_names(group, index)
            if len(set(map(id, group["params"]))) < len(group["params"]):
                raise ValueError(f"a parameter is twice in group {index}; list every one once")
            for name, param in zip(names, group["params"]):
                check_parameter(name, param)
            check_step(group["params"], [], options)
            self._served(group["params"], names, options)
            if self._constructed:
                self._flatten([(index, group)])
        except Exception:
            del self.param_groups[index]
            raise

    def _flatten(self, groups: list[tuple[int, dict[str, Any]]]) -> None:
        """Move the groups' parameters that go to the kernels; all or, if one must stay, none."""
        if self.flatten is False:
            return
        moving = []
        for index, group in groups:
            names, params = parameter_names(group, index), group["params"]
            served = self._served(params, names, Options.of(group))
            moving.append([param for param, fused in zip(params, served) if fused])
            for name, param, fused in zip(names, params, served):
                if not self.flatten:
                    continue
                reason = why_not_flat(param) if fused else "the kernels do not serve it"
                if reason:
                    raise RuntimeError(
                        f"flatten=True cannot move {name}: {reason}; "
                        "use flatten=None to leave such parameters where they are"
                    )
        for params in moving:
            flatten_(params)

    def _served(self, params: list[Tensor], names: list[str], options: Options) -> list[bool]:
        """Which parameters go to the kernels; an error where ``fused=True`` cannot be kept."""
        if self.fused is False:
            return [False] * len(params)
        reasons = [why_not(param) for param in params]
        for name, reason in zip(names, reasons):
            if self.fused and reason:
                raise RuntimeError(f"fused=True cannot serve {name}: {reason}")
        if self.fused is None:
            # in the interpreter kernels are for tests: they are slower than the reference
            reasons = [
                reason or (None if param.device.type != "cpu" else "cpu")
                for param, reason in zip(params, reasons)
            ]
        if options.granularity == "global" and any(reasons):
            return [False] * len(params)
        return [reason is None for reason in reasons]

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
            TypeError: a gradient is sparse or not of a supported dtype.
            FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # opaque to torch.compile: a compiled training step breaks its graph here, and nothing in it
    # depends on an option's value
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self) -> None:
        steady = self._steady
        if steady is None or not steady.run(self, self._skipped):
            self._steady = None
            self._lay_out_and_step()

    @torch.no_grad()
    def _lay_out_and_step(self) -> None:
        self._refuse_capture()
        work = [self._gather(group, index) for index, group in enumerate(self.param_groups)]
        self._make_momentum(work)
        members: list[Member] = []
        for index, (options, params, grads, _, fused) in enumerate(work):
            buffers = [self.state[p][BUFFER] if options.momentum else None for p in params]
            rows = list(zip(params, grads, buffers, fused))
            members += [Member(p, g, m, index) for p, g, m, on in rows if on and p.numel()]
            eager = [(p, g, m) for p, g, m, on in rows if not on]
            if eager:
                eager_params, eager_grads, eager_buffers = zip(*eager)
                count = reference.apply_(eager_params, eager_grads, eager_buffers, options)
                self._counter(count.device).add_(count)
        if members:
            groups = [part.options for part in work]
            prepared = self._prepared
            if prepared is None or prepared.signature != FusedStep.sign(members, groups):
                self._prepared = prepared = FusedStep(members, groups)
            for member in members:
                self._counter(member.param.device)
            prepared.run(members, groups, self._skipped)
            alone = all(all(part.fused) for part in work)
            if alone and Steady.serves(prepared, groups):
                self._steady = Steady(self, prepared, members, groups)

    def _refuse_capture(self) -> None:
        """A CUDA graph can hold only a step that repeats the one before it."""
        captured = [
            (name, param)
            for index, group in enumerate(self.param_groups)
            for name, param in zip(parameter_names(group, index), group["params"])
            if capturing(param.device)
        ]
        for name, param in captured:
            if param.grad is None:
                raise RuntimeError(
                    f"{name} has no gradient while a CUDA graph is being captured, and would not "
                    "move in any replay; give it one, or leave it out of the optimizer"
                )
        if captured:
            raise RuntimeError(
                "a step captured in a CUDA graph must repeat the one before it (same tensors, "
                "layouts and granularity, kernels only); run one whole iteration on the same "
                "stream first, and keep its gradients (zero_grad(set_to_none=False))"
            )

    def _gather(self, group: dict[str, Any], index: int) -> _Work:
        """What a group asks of this step, checked in full before anything changes."""
        options = Options.of(group)
        names = parameter_names(group, index)
        found = [(p, p.grad, n) for p, n in zip(group["params"], names) if p.grad is not None]
        params = [param for param, _, _ in found]
        grads = [grad for _, grad, _ in found]
        names = [name for _, _, name in found]
        buffers = [self.state[p].get(BUFFER, p) if p in self.state else p for p in params]
        check_tensors(params, grads, buffers, momentum=options.momentum, names=names)
        check_step(params, grads, options, names=names)
        fused = self._served(params, names, options)
        # a float32 parameter may have a float64 gradient, or momentum from a float64 checkpoint
        others = [(g, b) if options.momentum else (g,) for g, b in zip(grads, buffers)]
        for on, more, name in zip(fused, others, names):
            reason = next(filter(None, map(why_not, more)), None) if on and self.fused else None
            if reason:
                raise RuntimeError(
                    f"fused=True cannot serve {name} with the gradient or momentum it has: {reason}"
                )
        fused = [on and not any(map(why_not, more)) for on, more in zip(fused, others)]
        if options.granularity == "global":
            fused = [all(fused)] * len(fused)
        return _Work(options, params, grads, names, fused)

    def _make_momentum(self, work: list[_Work]) -> None:
        """Zeros for the parameters that got their first gradient."""
        new = [
            param
            for part in work
            if part.options.momentum
            for param in part.params
            if BUFFER not in self.state[param]
        ]
        dtypes = [torch.promote_types(param.dtype, torch.float32) for param in new]
        for param, buffer in zip(new, momentum_like(new, dtypes)):
            self.state[param][BUFFER] = buffer

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = new_counter(device)
        return self._skipped[device]

    @property
    def skipped(self) -> int:
        """Slices left as they were because of an inf or NaN, so far. Reading it synchronises."""
        return sum(int(count) for count in self._skipped.values())

    def sync_hyperparameters(self) -> None:
        """Write every group's options to the tables that the kernels read.

        `step` does so itself. Call it before replaying a CUDA graph in which `step` was captured,
        for options changed since; a tensor `lr` on the device needs no call.

        Raises:
            ValueError: an option is out of bounds.
        """
        if self._prepared is not None:
            self._prepared.write([Options.of(group) for group in self.param_groups])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of `state_dict`; options come with it, `fused` and `flatten` do not.

        State keeps the dtype in which it was saved (torch's own loader would cast it to the
        parameter's), moves to the parameter's device and is copied.

        Args:
            state_dict: from any BNGD optimizer over parameters of the same shapes.

        Raises:
            ValueError: the checkpoint is another optimizer's, or does not fit; nothing changed.
        """
        saved: dict[str, Any] = {}

        # runs after the user's own hooks: state is kept from torch's loader, which would cast it
        def set_aside(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            check_state_dict(self, incoming)
            saved.update(incoming)
            rest = {
                key: {name: value for name, value in entry.items() if name != BUFFER}
                for key, entry in incoming["state"].items()
            }
            return {**incoming, "state": {key: entry for key, entry in rest.items() if entry}}

        def place(_: Optimizer) -> None:
            place_state(self, saved)

        handles = [
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(place, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _forget(self) -> None:
        """Drop what can be made again; it holds addresses and must not be copied or saved."""
        self._prepared = None
        self._steady = None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "fused": self.fused, "flatten": self.flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self.__dict__.setdefault("fused", None)
        self.__dict__.setdefault("flatten", None)
        self.__dict__.setdefault("_skipped", {})
        self._constructed = True
        for group in self.param_groups:
            for field in fields(Options):
                group.setdefault(field.name, field.default)
                self.defaults.setdefault(field.name, field.default)
