"""The correctness gate: steps of an arm against float64; no time is taken behind a red gate.

The second step has other gradients, larger ones: it needs the momentum of the first, statistics of
its own, and counters as the first step found them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .arms import MOMENTUM, Arm, Storage, UnavailableError, start

# one entry, vectors, odd lengths, more than two dimensions, and rows longer than any tile. The last
# has several slices and chunks, on a GPU by rows too: slices there are of 8192 entries or 16384,
# in the interpreter of 65536
SHAPES = ((48, 32), (37, 19), (130,), (1,), (3, 5, 7), (2, 4097), (3, 40_003))
# on a GPU: more than 64 spans in a slice, and 27 MB of bf16 gradients, which are three waves of
# 8 MiB or less in a single launch. 8224 is longer than a tile, and its rows are aligned
LARGE = ((1_200_000,), *[(256, 8224)] * 6)
LR = 0.5
# float32 statistics by torch.compile are good to about 2**-20 at these sizes; a step with a wrong
# mean, a forgotten momentum weight or a swapped tensor is off by more than 2**-4
EXACT = 2.0**-17
# one rounding at the store; Triton's interpreter truncates
STORED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}

Tensors = Sequence[Tensor]
# from the gradients of each step to what each step subtracts, over lr
Rule = Callable[[Sequence[Tensors]], Iterator[Tensors]]


def _standardized(grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = grad if grad.dim() < 2 else grad - grad.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True).sqrt() + 1e-8)


def _by_tensor(grads: Tensors) -> list[Tensor]:
    return [_standardized(grad, tuple(range(grad.dim()))) for grad in grads]


def _by_row(grads: Tensors) -> list[Tensor]:
    return [_standardized(g, tuple(range(1, g.dim())) if g.dim() > 1 else (0,)) for g in grads]


def _together(grads: Tensors) -> list[Tensor]:
    whole = _standardized(torch.cat([grad.flatten() for grad in grads])[None], (0, 1))
    parts = whole[0].split([grad.numel() for grad in grads])
    return [part.view_as(grad) for part, grad in zip(parts, grads)]


def _bngd(standardize: Callable[[Tensors], list[Tensor]]) -> Rule:
    def rule(grads: Sequence[Tensors]) -> Iterator[Tensors]:
        momenta = [torch.zeros_like(grad) for grad in grads[0]]
        for now in grads:
            pairs = zip(momenta, standardize(now))
            momenta = [MOMENTUM * m + (1 - MOMENTUM) * ghat for m, ghat in pairs]
            yield momenta

    return rule


def _sgd(grads: Sequence[Tensors]) -> Iterator[Tensors]:
    momenta = [torch.zeros_like(grad) for grad in grads[0]]
    for now in grads:
        momenta = [MOMENTUM * m + grad for m, grad in zip(momenta, now)]
        yield momenta


def _adam(beta2: float, eps: float, *, clips: bool = False) -> Rule:
    """Adam without weight decay.

    Args:
        beta2: of the squares' mean; that of the gradients' is 0.9.
        eps: added to the root.
        clips: StableAdamW: a tensor whose squares exceed their means moves by less.
    """

    def rule(grads: Sequence[Tensors]) -> Iterator[Tensors]:
        # the means with their bias removed: (1 - beta) / (1 - beta**step) is the newest's weight
        means = [torch.zeros_like(grad) for grad in grads[0]]
        squares = means
        for step, now in enumerate(grads, 1):
            new, new_square = (1 - 0.9) / (1 - 0.9**step), (1 - beta2) / (1 - beta2**step)
            means = [m + new * (g - m) for m, g in zip(means, now)]
            squares = [s + new_square * (g * g - s) for s, g in zip(squares, now)]
            steps = [m / (s.sqrt() + eps) for m, s in zip(means, squares)]
            if clips:
                ratios = [g * g / s.clamp_min(eps * eps) for s, g in zip(squares, now)]
                steps = [u / r.mean().sqrt().clamp_min(1.0) for u, r in zip(steps, ratios)]
            yield steps

    return rule


RULES: dict[str, Rule] = {
    "bngd": _bngd(_by_tensor),
    "bngd-row": _bngd(_by_row),
    "bngd-global": _bngd(_together),
    "sgd": _sgd,
    "adam": _adam(0.999, 1e-8),
    "stableadamw": _adam(0.99, 1e-6, clips=True),
}


def shapes_for(device: torch.device) -> list[tuple[int, ...]]:
    """What is stepped: the interpreter would take minutes over the large ones."""
    return [*SHAPES, *(() if device.type == "cpu" else LARGE)]


def check(arm: Arm, storage: Storage, device: torch.device) -> None:
    """Raise `UnavailableError` unless the arm's first two steps are right."""
    generator = torch.Generator(device).manual_seed(7)
    params: list[Parameter] = []
    first: list[Tensor] = []
    second: list[Tensor] = []
    for shape in shapes_for(device):
        value = torch.randn(shape, generator=generator, device=device).to(storage.param)
        params.append(Parameter(value))
        first.append(_gradient(shape, storage, generator))
        # so that statistics of the step before show, in bf16 too
        second.append(2 * _gradient(shape, storage, generator))
        # a tensor of its own, which is overwritten
        params[-1].grad = first[-1].clone()
    wanted = [param.detach().double() for param in params]
    bounds = [torch.zeros_like(want) for want in wanted]
    rate = EXACT + STORED[storage.param]
    step = start(arm, params, 1, storage, LR)
    grads = [[grad.double() for grad in first], [grad.double() for grad in second]]
    for number, moved in enumerate(RULES[arm.rule](grads), 1):
        wanted = [want - LR * one for want, one in zip(wanted, moved)]
        # a step rounds what it stores of the parameter and of the momentum
        sizes = [1 + want.abs() + LR * one.abs() for want, one in zip(wanted, moved)]
        bounds = [bound + rate * size for bound, size in zip(bounds, sizes)]
        if number == 2:
            for param, grad in zip(params, second):
                assert param.grad is not None, "an optimizer removed a gradient"
                param.grad.copy_(grad)
            step()
        _compare(params, wanted, bounds, number)


def _gradient(shape: tuple[int, ...], storage: Storage, generator: torch.Generator) -> Tensor:
    """Random entries that grow along the tensor, so that statistics without some slice show.

    Three of four are positive, so that a mean that is not removed shows: half at the start and all
    at the end. None is near 0, where adam's quotient would amplify roundings.
    """
    device = generator.device
    rising = torch.linspace(0.5, 1.0, math.prod(shape), device=device).view(shape)
    sign = (torch.rand(shape, generator=generator, device=device) < rising) * 2.0 - 1
    size = 0.5 + rising * torch.rand(shape, generator=generator, device=device)
    return (sign * size).to(storage.param)


def _compare(params: Sequence[Parameter], wanted: Tensors, bounds: Tensors, steps: int) -> None:
    for param, want, bound in zip(params, wanted, bounds):
        error = (param.detach().double() - want).abs()
        # written so that a NaN fails
        if not bool((error <= bound).all()):
            raise UnavailableError(
                f"gate: a tensor of shape {tuple(param.shape)} is off by "
                f"{float(error.max()):.3g} after {steps} step{'s'[: steps - 1]}"
            )
