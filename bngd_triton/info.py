"""`bngd info`: versions, devices and the path that each will take; for a bug report.

Nothing here may fail: what is broken is shown as its error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch

from . import __version__
from .kernels.devices import OTHERS, TABLE, Tuning, architecture_of, tuning_for
from .kernels.launch import FORMS
from .kernels.support import has_triton, interpreting, why_not

PACKAGES = ("numpy", "triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")
EXTRAS = (
    "matplotlib", "scikit-learn", "rich", "tensorboard", "transformers", "accelerate", "lightning",
    "timm", "safetensors",
)  # fmt: skip
# what the host's fast paths use of torch beside its public functions; without them steps are the
# same, but take longer on the host, or parameters stay where they are
PRIVATE = (
    "torch._C._dynamo.guards.TensorGuards",
    "torch._C._storage_Use_Count",
)
_ERROR = "error: "


def collect() -> dict[str, Any]:
    """Everything, as JSON can hold it: a part that cannot be had is ``"error: ..."``."""
    devices = _devices()
    return {
        "steps are served by": {
            name: found["served by"] if isinstance(found, Mapping) else found
            for name, found in devices.items()
        },
        "versions": {
            "bngd_triton": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": str(torch.__version__),
            **{name: _tried(_version, name) for name in PACKAGES},
            "CUDA runtime": torch.version.cuda,
            "HIP runtime": torch.version.hip,
            "NVIDIA driver": _tried(_driver),
        },
        "kernels": {
            "triton imports": _tried(_import_triton),
            "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
            "interpreter": _tried(interpreting),
        },
        "devices": devices,
        "private functions of torch": {name: _tried(_found, name) for name in PRIVATE},
        "optional packages": {name: _tried(_version, name) for name in EXTRAS},
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """`collect`'s answer as text."""
    text = []
    for title, part in found.items():
        rows = part.items() if isinstance(part, Mapping) else [("", part)]
        text += ["", title]
        for name, value in rows:
            if isinstance(value, Mapping):
                text.append(f"  {name}")
                text += [f"    {key:22} {_plain(item)}" for key, item in value.items()]
            else:
                text.append(f"  {name:24} {_plain(value)}")
    return text[1:]


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _tried(part: Callable[..., Any], *args: Any) -> Any:
    """What `part` returns, or the error that it raises."""
    try:
        return part(*args)
    # a broken installation may raise anything, on import too
    except Exception as error:
        first = str(error).partition("\n")[0]
        return f"{_ERROR}{type(error).__name__}: {first}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip().partition("\n")[0] or None


def _import_triton() -> Any:
    if not has_triton():
        return "not installed"
    importlib.import_module("triton.language")
    return importlib.import_module("triton").__version__


def _found(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        # part of an extension module, or not there
        rest = module.removeprefix("torch.")
        return hasattr(attrgetter(rest)(torch), attribute)


def _devices() -> Any:
    found = {"cpu": _tried(_device, torch.device("cpu"))}
    for kind in ("cuda", "xpu", "mps"):
        count = _tried(_count, kind)
        if not isinstance(count, int):
            found[kind] = count
            continue
        for index in range(count):
            device = torch.device(kind, index)
            found[str(device)] = _tried(_device, device)
    return found


def _count(kind: str) -> int:
    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        return 0
    return int(module.device_count())


def _device(device: torch.device) -> dict[str, Any]:
    """What a device is, and what a step of float32 parameters there does."""
    about: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if device.type != "cpu":
        about = _tried(_hardware, device)
        if not isinstance(about, dict):
            about = {"name": about}
    reason = _tried(_why_not, device)
    about["served by"] = "the eager reference"
    if reason is None:
        # in the interpreter kernels are for tests
        about["served by"] = "the kernels" + ", if fused=True" * (device.type == "cpu")
    elif reason.startswith(_ERROR):
        about["served by"] = "unknown"
    about["because"] = reason
    if device.type != "mps":
        about |= {name: _tried(part, device) for name, part in _KERNEL_PARTS.items()}
    return about


def _why_not(device: torch.device) -> str | None:
    reason = why_not(torch.empty(1, dtype=torch.float32, device=device))
    if reason is None:
        # what is installed may be broken
        _import_triton()
    return reason


def _hardware(device: torch.device) -> dict[str, Any]:
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None)
    capability = getattr(properties, "major", None)
    return {
        "name": properties.name,
        "compute capability": (
            None if capability is None else f"{properties.major}.{properties.minor}"
        ),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": processors or getattr(properties, "gpu_subslice_count", None),
    }


def _row(device: torch.device) -> str:
    """The row of `devices.TABLE` that applies."""
    name, tuning = architecture_of(device), tuning_for(device)
    if name in TABLE:
        return f"row {name}: {TABLE[name].reason}"
    (wave,) = (wave for wave, row in OTHERS.items() if row.tuning == tuning)
    return f"no row of its own, others with waves of {wave}: {OTHERS[wave].reason}"


def _form(tuning: Tuning) -> str:
    if tuning.form or not tuning.single_to:
        return tuning.form or FORMS[0]
    return f"{FORMS[1]} for {tuning.single_from} to {tuning.single_to} bytes, else {FORMS[0]}"


_KERNEL_PARTS: dict[str, Callable[[torch.device], Any]] = {
    "architecture": architecture_of,
    "sizes": _row,
    "form of a step": lambda device: _form(tuning_for(device)),
    "statistics": lambda device: "float64 lanes" if tuning_for(device).wide else "float32 blocks",
}
