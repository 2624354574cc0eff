"""`verify_step` and `bngd verify --model`: one step of somebody's own model."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from bngd_triton import BNGD, cli, release_gradients, verify_step
from support.runs import snapshot

FACTORY = """
import torch
from bngd_triton import BNGD

def make():
    model = torch.nn.Linear(30, 5)
    x = torch.randn(16, 30)
    return model, BNGD(model.named_parameters(), lr=1e-2), lambda m: m(x).square().mean()

def broken():
    raise ValueError("of mine")
"""


def network(dtype=torch.float32, device="cpu"):
    layers = nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    return nn.Sequential(*layers).to(device, dtype)


def loss_of(model):
    weight = next(model.parameters())
    x = torch.linspace(-1, 1, 160, device=weight.device).view(8, 20).to(weight.dtype)
    out = model(x)
    return (out.float() - 1).square().mean()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"granularity": "tensor", "weight_decay": 0.1}),
        (torch.bfloat16, {"nesterov": True}),
        (torch.bfloat16, {"master_weights": "stochastic", "momentum_dtype": torch.bfloat16}),
        (torch.float16, {"granularity": "global", "maximize": True}),
        (torch.float32, {"normalizer": "cdf", "momentum": 0.0, "center_1d": True}),
        (torch.float32, {"lr": torch.tensor(0.0)}),
    ],
    ids=str,
)
def test_a_right_step_is_right_for_every_parameter(dtype, options, path):
    """Before the first step, and with the state of one."""
    model = network(dtype, str(path.device))
    optimizer = BNGD(model.parameters(), fused=path.fused, **({"lr": 1e-2} | options))
    for _ in range(2):
        report = verify_step(model, optimizer, loss_of)
        assert report.ok
        assert [one.name for one in report.parameters] == [n for n, _ in model.named_parameters()]
        assert {one.path for one in report.parameters} == {"kernels" if path.fused else "eager"}
        assert any(one.share > 0 for one in report.parameters) or options.get("lr") == 0
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_nothing_of_the_callers_changes():
    model = network()
    params = list(model.parameters())
    optimizer = BNGD(params, lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    grads = [param.grad for param in params]
    random, buffers = torch.get_rng_state(), copy.deepcopy(list(model.buffers()))
    before = snapshot(optimizer, params)
    verify_step(model, optimizer, loss_of)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(param.grad is grad for param, grad in zip(params, grads))
    assert all(map(torch.equal, model.buffers(), buffers))
    assert snapshot(optimizer, params) == before


def param_off(optimizer, params):
    """A thousandth of a step, in one entry: bounds are some millionths."""
    params[4].view(-1)[7] += 1e-4


def momentum_off(optimizer, params):
    optimizer.state[params[4]]["momentum_buffer"].view(-1)[7] += 1e-4


def moved_without_gradient(optimizer, params):
    params[1][2] += 1e-6


def lost(key):
    return lambda optimizer, params: optimizer.state[params[4]].pop(key)


@pytest.mark.parametrize(
    ("spoil", "dtype", "name", "where"),
    [
        (param_off, torch.float32, "3.weight", r"parameter of shape \(3, 6\), entry 7.*"),
        (momentum_off, torch.float32, "3.weight", r"momentum of shape \(3, 6\), entry 7.*"),
        (moved_without_gradient, torch.float32, "0.bias", "has no gradient, and the step moved it"),
        *(
            (lost(key), dtype, "3.weight", f"the step left no {key}")
            for key, dtype in (
                ("momentum_buffer", torch.float32), ("master_remainder", torch.bfloat16),
                ("master", torch.float16),
            )
        ),
    ],
)  # fmt: skip
def test_a_wrong_step_names_its_parameter(spoil, dtype, name, where, monkeypatch):
    model = network(dtype)
    model[0].bias.requires_grad_(name != "0.bias")
    right = BNGD._step

    @torch.no_grad()
    def step(optimizer):
        right(optimizer)
        spoil(optimizer, optimizer.param_groups[0]["params"])

    monkeypatch.setattr(BNGD, "_step", step)
    report = verify_step(model, BNGD(model.parameters(), lr=0.1), loss_of)
    assert not report.ok
    assert not report.without_gradient
    (wrong,) = [one for one in report.parameters if not one.ok]
    assert wrong.name == name
    assert re.fullmatch(f".*{where}", wrong.where)
    assert f"{name}: {wrong.where}" in str(report)
    assert "5 of 6 parameters within their bounds" in str(report)


@pytest.mark.parametrize("change", ["option", "dtype"])
def test_masters_that_the_next_step_makes_begin_as_the_parameter(change, path):
    model = network(torch.bfloat16, str(path.device))
    if change == "dtype":
        model.float()
    optimizer = BNGD(model.parameters(), lr=1e-2, fused=path.fused, master_weights=None)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.bfloat16()
    optimizer.param_groups[0]["master_weights"] = "split"
    assert verify_step(model, optimizer, loss_of).ok


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_float64_gradients_may_have_squares_that_do_not_fit(scale):
    model = network(torch.float64)
    optimizer = BNGD(model.parameters(), lr=0.1, eps=0.0)
    x = torch.randn(8, 20, dtype=torch.float64)
    assert verify_step(model, optimizer, lambda m: m(x).square().mean() * scale).ok


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_had_wherever_it_is_called(mode):
    model = network()
    optimizer = BNGD(model.parameters())
    with mode():
        assert verify_step(model, optimizer, loss_of).ok


def test_what_it_cannot_hold_is_refused():
    model, keeps, released = network(), network(), network()
    optimizer = BNGD(model.parameters())
    keeps.kept = keeps(torch.ones(8, 20))
    keeping, releasing = BNGD(keeps.parameters()), BNGD(released.parameters())
    release_gradients(released, releasing)
    windowed = BNGD(model.parameters(), accumulation_steps=2)
    for its_model, its_optimizer, loss_fn, error, message in (
        (model, torch.optim.SGD(model.parameters()), loss_of, TypeError, "a BNGD, got SGD"),
        (model, windowed, loss_of, NotImplementedError, "accumulation_steps > 1"),
        (released, releasing, loss_of, NotImplementedError, "gradient release"),
        (model, optimizer, lambda m: torch.tensor(1.0), ValueError, "scalar tensor that depends"),
        (model, optimizer, lambda m: m(torch.ones(8, 20)), ValueError, "scalar tensor that depend"),
        (model, optimizer, lambda _: loss_of(model), ValueError, "with the model that it is given"),
        (keeps, keeping, loss_of, ValueError, r"copy\.deepcopy fails on .*must not keep tensors"),
    ):
        with pytest.raises(error, match=message):
            verify_step(its_model, its_optimizer, loss_fn)


def test_the_command_steps_a_factorys_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "factory_of_a_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/"])
    command = ["verify", "--model", "factory_of_a_test:make", "--json", "report.json"]
    assert cli.main(command) == 0
    assert "2 of 2 parameters within their bounds" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    found = [(one["name"], one["dtype"], one["ok"]) for one in report["parameters"]]
    assert found == [("weight", "float32", True), ("bias", "float32", True)]
    for wrong, messages in {
        "factory_of_a_test:none": ["no attribute 'none'"],
        "nowhere_at_all:make": ["No module named"],
        "factory_of_a_test": ["must be MODULE:FACTORY"],
        "factory_of_a_test:broken": [
            "in broken\n", "ValueError: of mine",
            "--model factory_of_a_test:broken: no step could be made",
        ],
    }.items():  # fmt: skip
        assert cli.main(["verify", "--model", wrong]) == 2
        shown = capsys.readouterr().err
        assert all(message in shown for message in messages)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_json_is_written_and_no_verdict_given_where_nobody_reads(unbuffered, tmp_path):
    (tmp_path / "factory_of_a_test.py").write_text(FACTORY)
    command = [sys.executable, "-m", "bngd_triton", "verify", "--model", "factory_of_a_test:make"]
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [*command, "--json", "report.json"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE,
        text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")
    assert json.loads((tmp_path / "report.json").read_text())["passed"]


def test_what_a_step_left_alone_is_told_beside_the_verdict():
    """Nothing is wrong where nothing moved, but nothing was shown either."""
    model = network()
    model[0].bias.requires_grad_(False)
    report = verify_step(model, BNGD(model.parameters()), lambda m: loss_of(m) * torch.inf)
    assert report.ok
    assert report.skipped == report.as_dict()["skipped"] == 6 + 1 + 1 + 3 + 1
    assert f"left as they were: {report.skipped}" in str(report)
    assert report.without_gradient == ("0.bias",)
    assert "without a gradient: 0.bias" in str(report)
    assert not verify_step(model, BNGD(model.parameters()), loss_of).skipped
