"""One case: a workload in one storage, all arms over the same buffers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from . import compiled, gate
from .arms import Arm, Stepper, Storage, UnavailableError, capture, start
from .measure import Clock, Series, count, interleave, probe, quantile
from .models import Shape, Workload

# small enough that thousands of steps of any arm stay finite
LR = 1e-6
# between two uses of a set at least this many times the L2 is touched
L2_TIMES = 3
MOST_SETS = 32
# of the free memory; the rest is for temporaries of the eager arms and of torch.compile
MEMORY_SHARE = 0.7
# the gate's tensors are the same in every case; what failed is asked again: it may lack memory once
_right: set[tuple[Arm, Storage, torch.device]] = set()


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repetitions: windows per arm.
        most_s: bounds the windows of one arm of one case.
        host_calls: steps timed for `host_us`.
        variants: of `torch.compile`, the fastest of which is the arm; none where it is no arm.
        warm: whether steps over one set, which may stay in the L2, are timed too.
    """

    repetitions: int
    most_s: float
    host_calls: int
    variants: tuple[str, ...] = ()
    warm: bool = True


@dataclass
class Case:
    """What one call of `run` measures; `copy_gbps` is the copy bandwidth of the same run."""

    workload: Workload
    storage: Storage
    arms: Sequence[Arm]
    clock: Clock
    effort: Effort
    copy_gbps: float
    l2_bytes: int
    memory: int | None
    in_time: Callable[[], bool]


@dataclass
class Outcome:
    """Rows of the results, and the arms without one, each with its reason."""

    rows: list[dict[str, Any]]
    unavailable: list[dict[str, str]]


def run(case: Case) -> Outcome:
    """Gate every arm, then time those that passed, in batches that fit the memory."""
    outcome = Outcome([], [])
    _release(case.clock.device)
    passed = []
    shapes = list(case.workload.shapes())
    largest = max(map(math.prod, shapes))
    for arm in case.arms:
        try:
            if arm.most_entries is not None and largest > arm.most_entries:
                raise UnavailableError(f"{largest} entries need more than its 32-bit indices")
            gated = arm, case.storage, case.clock.device
            if gated not in _right:
                gate.check(*gated)
                _right.add(gated)
            passed.append(arm)
        except UnavailableError as error:
            _skip(case, outcome, arm, str(error))
    compiled.forget()
    for number, batch in enumerate(batches(passed, case, shapes)):
        _run_batch(case, batch, number, shapes, outcome)
        _release(case.clock.device)
    compiled.forget()
    return outcome


