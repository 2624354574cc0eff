"""Predictions, targets, and what README and docs/performance.md say of a GPU: committed rows alone.

The results here are made up and never leave a temporary folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "bench" / "readme.py").is_file():
    # at the end: the root also holds the folder `kernels`, which is not to be imported by that name
    sys.path.append(str(ROOT))
pytest.importorskip("bench.readme", reason="bench/ is in the checkout only")

from bench import predictions, readme, report, targets  # noqa: E402

ELEMENTS = 124_439_808
EMBEDDING = 50257 * 768


def row(workload: str, dtype: str, arm: str, us: float, **more: Any) -> dict[str, Any]:
    return {
        "workload": workload, "dtype": dtype, "arm": arm, "median_us": us, "p20_us": us,
        "p80_us": us, "n": 5, "host_us": 50.0, "launches": 2, "bytes_per_element": 20,
        "gbps": 1.0, "copy_fraction": 0.9, "peak_extra_bytes": 1000, "elements": ELEMENTS,
        "tensors": 148, **more,
    }  # fmt: skip


def document(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {
        "gpu": "NVIDIA X1",
        "torch": "9.9",
        "triton": "8.8",
        "driver": "7",
        "l2_bytes": 50 << 20,
    }
    return {
        "suite": "quick", "started": "2030-01-01T00:00:00+00:00", "environment": about,
        "commit": "c0ffee", "kernels_sha256": "5", "copy_gbps": 4000.0, "finished": True,
        "rows": list(rows), "unavailable": [], "not_run": [], "training": [], "cold_start": [],
        **more,
    }  # fmt: skip


WHOLE = document(
    row("gpt2-124m", "fp32", "bngd", 700.0, copy_fraction=0.86, warm_us=650.0),
    row("gpt2-124m", "fp32", "torch-sgd-fused", 690.0, host_us=70.0),
    row("gpt2-124m", "fp32", "eager", 7000.0),
    row("host-300", "fp32", "bngd", 10.0, host_us=90.0),
    row("host-300", "fp32", "torch-sgd-fused", 20.0, host_us=80.0),
    row("many-1000x1000", "fp32", "bngd", 10.0, launches=3),
    row("many-1000x1000", "fp32", "optimi-sgd", 51.0),
    unavailable=[
        {"workload": "moe-10k", "dtype": "fp32", "arm": "optimi-sgd", "reason": "cannot import it"}
    ],
)


def verdict(verdicts: list[targets.Verdict], what: str) -> targets.Verdict:
    (found,) = [v for v in verdicts if v.what == what]
    return found


def test_predictions_by_hand() -> None:
    """GPT-2 124M at 4300 GB/s: 24 bytes of 94 % and two launches; short vectors are read once."""
    at = predictions.predict("gpt2-124m", "fp32", "bngd", 4300.0)
    vectors = 12 * (6 * 768) + 2 * 768
    assert at == pytest.approx(6 + (24 * ELEMENTS - 4 * vectors) / (0.94 * 4.3e6), rel=1e-9)
    single = predictions.predict("gpt2-124m", "fp32", "bngd-single-launch", 4300.0)
    assert single == pytest.approx(3 + (20 * ELEMENTS + 4 * EMBEDDING) / (0.92 * 4.3e6), rel=1e-9)
    sgd = predictions.predict("gpt2-124m", "fp32", "torch-sgd-fused", 4300.0)
    assert sgd == pytest.approx(2 * 3 + 20 * ELEMENTS / (0.91 * 4.3e6), rel=1e-9)
    tiny = predictions.predict("many-1000x1000", "fp32", "bngd", 4000.0)
    assert tiny == pytest.approx(3 + 20e6 / (0.94 * 4e6))
    for missing in (("gpt2-1.5b", "bf16-split", "compile"), ("dry-run", "fp32", "bngd"),
                    ("gpt2-124m", "fp32", "optimi-sgd")):  # fmt: skip
        assert predictions.predict(*missing, 4300.0) is None


def test_a_run_is_printed_beside_its_prediction() -> None:
    told = predictions.predict("gpt2-124m", "fp32", "bngd", WHOLE["copy_gbps"])
    first = report.table(WHOLE).splitlines()[1].split()
    assert first[:5] == ["gpt2-124m", "fp32", "bngd", "700.0", f"{told:.1f}"]


def test_targets() -> None:
    found = targets.evaluate([WHOLE])
    ratio = verdict(found, "time of BNGD over torch's fused SGD, gpt2-124m fp32")
    assert ratio == (ratio.what, "<= 1.030", "1.014", True)
    assert verdict(found, "time of BNGD over torch's fused SGD, resnet50 fp32").met is None
    assert verdict(found, "share of the copy bandwidth, gpt2-124m fp32").met
    assert verdict(found, "times as fast as eager, gpt2-124m fp32").found == "10.000"
    assert verdict(found, "times as fast as optimi-sgd, many-1000x1000 fp32").met
    assert verdict(found, "times as fast as optimi-sgd, moe-10k fp32").met is None
    launches = verdict(found, "launches of a step, most of any case")
    assert (launches.found, launches.met) == ("3", False)
    host = [v for v in found if v.what.startswith("host time")]
    assert [(v.found, v.met) for v in host] == [("90.0", True), ("90.0 against 80.0", False)]
    assert verdict(found, "extra memory of a step, the worst case").met
    large = document(row("gpt2-124m", "fp32", "bngd", 1.0, peak_extra_bytes=12 << 20))
    assert verdict(targets.evaluate([large]), "extra memory of a step, the worst case").met is False
    assert all(v.met is None and not v.found for v in targets.evaluate([]))


def test_a_ratio_is_of_one_run() -> None:
    apart = [
        document(row("resnet50", "fp32", "bngd", 1.0)),
        document(row("resnet50", "fp32", "torch-sgd-fused", 1.0)),
    ]
    what = "time of BNGD over torch's fused SGD, resnet50 fp32"
    assert verdict(targets.evaluate(apart), what).met is None
    both = document(*apart[0]["rows"], *apart[1]["rows"])
    assert verdict(targets.evaluate([*apart, both]), what).met


def test_bytes_that_were_moved() -> None:
    counted = {"workload": "gpt2-124m", "dtype": "fp32", "arm": "bngd", "dram_bytes": 2.6e9}
    found = targets.evaluate([WHOLE], [document(counted, suite="counters")])
    moved = verdict(found, "share of the copy bandwidth by bytes that were moved, gpt2-124m fp32")
    assert moved.found == f"{2.6e9 / 700e-6 / 4e12:.3f}"
    assert moved.met


def test_bounds_between_tensors_that_fit_the_l2_and_others() -> None:
    embedding, whole = 50257 * 1600, 1_557_611_200
    share = embedding / whole
    assert targets.mixed_bound("gpt2-1.5b", 50 << 20) == pytest.approx(1.10 + 0.12 * share)
    assert targets.mixed_bound("gpt2-1.5b", 1) == pytest.approx(1.22)
    assert targets.mixed_bound("gpt2-1.5b", 1 << 40) == pytest.approx(1.10)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# A\n\ntext\n\n## What it is not\n\n- fast\n")
    return tmp_path


def put(checkout: Path, name: str, content: dict[str, Any]) -> None:
    (checkout / "bench" / "results" / name).write_text(json.dumps(content))


def test_without_results_nothing_is_said(checkout: Path) -> None:
    before = (checkout / "README.md").read_text()
    cpu = document(*WHOLE["rows"], environment={"gpu": "cpu"})
    put(checkout, "cpu.json", cpu)
    put(checkout, "sweep.json", document(row("w", "fp32", "usual", 1.0), suite="sweep"))
    assert readme.main([], checkout) == 0
    assert readme.main(["--check"], checkout) == 0
    assert (checkout / "README.md").read_text() == before
    assert not (checkout / "docs" / "performance.md").exists()


def test_pages_follow_the_newest_run(checkout: Path) -> None:
    before = (checkout / "README.md").read_text()
    old = document(row("resnet50", "fp32", "bngd", 123.0), started="2029-01-01", commit="old")
    put(checkout, "old.json", old)
    put(checkout, "new.json", WHOLE)
    assert readme.main(["--check"], checkout) == 1
    assert readme.main([], checkout) == 0
    assert readme.main(["--check"], checkout) == 0
    text = (checkout / "README.md").read_text()
    assert "| gpt2-124m | fp32 | 700.0 (86 %) | - | 690.0 (90 %) | - |" in text
    assert "NVIDIA X1" in text
    assert "(bench/results/new.json)" in text
    assert "123.0" not in text
    assert text.endswith("## What it is not\n\n- fast\n")
    assert (checkout / "docs" / "bench.png").read_bytes().startswith(b"\x89PNG")
    page = (checkout / "docs" / "performance.md").read_text()
    told = predictions.predict("gpt2-124m", "fp32", "bngd", 4000.0)
    cells = f"| gpt2-124m | fp32 | bngd | 700.0 | {told:.1f} | - | 650.0 | 50.0 | 2 | 86.0 |"
    assert cells in page
    assert "| launches of a step, most of any case | <= 2 | 3 | no |" in page
    assert "- moe-10k fp32, optimi-sgd: cannot import it" in page
    # what is written by hand stays when the results change
    (checkout / "docs" / "performance.md").write_text("# By hand\n\n" + page)
    put(checkout, "newer.json", {**WHOLE, "started": "2031", "commit": "d", "rows": old["rows"]})
    assert readme.main([], checkout) == 0
    assert "700.0" not in (checkout / "README.md").read_text()
    assert (checkout / "docs" / "performance.md").read_text().startswith("# By hand\n\n# Perf")
    for path in (checkout / "bench" / "results").iterdir():
        path.unlink()
    assert readme.main([], checkout) == 0
    assert (checkout / "README.md").read_text() == before
    assert "123.0" not in (checkout / "docs" / "performance.md").read_text()


def test_parts_of_a_run_belong_together(checkout: Path) -> None:
    for name, suite, more in (
        ("a.json", "full-1", {}),
        ("b.json", "full-2", {}),
        ("c.json", "compiled", {"started": "2031"}),
        ("d.json", "quick", {"started": "2029"}),
        ("e.json", "full-3", {"commit": "other", "started": "2029"}),
        ("f.json", "counters", {"started": "2031"}),
    ):
        put(checkout, name, document(row("w", "fp32", "bngd", 1.0), suite=suite, **more))
    files = readme.load(checkout / "bench" / "results")
    run = readme.newest(files, readme.SUITES)
    assert sorted(name for name, _ in run) == ["a.json", "b.json", "c.json"]


def test_a_file_that_is_no_result_is_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkout, "bad.json", document({**WHOLE["rows"][0], "median_us": None}))
    assert readme.main([], checkout) == 2
    assert "median_us" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the checkout around the tests")
def test_the_readme_says_what_the_committed_results_say() -> None:
    wanted = readme.pages(ROOT)
    assert ROOT / "README.md" in wanted
    for path, text in wanted.items():
        assert path.exists(), f"python -m bench.readme writes {path.name}"
        assert path.read_text(encoding="utf-8") == text, "run python -m bench.readme"
    run = readme.newest(readme.load(ROOT / "bench" / "results"), readme.SUITES)
    if not run:
        assert readme.START not in (ROOT / "README.md").read_text(encoding="utf-8")
