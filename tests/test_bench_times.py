"""bench/measure.py: windows of steps in turn, by a clock that foretells them."""

from benching import FP32

from bench import arms, cases, measure, models


class FakeClock(measure.CpuClock):
    """Every step takes what its arm says, so that figures can be foretold."""

    def __init__(self):
        self.now = 0.0

    def span(self, run, lead_us=0.0):
        before = self.now
        run()
        return self.now - before


def test_interleaving_and_quantiles():
    clock, calls = FakeClock(), []

    def step(name, us):
        calls.append(name)
        clock.now += us

    several = [
        measure.Series("a", [lambda: step("a0", 900.0), lambda: step("a1", 1100.0)], 10.0),
        measure.Series("b", [lambda: step("b", 5000.0)], 0.0),
    ]
    for series in several:
        measure.probe(series, clock, 3)
    assert several[0].estimate_us == 1000
    assert (several[0].per_window(), several[1].per_window()) == (2, 1)
    del calls[:]
    measure.interleave(several, clock, 8, lambda: True)
    # `b` may take no time at all and stops at the least number of windows
    assert [len(series.windows) for series in several] == [8, measure.LEAST_WINDOWS]
    assert set(several[0].windows) == {1000.0}
    assert calls.count("a0") == calls.count("a1") == 8
    assert measure.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert measure.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    late = measure.Series("c", [lambda: step("c", 1.0)], 10.0)
    measure.probe(late, clock, 3)
    measure.interleave([late], clock, 100, lambda: False)
    assert len(late.windows) == measure.LEAST_WINDOWS


def test_launches_are_counted_after_all_host_times_and_never_of_a_long_step(monkeypatch):
    order = []
    monkeypatch.setattr(cases, "probe", lambda *a: order.append("host") or measure.probe(*a))
    monkeypatch.setattr(cases, "count", lambda *a: order.append("launches") or measure.count(*a))
    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [arms.ARMS["eager"], arms.ARMS["torch-adamw-fused"]],
        measure.CpuClock(), cases.Effort(1, 0.0, 1, (), warm=False), 1.0, 2048, None, lambda: True,
    )  # fmt: skip
    outcome = cases.run(case)
    assert order == ["host", "host", "launches", "launches"]
    assert [row["warm_us"] for row in outcome.rows] == [None, None]

    class Counting(FakeClock):
        def launches(self, run):
            run()
            return 7, 1.0

    for us, launches in ((measure.MOST_COUNTED_US, 7), (measure.MOST_COUNTED_US + 1, None)):
        series = measure.Series("a", [lambda: None], 1.0, estimate_us=us)
        measure.count(series, Counting())
        assert series.launches == launches


def test_a_host_time_says_whether_a_profiler_had_run():
    class Attaching(measure.CpuClock):
        def launches(self, run):
            self.profiled = True
            run()
            return 1, 1.0

    case = cases.Case(
        models.DRY_RUN["dry-run"], FP32, [arms.ARMS["eager"], arms.ARMS["torch-adamw-fused"]],
        Attaching(), cases.Effort(1, 0.0, 1, warm=False), 1.0, 2048, None, lambda: True,
    )  # fmt: skip
    flags = [[row["host_after_profiler"] for row in cases.run(case).rows] for _ in range(2)]
    assert flags == [[False, False], [True, True]]


def test_the_device_is_kept_busy_only_for_what_its_queue_holds():
    class Leads(FakeClock):
        def __init__(self):
            super().__init__()
            self.leads = []

        def span(self, run, lead_us=0.0):
            self.leads.append(lead_us)
            run()
            return 1.0

    for launches, lead in ((2, 63.0), (measure.QUEUE + 1, 0.0), (None, 0.0)):
        clock = Leads()
        several = [measure.Series("a", [lambda: None], 0.0, estimate_us=1e6, host_us=10.0)]
        several[0].launches = launches
        measure.interleave(several, clock, 1, lambda: True)
        assert clock.leads == [lead]


def test_queue_is_not_overfilled():
    many = measure.Series("a", [lambda: None], 1.0, estimate_us=1.0, launches=300)
    assert many.per_window() == measure.QUEUE // 300
    huge = measure.Series("a", [lambda: None], 1.0, estimate_us=1.0, launches=10_000)
    assert huge.per_window() == 1
