"""`bngd verify`: what it runs, prints and refuses."""

import io
import itertools
import json
import math
import re
import sys

import pytest
import torch

from bngd_triton.kernels.devices import tuning_for
from bngd_triton.verify import judge
from bngd_triton.verify import run as verify
from bngd_triton.verify.arms import more_arms
from bngd_triton.verify.cases import FACTORS, QUICK, Case, covering, suite
from bngd_triton.verify.judge import Error, Result
from bngd_triton.verify.tensors import gradients, place, shapes
from support.checkout import DOCS
from support.verify_command import CPU, cases_of, run

# one of each promise: bits, powers of two, skipped slices, and what is kept of narrow parameters
RIGHT = ("bf16,exact,nearest,decay", "row,eps0,vanishing,f32/bf16", "f16,inf,global,stochastic")


def test_right_cases_pass(tmp_path, capsys, device):
    file = tmp_path / "found.json"
    assert run(*cases_of(RIGHT), "--seed", "3", "--json", str(file), device=device) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["passed"]
    assert found["complete"]
    assert found["seed"] == 3
    assert found["info"]["versions"]["torch"] == torch.__version__
    names = [Case.named(name).name for name in RIGHT]
    assert [one["case"] for one in found["cases"]] == names
    assert all(name in printed for name in names)
    assert "3 cases of 3 steps" in printed
    assert "seed 3, 0 failed" in printed
    assert [one["bits"] for one in found["cases"]] == ["equal", "", ""]
    for one in found["cases"]:
        assert not one["failures"]
        # the arithmetic rounds: errors of nothing at all were not measured
        assert 0 < one["kernels"]["share"] <= 1
        assert 0 < one["eager"]["share"] <= 1
    # one rounding to nearest, and one stochastic rounding
    assert 0.3 < found["cases"][0]["kernels"]["ulp"] <= 0.51
    assert 0.6 < found["cases"][2]["kernels"]["ulp"] <= 1.01


def test_every_combination_is_in_the_suite():
    quick, pairs = suite(0), suite(2)
    assert [case.name for case in quick] == [Case.named(name).name for name in QUICK]
    assert pairs[: len(quick)] == quick
    assert len(set(pairs)) == len(pairs) < 60
    for one, other in itertools.combinations(FACTORS, 2):
        met = {(case[one], case[other]) for case in pairs}
        assert met == set(itertools.product(FACTORS[one], FACTORS[other]))
    # nothing that was given again
    assert not covering(2, pairs)
    for factor, values in FACTORS.items():
        assert {case[factor] for case in quick} == set(values), "quick cases have every value"


def test_names():
    assert Case.named("defaults") == Case.of({})
    assert Case.of({}).name == "defaults"
    case = Case.named("large,row,bf16")
    assert case.name == "bf16,row,large"
    assert case.dtypes == (torch.bfloat16, torch.bfloat16)
    assert case.options == {"lr": 0.01, "granularity": "row"}
    values = [value for values in FACTORS.values() for value in values]
    assert len(set(values)) == len(values), "a value names its factor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "bf16,rows"], "no part 'rows', in 'bf16,rows'; did you mean row or zeros?"),
        (["--case", "bf16,xyz"], "parts are storage: f32, "),
        (["--case", "bf16,f16"], "two values of storage, bf16 and f16"),
        (["--seed", "-1"], "--seed must be in"),
        (["--json", "/proc/found.json"], "--json /proc cannot be written"),
        (["--json", "/tmp"], "--json must be a file, got the folder /tmp"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_kernels_do_not_serve(monkeypatch, capsys):
    monkeypatch.setattr("bngd_triton.kernels.support.has_triton", lambda: False)
    assert run("--quick") == 1
    error = capsys.readouterr().err
    assert "the kernels cannot run on cpu: Triton is not installed" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not for the CPU then")
def test_a_triton_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert run("--quick") == 1
    error = capsys.readouterr().err
    assert "Triton cannot be imported: ModuleNotFoundError" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("way", "strides"),
    [
        ("own", (20, 5, 1)), ("inside", (20, 5, 1)), ("unaligned", (20, 5, 1)),
        ("transposed", (4, 1, 12)), ("permuted", (4, 1, 12)), ("gaps", (40, 10, 2)),
        ("rows apart", (23, 5, 1)),
    ],
)  # fmt: skip
def test_tensors_lie_as_they_are_called(way, strides):
    values = torch.randn(3, 4, 5)
    placed = place(values, way)
    assert torch.equal(placed.tensor, values)
    assert placed.tensor.stride() == strides
    assert bool(placed.tensor.data_ptr() % 16) == (way == "unaligned")
    placed.tensor.add_(1)
    assert placed.overwritten() == 0
    if placed.buffer is not None:
        placed.buffer[placed.tensor.storage_offset() - 1] = 0
        assert placed.overwritten() == 1


