"""Micro-batches: `accumulation_steps=K` against a literal float64 oracle, and its limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.engine.step import Stepper
from bngd_triton.verify.oracle import normalized
from support import capture
from support.checkpoints import through_a_file
from support.exact_runs import (
    assert_bits,
    exact_gradient,
    give,
    make_params,
    state_of,
    take_steps,
)
from support.paths import StepPath
from support.snapshots import snapshot

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# a few roundings of float32 in values below 4, and of erf
ATOL = {torch.float32: 4e-6, torch.float64: 1e-13}


class Oracle:
    """Windows of micro-batches, one slice at a time in float64, from the definition alone."""

    def __init__(self, params: Sequence[Tensor], steps: int, **options: Any) -> None:
        self.params = [param.detach().cpu().double().clone() for param in params]
        self.momenta = [torch.zeros_like(param) for param in self.params]
        self.steps, self.options = steps, options
        self.count = 0
        by_row = options["granularity"] == "row"
        self.slices: list[list[tuple[int, Any]]] = []
        for i, param in enumerate(self.params):
            rows = range(len(param)) if by_row and param.dim() >= 2 else [...]
            self.slices += [[(i, row)] for row in rows]
        if options["granularity"] == "global":
            self.slices = [[(i, ...) for i in range(len(self.params))]]
        self.seen = [False] * len(self.slices)

    def ghat(self, members: list[tuple[int, Any]], grads: Sequence[Tensor | None]) -> Tensor | None:
        """One slice's normalised gradient; None without one, or if it is not finite."""
        if any(grads[i] is None for i, _ in members):
            return None
        flat = torch.cat([grads[i].detach().cpu().double()[at].reshape(-1) for i, at in members])
        if not flat.isfinite().all():
            return None
        centred = self.options["granularity"] == "global" or grads[members[0][0]].dim() >= 2
        return normalized(flat, 1e-8, self.options["normalizer"], float(centred))

    def step(self, grads: Sequence[Tensor | None], lr: float, found: bool) -> None:
        momentum = self.options["momentum"]
        self.count += 1
        for s, members in enumerate(self.slices):
            ghat = self.ghat(members, grads)
            if ghat is not None and not found:
                sizes = [self.params[i][at].numel() for i, at in members]
                for (i, at), part in zip(members, ghat.split(sizes)):
                    if not self.seen[s]:
                        self.momenta[i][at] *= momentum
                    share = (1 - momentum) / self.steps
                    self.momenta[i][at] += share * part.view(self.params[i][at].shape)
                self.seen[s] = True
            if self.count == self.steps and self.seen[s]:
                for i, at in members:
                    self.params[i][at] *= 1 - lr * self.options["weight_decay"]
                    self.params[i][at] -= lr * self.momenta[i][at]
                self.seen[s] = False
        if self.count == self.steps:
            self.count = 0


Grads = list[Any]


def whole(grads: Grads) -> None:
    """Leave them as they are."""


def nan_in_a_row(grads: Grads) -> None:
    for grad in (grads[0], grads[2]):
        grad[2, 1] = math.nan


def inf_everywhere(grads: Grads) -> None:
    for grad in grads:
        grad.view(-1)[0] = math.inf


def missing(grads: Grads) -> None:
    grads[1] = None


def all_missing(grads: Grads) -> None:
    grads[:] = [None] * len(grads)


# micro-batches in a row; "found" is a GradScaler's overflow. Every fault meets the first, a middle
# and the last place of a window of 2 and of 4
SCENARIO: list[Callable[[Grads], None] | str] = [
    whole, missing, missing, missing,
    nan_in_a_row, whole, nan_in_a_row, whole,
    whole, whole, inf_everywhere, nan_in_a_row,
    inf_everywhere, inf_everywhere, inf_everywhere, inf_everywhere,
    "found", whole, whole, "found",
    all_missing, whole, missing, all_missing,
    "found", "found", missing, whole,
]  # fmt: skip


def random_grads(params: Sequence[Tensor], seed: int) -> Grads:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(param.shape, generator=generator) + 0.25).to(param.device, param.dtype)
        for param in params
    ]


def oracle_params(device: torch.device, dtype: torch.dtype = FLOAT32) -> list[Parameter]:
    # rows of all but the last fit the kernels' tiles
    return make_params(device, dtype, shapes=[(4, 6), (3, 7), (3, 2100)])


