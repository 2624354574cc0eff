"""Launches past Triton's dispatch are those that Triton's own dispatch makes."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("bench", reason="bench/ is in the checkout only")

from support.compiling import python


# every kernel is compiled, 15 s for each
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_launches_agree_with_tritons(backend):
    code, printed = python("tests/support/fake_launches.py", backend)
    assert code == 0, printed
    assert "launches agree" in printed
