"""Repeated steps of sharded parameters on every rank, and what changes between two of them."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.engine.step import Stepper
from bngd_triton.tensors import local
from support.sharded_model import NAMES, Parts, gradients, initial, like, mesh_of, parts

# three, so that some ranks have no entry of some parameters
WORLD = 3
STEPS = 4
CHANGED = 2
# "lone" has one row; the last parameter is whole on every rank
NAMED = ("up.weight", "down.bias", "lone")
UP, LONE, WHOLE = 0, 2, 3


def nothing(params, optimizer):
    pass


def other_rates(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 3e-3, 0.2


def other_memory(params, optimizer):
    """As `fully_shard` does when a state dict is assigned."""
    with torch.no_grad():
        params[UP]._local_tensor = params[UP].to_local().clone()


def momentum_on_one_rank(params, optimizer):
    if dist.get_rank() == 1:
        entry = optimizer.state[params[UP]]
        entry["momentum_buffer"] = like(params[UP], local(entry["momentum_buffer"]).clone())


def no_gradient(params, optimizer):
    params[UP].grad = None


def no_gradient_where_empty(params, optimizer):
    """Of the parameter of which two ranks hold nothing."""
    params[LONE].grad = None


def replicated_gradient(params, optimizer):
    grad = params[UP].grad
    assert isinstance(grad, DTensor)
    params[UP].grad = grad.redistribute(placements=[Replicate()])


def partial_gradient(params, optimizer):
    """Shaped here as the reduced one is."""
    part = local(params[WHOLE].grad) * (dist.get_rank() + 1)
    params[WHOLE].grad = DTensor.from_local(part, mesh_of((WORLD,)), [Partial()])


def strided_on_one_rank(params, optimizer):
    if dist.get_rank() == 2:
        grad = local(params[UP].grad)
        params[UP].grad = like(params[UP], grad.t().contiguous().t())


def by_row(params, optimizer):
    group = optimizer.param_groups[0]
    group["granularity"] = "tensor" if group["granularity"] == "row" else "row"


def overflow_elsewhere(params, optimizer):
    """A GradScaler's first step."""
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)


class Change(NamedTuple):
    """What is done before a step, the ranks that must notice, and the group's options."""

    make: Callable[[list[Tensor], BNGD], None]
    ranks: tuple[int, ...] = (0, 1, 2)
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def name(self):
        """Of the change, and where it is not the default of the granularity."""
        return f"{self.make.__name__} {self.options.get('granularity', '')}".strip()


ROW = {"granularity": "row", "nesterov": True}
GLOBAL = {"granularity": "global", "weight_decay": 0.1}
CHANGES = [
    Change(nothing, ()), Change(nothing, (), ROW), Change(nothing, (), GLOBAL),
    Change(other_rates, ()), Change(other_memory), Change(momentum_on_one_rank, (1,)),
    Change(momentum_on_one_rank, (1,), ROW), Change(no_gradient),
    Change(no_gradient_where_empty), Change(no_gradient_where_empty, options=ROW),
    Change(replicated_gradient), Change(partial_gradient), Change(strided_on_one_rank, (2,)),
    Change(by_row), Change(overflow_elsewhere),
]  # fmt: skip


def held():
    """The named parameters of a block, as this rank holds them."""
    made = parts("fsdp", WORLD, torch.float32)
    made.place(initial())
    chosen = [NAMES.index(name) for name in NAMED]
    whole = Parameter(DTensor.from_local(torch.ones(4, 3), mesh_of((WORLD,)), [Replicate()]))
    return Parts(
        [*(made.params[i] for i in chosen), whole],
        [*(made.indices[i] for i in chosen), torch.arange(12).view(4, 3)],
    )


def give(one, step):
    found = dict(zip(NAMES, gradients(step)))
    one.give([*(found[name] for name in NAMED), torch.arange(12.0).sub(step).square()])


def run(change, *, recognise):
    """Layouts of each step, and what the tensors are in the end."""
    made = held()
    optimizer = BNGD(made.params, 1e-2, fused=True, **change.options)
    layouts = []
    for step in range(STEPS):
        give(made, step)
        if step == CHANGED:
            change.make(made.params, optimizer)
        if not recognise:
            optimizer._stepper.replay = None
        layouts.append(counted(optimizer))
    records = [optimizer._records[param] for param in made.params]
    momenta = [optimizer.state[param]["momentum_buffer"] for param in made.params]
    return layouts, [local(tensor).clone() for tensor in (*made.params, *momenta, *records)]


def counted(optimizer):
    """Step, and say how often it was laid out."""
    full = Stepper.lay_out_and_step
    with (
        mock.patch.object(Stepper, "lay_out_and_step", autospec=True, side_effect=full) as laid_out,
        torch.no_grad(),
    ):
        optimizer.step()
    return laid_out.call_count


def freed():
    """Whether gradients are, once they are dropped after repeated steps."""
    made = held()
    optimizer = BNGD(made.params, 1e-2, fused=True)
    memory = []
    for step in range(3):
        give(made, step)
        storages = [local(param.grad).untyped_storage() for param in made.params]
        memory += map(StorageWeakRef, storages)
        del storages
        optimizer.step()
        optimizer.zero_grad()
    return [one.expired() for one in memory]


def on_every_rank():
    """Each change, with recognition and without; what `freed` says."""
    mesh_of((WORLD,))
    with torch.no_grad():
        return [(run(c, recognise=True), run(c, recognise=False)) for c in CHANGES], freed()