CASES: list[tuple[int, dict[str, Any]]] = [
    (4, {"granularity": "tensor"}),
    (2, {"granularity": "row", "normalizer": "cdf", "momentum": 0.0, "weight_decay": 0.0}),
    (4, {"granularity": "row"}),
    (4, {"granularity": "global", "momentum": 0.5}),
]
cases = pytest.mark.parametrize(("steps", "options"), CASES, ids=str)


@cases
def test_windows_follow_the_definition(steps: int, options: dict[str, Any], path: StepPath) -> None:
    follow(FLOAT32, steps, options, path)


@cases
def test_windows_in_float64(steps: int, options: dict[str, Any], device: torch.device) -> None:
    follow(torch.float64, steps, options, StepPath(False, device))


def follow(dtype: torch.dtype, steps: int, options: dict[str, Any], path: StepPath) -> None:
    """Train through the scenario beside the oracle."""
    options = {"normalizer": "zscore", "momentum": 0.9, "weight_decay": 0.1, **options}
    params = oracle_params(path.device, dtype)
    oracle = Oracle(params, steps, **options)
    optimizer = BNGD(params, accumulation_steps=steps, fused=path.fused, **options)
    for i, fault in enumerate(SCENARIO):
        grads = random_grads(params, i)
        if callable(fault):
            if options["granularity"] == "global" and fault is missing:
                fault = nan_in_a_row
            fault(grads)
        # a scheduler that steps with every micro-batch
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.found_inf = torch.tensor(float(fault == "found"), device=path.device)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        oracle.step(grads, lr, fault == "found")
        if oracle.count:
            assert_bits([param.detach() for param in params], before)
        for param, want in zip(params, oracle.params):
            got = param.detach().cpu().double()
            torch.testing.assert_close(got, want, rtol=0, atol=ATOL[dtype], msg=f"micro-batch {i}")
    for param, want in zip(params, oracle.momenta):
        got = optimizer.state[param]["momentum_buffer"].cpu().double()
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_one_micro_batch_is_a_step(granularity: str, path: StepPath) -> None:
    """K equal micro-batches too, if the momentum's past is nothing."""
    params, twins = (make_params(path.device) for _ in range(2))
    one = BNGD(params, 0.1, granularity=granularity, fused=path.fused)
    four = BNGD(twins, 0.1, granularity=granularity, accumulation_steps=4, fused=path.fused)
    take_steps(one, params, [1])
    take_steps(four, twins, [1] * 4)
    for a, b in zip(params, twins):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [2, 4])
def test_an_exploded_micro_batch_counts_as_one(steps: int, momentum: float, path: StepPath) -> None:
    """Two ghat of RMS 1 differ by RMS 2 at most, in a step by 2 * lr * (1 - momentum) / K."""
    done = []
    for factor, shift in ((1.0, 0), (1e20, 0), (1e20, 1000), (1e-20, 1000)):
        params = oracle_params(path.device)[:2]
        optimizer = BNGD(params, 0.1, momentum, eps=0.0, accumulation_steps=steps, fused=path.fused)
        for i in range(steps):
            exploded = i == steps // 2
            grads = random_grads(params, i + shift * exploded)
            for param, grad in zip(params, grads):
                param.grad = grad * (factor if exploded else 1.0)
            optimizer.step()
        done.append([param.detach() for param in params])
    plain, scaled, *others = done
    for a, b in zip(plain, scaled):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for other in others:
        for a, b in zip(plain, other):
            change = float((a - b).square().mean().sqrt())
            assert 0 < change <= 2 * 0.1 * (1 - momentum) / steps * (1 + 1e-5)


