"""Loss scaling: `torch.amp.GradScaler` without unscaling, without a wait, without a trace."""

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD, reference
from bngd_triton.kernels import fused_step_
from support.exact_runs import assert_bits, exact_gradient
from support.host_reads import HostReads
from support.paths import StepPath
from support.runs import everything

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
OPTION_SETS = [
    {"weight_decay": 0.1},
    {"granularity": "row", "nesterov": True, "eps": 0.5},
    {"granularity": "global", "normalizer": "cdf", "eps": 1e-3},
    {"momentum": 0.0, "eps": 0.0},
]


class Run:
    """A small model, its optimizer and, for a scale, its scaler."""

    def __init__(self, path, scale, dtype=FLOAT32, **options):
        torch.manual_seed(3)
        layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        self.model = torch.nn.Sequential(*layers).to(path.device, dtype)
        self.params = list(self.model.parameters())
        self.optimizer = BNGD(self.model.named_parameters(), lr=0.05, fused=path.fused, **options)
        self.scaler = None
        if scale is not None:
            self.scaler = torch.amp.GradScaler(
                path.device.type, init_scale=scale, growth_interval=2, growth_factor=4.0
            )

    def backward(self, seed, poison=None):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 6, generator=generator).to(self.params[0])
        self.optimizer.zero_grad()
        # of entries below 1e-2, as where a scale is needed
        loss = self.model(x).float().square().mean() * 1e-3
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if poison is not None:
            self.params[2].grad[1, 2] = poison

    def step(self):
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def everything(self):
        return everything(self.optimizer, self.params)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_a_power_of_two_changes_no_bit(options, dtype, unscale, path):
    """Nor does unscaling first."""
    plain, scaled = (Run(path, scale, dtype, **options) for scale in (None, 2.0**10))
    for seed in range(5):
        for run in (plain, scaled):
            run.backward(seed)
            if unscale and run.scaler:
                run.scaler.unscale_(run.optimizer)
            run.step()
        assert_bits(scaled.everything(), plain.everything())
    # it has grown on the way
    assert scaled.scaler.get_scale() == 2.0**14
    assert not hasattr(scaled.optimizer, "grad_scale")


def test_eps_is_in_the_units_of_the_unscaled_gradient(path):
    param = Parameter(torch.zeros(4, 6, device=path.device))
    grad = exact_gradient(param, 0)
    step_ = fused_step_ if path.fused else reference.step_
    for scale in (0.25, 1.0, 1000.0, 2.0**16):
        param.detach().zero_()
        step_(
            [param], [grad * scale], None, lr=1.0, momentum=0.0, eps=3.0,
            grad_scale=torch.tensor([scale], device=path.device),
        )  # fmt: skip
        # standard deviation 1: ghat is +-1 / (1 + 3)
        assert torch.equal(param.detach(), (2.0 - grad) / 4)


@pytest.mark.parametrize(
    ("options", "unscale"), list(zip(OPTION_SETS, [False, True, False, True])), ids=str
)
def test_an_overflow_skips_the_whole_step(options, unscale, path):
    """The first step included; nothing changes but the scale."""
    skipping, without = (Run(path, 2.0**10, BFLOAT16, **options) for _ in range(2))
    for seed in range(4):
        if seed % 2 == 0:
            skipping.backward(seed, torch.inf if seed else torch.nan)
            before = skipping.everything()
            if unscale:
                skipping.scaler.unscale_(skipping.optimizer)
            skipping.step()
            after = skipping.everything()
            # state that the first step makes: momentum and remainders of zeros
            assert all(not made.any() for made in after[len(before) :])
            assert_bits(after[: len(before)], before)
        else:
            for run in (skipping, without):
                run.backward(seed)
                run.step()
    assert skipping.scaler.get_scale() < without.scaler.get_scale()
    assert_bits(skipping.everything(), without.everything())
    # of the first overflow and the second; other slices were finite
    assert skipping.optimizer.skipped == 2


