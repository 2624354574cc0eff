"""What the measurements are to show, held against the rows of result files.

Each target is computed from committed rows alone; where a row is missing, so is the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .models import WORKLOADS

Document = dict[str, Any]

MIB = 1 << 20
# the tables of a plan, generously: a slice's row, its partial result and a chunk's row for every
# 2048 entries; and what a tensor has in any case (addresses, a segment, a record)
SLICE = 2048
TABLE_BYTES_PER_SLICE = 128
TABLE_BYTES_PER_TENSOR = 512


class Verdict(NamedTuple):
    """One target, where it was looked for, and what was found.

    Attributes:
        what: in words.
        target: as text.
        found: as text; empty where a row is missing.
        met: None where a row is missing.
    """

    what: str
    target: str
    found: str
    met: bool | None


class Rows:
    """Rows of several result files; a ratio is of two rows of one file."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = documents

    def pairs(self, workload: str, dtype: str, *arms: str) -> list[dict[str, Any]] | None:
        """A row for each arm, all from the same file; None if no file has them all."""
        for document in self.documents:
            found = {
                row["arm"]: row
                for row in document["rows"]
                if (row["workload"], row["dtype"]) == (workload, dtype)
            }
            if set(arms) <= set(found):
                return [found[arm] for arm in arms]
        return None

    def all_of(self, arm: str) -> list[dict[str, Any]]:
        """An arm's rows of all files."""
        return [row for document in self.documents for row in document["rows"] if row["arm"] == arm]


def evaluate(documents: Sequence[Document], counters: Sequence[Document] = ()) -> list[Verdict]:
    """All targets.

    Args:
        documents: of `bench.gpu`, of one GPU and commit.
        counters: of `bench.counters`.
    """
    rows = Rows(documents)
    l2 = next(
        (d["environment"]["l2_bytes"] for d in documents if "l2_bytes" in d["environment"]), 0
    )
    verdicts: list[Verdict] = []
    for arm, name, bounds in (
        ("bngd", "BNGD", {"resnet50": 1.0, "vit-b16": 1.0, "gpt2-124m": 1.03}),
        ("bngd-row", "BNGD by rows", {"resnet50": 1.05, "vit-b16": 1.05, "gpt2-124m": 1.05}),
    ):
        for workload, bound in bounds.items():
            verdicts.append(
                _ratio(rows, f"time of {name} over torch's fused SGD", workload, "fp32", arm,
                       "torch-sgd-fused", bound)
            )  # fmt: skip
    for workload in ("gpt2-1.5b", "llama3-8b-shard"):
        verdicts.append(
            _ratio(rows, "time of BNGD over torch's fused SGD, all in bf16", workload, "bf16",
                   "bngd", "torch-sgd-fused", mixed_bound(workload, l2))
        )  # fmt: skip
    for workload, dtype, bound in (
        ("gpt2-1.5b", "bf16-split", 0.88), ("llama3-8b-shard", "bf16-split", 0.88),
        ("vit-b16", "fp32", 0.88), ("gpt2-124m", "fp32", 0.85),
    ):  # fmt: skip
        found = rows.pairs(workload, dtype, "bngd")
        share = found and found[0]["copy_fraction"]
        verdicts.append(_least("share of the copy bandwidth", workload, dtype, bound, share))
    verdicts += _moved(documents, counters)
    for workload in ("many-1000x1000", "moe-10k"):
        for rival in ("optimi-sgd", "flashoptim-sgd"):
            verdicts.append(_faster(rows, workload, rival, 5.0))
    verdicts.append(_faster(rows, "gpt2-124m", "eager", 3.0))
    verdicts.append(_faster(rows, "gpt2-124m", "compile", 1.15))
    verdicts += _launches(rows)
    verdicts += _host(rows)
    verdicts += _memory(rows)
    return verdicts


def mixed_bound(workload: str, l2_bytes: int) -> float:
    """1.10 for entries of tensors whose bf16 gradient fits the L2, 1.22 for others; their mean."""
    sizes = [math.prod(shape) for shape in WORKLOADS[workload].shapes()]
    fitting = sum(size for size in sizes if 2 * size <= l2_bytes)
    return 1.22 - 0.12 * fitting / sum(sizes)