@pytest.mark.parametrize("into", [False, True], ids=["into_eager", "into_fused"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FLOAT32, {"granularity": "row"}),
        (BFLOAT16, {"master_weights": "split"}),
        (BFLOAT16, {"master_weights": "stochastic", "momentum": 0.0}),
        (torch.float16, {"master_weights": "split", "granularity": "row"}),
    ],
    ids=str,
)
def test_resuming_within_a_window(
    dtype: torch.dtype, options: dict[str, Any], into: bool, path: StepPath
) -> None:
    params = make_params(path.device, dtype)
    optimizer = BNGD(
        params, 0.1, weight_decay=0.1, accumulation_steps=3, seed=2, fused=path.fused, **options
    )

    def go_on(optimizer: BNGD, params: list[Parameter]) -> None:
        for seed in range(4, 8):
            for i, param in enumerate(params):
                # the end of the open window finds no gradient of the first
                absent = i == 0 and seed < 6
                give(param, None if absent else exact_gradient(param, seed + i).to(dtype))
            optimizer.step()

    take_steps(optimizer, params, range(4))
    saved = through_a_file([optimizer.state_dict(), [param.detach() for param in params]])
    go_on(optimizer, params)
    twins = make_params(path.device, dtype)
    with torch.no_grad():
        for param, value in zip(twins, saved[1]):
            param.copy_(value)
    again = BNGD(twins, fused=into)
    again.load_state_dict(saved[0])
    go_on(again, twins)
    assert_bits([param.detach() for param in twins], [param.detach() for param in params])
    assert not torch.equal(twins[0], saved[1][0])
    assert_bits(state_of(again, twins), state_of(optimizer, params))
    assert again.param_groups[0]["micro_step"] == 2


