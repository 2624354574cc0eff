"""The code of README and of every page of docs/ runs as the page stands, from top to bottom."""

import builtins
import contextlib
import importlib.util
import os
import re
import symtable
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from support.checkout import DOCS, EXAMPLES, ROOT, blocks, needs_docs

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TELEMETRY = DOCS / "telemetry.md"
pytestmark = needs_docs
NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\w)"
# what a block may import without a first line that says `# needs PACKAGE`
ALWAYS = {*sys.stdlib_module_names, "torch", "bngd_triton"}


WITH_CODE = [page for page in PAGES if page.exists() and blocks(page.read_text())]


def needs(block):
    """The packages that the block's first line asks for."""
    first = re.match(r"# needs (.*)\n", block)
    return set(first[1].split(" and ")) if first else set()


def imported(block):
    return set(re.findall(r"^\s*(?:from|import) (\w+)", block, re.M))


def names(table):
    """Of a block's namespace, in functions and classes too."""
    module = table.get_type() == "module"
    yield from (name for name in table.get_symbols() if module or name.is_global())
    for inner in table.get_children():
        yield from names(inner)


def test_pages_with_code_are_found():
    assert {page.stem for page in WITH_CODE} >= {"README", "first-steps", "training", "distributed"}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """What a package is missing for is left to the test below, and to tests/integrations."""
    if "torch.distributed" in page.read_text() and not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    scope = {"__name__": page.stem}
    try:
        for block in blocks(page.read_text()):
            if all(map(importlib.util.find_spec, needs(block))):
                exec(compile(block, str(page), "exec"), scope)
        check_what_is_left(page.stem, scope)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page itself runs it")
def test_the_graph_of_the_training_page_is_rehearsed(monkeypatch):
    """Without a GPU a replay is an iteration, which must leave gradients where they were."""
    setup, *_ = found = blocks((DOCS / "training.md").read_text())
    (code,) = [block for block in found if "graph.replay" in block]
    scope = {}
    exec(setup, scope)
    where = []

    def replay():
        where[:] = where or [param.grad for param in scope["net"].parameters()]
        scope["iteration"]()
        assert all(old is param.grad for old, param in zip(where, scope["net"].parameters()))

    waiting = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    for name, stand_in in {
        "is_available": lambda: True,
        "Stream": lambda: waiting,
        "current_stream": lambda: waiting,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "stream": contextlib.nullcontext,
        "graph": lambda _, stream: contextlib.nullcontext(stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    exec(code.replace('"cuda"', '"cpu"').replace(".cuda()", ""), scope)
    assert len(where) == 4
    assert scope["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def check_what_is_left(page, scope):
    """What the text beside the code says of it."""
    for name, value in scope.items():
        if isinstance(value, torch.nn.Module):
            assert all(param.isfinite().all() for param in value.parameters()), name
    if page == "README":
        assert scope["loss"] < 0.1 * scope["batches"][0][1].square().mean()
    elif page == "training":
        assert os.listdir() == ["run.pt"]
    elif page == "distributed":
        assert (Path(scope["checkpoint"]) / ".metadata").exists()
    elif page == "telemetry":
        assert {"grad-stats.png", "stats.json", "run.pt"} <= set(os.listdir())
        assert scope["saved"]["step"] == 300


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_a_page_defines_what_it_uses_and_says_what_it_needs(page):
    """For every block, those that cannot run here, too."""
    known = set(dir(builtins))
    for block in blocks(page.read_text()):
        found = list(names(symtable.symtable(block, page.name, "exec")))
        known |= {name.get_name() for name in found if name.is_assigned() or name.is_imported()}
        used = {name.get_name() for name in found if name.is_referenced()}
        assert used <= known, used - known
        assert imported(block) <= ALWAYS | needs(block)


def test_figures_of_the_telemetry_page_are_the_example_s(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import find_exploding_layer as example

    split, model = example.exploding_task(example.SEED)
    # the first step comes before any difference that training could make
    rows = example.batches(split, 1)
    log = example.train(split, model, steps=len(rows))
    example.show(log, 0)
    _, printed = capsys.readouterr().out.split("\n", 1)
    (shown,) = blocks(TELEMETRY.read_text(), "text")
    assert re.sub(NUMBER, "#", shown) == re.sub(NUMBER, "#", printed)
    got, want = ([float(x) for x in re.findall(NUMBER, text)] for text in (shown, printed))
    assert len(got) == 11
    # of another processor: one unit of the last digit
    assert got == pytest.approx(want, rel=0.06)
    prose = TELEMETRY.read_text()
    assert f"are {got[9]} decades larger" in prose
    assert f"{got[-1]} times is the most" in prose
