"""Checkpoint files: whole or not there, and checked before they are used."""

import io
import json
import os
import pickle
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from torch import Tensor, nn

from bngd_triton import BNGD, load_checkpoint, save_checkpoint
from support.checkout import ROOT
from support.time_limits import patience


class Unknown:
    """What `torch.load` reads with weights_only=False alone."""


def plain(value):
    """What `==` compares to the bit, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [plain(item) for item in value]
    return (value.dtype, value.tolist()) if isinstance(value, Tensor) else (type(value), value)


def assert_same(got, want):
    assert plain(got) == plain(want)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("way", ["eager", "fused"])
def test_a_killed_run_ends_as_one_that_was_not(way, tmp_path):
    # on the CPU everywhere: a process that is killed every few steps has no time to open a GPU
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "support.killed_training", str(tmp_path), way],
        cwd=ROOT / "tests",
        capture_output=True, text=True, env=environment, timeout=patience(300),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # four stages have begun a file that is not in place yet
    assert json.loads(done.stdout) == [False, False, True, True, True, True, False, False]
    want = load_checkpoint(tmp_path / "never.pt")
    states, groups = want["optimizer"]["state"].values(), want["optimizer"]["param_groups"]
    kept = {key for state in states for key in state}
    assert kept == {"momentum_buffer", "master_remainder", "window"}
    assert groups[1]["rounding_steps"] > 0
    assert groups[0]["lr"] < groups[0]["initial_lr"]
    for name in ("random", "saves"):
        assert_same(load_checkpoint(tmp_path / f"{name}.pt"), want)
        assert not (tmp_path / f"{name}.pt.tmp").exists()


@pytest.fixture
def path(tmp_path):
    """A checkpoint of a tensor, a generator and a number."""
    path = tmp_path / "run.pt"
    generator = torch.Generator().manual_seed(7)
    save_checkpoint(path, weights=torch.arange(200.0), order=generator, step=3)
    return path


def assert_whole(path):
    """That checkpoint, and nothing beside it."""
    order = torch.Generator().manual_seed(7).get_state()
    content = {"weights": torch.arange(200.0), "order": order, "step": 3}
    assert_same(load_checkpoint(path), content)
    assert_same(torch.load(path, weights_only=True), content)
    assert os.listdir(path.parent) == ["run.pt"]


def test_objects_are_saved_by_their_state_dicts(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = BNGD(model.parameters(), lr=torch.tensor(0.1), momentum_dtype=torch.bfloat16)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    save_checkpoint(tmp_path / "a.pt", model=model, optimizer=optimizer, schedule=schedule)
    saved = load_checkpoint(tmp_path / "a.pt")
    for name, one in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
        assert_same(dict(saved[name]), dict(one.state_dict()))


@pytest.mark.parametrize("size", [0, 1, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(path, size):
    whole = path.read_bytes()
    cut = int(size * len(whole)) if isinstance(size, float) else size
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"run\.pt \(\d+ bytes\) is incomplete, or no checkpoint"):
        load_checkpoint(path)


def test_a_changed_byte_is_refused_or_changes_nothing(path):
    whole = path.read_bytes()
    # those of the tensors' entries; headers have names, dates and padding that nobody reads
    start = whole.index(torch.arange(200.0).numpy().tobytes())
    refused = dict.fromkeys(range(0, len(whole), 13), False)
    for place in refused:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except ValueError:
            refused[place] = True
        else:
            assert_whole(path)
    assert all(refused[place] for place in refused if start <= place < start + 800)


def test_checksums_are_written_where_they_are_switched_off(path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(path, weights=torch.arange(200.0))
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load_checkpoint(path)["weights"], torch.arange(200.0))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"step": 3}))
    with pytest.raises(ValueError, match=r"a\.pt .* no checkpoint: File is not a zip file; resume"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"a\.pt holds a list, no objects by name"):
        load_checkpoint(path)
    torch.save({"a": Unknown()}, path)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read: Unsupported global: .*Unknown"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    "value",
    [Unknown(), lambda: None, threading.Lock(), numpy.float64(1.0)],
    ids=["class", "lambda", "lock", "numpy"],
)
def test_what_would_not_load_is_refused_and_the_last_file_stays(path, value):
    with pytest.raises(ValueError, match=r"run\.pt was not written, since it would not load again"):
        save_checkpoint(path, step=4, other=value)
    assert_whole(path)


def test_nothing_to_save_is_refused(path):
    with pytest.raises(ValueError, match="there is nothing to save"):
        save_checkpoint(path)
    assert_whole(path)


def no_space(*_):
    raise OSError(28, "No space left on device")


class FullDisk(io.BytesIO):
    """Takes 1000 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            no_space()
        return super().write(data)


def save_on_a_full_disk(content, _, save=torch.save):
    save(content, FullDisk())


@pytest.mark.parametrize(
    ("module", "function", "instead"),
    [(torch, "save", save_on_a_full_disk), (os, "fsync", no_space), (os, "replace", no_space)],
)
def test_a_full_disk_leaves_the_last_file(path, monkeypatch, module, function, instead):
    monkeypatch.setattr(module, function, instead)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, weights=torch.zeros(10_000))
    monkeypatch.undo()
    assert_whole(path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "a.pt", step=1)


def test_the_file_is_on_the_disk_before_its_name_is(path, monkeypatch):
    calls = []

    def note(name, real):
        return lambda *args: (calls.append(name), real(*args))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    save_checkpoint(path, step=4)
    # the file, its name, and the folder that holds the name
    assert calls == ["fsync", "replace", "fsync"][: 3 if os.name == "posix" else 2]


def test_a_link_keeps_pointing_where_it_did(path):
    link = path.with_name("last.pt")
    link.symlink_to(path)
    save_checkpoint(link, step=4)
    assert link.is_symlink()
    assert_same(load_checkpoint(path), {"step": 4})
