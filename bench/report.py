"""The results: one JSON document, written after every arm, a short table and a chart.

``python -m bench.report RESULTS.json`` draws a PNG beside it.
"""

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
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

_NUMBER = (int, float)
# Okabe and Ito's
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
# what every row has; None is allowed where the device does not tell
ROW: dict[str, tuple[type, ...]] = {
    "workload": (str,),
    "dtype": (str,),
    "arm": (str,),
    "median_us": _NUMBER,
    "p20_us": _NUMBER,
    "p80_us": _NUMBER,
    "host_us": (int, float, type(None)),
    "replay_us": (int, float, type(None)),
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
        key = (row["workload"], row["dtype"], row["arm"])
        if key in seen:
            raise ValueError(f"two rows for {key}")
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
    for path in sorted((ROOT / "kernels").rglob("*.py")):
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
        suite: its name.
    """

    def __init__(self, folder: Path, device: torch.device, suite: str):
        about = environment(device)
        now = datetime.datetime.now(datetime.timezone.utc)
        self.document: dict[str, Any] = {
            "suite": suite, "started": now.isoformat(timespec="seconds"), "environment": about,
            "commit": commit(), "kernels_sha256": kernels_hash(), "copy_gbps": None,
            "finished": False, "rows": [], "unavailable": [], "not_run": [],
        }  # fmt: skip
        stem = f"{slug(about['gpu'])}-{now:%Y-%m-%d}"
        names = [f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000))]
        # several runs of a day stand side by side
        self.path = next(folder / name for name in names if not (folder / name).exists())

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        text = json.dumps(self.document, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)


def table(document: dict[str, Any]) -> str:
    """A line per row, and what has none."""
    lines = [
        f"{'workload':16}{'dtype':12}{'arm':20}{'us':>11}{'p20-p80':>20}{'replay':>11}"
        f"{'host us':>10}{'kernels':>8}{'copy %':>8}"
    ]
    for row in document["rows"]:
        spread = f"{row['p20_us']:.1f}-{row['p80_us']:.1f}"
        host, replay = (
            "-" if row[name] is None else f"{row[name]:.1f}" for name in ("host_us", "replay_us")
        )
        launches = "-" if row["launches"] is None else row["launches"]
        lines.append(
            f"{row['workload']:16}{row['dtype']:12}{row['arm']:20}{row['median_us']:11.1f}"
            f"{spread:>20}{replay:>11}{host:>10}{launches:>8}{100 * row['copy_fraction']:8.1f}"
        )
    reasons: dict[str, list[str]] = {}
    for missing in document["unavailable"]:
        key = f"{missing['arm']} {missing['dtype']}: {missing['reason']}"
        reasons.setdefault(key, []).append(missing["workload"])
    lines += [f"not available: {key} ({', '.join(where)})" for key, where in reasons.items()]
    lines += [f"not run: {what}" for what in document["not_run"]]
    return "\n".join([*lines, f"copy bandwidth {document['copy_gbps']:.0f} GB/s"])


def draw(document: dict[str, Any], path: Path) -> None:
    """Percent of the copy bandwidth that each arm reaches: a group of bars for each case."""
    from matplotlib.figure import Figure

    rows = document["rows"]
    places = list(dict.fromkeys((row["workload"], row["dtype"]) for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    found = {(row["workload"], row["dtype"], row["arm"]): row["copy_fraction"] for row in rows}
    figure = Figure(figsize=(max(8.0, 1.9 * len(places)), 6.0), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(arms)
    for at, arm in enumerate(arms):
        shown = [i for i, place in enumerate(places) if (*place, arm) in found]
        left = (at - (len(arms) - 1) / 2) * width
        heights = [100 * found[(*places[i], arm)] for i in shown]
        hatch = "//" if at >= len(_COLORS) else ""
        color = _COLORS[at % len(_COLORS)]
        axes.bar([i + left for i in shown], heights, width, label=arm, color=color, hatch=hatch)
    axes.axhline(100, color="0.3", linewidth=1)
    axes.set_xticks(range(len(places)), [f"{workload}\n{dtype}" for workload, dtype in places])
    axes.set_ylabel("% of copy bandwidth, each tensor counted once")
    about = document["environment"]
    copied = f"copy {document['copy_gbps']:.0f} GB/s"
    axes.set_title(f"{about['gpu']}, {copied}, torch {about['torch']}, Triton {about['triton']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def chart(names: list[str]) -> int:
    """Draw each of some result files beside it; 2 for one that is none."""
    for name in names:
        source = Path(name)
        try:
            document = json.loads(source.read_text(encoding="utf-8"))
            check(document)
            draw(document, source.with_suffix(".png"))
        except ImportError as error:
            print(f"No chart: {error}; pip install matplotlib, then bngd bench --plot {name}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"bngd: error: {name} is not a result file: {error}", file=sys.stderr)
            return 2
        else:
            print(f"Wrote {source.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(chart(sys.argv[1:]))