def _release(device: torch.device) -> None:
    """Give back the memory of what is no longer used, also by a case that broke off."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def n_sets(case_bytes: int, l2_bytes: int) -> int:
    """Buffer sets to rotate: one where it dwarfs the L2, else enough that none survives in it."""
    if case_bytes > 32 * l2_bytes:
        return 1
    return min(MOST_SETS, 1 + math.ceil(L2_TIMES * l2_bytes / case_bytes))


def _set_bytes(case: Case, shapes: Sequence[Shape]) -> tuple[int, int]:
    """Bytes of the shared tensors of a set, and of one buffer of momentum."""
    count = sum(math.prod(shape) for shape in shapes)
    return 2 * count * case.storage.param.itemsize, count * case.storage.momentum.itemsize


def batches(arms: Sequence[Arm], case: Case, shapes: Sequence[Shape]) -> Iterator[list[Arm]]:
    """Arms that fit the memory together, in order; one alone where nothing else fits."""
    shared, buffer = _set_bytes(case, shapes)
    sets = n_sets(shared + buffer, case.l2_bytes)
    room = math.inf if case.memory is None else case.memory * MEMORY_SHARE
    batch: list[Arm] = []
    used = shared * sets
    for arm in arms:
        need = (arm.buffers * buffer + shared // 2 * (case.storage.low > 0)) * sets
        if batch and used + need > room:
            yield batch
            batch, used = [], shared * sets
        batch.append(arm)
        used += need
    if batch:
        yield batch


def make_set(shapes: Sequence[Shape], storage: Storage, device: torch.device) -> list[Parameter]:
    """Parameters with gradients, random: zeros would be moved at another power and clock."""
    params = []
    for shape in shapes:
        param = Parameter(torch.randn(shape, dtype=storage.param, device=device).mul_(0.02))
        param.grad = torch.randn(shape, dtype=storage.param, device=device).mul_(1e-3)
        params.append(param)
    return params


def _run_batch(
    case: Case, arms: Sequence[Arm], number: int, shapes: list[Shape], outcome: Outcome
) -> None:
    shared, buffer = _set_bytes(case, shapes)
    n = n_sets(shared + buffer, case.l2_bytes)
    sets = [make_set(shapes, case.storage, case.clock.device) for _ in range(n)]
    cold: list[Series] = []
    warm: dict[str, Series] = {}
    replayed: dict[str, Series] = {}
    notes: dict[str, dict[str, Any]] = {}
    made: dict[str, list[Stepper]] = {}
    for arm in arms:
        try:
            notes[arm.name] = {}
            made[arm.name] = _steppers(case, arm, sets, buffer, notes[arm.name])
            series = Series(arm.name, [s.step for s in made[arm.name]], case.effort.most_s)
            probe(series, case.clock, case.effort.host_calls)
        except UnavailableError as error:
            _skip(case, outcome, arm, str(error))
            continue
        cold.append(series)
    named = {arm.name: arm for arm in arms}
    for series in cold:
        count(series, case.clock)
        steppers = made[series.name]
        # where one set dwarfs the L2 there is no warm case
        if n > 1 and case.effort.warm:
            warm[series.name] = _like(series, [steppers[0].step], case)
        if named[series.name].captures and case.clock.device.type == "cuda":
            replay = _replay(steppers)
            if replay is not None:
                replayed[series.name] = _like(series, [replay], case, per_call=n)
    for several in (cold, list(replayed.values()), list(warm.values())):
        interleave(several, case.clock, case.effort.repetitions, case.in_time)
    for series in cold:
        try:
            for stepper in made[series.name]:
                stepper.check()
        except UnavailableError as error:
            _skip(case, outcome, named[series.name], str(error))
            continue
        row = _row(case, named[series.name], series, shapes)
        row["replay_us"] = _median(replayed.get(series.name))
        row["warm_us"] = _median(warm.get(series.name))
        outcome.rows.append({**row, **notes[series.name], "sets": n, "batch": number})


def _like(series: Series, steps: list[Callable[[], Any]], case: Case, per_call: int = 1) -> Series:
    return Series(
        series.name, steps, case.effort.most_s / 2, per_call, series.estimate_us, series.host_us,
        # a replay is one launch
        launches=series.launches if per_call == 1 else 1,
    )  # fmt: skip


def _steppers(
    case: Case, arm: Arm, sets: list[list[Parameter]], buffer: int, notes: dict[str, Any]
) -> list[Stepper]:
    """The arm over every set, stepped once; notes its memory on the way."""

    def one(params: list[Parameter]) -> Stepper:
        return start(arm, params, case.workload.groups, case.storage, LR)

    if arm.name == "compile":

        def time() -> float:
            if not case.in_time():
                raise UnavailableError("the budget was spent")
            gate.check(arm, case.storage, case.clock.device)
            stepper = one(sets[0])
            return min(case.clock.span(stepper.step) for _ in range(3))

        notes["variants"] = found = compiled.choose(time, case.effort.variants)
        if not any(isinstance(us, float) for us in found.values()):
            raise UnavailableError("; ".join(f"{name}: {why}" for name, why in found.items()))
        notes["variant"] = compiled.chosen
    made: list[Stepper] = []
    # a first set to load kernels and libraries; memory is read on the second
    before = case.clock.allocated()
    peak = case.clock.peak(lambda: made.append(one(sets[0])))
    after = case.clock.allocated()
    steady = case.clock.peak(made[0].step)
    notes["peak_extra_bytes"] = notes["first_step_extra_bytes"] = None
    if before is not None and after is not None and peak is not None and steady is not None:
        kept = arm.buffers * buffer
        if case.storage.low:
            kept += buffer // case.storage.momentum.itemsize * case.storage.low
        notes["peak_extra_bytes"] = max(steady, after) - before - kept
        notes["first_step_extra_bytes"] = peak - before - kept
    made += [one(params) for params in sets[1:]]
    return made


def _replay(steppers: Sequence[Stepper]) -> Callable[[], None] | None:
    """A graph of one step on every set in turn; None where the arm refuses to be captured."""

    def all_sets() -> None:
        for stepper in steppers:
            stepper.step()

    stream = torch.cuda.current_stream()
    try:
        return capture(all_sets)
    except Exception:
        # torch leaves the capture's stream current when the capture cannot be ended
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None


def _median(series: Series | None) -> float | None:
    return quantile(series.windows, 0.5) if series and series.windows else None


def _row(case: Case, arm: Arm, series: Series, shapes: Sequence[Shape]) -> dict[str, Any]:
    count = sum(math.prod(shape) for shape in shapes)
    median = quantile(series.windows, 0.5)
    once = arm.bytes_once(case.storage)
    gbps = once * count / median / 1e3
    return {
        "workload": case.workload.name,
        "dtype": case.storage.label,
        "arm": arm.name,
        "median_us": median,
        "p20_us": quantile(series.windows, 0.2),
        "p80_us": quantile(series.windows, 0.8),
        "n": len(series.windows),
        "steps_per_window": series.per_window(),
        "host_us": series.host_us,
        "host_after_profiler": series.host_after_profiler,
        "launches": series.launches,
        "kernel_us": series.kernel_us,
        "elements": count,
        "tensors": len(shapes),
        "bytes_per_element": once,
        "bytes_issued_per_element": arm.bytes_issued(case.storage),
        "gbps": gbps,
        "copy_fraction": gbps / case.copy_gbps,
    }


def _skip(case: Case, outcome: Outcome, arm: Arm, reason: str) -> None:
    outcome.unavailable.append(
        {
            "workload": case.workload.name,
            "dtype": case.storage.label,
            "arm": arm.name,
            "reason": reason,
        }
    )