def test_gradients_are_what_they_are_called():
    tuning = tuning_for(CPU)

    def of(name, step=0):
        found = gradients(Case.named(name), tuning, step, 0)
        return [grad for grad in found if grad.numel()]

    normal = of("normal")
    assert all(torch.equal(a * 2.0**100, b) for a, b in zip(normal, of("exploding")))
    assert all(torch.equal(a * 2.0**-100, b) for a, b in zip(normal, of("vanishing")))
    assert all(a.isfinite().all() for a in of("f16,exploding"))
    for grad in of("exact"):
        assert {float(row.mean()) for row in (grad if grad.dim() > 1 else [grad])} == {2.0}
    assert all(a.isfinite().all() for a in of("nan"))
    assert any(a.isnan().any() for a in of("nan", 1))
    assert any(a.isinf().any() for a in of("inf", 1))
    assert not torch.equal(normal[5], of("normal", 1)[5])
    # of a length around each border
    edges = shapes(Case.named("borders"), tuning)
    assert {(tuning.span + 1,), (2, 2048), (1, 2049)} <= {shape for shape, _ in edges}


PAGE = DOCS / "verify.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the checkout around them")
def test_the_page_has_every_value_and_the_right_counts():
    text = PAGE.read_text()
    for values in FACTORS.values():
        places = [text.find(f"`{value}`", text.index("| of | values |")) for value in values]
        assert -1 not in places
        assert places == sorted(places), "in this order"
    assert f"interpreter: {len(suite(2))} cases" in text
    assert f"in {len(suite(3))} cases" in text
    (command,) = re.findall("bngd verify --case ([^`]*)`", text)
    assert Case.named(command).name == command


def test_a_gpu_has_more_arms():
    gpu = torch.device("cuda", 0)
    found = list(more_arms(Case.named("layouts"), gpu, 0))
    assert found == ["second run", "two-launch", "single-launch"]
    assert list(more_arms(Case.named("large"), gpu, 0))[-1] == "CUDA graph"
    assert list(more_arms(Case.named("large"), CPU, 0)) == ["single-launch"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    assert run("--quick", device=torch.device("cuda")) == 0


def test_what_breaks_off_or_writes_elsewhere(monkeypatch, capsys, device):
    """Named like any other failure; the rest is run all the same."""
    right = judge.by_optimizer

    def arm(*args, fused):
        if fused:
            raise RuntimeError("no kernel image is available\nand more")
        return right(*args, fused=fused)._replace(overwritten=2)

    monkeypatch.setattr(judge, "by_optimizer", arm)
    assert run(*cases_of(("defaults", "row")), device=device) == 1
    printed = capsys.readouterr().out
    assert printed.count("  kernels: RuntimeError: no kernel image is available\n") == 2
    assert printed.count("  reference: wrote to 2 entries beside parameters\n") == 2
    assert "and more" not in printed


@pytest.fixture
def shares(monkeypatch):
    """No case is run: each has the share of its bound that is here, or half; a NaN interrupts."""
    found = {}

    def judge(case, *_):
        error = Error(1.0, found.get(case.name, 0.5), "step 1, somewhere")
        if math.isnan(error.share):
            raise KeyboardInterrupt
        result = Result(case.name, eager=error)
        result.kernels = result.bounded("kernels", error)
        return result

    monkeypatch.setattr(verify, "judge", judge)
    return found


def test_the_worst_come_first(shares, capsys, tmp_path):
    cases = suite(2)[:20]
    shares |= zip((case.name for case in cases), [0.5, 3.0, torch.inf, 1.0, *range(2, 18)])
    file = tmp_path / "found.json"
    assert verify.verify(cases, CPU, 0, file) == 1
    printed = capsys.readouterr().out
    assert "18 failed" in printed
    assert "and 13 more, in " in printed
    shown = [line[:-1] for line in printed.splitlines() if line.endswith(":") and line[0] != " "]
    assert shown == sorted(shares, key=lambda name: -shares[name])[:5]
    # by the values of factors, of which these cases have many
    row = next(line for line in printed.splitlines() if line.startswith("storage"))
    assert row.split()[1:3] == ["f32", str(sum(case["storage"] == "f32" for case in cases))]
    found = json.loads(file.read_text())
    assert not found["passed"]
    assert found["cases"][2]["kernels"] == {"ulp": 1.0, "share": None, "where": "step 1, somewhere"}


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("few", [True, False])
def test_the_table_fits_the_terminal(columns, few, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    error = Error(0.5, 0.25, "")
    results = [Result(case.name, error, error) for case in suite(2)]
    lines = verify._table(results[:3] if few else results)
    assert max(map(len, lines)) < columns
    text = "\n".join(lines)
    if few:
        assert all(f"\n{result.case}\n" in text for result in results[:3])
    elif columns == 60:
        assert "\ngranularity row\n" in text
    else:
        assert re.search(r"\ngranularity +tensor +\d+ ", text)


def test_interrupted(shares, capsys, tmp_path):
    shares[suite(0)[1].name] = math.nan
    file = tmp_path / "found.json"
    assert verify.verify(suite(0), CPU, 0, file) == 130
    assert "interrupted: 11 cases were not run" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [found["complete"], found["passed"], len(found["cases"])] == [False, False, 1]


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal, monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    assert verify.verify(suite(0), CPU, 0, None) == 0
    shown = stream.getvalue().split("\r\x1b[K")
    assert "\x1b" not in capsys.readouterr().out
    if not terminal:
        assert shown == [""]
        return
    assert len(shown) == 1 + 12 + 1
    assert shown[1].endswith("0/12 row,borders")
    assert shown[12].startswith("[" + "#" * 22 + "  ] 11/12")
    assert shown[-1] == "", "the line is cleared"
