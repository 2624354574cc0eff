"""Training in bfloat16 and float16: parameters that really move, and go on from a checkpoint."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from bngd_triton import BNGD, fp32_state_dict, load_fp32_state_dict
from bngd_triton.eager.rounding import widen
from support.checkpoints import through_a_file
from support.exact_runs import SHAPES, assert_bits, exact_gradient, give, state_of, take_steps
from support.paths import StepPath
from support.runs import start
from support.steps import set_grads

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
narrow = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)


def masters(optimizer, params):
    """The float32 masters of split parameters; float32 parameters are their own."""
    states = [optimizer.state[param] for param in params]
    kept = [state.get("master_remainder", state.get("master")) for state in states]
    return [widen(param.detach(), rest).clone() for param, rest in zip(params, kept)]


@narrow
@pytest.mark.parametrize(
    ("grads", "options"),
    [
        (FLOAT32, {"weight_decay": 0.1}),
        (BFLOAT16, {"granularity": "row", "nesterov": True}),
        (FLOAT16, {"granularity": "global", "maximize": True}),
        (BFLOAT16, {"normalizer": "cdf", "momentum": 0.0}),
        (FLOAT32, {"accumulation_steps": 2, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_split_training_is_float32_training(grads, options, dtype, path):
    params, optimizer = start(path, dtype, SHAPES, lr=1e-3, **options)
    twins = [Parameter(param.detach().float()) for param in params]
    twin = BNGD(twins, lr=1e-3, fused=path.fused, **options)
    for step in range(4):
        take_steps(optimizer, params, [step], grads)
        take_steps(twin, twins, [step], FLOAT32)
        assert_bits(masters(optimizer, params), [param.detach() for param in twins])
    # that needs more bits than the parameters have
    assert not torch.equal(params[0].float(), twins[0])


@pytest.mark.parametrize("grads", [BFLOAT16, FLOAT16], ids=str)
def test_narrow_gradients_of_float32_parameters(grads, path):
    (params, optimizer), (twins, twin) = (start(path, shapes=SHAPES, lr=1e-2) for _ in range(2))
    take_steps(optimizer, params, range(3), grads)
    take_steps(twin, twins, range(3))
    assert_bits(params, twins)
    assert {tuple(state) for state in optimizer.state.values()} == {("momentum_buffer",)}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_momentum_in_bfloat16(dtype, path):
    params, narrow_ = start(path, dtype, SHAPES, lr=1e-2, momentum_dtype=BFLOAT16)
    twins, wide = start(path, dtype, SHAPES, lr=1e-2)
    for seed in range(3):
        take_steps(narrow_, params, [seed])
        take_steps(wide, twins, [seed])
        for param, twin in zip(params, twins):
            kept = narrow_.state[param]["momentum_buffer"]
            want = wide.state[twin]["momentum_buffer"]
            assert (kept.dtype, want.dtype) == (BFLOAT16, FLOAT32)
            # half a unit in the last place for each step, of values below 1
            assert float((kept.float() - want).abs().max()) <= (seed + 1) * 2.0**-9
            if seed == 0:
                assert torch.equal(kept, want.to(BFLOAT16))


@narrow
def test_a_parameter_written_between_steps(dtype, path):
    """`load_state_dict`, pruning, ...: the new value counts, not the master of the old one."""
    params, optimizer = start(path, dtype, SHAPES, lr=1e-3, momentum=0.0)
    model = torch.nn.ParameterList(params)
    take_steps(optimizer, params, range(3))
    remainders = [value for value in state_of(optimizer, params) if value.dtype == torch.int16]
    assert all((value < 0).any() and (value > 0).any() for value in remainders)
    new = {key: value.roll(1) * 1.5 for key, value in model.state_dict().items()}
    for value in new.values():
        value.flatten()[0] = 0.0
        value.view(-1)[::2] = 0.0
    model.load_state_dict(new)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, master, want in zip(params, masters(optimizer, params), new.values()):
        assert torch.equal(param, want)
        if dtype == FLOAT16:
            assert torch.equal(master, want.float())
        else:
            size = want.float().abs().clamp(min=2.0**-126)
            assert ((master - want.float()).abs() <= size * 2.0**-8).all()


@narrow
def test_master_weights_changed_between_steps(dtype, path):
    """A master that was given up starts anew from the parameter."""
    params, optimizer = start(path, dtype, SHAPES, lr=0.01, weight_decay=0.1)
    (group,) = optimizer.param_groups
    for seed, mode in enumerate(["split", None, "split", "stochastic", "split"]):
        group["master_weights"] = mode
        old = [param.detach().clone() for param in params]
        for param in params:
            give(param, exact_gradient(param, seed).to(dtype))
        optimizer.step()
        kept = {key for key in optimizer.state[params[0]] if key.startswith("master")}
        assert bool(kept) == (mode == "split")
        if mode == "split" and seed > 0:
            for param, value, master in zip(params, old, masters(optimizer, params)):
                buffer = optimizer.state[param]["momentum_buffer"]
                want = value.float() * (1 - 0.01 * 0.1) - buffer * 0.01
                torch.testing.assert_close(master, want, rtol=2.0**-22, atol=1e-9)


@narrow
def test_a_seed_changed_between_steps(dtype, device):
    ends = {}
    options = {"lr": 0.01, "master_weights": "stochastic", "seed": 11}
    for seed, fused in itertools.product((11, 12), (False, True)):
        params, optimizer = start(StepPath(fused, device), dtype, SHAPES, **options)
        take_steps(optimizer, params, [0, 1])
        optimizer.param_groups[0]["seed"] = seed
        take_steps(optimizer, params, [2, 3])
        ends[seed, fused] = params
        assert optimizer.state_dict()["param_groups"][0]["rounding_steps"] == 4
    for seed in (11, 12):
        assert_bits(ends[seed, False], ends[seed, True])
    assert not torch.equal(ends[11, False][0], ends[12, False][0])


def test_parameters_of_an_optimizer_round_apart(path):
    params = [Parameter(torch.ones(256, dtype=BFLOAT16, device=path.device)) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    # halfway to the next value below 1
    optimizer = BNGD(
        groups, 2.0**-9, 0.0, weight_decay=1.0, master_weights="stochastic", fused=path.fused
    )
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[0], params[2])


def test_a_model_cast_to_the_other_narrow_type(path):
    params, optimizer = start(path, FLOAT16, SHAPES)
    model = torch.nn.ParameterList(params)
    take_steps(optimizer, params, [0])
    model.to(BFLOAT16)
    take_steps(optimizer, params, [1])
    assert set(optimizer.state[params[0]]) == {"momentum_buffer", "master_remainder"}
    # so that the checkpoint loads
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def make(path, dtype, **options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 2)).to(path.device)
    model[0].to(dtype)
    return model, BNGD(model.parameters(), 1e-3, weight_decay=0.1, fused=path.fused, **options)


def assert_same(got, want):
    assert list(got) == list(want)
    assert_bits(list(got.values()), list(want.values()))


def train(model, optimizer, seeds):
    for seed in seeds:
        set_grads(list(model.parameters()), seed)
        optimizer.step()


@narrow
def test_float32_weights_go_out_and_come_back(dtype, path):
    model, optimizer = make(path, dtype)
    train(model, optimizer, range(5))
    weights = fp32_state_dict(model, optimizer)
    assert {value.dtype for value in weights.values()} == {FLOAT32, torch.int64}
    # they hold more than the parameters do, which are their roundings
    assert not torch.equal(weights["0.weight"].to(dtype).float(), weights["0.weight"])
    torch.testing.assert_close(
        model[0].weight.float(), weights["0.weight"], rtol=2.0**-8, atol=0, check_dtype=False
    )

    again, resumed = make(path, dtype)
    train(again, resumed, range(40, 42))
    resumed.load_state_dict(optimizer.state_dict())
    load_fp32_state_dict(again, resumed, weights)
    assert_same(fp32_state_dict(again, resumed), weights)
    train(model, optimizer, range(5, 8))
    train(again, resumed, range(5, 8))
    assert_same(fp32_state_dict(again, resumed), fp32_state_dict(model, optimizer))


def test_a_new_optimizer_takes_float32_weights(path):
    """Before its first gradient: a float32 model goes on in bfloat16 without losing a bit."""
    wide, optimizer = make(path, FLOAT32)
    train(wide, optimizer, range(3))
    narrow, fresh = make(path, BFLOAT16)
    load_fp32_state_dict(narrow, fresh, wide.state_dict())
    assert narrow[0].weight.dtype == BFLOAT16
    assert_same(fp32_state_dict(narrow, fresh), wide.state_dict())


def test_without_a_master_parameters_stay_as_they_are(path):
    model, optimizer = make(path, BFLOAT16, master_weights=None)
    train(model, optimizer, range(2))
    assert_same(fp32_state_dict(model, optimizer), model.state_dict())


def test_another_model_is_refused(path):
    model, optimizer = make(path, BFLOAT16)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fp32_state_dict(make(path, BFLOAT16)[0], optimizer)
    with pytest.raises(TypeError, match="got Sequential and SGD"):
        load_fp32_state_dict(model, torch.optim.SGD(model.parameters(), 0.1), {})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_fp32_state_dict(model, optimizer, {})
