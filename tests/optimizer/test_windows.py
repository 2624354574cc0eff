"""Windows of micro-batches against a literal float64 oracle."""

import math

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.verify.oracle import normalized
from support.exact_runs import assert_bits
from support.steps import assert_close, make_params, momenta, values

# a few roundings of float32 in values below 4, and of erf
ATOL = {torch.float32: 4e-6, torch.float64: 1e-13}


class Oracle:
    """Windows of micro-batches, one slice at a time in float64, from the definition alone."""

    def __init__(self, params, steps, **options):
        self.params = [param.detach().cpu().double().clone() for param in params]
        self.momenta = [torch.zeros_like(param) for param in self.params]
        self.steps, self.options, self.count = steps, options, 0
        by_row = options["granularity"] == "row"
        places = [
            (i, row)
            for i, param in enumerate(self.params)
            for row in (range(len(param)) if by_row else [...])
        ]
        whole = options["granularity"] == "global"
        self.slices = [places] if whole else [[place] for place in places]
        self.seen = [False] * len(self.slices)

    def ghat(self, slice_, grads):
        """One slice's normalised gradient; None without one, or if it is not finite."""
        if any(grads[i] is None for i, _ in slice_):
            return None
        flat = torch.cat([grads[i].cpu().double()[at].reshape(-1) for i, at in slice_])
        if not flat.isfinite().all():
            return None
        return normalized(flat, 1e-8, self.options["normalizer"], 1.0)

    def step(self, grads, lr, found):
        past, self.count = self.options["momentum"], self.count + 1
        closing = self.count >= self.steps
        for s, slice_ in enumerate(self.slices):
            params = [self.params[i][at] for i, at in slice_]
            momenta = [self.momenta[i][at] for i, at in slice_]
            ghat = None if found else self.ghat(slice_, grads)
            if ghat is not None:
                parts = ghat.split([param.numel() for param in params])
                for momentum, part in zip(momenta, parts):
                    momentum *= 1.0 if self.seen[s] else past
                    momentum += (1 - past) / self.steps * part.view(momentum.shape)
                self.seen[s] = True
            if closing and self.seen[s]:
                for param, momentum in zip(params, momenta):
                    param *= 1 - lr * self.options["weight_decay"]
                    param -= lr * momentum
                self.seen[s] = False
        self.count = 0 if closing else self.count


def spoil(grads, fault):
    if fault == "nan":
        for grad in (grads[0], grads[2]):
            grad[2, 1] = math.nan
    elif fault == "inf":
        for grad in grads:
            grad[0, 0] = math.inf
    elif fault == "missing":
        grads[1] = None
    elif fault == "none":
        grads[:] = [None] * len(grads)


# micro-batches in a row; "found" is a GradScaler's overflow. Every fault meets the first, a middle
# and the last place of a window of 2 and of 4
SCENARIO = [
    "whole", "missing", "missing", "missing", "nan", "whole", "nan", "whole",
    "whole", "whole", "inf", "nan", "inf", "inf", "inf", "inf",
    "found", "whole", "whole", "found", "none", "whole", "missing", "none",
    "found", "found", "missing", "whole",
]  # fmt: skip


def random_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(param.shape, generator=generator) + 0.25).to(param.device, param.dtype)
        for param in params
    ]


def oracle_params(device, dtype=torch.float32):
    # rows of all but the last fit the kernels' tiles
    return make_params(device, dtype, shapes=[(4, 6), (3, 7), (3, 2100)])


CASES = [
    (4, {"granularity": "tensor"}),
    (2, {"granularity": "row", "normalizer": "cdf", "momentum": 0.0, "weight_decay": 0.0}),
    (4, {"granularity": "row"}),
    (4, {"granularity": "global", "momentum": 0.5}),
]


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize(("steps", "options"), CASES, ids=str)
def test_windows_follow_the_definition(steps, options, dtype, path):
    if path.fused and dtype is torch.float64:
        pytest.skip("the kernels have no float64")
    options = {"normalizer": "zscore", "momentum": 0.9, "weight_decay": 0.1, **options}
    params = oracle_params(path.device, dtype)
    oracle = Oracle(params, steps, **options)
    optimizer = BNGD(params, accumulation_steps=steps, fused=path.fused, **options)
    for i, fault in enumerate(SCENARIO):
        grads = random_grads(params, i)
        if options["granularity"] == "global" and fault == "missing":
            fault = "nan"
        spoil(grads, fault)
        # a scheduler that steps with every micro-batch
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.found_inf = torch.tensor(float(fault == "found"), device=path.device)
        before = values(params)
        optimizer.step()
        oracle.step(grads, lr, fault == "found")
        if oracle.count:
            assert_bits(params, before)
        assert_close(params, oracle.params, ATOL[dtype])
    assert_close(momenta(optimizer, params), oracle.momenta, ATOL[dtype])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [2, 4])
def test_an_exploded_micro_batch_counts_as_one(steps, momentum, path):
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
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)
    for other in others:
        for a, b in zip(plain, other):
            change = float((a - b).square().mean().sqrt())
            assert 0 < change <= 2 * 0.1 * (1 - momentum) / steps * (1 + 1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_window_given_up_leaves_nothing_behind(granularity, path):
    """Neither its count nor, where the single step finds no gradient, what was seen of it."""
    options = {"granularity": granularity, "normalizer": "zscore"}
    options |= {"momentum": 0.9, "weight_decay": 0.1}
    params = oracle_params(path.device)[:2]
    oracle = Oracle(params, 2, **options)
    optimizer = BNGD(params, 0.1, accumulation_steps=2, fused=path.fused, **options)
    runs = ((2, 2), (3, 4), (1, 2), (4, 4), (2, 1), (1, 1), (4, 3), (2, 1), (2, 2))
    grads = iter(random_grads(params, seed) for seed in range(sum(count for _, count in runs)))
    for steps, count in runs:
        optimizer.param_groups[0]["accumulation_steps"] = oracle.steps = steps
        for _ in range(count):
            found = next(grads)
            if steps == 1:
                found[0] = None
                oracle.count, oracle.seen = 0, [False] * len(oracle.seen)
            for param, grad in zip(params, found):
                param.grad = grad
            optimizer.step()
            oracle.step(found, 0.1, False)
    assert_close(params, oracle.params)
    assert_close(momenta(optimizer, params), oracle.momenta)


@pytest.mark.parametrize(("before", "after"), [("tensor", "row"), ("row", "tensor")])
def test_momentum_decays_once_though_the_granularity_changes_within_a_window(before, after, path):
    param = Parameter(torch.zeros(2, 3, device=path.device))
    optimizer = BNGD([param], 0.1, accumulation_steps=2, granularity=before, fused=path.fused)
    grads = torch.randn(4, 2, 3).double()
    want = torch.zeros(2, 3, dtype=torch.float64)
    for step, grad in enumerate(grads):
        how = before if step < 3 else after
        optimizer.param_groups[0]["granularity"] = how
        param.grad = grad.float().to(path.device)
        optimizer.step()
        rows = grad.view(2 if how == "row" else 1, -1)
        ghat = torch.stack([normalized(row, 1e-8, "zscore", 1.0) for row in rows]).view(2, 3)
        want = (0.9 if step % 2 == 0 else 1.0) * want + 0.05 * ghat
    momentum = optimizer.state[param]["momentum_buffer"].cpu().double()
    torch.testing.assert_close(momentum, want, rtol=0, atol=1e-6)
