"""The formulas and tables of docs/scaling.md: against counted collectives, and worked out anew."""

import math
import re

import pytest

from bngd_triton.sharding import exchange
from support.checkout import DOCS, needs_docs
from support.sharded_cases import WORLDS
from support.sharded_statistics import Transformer, visited

PAGE = DOCS / "scaling.md"
pytestmark = needs_docs
# the transformer that the worlds exchange, in the words of the page
SMALL = {"tensors": 21, "vectors": 5, "rows": 2 * (2 * 5 + 2 * 3 + 2 * 7 + 5) + 2 * 11}
# what the worlds do, and the lines of the page that speak of it
WAYS = {
    "tensor": ("tensor", "gathered"),
    "tensor, dealt out": ("tensor", "dealt out"),
    "row": ("row, `Shard(0)`", "gathered"),
    "row, cut": ("row, other dimensions cut", "gathered"),
    "row, cut, dealt out": ("row, other dimensions cut", "dealt out"),
    "global": ("global", "gathered"),
}


def table(title):
    """The table whose header starts with `title`: cells by the first one of their line."""
    (text,) = re.findall(rf"^(\| {title} \|.*\n(?:\|.*\n)+)", PAGE.read_text(), re.M)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {first: rest for first, *rest in cells if first != "---"}


def worked_out(formula, **names):
    value = eval(formula.strip("`"), {"ceil": math.ceil, **names})
    assert value == int(value)
    return int(value)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
def test_formulas_are_what_collectives_carry(world, way):
    line, how = WAYS[way]
    slices = worked_out(table("granularity")[line][0], **SMALL)
    collectives, given, received = (
        worked_out(cell, T=slices, R=world) for cell in table("way")[how]
    )
    for result in visited(world):
        travelled, log = result.transformer[way]
        assert travelled == slices
        assert len(log) == collectives
        assert sum(each.sent for each in log) == given
        assert sum(each.received for each in log) == received


def models():
    found = table("model")
    del found["model"]
    return {
        name: Transformer(*(int(cell.replace(" ", "")) for cell in cells[:5]))
        for name, cells in found.items()
    }


def spaced(number):
    return f"{number:,}".replace(",", " ")


def test_models():
    found = table("model")
    for name, model in models().items():
        shapes = model.shapes()
        matrices = [shape for shape in shapes if len(shape) == 2]
        assert found[name][5:] == [
            f"{sum(map(math.prod, shapes)) / 1e9:.1f}e9",
            spaced(len(shapes)),
            spaced(len(shapes) - len(matrices)),
            spaced(sum(shape[0] for shape in matrices)),
        ]


def size_of(number):
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"


def test_bytes_by_model_and_ranks():
    assert f"`40 * T * R` above {spaced(exchange.GATHERED)}" in PAGE.read_text()
    found, ways = table("ranks"), table("way")
    assert found.pop("ranks") == list(models())
    ranks = {int(count.replace(" ", "")): cells for count, cells in found.items()}
    assert list(ranks) == [1, 2, 8, 64, 512, 4096, 16384]
    for count, cells in ranks.items():
        want = []
        for model in models().values():
            gathered, dealt = (
                worked_out(ways[way][2], T=len(model.shapes()), R=count)
                for way in ("gathered", "dealt out")
            )
            if count == 1:
                want.append("0")
            elif gathered <= exchange.GATHERED:
                want.append(size_of(gathered))
            else:
                want.append(f"{size_of(dealt)} (not {size_of(gathered)})")
        assert cells == want, count
