"""bench/report.py: what a result file is called and has to hold; what a cold start tells."""

import re
from pathlib import Path

import pytest
from benching import CPU

from bench import cold, report


@pytest.mark.parametrize(
    "change",
    [
        {"median_us": float("nan")}, {"host_us": None}, {"launches": 2.0}, {"arm": 1},
        {"p20_us": 3.0}, {"copy_fraction": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_schema_refuses(change):
    row = {
        "workload": "w", "dtype": "fp32", "arm": "a", "median_us": 2.0, "p20_us": 1.0,
        "p80_us": 3.0, "n": 5, "host_us": 1.0, "launches": 2, "bytes_per_element": 20,
        "gbps": 1.0, "copy_fraction": 0.5, "peak_extra_bytes": None,
    }  # fmt: skip
    rest = dict.fromkeys(("environment", "commit", "kernels_sha256", "copy_gbps"))
    report.check({"rows": [row], "unavailable": [], **rest})
    with pytest.raises(ValueError, match=r"row|quantiles"):
        report.check({"rows": [row | change], "unavailable": [], **rest})
    with pytest.raises(ValueError, match="two rows"):
        report.check({"rows": [row, row], "unavailable": [], **rest})


@pytest.mark.parametrize(
    ("gpu_name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("cpu", "cpu")],
)
def test_slug(gpu_name, short):
    assert report.slug(gpu_name) == short


def test_files_of_a_day_stand_side_by_side(tmp_path: Path) -> None:
    names = []
    for kind in ("", "", "", "sweep", "sweep"):
        results = report.Results(tmp_path, CPU, "quick", kind)
        results.save()
        names.append(results.path.name)
    day = names[0].removeprefix("cpu-").removesuffix(".json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    ends = ("", "-2", "-3", "-sweep", "-sweep-2")
    assert names == [f"cpu-{day}{end}.json" for end in ends]
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())


def test_cold_start_reports_a_failure():
    assert "KeyError" in cold.measure("bngd", "no-such", "cpu")["reason"]