def test_a_partial_window_goes_on(path: StepPath) -> None:
    """An epoch of five micro-batches, K = 4: its fifth opens the window of the next epoch."""
    params, twins = (make_params(path.device) for _ in range(2))
    done = []
    for group, epochs in ((params, 2), (twins, 1)):
        optimizer = BNGD(group, 0.1, accumulation_steps=4, fused=path.fused)
        for epoch in range(epochs):
            take_steps(optimizer, group, range(10 * epoch // epochs, 10 * (epoch + 1) // epochs))
            optimizer.zero_grad()
        done.append([*(param.detach() for param in group), *state_of(optimizer, group)])
    assert_bits(*done)


@pytest.mark.parametrize("mode", ["split", "stochastic"])
def test_masters_and_windows(mode: str, device: torch.device) -> None:
    """Both paths agree; a split master is what float32 training gives."""
    done = []
    for fused in (False, True):
        params = make_params(device, BFLOAT16)
        optimizer = BNGD(
            params, 1e-3, accumulation_steps=2, master_weights=mode, weight_decay=0.1, fused=fused
        )
        take_steps(optimizer, params, range(5))
        done.append([*(param.detach() for param in params), *state_of(optimizer, params)])
    assert_bits(*done)
    twins = [Parameter(param.detach().float()) for param in make_params(device, BFLOAT16)]
    wide = BNGD(twins, 1e-3, accumulation_steps=2, weight_decay=0.1, fused=False)
    take_steps(wide, twins, range(5))
    if mode == "split":
        for param, twin in zip(params, twins):
            rest = optimizer.state[param]["master_remainder"]
            bits = (param.detach().view(torch.int16).int() << 16) + rest
            assert torch.equal(bits.view(FLOAT32), twin)
    else:
        for param, twin in zip(params, twins):
            torch.testing.assert_close(param.float(), twin, rtol=2.0**-6, atol=0)


def test_groups_of_different_windows(path: StepPath) -> None:
    """A group that steps, one with K = 2 and one with K = 3 do as they would alone."""
    ks = (1, 2, 3)
    shapes = [(4, 6), (10,)]
    together = [make_params(path.device, shapes=shapes) for _ in ks]
    groups = [{"params": p, "accumulation_steps": k} for p, k in zip(together, ks)]
    optimizer = BNGD(groups, 0.1, fused=path.fused)
    alone = [make_params(path.device, shapes=shapes) for _ in ks]
    optimizers = [BNGD(p, 0.1, accumulation_steps=k, fused=path.fused) for p, k in zip(alone, ks)]
    for seed in range(7):
        for params in together:
            for i, param in enumerate(params):
                give(param, exact_gradient(param, 100 * seed + i))
        optimizer.step()
        for params, one in zip(alone, optimizers):
            take_steps(one, params, [seed])
    for params, twins in zip(together, alone):
        assert_bits(params, twins)
    assert [group.get("micro_step", 0) for group in optimizer.param_groups] == [0, 1, 1]


def test_another_number_of_micro_batches(path: StepPath) -> None:
    params = oracle_params(path.device)[:2]
    options = {"granularity": "row", "normalizer": "zscore", "momentum": 0.9, "weight_decay": 0.1}
    oracle = Oracle(params, 2, **options)
    optimizer = BNGD(params, 0.1, accumulation_steps=2, fused=path.fused, **options)
    seed = 0
    # from the third on, a window is given up when a single step comes
    for steps, micro_batches in ((2, 2), (3, 3), (1, 2), (4, 4), (1, 1), (2, 2)):
        optimizer.param_groups[0]["accumulation_steps"] = oracle.steps = steps
        for _ in range(micro_batches):
            grads = random_grads(params, seed)
            seed += 1
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
            oracle.step(grads, 0.1, False)
    for param, want in zip(params, oracle.params):
        torch.testing.assert_close(param.detach().cpu().double(), want, rtol=0, atol=4e-6)


def test_a_window_given_up_leaves_no_count(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(params, 0.1, accumulation_steps=4, fused=path.fused)
    (group,) = optimizer.param_groups
    take_steps(optimizer, params, [0])
    group["accumulation_steps"] = 1
    take_steps(optimizer, params, [1])
    group["accumulation_steps"] = 4
    before = [param.detach().clone() for param in params]
    take_steps(optimizer, params, [2, 3, 4])
    assert_bits([param.detach() for param in params], before)
    take_steps(optimizer, params, [5])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_window_given_up_leaves_nothing_on_a_parameter_without_gradient(
    granularity: str, path: StepPath
) -> None:
    params = make_params(path.device)
    optimizer = BNGD(
        params, 0.1, accumulation_steps=4, granularity=granularity, fused=path.fused
    )  # fmt: skip
    (group,) = optimizer.param_groups
    take_steps(optimizer, params, [0])
    group["accumulation_steps"] = 1
    for param in params[1:]:
        give(param, torch.ones_like(param))
    params[0].grad = None
    optimizer.step()
    group["accumulation_steps"] = 4
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    before = buffer.clone()
    # ghat = 0 everywhere: what is left is the decay that a window brings once
    for param in params:
        give(param, torch.zeros_like(param))
    optimizer.step()
    assert_bits([buffer], [before * 0.9])


def test_a_master_that_is_new_when_a_window_ends(path: StepPath) -> None:
    params = make_params(path.device, BFLOAT16)
    optimizer = BNGD(params, 0.1, accumulation_steps=2, master_weights=None, fused=path.fused)
    take_steps(optimizer, params, [0])
    before = params[0].detach().clone()
    optimizer.param_groups[0]["master_weights"] = "split"
    params[0].grad = None
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert "master_remainder" in optimizer.state[params[0]]


def test_nesterov_is_refused(path: StepPath) -> None:
    params = make_params(path.device)
    with pytest.raises(ValueError, match=r"nesterov needs accumulation_steps=1.*got.*=2"):
        BNGD(params, nesterov=True, accumulation_steps=2, fused=path.fused)
    optimizer = BNGD(params, accumulation_steps=2, fused=path.fused)
    take_steps(optimizer, params, [0])
    optimizer.param_groups[0]["nesterov"] = True
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="nesterov"):
        take_steps(optimizer, params, [1])
    assert snapshot(optimizer, params) == before


def test_a_global_slice_needs_all_its_gradients(path: StepPath) -> None:
    params = make_params(path.device)
    optimizer = BNGD(
        [(f"layer{i}", param) for i, param in enumerate(params)],
        granularity="global", accumulation_steps=2, fused=path.fused,
    )  # fmt: skip
    take_steps(optimizer, params, [0])
    params[2].grad = None
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"needs a gradient of every parameter.*layer2 has none"):
        optimizer.step()
    assert snapshot(optimizer, params) == before


def test_capture_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(device)
    optimizer = BNGD(params, accumulation_steps=2, fused=True)
    take_steps(optimizer, params, [0])
    before = snapshot(optimizer, params)
    capture.pretend(monkeypatch)
    with pytest.raises(RuntimeError, match="accumulation_steps > 1 cannot be captured"):
        optimizer.step()
    assert snapshot(optimizer, params) == before


def test_windows_are_laid_out_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[None] = []
    full = Stepper.lay_out_and_step
    monkeypatch.setattr(
        Stepper, "lay_out_and_step", lambda *args: (layouts.append(None), full(*args))
    )
    params = make_params(device)
    optimizer = BNGD(params, accumulation_steps=3, fused=True)
    take_steps(optimizer, params, range(7))
    assert len(layouts) == 1
    # a gradient that is missing once costs its step, the end of its window and one to settle
    params[0].grad = None
    optimizer.step()
    take_steps(optimizer, params, range(6))
    assert len(layouts) <= 4
