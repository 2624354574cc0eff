"""`bngd info`: what it says, and that nothing makes it fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bngd_triton
from bngd_triton import cli, info
from bngd_triton.kernels import devices, support


def printed(capsys, *arguments):
    assert cli.main(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_this_machine(capsys):
    found = json.loads(printed(capsys, "--json"))
    assert found["versions"]["bngd_triton"] == bngd_triton.__version__
    assert found["versions"]["torch"] == torch.__version__
    # this torch has all that the fast paths use
    assert set(found["private functions of torch"].values()) == {True}
    assert found["devices"]["cpu"]["architecture"] == "interpreter"
    text = printed(capsys)
    # the verdict first
    verdict = found["steps are served by"]["cpu"]
    assert text.startswith(f"steps are served by\n  cpu                      {verdict}\n")
    for name in (*found, *found["devices"]):
        assert name in text
    assert re.search(rf"\n  torch +{re.escape(torch.__version__)}\n", text)
    assert "error" not in text


def test_every_private_function_is_listed():
    """So that a report shows which of them another torch lacks."""
    used = set()
    for path in Path(bngd_triton.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for module, names in re.findall(r"from (torch\._[\w.]*) import ([\w, ]+)", text):
            used |= {f"{module}.{name}" for name in re.split(r",\s*", names)}
        used |= set(re.findall(r"\btorch\._C\.\w+|\btorch\._[a-z]\w+", text))
        used |= {f"torch._C.{name}" for name in re.findall(r'getattr\(torch\._C, "(\w+)"', text)}
    assert used
    listed = set(info.PRIVATE)
    # a module is listed by its functions
    missing = {name for name in used if not any(one.startswith(name) for one in listed)}
    assert not missing


@pytest.fixture
def gpus(monkeypatch):
    """A machine with an H100, a GPU without a row, one that is too old and one that fails."""

    kinds = [("H100", 9, 0), ("Unheard", 10, 3), ("V100", 7, 0)]

    def properties(device):
        if device.index == 3:
            raise RuntimeError("CUDA error: unknown\nmore")
        name, major, minor = kinds[device.index]
        return SimpleNamespace(
            name=name, major=major, minor=minor, total_memory=80 << 30, warp_size=32,
            multi_processor_count=132, L2_cache_size=50 << 20,
        )  # fmt: skip

    class OnGPU(torch.Tensor):
        device = property(lambda self: self.where)

    def empty(*_, device, **__):
        tensor = torch.zeros(1).as_subclass(OnGPU)
        tensor.where = device
        return tensor

    def capability(device):
        return properties(device).major, properties(device).minor

    caches = (devices.architecture_of, devices.tuning_for)
    for cache in caches:
        cache.cache_clear()
    for module, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 4),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", capability),
        (torch, "get_device_module", lambda device: torch.cuda),
        (torch.version, "hip", None),
        (info.torch, "empty", empty),
        (support, "interpreting", lambda: False),
        (info, "interpreting", lambda: False),
        # what `empty` gives is no tensor
        (support, "why_not_memory", lambda _: None),
    ):
        monkeypatch.setattr(module, name, value)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("gpus")
def test_gpus():
    everything = info.collect()
    found = everything["devices"]
    assert list(everything["steps are served by"].values()) == [
        "the eager reference", "the kernels", "the kernels", "the eager reference", "unknown",
    ]  # fmt: skip
    assert found["cuda:0"].items() >= {
        "served by": "the kernels", "because": None, "memory": "80.0 GiB", "multiprocessors": 132,
        "architecture": "sm_90", "sizes": "row sm_90: " + devices.TABLE["sm_90"].reason,
        "form of a step": "two-launch",
    }.items()  # fmt: skip
    assert found["cuda:1"]["sizes"].startswith("no row of its own, others with waves of 32: ")
    assert found["cuda:1"]["statistics"] == "float32 blocks"
    assert "needs compute capability 8.0, cuda:2 has 7.0" in found["cuda:2"]["because"]
    assert found["cuda:3"]["name"] == "error: RuntimeError: CUDA error: unknown"
    assert found["cuda:3"]["sizes"].startswith("error: ")


def test_parts_that_are_broken(monkeypatch, capsys):
    def broken(*_):
        raise OSError("libcuda.so.1: cannot open\nshared object file")

    for module, name in (
        (info.importlib.metadata, "version"), (info, "_driver"), (info, "_import_triton"),
        (torch.cuda, "device_count"), (info, "why_not"), (info, "tuning_for"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = printed(capsys)
    error = "error: OSError: libcuda.so.1: cannot open"
    for name in ("numpy", "NVIDIA driver", "triton imports", "cuda", "because", "sizes"):
        assert re.search(rf"\n +{name} +{error}\n", text), name
    assert "served by              unknown" in text
    assert "shared object" not in text


@pytest.mark.parametrize("there", [False, True], ids=["missing", "broken"])
def test_without_triton(there, tmp_path):
    """In a process of its own; a broken one raises whatever its libraries do."""
    if there:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so')")
        first = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    else:
        first = "import sys; sys.modules['triton'] = None"
    others = "sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'sklearn']))"
    command = "from bngd_triton.cli import main; sys.exit(main(['info', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; {others}; {command}"],
        capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    words = "error: OSError: libtriton.so" if there else "not installed"
    assert found["kernels"]["triton imports"] == words
    cpu = found["devices"]["cpu"]
    if there:
        assert [cpu["served by"], cpu["because"]] == ["unknown", words]
    else:
        assert cpu["served by"] == "the eager reference"
        assert cpu["because"].startswith("Triton is not installed")