def _ratio(
    rows: Rows, what: str, workload: str, dtype: str, arm: str, rival: str, bound: float
) -> Verdict:
    found = rows.pairs(workload, dtype, arm, rival)
    ratio = found and found[0]["median_us"] / found[1]["median_us"]
    return _most(what, f"{workload} {dtype}", bound, ratio, "{:.3f}")


def _faster(rows: Rows, workload: str, rival: str, bound: float) -> Verdict:
    found = rows.pairs(workload, "fp32", "bngd", rival)
    times = found and found[1]["median_us"] / found[0]["median_us"]
    return _least(f"times as fast as {rival}", workload, "fp32", bound, times)


def _most(what: str, where: str, bound: float, found: float | None, form: str) -> Verdict:
    target = f"<= {form.format(bound)}"
    if found is None:
        return Verdict(f"{what}, {where}", target, "", None)
    return Verdict(f"{what}, {where}", target, form.format(found), found <= bound)


def _least(what: str, workload: str, dtype: str, bound: float, found: float | None) -> Verdict:
    name, target = f"{what}, {workload} {dtype}", f">= {bound:g}"
    if found is None:
        return Verdict(name, target, "", None)
    return Verdict(name, target, f"{found:.3f}", found >= bound)


def _moved(documents: Sequence[Document], counters: Sequence[Document]) -> Iterator[Verdict]:
    """By the counters' bytes and the benchmark's times: a profiled step's own time is another."""
    for workload, dtype in (("gpt2-124m", "fp32"), ("gpt2-1.5b", "bf16")):
        share = None
        read = [
            row["dram_bytes"]
            for document in counters
            for row in document["rows"]
            if (row["workload"], row["dtype"], row["arm"]) == (workload, dtype, "bngd")
        ]
        for document in documents:
            timed = Rows([document]).pairs(workload, dtype, "bngd")
            if timed and read and read[0] is not None and share is None:
                share = read[0] / timed[0]["median_us"] / 1e3 / document["copy_gbps"]
        what = "share of the copy bandwidth by bytes that were moved"
        yield _least(what, workload, dtype, 0.92, share)


def _launches(rows: Rows) -> Iterator[Verdict]:
    """Every workload is one class of storage dtypes and alignment."""
    counts = [row["launches"] for row in rows.all_of("bngd") if row["launches"] is not None]
    most = max(counts, default=None)
    yield _most("launches of a step", "most of any case", 2, most, "{:.0f}")


def _host(rows: Rows) -> Iterator[Verdict]:
    found = rows.pairs("host-300", "fp32", "bngd", "torch-sgd-fused")
    mine, theirs = (None, 0.0) if found is None else [row["host_us"] for row in found]
    what = "host time of a step over 300 tensors, us"
    yield _most(what, "fp32", 120.0, mine, "{:.1f}")
    target = "< torch's fused SGD"
    if mine is None:
        yield Verdict(what, target, "", None)
    else:
        yield Verdict(what, target, f"{mine:.1f} against {theirs:.1f}", mine < theirs)


def _memory(rows: Rows) -> Iterator[Verdict]:
    """The case that is furthest above, or least below, what it may take."""
    over: list[tuple[float, dict[str, Any], float]] = []
    for row in rows.all_of("bngd"):
        if row["peak_extra_bytes"] is None:
            continue
        slices = row["elements"] / SLICE
        allowed = MIB + TABLE_BYTES_PER_SLICE * slices + TABLE_BYTES_PER_TENSOR * row["tensors"]
        over.append((row["peak_extra_bytes"] - allowed, row, allowed))
    what, target = "extra memory of a step, the worst case", "<= 1 MiB and the tables"
    if not over:
        yield Verdict(what, target, "", None)
        return
    excess, row, allowed = max(over, key=lambda one: one[0])
    found = f"{row['peak_extra_bytes'] / MIB:.2f} of {allowed / MIB:.2f} MiB, {row['workload']} "
    yield Verdict(what, target, found + row["dtype"], excess <= 0)


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Markdown lines."""
    said: Callable[[bool | None], str] = {
        True: "yes",
        False: "no",
        None: "not measured",
    }.__getitem__
    lines = ["| what | target | found | met |", "| --- | --- | --- | --- |"]
    lines += [f"| {v.what} | {v.target} | {v.found or '-'} | {said(v.met)} |" for v in verdicts]
    return lines
