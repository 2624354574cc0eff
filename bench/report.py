"""The results: one JSON document, written after every case, and a short table."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

_NUMBER = (int, float)
# what every row has; None is allowed where the device does not tell
ROW: dict[str, tuple[type, ...]] = {
    "workload": (str,),
    "dtype": (str,),
    "arm": (str,),
    "median_us": _NUMBER,
    "p20_us": _NUMBER,
    "p80_us": _NUMBER,
    "n": (int,),
    "host_us": _NUMBER,
    "launches": (int, type(None)),
    "bytes_per_element": (int,),
    "gbps": _NUMBER,
    "copy_fraction": _NUMBER,
    "peak_extra_bytes": (int, type(None)),
}


def check(document: dict[str, Any]) -> None:
    """Raise ValueError for the first thing in a document that is not as described here."""
    for key in ("rows", "unavailable", "environment", "commit", "kernels_sha256", "copy_gbps"):
        if key not in document:
            raise ValueError(f"results lack {key!r}")
    seen = set()
    for row in document["rows"]:
        for name, types in ROW.items():
            value = row.get(name, ...)
            if not isinstance(value, types) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"{name} of a row is {value!r}: {row}")
        key = (row.get("question"), row["workload"], row["dtype"], row["arm"])
        if key in seen:
            raise ValueError(f"two rows for {key[1:]}")
        seen.add(key)
        if not 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]:
            raise ValueError(f"quantiles out of order: {row}")
    for missing in document["unavailable"]:
        if not missing["reason"]:
            raise ValueError(f"no reason: {missing}")


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a time depends on that is not in the checkout."""
    found: dict[str, Any] = {
        "gpu": "cpu",
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "os": platform.platform(),
    }
    found |= {name: version(name) for name in ("triton", "torch-optimi", "flashoptim")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        found["clocks"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    return found


def version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(gpu: str) -> str:
    """A GPU's name for a file: ``NVIDIA H200`` is ``h200``."""
    words = re.sub(r"[^a-z0-9]+", " ", gpu.lower()).split()
    plain = [w for w in words if w not in ("nvidia", "amd", "geforce", "tesla", "instinct")]
    return "-".join(plain) or "gpu"


def kernels_hash() -> str:
    """SHA-256 over names and contents of the files in `kernels/`."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, ``-dirty`` with changes; None outside git."""
    # a copy of the checkout without its history may be told
    return os.environ.get("BENCH_COMMIT") or _output(
        "git", "describe", "--always", "--dirty", "--abbrev=40"
    )


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Results:
    """A document on its way to a file; `save` writes all that is there.

    Args:
        folder: for the file, which is named after the GPU and the date.
        device: that is measured.
        suite: its name, and the part of it.
        kind: ends the file's name, for results that are no suite's.
    """

    def __init__(self, folder: Path, device: torch.device, suite: str, kind: str = ""):
        about = environment(device)
        now = datetime.datetime.now(datetime.timezone.utc)
        self.document: dict[str, Any] = {
            "suite": suite,
            "started": now.isoformat(timespec="seconds"),
            "environment": about,
            "commit": commit(),
            "kernels_sha256": kernels_hash(),
            "copy_gbps": None,
            "copy_gbps_after": None,
            "finished": False,
            "rows": [],
            "unavailable": [],
            "not_run": [],
            "training": [],
            "cold_start": [],
        }
        stem = f"{slug(about['gpu'])}-{now:%Y-%m-%d}{kind and '-' + kind}"
        names = [f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000))]
        # several parts or runs of a day stand side by side
        self.path = next(folder / name for name in names if not (folder / name).exists())

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        text = json.dumps(self.document, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)


def table(document: dict[str, Any]) -> str:
    """A line per row, and what has none; what was predicted for the run's own copy bandwidth."""
    # the arms import kernels, which Triton defines for the interpreter or the GPU at once
    from .predictions import predict

    lines = [
        f"{'workload':16}{'dtype':11}{'arm':20}{'us':>11}{'predicted':>11}{'replay':>11}{'p20-p80':>20}"
        f"{'host us':>10}{'kernels':>8}{'copy %':>8}"
    ]
    for row in document["rows"]:
        spread = f"{row['p20_us']:.1f}-{row['p80_us']:.1f}"
        replay = row.get("replay_us")
        told = predict(row["workload"], row["dtype"], row["arm"], document["copy_gbps"])
        lines.append(
            f"{row['workload']:16}{row['dtype']:11}{row['arm']:20}{row['median_us']:11.1f}"
            f"{'-' if told is None else format(told, '.1f'):>11}"
            f"{'-' if replay is None else format(replay, '.1f'):>11}{spread:>20}"
            f"{row['host_us']:10.1f}{row['launches'] if row['launches'] is not None else '-':>8}"
            f"{100 * row['copy_fraction']:8.1f}"
        )
    for row in document["training"]:
        lines.append(
            f"training {row['model']:18}{row['arm']:20}{row['iteration_us']:11.1f} us, "
            f"optimizer {100 * row['optimizer_share']:.1f} %"
        )
    reasons: dict[str, list[str]] = {}
    for missing in document["unavailable"]:
        key = f"{missing['arm']} {missing['dtype']}: {missing['reason']}"
        reasons.setdefault(key, []).append(missing["workload"])
    lines += [f"not available: {key} ({', '.join(where)})" for key, where in reasons.items()]
    lines += [f"not run: {what}" for what in document["not_run"]]
    copy = document["copy_gbps"]
    lines.append(f"copy bandwidth {'-' if copy is None else format(copy, '.0f')} GB/s")
    return "\n".join(lines)
