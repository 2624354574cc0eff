"""Distributed checkpoints: saved on 4 ranks, loaded on 4, 2 and 1, and back."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing import ProcessExitedException

from bngd_triton import BNGD
from bngd_triton.verify.tolerances import ULP
from support import distributed_checkpoints
from support.checkout import EXAMPLES
from support.closeness import ulps
from support.distributed_checkpoints import FORMS, LAST, SAVED, made
from support.processes import WorkerError, needs_gloo, run
from support.time_limits import patience

pytestmark = [
    needs_gloo,
    # loading in one process, without a group, is meant
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder):
    return distributed_checkpoints.visited(folder)


@pytest.fixture(scope="module")
def alone():
    """The same training in one process, without a checkpoint."""
    whole = made(None)
    whole.train(0, LAST)
    return whole.snapshot()


def assert_same(got, want):
    assert got.groups == want.groups
    assert set(got.kept) == set(want.kept)
    for key, value in want.kept.items():
        assert got.kept[key].dtype is value.dtype, key
        assert torch.equal(got.kept[key], value), key


def assert_close(got, whole):
    """Within the rounding of another order of sums; what is rounded at random is left out."""
    compared = 0
    for name, index in got.indices.items():
        if name.startswith("stochastic"):
            continue
        ours, theirs = (one.kept[f"{name} float32"] for one in (got, whole))
        theirs = theirs.flatten()[index]
        assert ulps(ours, theirs) <= ULP, name
        compared += ours.numel()
    assert compared or not any(map(len, got.indices.values()))


@pytest.mark.slow
def test_training_goes_on_as_if_uninterrupted(ranks, alone):
    for rank in ranks:
        # nor does saving change anything, or asking for the state before the first step
        assert [group["micro_step"] for group in rank.saving.groups] == [1, 1, 0, 0]
        assert_same(rank.saving, rank.uninterrupted)
        for form in FORMS:
            assert_same(rank.resumed[form], rank.uninterrupted)
        assert_close(rank.uninterrupted, alone)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["two", "one"])
def test_training_goes_on_with_fewer_ranks_and_back(ranks, alone, size):
    for rank in ranks:
        back, want = rank.back[size], rank.uninterrupted
        assert_close(back, alone)
        assert back.groups == want.groups
        dtypes = [{k: value.dtype for k, value in one.kept.items()} for one in (back, want)]
        assert dtypes[0] == dtypes[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_loads_in_a_process_of_its_own(ranks, folder, alone, form):
    whole = made(None, blank=True)
    whole.load(folder / f"four {form}", form)
    assert whole.optimizer.param_groups[0]["micro_step"] == 1
    whole.train(SAVED, LAST)
    assert_close(whole.snapshot(), alone)


def test_asking_for_state_between_steps_without_any():
    def weights(ask):
        torch.manual_seed(0)
        model = nn.Linear(6, 5).bfloat16()
        optimizer = BNGD(
            model.parameters(), granularity="tensor", momentum=0.0, master_weights="stochastic"
        )
        for _ in range(3):
            model(torch.ones(2, 6).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if ask:
                assert not get_optimizer_state_dict(model, optimizer)["state"]
                assert optimizer.grad_stats()["param_groups[0]['params'][0]"].std > 0
        return model.weight.detach()

    assert torch.equal(weights(ask=True), weights(ask=False))


def test_state_that_a_parameter_never_had(tmp_path):
    def fresh():
        model = nn.Linear(3, 2)
        return model, BNGD(model.parameters())

    model, optimizer = fresh()
    model.weight.grad = torch.randn(2, 3)
    optimizer.step()
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    again, loaded = fresh()
    into = {"optimizer": get_optimizer_state_dict(again, loaded)}
    with pytest.raises(CheckpointException, match=r"Missing key.*bias"):
        dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(into, checkpoint_id=tmp_path, planner=partly, no_dist=True)
    set_optimizer_state_dict(again, loaded, into["optimizer"])
    momentum = loaded.state[again.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])
    assert not loaded.state[again.bias]["momentum_buffer"].any()


def example():
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import train_fsdp2

    return train_fsdp2


@pytest.mark.slow
def test_a_rank_killed_while_saving_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises((WorkerError, ProcessExitedException)):
        run(2, distributed_checkpoints.killed_while_saving, tmp_path)
    assert list((tmp_path / "step-2").glob("*.distcp"))
    train_fsdp2 = example()
    newest = train_fsdp2.latest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-1"
    model = train_fsdp2.make_model()
    optimizer = train_fsdp2.make_optimizer(model)
    assert train_fsdp2.load(newest, 2, model, optimizer) == 1
    with pytest.raises(SystemExit, match="resume it with --steps 2"):
        train_fsdp2.load(newest, 3, model, optimizer)
    for param, saved in zip(model.parameters(), torch.load(tmp_path / "weights.pt")):
        assert torch.equal(param, saved)


@pytest.mark.slow
def test_example_is_stopped_and_resumed(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        str(EXAMPLES / "train_fsdp2.py"), "--steps", "40", "--save-every", "4",
        "--folder", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nowhere = subprocess.DEVNULL
    first = subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere)
    try:
        end = time.monotonic() + patience(100)
        while example().latest_checkpoint(tmp_path) is None:
            assert time.monotonic() < end
            assert first.poll() is None
            time.sleep(0.02)
    finally:
        # a SIGKILL would leave the workers running, which torchrun starts in sessions of their own
        first.terminate()
        first.wait(timeout=patience(60))
    stopped = int(example().latest_checkpoint(tmp_path).name.removeprefix("step-"))
    assert stopped < 40
    done = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True,
        timeout=patience(200),
    )  # fmt: skip
    # torch's gloo threads abort some processes that have ended, those of plain DDP and SGD too
    ended = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or ended, done.stderr
    (resumed,) = re.findall(r"resumed .* at step (\d+)", done.stdout)
    assert int(resumed) == stopped
    ((apart, last),) = re.findall(r"differ by at most (\S+), the last one is (\S+)", done.stdout)
    # bytes drawn evenly would be at log(256) = 5.5
    assert float(last) < 3.5
    # seen: 5e-7 and 8 units; statistics of the shards would end at 1e-1
    assert float(apart) < 1e-5
    (units,) = re.findall(r"weights differ by at most \S+, (\d+) ulp", done.stdout)
    assert int(units) < 1000
