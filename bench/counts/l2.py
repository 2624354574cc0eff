"""Which reads of a step hit L2: a simulation of its spans and chunks, 2048 entries at a time.

As many programs as run at a time take turns; the cache is fully associative and drops what was used
longest ago, or, where hints are honoured, first what was marked `evict_first` and last what was
marked `evict_last`. Tiles are left out: they read what nobody else does.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from bench.counts import h200
from bench.workloads import WORKLOADS

UNIT = 2048
# registers leave so many programs to an SM: statistics, updates, the single launch
RESIDENT = (9, 12, 7)
STORAGES = {
    "fp32": (torch.float32, {"param": 4, "momentum": 4}),
    "bf16 split": (torch.bfloat16, {"param": 2, "momentum": 4, "remainder": 2}),
}


class Cache:
    """Bytes by unit, and what went to and from memory."""

    def __init__(self, capacity: int, hints: bool) -> None:
        self.capacity, self.hints = capacity, hints
        # what goes first, and what goes last: unit to bytes and whether they were written
        self.queues: tuple[OrderedDict[Any, tuple[int, bool]], ...] = (OrderedDict(), OrderedDict())
        self.used = self.moved = self.hits = 0

    def access(self, unit: Any, size: int, written: bool, keep: bool) -> bool:
        """Whether it was there."""
        found = next((queue.pop(unit) for queue in self.queues if unit in queue), None)
        if found is None:
            self.moved += size
            self.used += size
        dirty = written or (found is not None and found[1])
        self.queues[keep or not self.hints][unit] = size, dirty
        while self.used > self.capacity:
            _, (gone, dirty) = (self.queues[0] or self.queues[1]).popitem(last=False)
            self.used -= gone
            self.moved += gone * dirty
        return found is not None

    def flush(self) -> None:
        self.moved += sum(size for queue in self.queues for size, dirty in queue.values() if dirty)


def simulate(plan: Any, form: str, grad: int, moved: dict[str, int], cache: Cache) -> None:
    """A step's accesses; `moved` are bytes of an entry of what is read and written."""
    from bngd_triton.kernels import tables as t

    pending: dict[int, int] = {}

    def span(row: list[int], tensors: list[int]) -> Iterator[bool]:
        start, n = row[t.SPAN_START], row[t.SPAN_LENGTH]
        for unit in range(start // UNIT, -(-(start + n) // UNIT)):
            cache.access(("grad", tensors[row[t.SPAN_TENSOR]], unit), UNIT * grad, False, True)
            yield True
        pending[row[t.SPAN_SLICE]] -= 1

    def chunk(row: list[int], tensors: list[int]) -> Iterator[bool]:
        while pending[row[t.CHUNK_SLICE]]:
            yield False
        start, n = row[t.CHUNK_START], row[t.CHUNK_LENGTH]
        for unit in range(start // UNIT, -(-(start + n) // UNIT)):
            at = tensors[row[t.CHUNK_TENSOR]], unit
            cache.hits += UNIT * cache.access(("grad", *at), UNIT * grad, False, False)
            for name, size in moved.items():
                cache.access((name, *at), UNIT * size, True, False)
            yield True

    for batch in plan.batches:
        spans, chunks = batch.spans.tolist(), batch.chunks.tolist()
        for row in spans:
            pending[row[t.SPAN_SLICE]] = pending.get(row[t.SPAN_SLICE], 0) + 1
        order = list(batch.order)
        work = [[span(row, order) for row in spans], [chunk(row, order) for row in chunks[::-1]]]
        resident = RESIDENT[:2]
        if form == "single-launch":
            items = batch.work(plan.tuning).items.tolist()
            both = {t.SPAN_ITEM: span, t.CHUNK_ITEM: chunk}
            work = [[both[item[t.ITEM_KIND]](item[t.ITEM_ROW :], order) for item in items]]
            resident = RESIDENT[2:]
        for programs, each in zip(work, resident):
            todo, running = iter(programs), []
            while True:
                while len(running) < h200.SMS * each and (new := next(todo, None)) is not None:
                    running.append(new)
                if not running:
                    break
                running = [program for program in running if next(program, None) is not None]
    cache.flush()


def rows(workload: str) -> Iterator[dict[str, Any]]:
    """Bytes from and to memory for each entry, of a step by tensor."""
    from bngd_triton.kernels import devices
    from bngd_triton.kernels.build_plan import build
    from bngd_triton.kernels.plan import Entry
    from bngd_triton.records import new_record

    base = devices.TABLE["sm_90"].tuning
    tuning = dataclasses.replace(base, wave=devices.wave_for(h200.L2, base.wave))
    for label, (dtype, moved) in STORAGES.items():
        entries = []
        for shape in WORKLOADS[workload].shapes():
            # contents are never looked at
            param, grad = (torch.empty(shape, dtype=dtype) for _ in range(2))
            master = torch.empty(shape, dtype=torch.int16) if "remainder" in moved else None
            record = new_record(1, torch.device("cpu"))
            momentum = torch.empty(shape)
            entries.append(Entry(param, grad, momentum, record, 0, 1, True, None, master))
        plan = build(entries, tuning)
        n = sum(int(batch.spans[:, 2].sum()) for batch in plan.batches)
        for form in ("two-launch", "single-launch"):
            for capacity in h200.L2_MODELLED:
                for hints in (True, False):
                    cache = Cache(capacity, hints)
                    simulate(plan, form, dtype.itemsize, moved, cache)
                    yield {
                        "workload": workload, "storage": label, "form": form, "l2": capacity,
                        "hints": hints, "bytes": round(cache.moved / n, 1),
                        "hits": round(cache.hits / n, 2),
                    }  # fmt: skip
