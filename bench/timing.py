"""How a step is timed: device time by Triton's own benchmark, host time, launches, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

# milliseconds of warm-up and of measurement for one arm of one case
WARM_UP, MEASURED = 25, 200
HOST_CALLS = 30
# half of a copied gigabyte alone dwarfs any L2
COPIED = 2**29


def times(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Microseconds of one step, for a result's row.

    Returns:
        `median_us`, `p20_us` and `p80_us`: on the device, its L2 flushed before each step by
        `triton.testing.do_bench`; `host_us`: until a step returns, the device idle at its start;
        `replay_us`: of the same step in a CUDA graph; `launches`: kernels of a step. On the CPU
        all but the first are None, and a step is timed as a whole.
    """
    if device.type == "cpu":
        taken = sorted(_host(step, lambda: None) for _ in range(3))
        names = ("p20_us", "median_us", "p80_us")
        rest = dict.fromkeys(("host_us", "replay_us", "launches"))
        return {**dict(zip(names, taken)), **rest}
    from triton.testing import do_bench

    def wait() -> None:
        torch.cuda.synchronize(device)

    # before any profiler: one that has run stays attached, which may slow the host
    host = statistics.median(_host(step, wait) for _ in range(HOST_CALLS))
    found = do_bench(step, warmup=WARM_UP, rep=MEASURED, quantiles=[0.5, 0.2, 0.8])
    median, low, high = (1e3 * value for value in found)
    return {
        "median_us": median, "p20_us": low, "p80_us": high, "host_us": host,
        "replay_us": _replay(step), "launches": _launches(step, wait),
    }  # fmt: skip


def _host(step: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)


def _replay(step: Callable[[], Any]) -> float | None:
    """Of a graph of one step; None where the arm refuses to be captured."""
    from triton.testing import do_bench_cudagraph

    stream = torch.cuda.current_stream()
    try:
        return 1e3 * float(do_bench_cudagraph(step, rep=MEASURED))
    # whatever a rival raises in a capture
    except Exception:
        # torch leaves the capture's stream current when the capture cannot be ended
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None


def _launches(step: Callable[[], Any], wait: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        wait()
    # the profiler mirrors `Optimizer.step` and other marked regions on the device's timeline
    return sum(
        event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))
        for event in seen.events() or []
    )


def extra_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes of tensors alive during a step beyond those before it; None on the CPU."""
    if device.type == "cpu":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_gbps(device: torch.device) -> float:
    """GB/s read and written by a copy: the ceiling of every fraction."""
    size = COPIED if device.type == "cuda" else 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-3 * size / float(times(lambda: target.copy_(source), device)["median_us"])