@pytest.mark.parametrize("mode", ["split", "stochastic", None], ids=str)
@pytest.mark.parametrize("found", [2.0, torch.inf])
def test_found_inf_is_a_sum_over_devices(found, mode, path):
    run = Run(path, None, BFLOAT16, weight_decay=0.5, master_weights=mode)
    run.backward(0)
    run.step()
    before = run.everything()
    for value in (torch.tensor(found), torch.tensor([found], dtype=torch.float64)):
        run.backward(1)
        run.optimizer.found_inf = value.to(path.device)
        run.step()
        assert_bits(run.everything(), before)
    run.optimizer.found_inf = torch.zeros((), device=path.device)
    run.step()
    assert not torch.equal(run.params[0], before[0])


def test_no_gradient_on_any_device(path):
    """The sum over no devices that a scaler leaves is the number 0."""
    run = Run(path, 8.0)
    run.scaler.scale(torch.ones((), device=path.device))
    before = run.everything()
    run.scaler.step(run.optimizer)
    assert_bits(run.everything(), before)


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_overflows_are_left_to_the_scaler(nonfinite, path):
    run = Run(path, 2.0**10, nonfinite=nonfinite)
    run.backward(0, torch.inf)
    before = run.everything()
    run.step()
    assert_bits(run.everything()[: len(before)], before)
    assert run.scaler.get_scale() == 2.0**9
    assert run.optimizer.skipped == (nonfinite == "raise")
    if nonfinite == "raise":
        run.backward(1, torch.inf)
        with pytest.raises(FloatingPointError, match=r"2\.weight"):
            run.optimizer.step()


def test_a_scale_of_ones_own(path):
    """Without a scaler, or as a number: `optimizer.grad_scale` is what gradients are divided by."""
    plain, scaled = (Run(path, None, eps=0.5) for _ in range(2))
    for seed, scale in enumerate((torch.tensor(8.0, device=path.device), 8.0, 8)):
        for run in (plain, scaled):
            run.backward(seed)
        for param in scaled.params:
            param.grad *= 8
        scaled.optimizer.grad_scale = scale
        plain.step()
        scaled.step()
        assert_bits(scaled.everything(), plain.everything())
    # it outlives a step that raises
    scaled.optimizer.param_groups[0]["momentum"] = 2.0
    with pytest.raises(ValueError, match="momentum"):
        scaled.step()
    assert scaled.optimizer.grad_scale == 8


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row", "accumulation_steps": 2}, {"master_weights": "stochastic"}],
    ids=str,
)
def test_nothing_waits_for_the_device(options, device):
    run, reads = Run(StepPath(True, device), 2.0**10, BFLOAT16, **options), HostReads()
    for seed in range(4):
        run.backward(seed, torch.inf if seed == 1 else None)
        with reads:
            run.scaler.step(run.optimizer)
            run.optimizer.grad_stats()
        run.scaler.update()
    assert reads.count == 0
    with reads:
        torch.ones(1).item()
    assert reads.count == 1


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_statistics_are_of_the_unscaled_gradient(granularity, path):
    plain, scaled = (Run(path, scale, granularity=granularity) for scale in (None, 2.0**20))
    for run in (plain, scaled):
        run.backward(0)
        run.step()
    want = plain.optimizer.grad_stats()
    for name, found in scaled.optimizer.grad_stats().items():
        for of in ("mean", "std", "rms", "kappa"):
            got, expected = getattr(found, of), getattr(want[name], of)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow", [None, torch.inf])
def test_a_step_that_raises_leaves_nothing_of_the_scaler_behind(overflow, unscale, path):
    """Neither an overflow, which would stop every later step, nor its scale."""
    run, plain = (Run(path, scale, eps=0.5) for scale in (2.0**10, None))
    run.backward(0, overflow)
    if unscale:
        run.scaler.unscale_(run.optimizer)
    run.optimizer.param_groups[0]["momentum"] = 2.0
    with pytest.raises(ValueError, match="momentum"):
        run.scaler.step(run.optimizer)
    assert not {"found_inf", "grad_scale"} & set(run.optimizer.__dict__)
    run.optimizer.param_groups[0]["momentum"] = 0.9
    run.scaler = None
    for one in (run, plain):
        one.backward(1)
        one.step()
    assert_bits(run.everything(), plain.everything())
