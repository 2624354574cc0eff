"""What tells a repeated step from another, each with torch's own functions and without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import unchanged
from bngd_triton.unchanged import Addresses, Same, same_dicts, same_kinds


@pytest.fixture(params=["torch's own", "in Python"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in Python":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
        monkeypatch.setattr(unchanged, "_at", None)


def insert(dicts: list[dict[str, Any]]) -> None:
    dicts[1]["c"] = 3.0


def remove(dicts: list[dict[str, Any]]) -> None:
    del dicts[0]["a"]


def set_equal(dicts: list[dict[str, Any]]) -> None:
    """True equals 1.0, and is no number."""
    dicts[0]["a"] = True


def replace_dict(dicts: list[dict[str, Any]]) -> None:
    dicts[1] = dict(dicts[1])


def swap(dicts: list[dict[str, Any]]) -> None:
    dicts.reverse()


def append(dicts: list[dict[str, Any]]) -> None:
    dicts.append({})


def drop(dicts: list[dict[str, Any]]) -> None:
    dicts.pop()


def reassign(dicts: list[dict[str, Any]]) -> None:
    """A new object in the place of one that is freed may have its address."""
    for i in range(50):
        dicts[0]["a"] = i + 0.5


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    "change",
    [insert, remove, set_equal, replace_dict, swap, append, drop, reassign],
    ids=lambda change: change.__name__,
)
def test_a_changed_dict(change: Callable[[list[dict[str, Any]]], None]) -> None:
    dicts: list[dict[str, Any]] = [{"a": 1.0, "list": [1]}, {"a": 1.0}]
    same = same_dicts(dicts)
    dicts[0]["list"].append(2)
    assert same(dicts)
    assert same(list(dicts))
    change(dicts)
    assert not same(dicts)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("other", "desc"),
    [
        (torch.ones(3, 3).half(), "dtype"),
        (torch.ones(3, 4), "shape"),
        (torch.ones(3, 4)[:, :3], "strides"),
        (torch.ones(3, 3).to_sparse(), "layout"),
        (torch.ones(3, 3, device="meta"), "device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind(other: torch.Tensor, desc: str) -> None:
    one, two = torch.ones(3, 3), torch.ones(2)
    same = same_kinds([one, two])
    assert same(torch.zeros(3, 3), torch.zeros(2))
    assert not same(other, two), desc
    assert not same(two, one)


@pytest.mark.usefixtures("ways")
def test_addresses() -> None:
    tensors = [Parameter(torch.ones(4)), torch.ones(4), torch.ones(4)[1:]]
    where = Addresses([tensor.data_ptr() for tensor in tensors])
    assert where.of(tensors) is where.addresses
    other = torch.ones(4)
    assert where.of([*tensors[:2], other]) == [*where.addresses[:2], other.data_ptr()]
    assert where.of(tensors[:2]) == where.addresses[:2]
    assert where.of([*tensors, other]) == [*where.addresses, other.data_ptr()]
    for bad in (None, torch.ones(3).to_sparse()):
        with pytest.raises((TypeError, RuntimeError)):
            where.of([tensors[0], bad, tensors[2]])  # type: ignore[list-item]


def test_torchs_comparison_of_addresses_is_used_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in CUDA builds alone; a stand-in has its signature."""
    asked = []

    def equal(tensors: list[Any], addresses: list[int], indices: list[int]) -> bool:
        asked.append(indices)
        return all(tensors[i].data_ptr() == addresses[i] for i in indices)

    monkeypatch.setattr(unchanged, "_at", equal)
    tensors = [torch.ones(4), torch.ones(4)]
    where = Addresses([tensor.data_ptr() for tensor in tensors])
    assert where.of(tensors) is where.addresses
    assert where.of(tensors[::-1]) == where.addresses[::-1]
    assert asked == [[0, 1]] * 2


def test_the_same_tensors() -> None:
    tensors = [torch.ones(3), torch.ones(()), torch.ones(3)]
    lists = [tensors[:2], tensors[2:]]
    same = Same(lists)
    assert same([list(tensors[:2]), list(tensors[2:])])
    for i in range(3):
        found = [t.clone() if i == j else t for j, t in enumerate(tensors)]
        assert not same([found[:2], found[2:]])
    assert not same(lists[:1])
    assert not same([*lists, []])
    assert not same([tensors[:1], tensors[1:]])
    lists[1].append(tensors[0])
    assert not same(lists)


def test_sharded_tensors_are_not_compared() -> None:
    """To compare two may take the other ranks."""
    compared = []

    class Placed(torch.Tensor):
        placements = ()

        def __eq__(self, other: object) -> Any:
            compared.append(other)
            return super().__eq__(other)

        __hash__ = torch.Tensor.__hash__

    one, other = (torch.ones(1).as_subclass(Placed) for _ in range(2))
    same = Same([[one], [other]])
    assert same([[one], [other]])
    assert not same([[other], [one]])
    assert not same([[one, other], []])
    assert not same([[one], [other, one]])
    assert not same([[one]])
    assert not compared
