"""Times of arms over the same rotating buffers: windows of steps, taken in turn.

`median_us` is device time: a window's steps are queued while a kernel that only waits keeps the
device busy, so that the device runs them without waiting for the host. An arm that launches more
than the driver's queue holds waits for the host all the same, as it does in training.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

# a window lasts about this long, so that an event's resolution of 0.5 us is under 0.1 % of it
WINDOW_US = 2000.0
MOST_STEPS = 50
# the driver queues 1024 launches before a launch waits
QUEUE = 900
# of the waiting kernel; no GPU is clocked higher, so it waits at least as long as asked
CYCLES_PER_US = 3000
# bounds the wait for a host that is slow: 0.2 s a window
MOST_LEAD_US = 200_000.0
LEAST_WINDOWS = 5
# of a step whose launches are counted: the profiler keeps every event, and reading the 150 000
# kernels of an eager step over 10 000 tensors would take longer than the case
MOST_COUNTED_US = 50_000.0


class Clock(Protocol):
    """Where and how time is taken."""

    device: torch.device
    # whether a profiler has run in this process
    profiled: bool

    def span(self, run: Callable[[], None], lead_us: float = 0.0) -> float:
        """Microseconds that what `run` queues takes, the device being busy for `lead_us` before."""

    def synchronize(self) -> None:
        """Wait for all that was queued."""

    def launches(self, run: Callable[[], None]) -> tuple[int | None, float | None]:
        """Kernels that `run` launches, and the sum of their times in microseconds."""

    def allocated(self) -> int | None:
        """Bytes of tensors that are alive."""

    def peak(self, run: Callable[[], None]) -> int | None:
        """Most bytes of tensors alive at a time while `run` runs."""


class CudaClock:
    """Events, the profiler and the allocator's figures of one GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.profiled = False

    def span(self, run: Callable[[], None], lead_us: float = 0.0) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead_us:
            torch.cuda._sleep(int(min(lead_us, MOST_LEAD_US) * CYCLES_PER_US))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def launches(self, run: Callable[[], None]) -> tuple[int | None, float | None]:
        self.synchronize()
        self.profiled = True
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            self.synchronize()
        # the profiler mirrors `Optimizer.step` and other marked regions on the device's timeline
        kernels = [
            event
            for event in seen.events() or []
            if event.device_type == DeviceType.CUDA
            and not event.is_user_annotation
            and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))
        ]
        return len(kernels), float(sum(event.time_range.elapsed_us() for event in kernels))

    def allocated(self) -> int | None:
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self, run: Callable[[], None]) -> int | None:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device))


class CpuClock:
    """The host's clock, for dry runs: no launches and no memory are counted."""

    device = torch.device("cpu")
    profiled = False

    def span(self, run: Callable[[], None], lead_us: float = 0.0) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6

    def synchronize(self) -> None:
        pass

    def launches(self, run: Callable[[], None]) -> tuple[int | None, float | None]:
        run()
        return None, None

    def allocated(self) -> int | None:
        return None

    def peak(self, run: Callable[[], None]) -> int | None:
        run()
        return None


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Series:
    """One thing that is timed: steps over buffer sets that take turns.

    Attributes:
        name: of the arm.
        steps: one callable per buffer set, or one that steps all sets.
        per_call: steps that one callable takes.
        most_s: no more windows are taken once all of them together took this long.
        estimate_us: of one step.
        host_us: until a step returns, the device idle at its start.
        host_after_profiler: whether that was taken with a profiler attached to the process.
        launches: kernels of one step.
        kernel_us: sum of the kernels' times, by the profiler.
        windows: microseconds per step, one entry per window.
    """

    name: str
    steps: Sequence[Callable[[], Any]]
    most_s: float
    per_call: int = 1
    estimate_us: float = 0.0
    host_us: float = 0.0
    host_after_profiler: bool = False
    launches: int | None = None
    kernel_us: float | None = None
    windows: list[float] = field(default_factory=list)
    _turn: int = 0

    def run(self, count: int) -> None:
        """Make `count` calls, each of the next step."""
        for _ in range(count):
            self.steps[self._turn % len(self.steps)]()
            self._turn += 1

    def per_window(self) -> int:
        """Calls in a window."""
        call_us = max(self.estimate_us * self.per_call, 1.0)
        count = min(MOST_STEPS, round(WINDOW_US / call_us))
        if self.launches:
            count = min(count, QUEUE // self.launches)
        return max(1, count)

    def spent_s(self) -> float:
        """Seconds that the windows took so far."""
        return sum(self.windows) * self.per_window() * self.per_call * 1e-6


def probe(series: Series, clock: Clock, calls: int) -> None:
    """Fill in a step's time on the host; warms up on the way."""
    series.host_after_profiler = clock.profiled
    series.run(len(series.steps))
    clock.synchronize()
    series.estimate_us = clock.span(lambda: series.run(2)) / 2
    calls = max(1, min(calls, int(series.most_s * 1e6 / max(series.estimate_us, 1.0) / 4)))
    hosts = []
    for _ in range(calls):
        clock.synchronize()
        start = time.perf_counter()
        series.run(1)
        hosts.append((time.perf_counter() - start) * 1e6)
    clock.synchronize()
    series.host_us = statistics.median(hosts)


def count(series: Series, clock: Clock) -> None:
    """Fill in a step's launches.

    After every arm's `probe`: a profiler that has run once stays attached, which may slow the host.
    """
    if series.estimate_us <= MOST_COUNTED_US:
        series.launches, series.kernel_us = clock.launches(lambda: series.run(1))


def interleave(
    several: Sequence[Series], clock: Clock, repetitions: int, in_time: Callable[[], bool]
) -> None:
    """Windows of all series in turn, in another order each time.

    Stops early when `in_time` says so, but not before every series has `LEAST_WINDOWS`.
    """
    order = random.Random(0)
    for repetition in range(repetitions):
        enough = repetition >= LEAST_WINDOWS
        if enough and not in_time():
            break
        for series in order.sample(list(several), len(several)):
            if enough and series.spent_s() > series.most_s:
                continue
            steps = series.per_window()
            # the device must be busy until the host has queued the window, if it can
            fits = series.launches is not None and series.launches * steps <= QUEUE
            lead = 1.3 * series.host_us * steps + 50 if fits else 0.0
            taken = clock.span(functools.partial(series.run, steps), lead)
            series.windows.append(taken / steps / series.per_call)


def quantile(values: Sequence[float], share: float) -> float:
    """Of a non-empty sample, between neighbours by proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def copy_bandwidth(clock: Clock, size: int) -> float:
    """GB/s read and written by a copy of `size` bytes: the ceiling of every fraction."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    run()
    times = [clock.span(run, 100) for _ in range(21)]
    return 2 * size / quantile(times, 0.5) / 1e3
