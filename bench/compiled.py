"""The strongest formulations of BNGD for `torch.compile`: the rival that costs no kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# one graph of 161 tensors is compiled in about a minute, by reports on inductor; 1000 and more take
# longer than a whole suite
MOST_TENSORS = 400

# combo kernels and cooperative reductions exclude each other in inductor's configuration
VARIANTS: dict[str, dict[str, Any]] = {
    "combo": {"combo_kernels": True},
    "cooperative": {"triton.cooperative_reductions": True},
    "foreach": {},
}
# which of them `stepper` builds; `choose` sets it
chosen = "combo"


def _loop(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: Tensor, momentum: float
) -> None:
    """Tensor by tensor, for inductor to batch."""
    for param, grad, buffer in zip(params, grads, momenta):
        ghat = _normalized(grad)
        moved = buffer.float() * momentum + ghat * (1 - momentum)
        buffer.copy_(moved)
        param.copy_(param.float() - lr * moved)


def _foreach(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: Tensor, momentum: float
) -> None:
    """Statistics tensor by tensor, which no foreach operation computes; the rest by foreach."""
    ghats = [_normalized(grad) for grad in grads]
    moved = torch._foreach_mul([buffer.float() for buffer in momenta], momentum)
    moved = torch._foreach_add(moved, ghats, alpha=1 - momentum)
    torch._foreach_copy_(momenta, moved)
    steps = torch._foreach_mul(moved, lr)
    torch._foreach_copy_(params, torch._foreach_sub([p.float() for p in params], steps))


def _normalized(grad: Tensor) -> Tensor:
    wide = grad.float()
    if grad.dim() < 2:
        return wide / (wide.square().mean().sqrt() + 1e-8)
    variance, mean = torch.var_mean(wide, correction=0)
    return (wide - mean) / (variance.sqrt() + 1e-8)


@functools.cache
def _compiled(variant: str, device: str) -> Callable[..., None]:
    body = _foreach if variant == "foreach" else _loop
    if device == "cpu":
        # a dry run: traced, not compiled
        return torch.compile(body, backend="eager", fullgraph=True, dynamic=False)
    return torch.compile(body, fullgraph=True, dynamic=False, options=VARIANTS[variant])


def stepper(
    params: Sequence[Tensor], momenta: Sequence[Tensor], *, lr: float, momentum: float
) -> Callable[[], None]:
    """A step of BNGD, tensor granularity, by the chosen variant."""
    step = _compiled(chosen, params[0].device.type)
    grads = [param.grad for param in params]
    plain = [param.detach() for param in params]
    rate = torch.tensor(lr, device=params[0].device)

    @torch.no_grad()
    def run() -> None:
        step(plain, grads, list(momenta), rate, momentum)

    return run


def choose(time: Callable[[], float], variants: Sequence[str]) -> dict[str, float | str]:
    """Leave the fastest variant chosen; `time` builds a stepper and returns its microseconds.

    Returns:
        For each variant its time, or why it did not run.
    """
    global chosen
    found: dict[str, float | str] = {}
    for variant in variants:
        chosen = variant
        try:
            found[variant] = time()
        except Exception as error:
            found[variant] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    timed = {name: value for name, value in found.items() if isinstance(value, float)}
    chosen = min(timed, key=timed.__getitem__) if timed else variants[0]
    return found


def forget() -> None:
    """Drop compiled graphs: the next workload has another list of tensors."""
    torch._dynamo.reset()
    _compiled.cache_clear()
