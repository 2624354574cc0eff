"""The columns that plan and kernels share: each has one place, none is used twice."""

import pytest

from bngd_triton.kernels import tables
from bngd_triton.options import Options

TABLES = {
    "SPAN": "SPAN_", "CHUNK": "CHUNK_", "TILE": "TILE_", "ROW": "ROW_", "SLICE": "SLICE_",
    "MOMENTS": "MOMENT_", "FACTORS": "FACTOR_", "RECORD": "RECORD_", "RATE": "RATE_",
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_a_table_are_numbered_from_0_on(name):
    others = (f"{name}_COLUMNS", f"{name}_BYTES", f"{name}_ITEM")
    columns = [
        value
        for key, value in vars(tables).items()
        if key.startswith(TABLES[name]) and key not in others
    ]
    assert sorted(columns) == list(range(getattr(tables, f"{name}_COLUMNS")))


def test_a_row_of_the_options_has_each_option_in_its_column():
    options = Options(
        lr=0.5, momentum=0.75, nesterov=True, weight_decay=0.25, eps=0.125, centering=0.625,
        normalizer="cdf", nonfinite="propagate", maximize=True,
    )  # fmt: skip
    want = {
        "LR": 0.5, "DECAY": 0.875, "MOMENTUM": 0.75, "FRESH": 0.25, "EPS": 0.125,
        "CENTERING": 0.625, "SIGN": -1.0, "NESTEROV": 1.0, "CDF": 1.0, "PROPAGATE": 1.0,
        "BUFFERED": 1.0, "CLOSING": 0.0, "WEIGHT_DECAY": 0.25,
    }  # fmt: skip
    row = tables.encode(options, closing=False)
    assert len(row) == tables.OPTION_COLUMNS
    assert {name: row[getattr(tables, name)] for name in want} == want
