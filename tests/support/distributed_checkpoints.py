"""Distributed checkpoints on 4 ranks: one start saves and loads on 4, on 2 of them, and on one."""

import functools
import os
import signal
import sys
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from bngd_triton import BNGD
from bngd_triton.eager.rounding import widen
from bngd_triton.tensors import local
from support import processes
from support.checkout import EXAMPLES
from support.sharded_model import Block, Parts, gradients, indices, initial
from support.sharded_steps import BF16, F32

# saved in the middle of a window; on fewer ranks, training goes on to the middle of the next
SAVED, HANDED, LAST = 3, 5, 7
GROUPS = {
    "micro": (F32, {"accumulation_steps": 2, "weight_decay": 0.1}),
    "micro_row": (BF16, {"accumulation_steps": 2, "granularity": "row"}),
    "narrow": (F32, {"momentum_dtype": BF16, "granularity": "row"}),
    "stochastic": (BF16, {"master_weights": "stochastic", "normalizer": "cdf"}),
}
FORMS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


class Run(NamedTuple):
    """A model on some ranks, or whole."""

    model: nn.Module
    optimizer: BNGD
    parts: list[Parts]
    # for what saves and loads
    group: dict[str, Any]

    def train(self, start, stop):
        for step in range(start, stop):
            for part in self.parts:
                part.give(gradients(step))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder, form):
        weights, state = get_state_dict(self.model, self.optimizer, options=FORMS[form])
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, **self.group)

    def load(self, folder, form):
        weights, state = get_state_dict(self.model, self.optimizer, options=FORMS[form])
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=folder, **self.group)
        set_state_dict(
            self.model, self.optimizer, options=FORMS[form],
            model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
        )  # fmt: skip

    @torch.no_grad()
    def snapshot(self):
        kept = {
            f"{name} {key}": local(tensor).clone()
            for name, param in self.model.named_parameters()
            for key, tensor in {**self.optimizer.state.get(param, {}), "value": param}.items()
        }
        for name, _ in self.model.named_parameters():
            rest = kept.get(f"{name} master_remainder")
            kept[f"{name} float32"] = widen(kept[f"{name} value"], rest).float()
        indices = [index for part in self.parts for index in part.indices]
        places = {name: i for (name, _), i in zip(self.model.named_parameters(), indices)}
        groups = self.optimizer.state_dict()["param_groups"]
        return Snapshot(kept, places, [{**group, "params": None} for group in groups])


class Snapshot(NamedTuple):
    """Parameters and state as a rank holds them; which entries those are; the groups."""

    kept: dict[str, Tensor]
    indices: dict[str, Tensor]
    groups: list[dict[str, Any]]


def made(mesh, *, blank=False):
    """A model of initial weights, or of weights that are to be loaded."""

    def cut(block):
        if mesh is not None:
            fully_shard(block, mesh=mesh)

    model, parts = nn.ModuleDict(), []
    for name, (dtype, _) in GROUPS.items():
        model[name] = Block().to(dtype)
        cut(model[name])
        parts.append(Parts(list(model[name].parameters()), indices(cut)))
        parts[-1].place([torch.full_like(w, 3.0) if blank else w for w in initial()])
    groups = [
        {"params": list(model[name].named_parameters()), **options}
        for name, (_, options) in GROUPS.items()
    ]
    group = {"process_group": mesh.get_group()} if mesh else {"no_dist": True}
    return Run(model, BNGD(groups, lr=1e-2, fused=False), parts, group)


class Result(NamedTuple):
    """What one rank saw."""

    uninterrupted: Snapshot
    # asked for its state before the first step, and saved on the way
    saving: Snapshot
    # by the form of the checkpoint
    resumed: dict[str, Snapshot]
    # by the number of ranks in between
    back: dict[str, Snapshot]


def visit(folder):
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in (4, 2)}
    rank = dist.get_rank()

    def resume(mesh, path, form, start, stop):
        run = made(mesh, blank=True)
        run.load(folder / path, form)
        run.train(start, stop)
        return run

    uninterrupted = made(meshes[4])
    uninterrupted.train(0, LAST)

    saving = made(meshes[4])
    get_optimizer_state_dict(saving.model, saving.optimizer)
    saving.train(0, SAVED)
    for form in FORMS:
        saving.save(folder / f"four {form}", form)
    saving.train(SAVED, LAST)
    resumed = {
        form: resume(meshes[4], f"four {form}", form, SAVED, LAST).snapshot() for form in FORMS
    }

    if rank < 2:
        resume(meshes[2], "four flat", "flat", SAVED, HANDED).save(folder / "two", "nested")
    if rank == 0:
        resume(None, "four nested", "nested", SAVED, HANDED).save(folder / "one", "flat")
    dist.barrier()
    back = {
        "two": resume(meshes[4], "two", "nested", HANDED, LAST).snapshot(),
        "one": resume(meshes[4], "one", "flat", HANDED, LAST).snapshot(),
    }
    return Result(uninterrupted.snapshot(), saving.snapshot(), resumed, back)


@functools.cache
def visited(folder):
    return processes.run(4, visit, folder)


def killed_while_saving(folder):
    """The second checkpoint of the example's model, in which a rank dies with its data written."""
    sys.path.insert(0, str(EXAMPLES))
    import train_fsdp2 as example

    model = example.make_model()
    fully_shard(model, mesh=DeviceMesh("cpu", [0, 1]))
    optimizer, text = example.make_optimizer(model), example.corpus()

    def write_and_die(self, *args):
        written(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    written = FileSystemWriter.write_data
    for step in range(2):
        example.train_step(model, optimizer, text, step, 2, dist.get_rank(), 2)
        dies = step == 1 and dist.get_rank() == 1
        with mock.patch.object(FileSystemWriter, "write_data", write_and_die if dies else written):
            example.save(folder, step + 1, 2, model, optimizer)
        weights = [param.full_tensor() for param in model.parameters()]
        if dist.get_rank() == 0:
            torch.save(weights, folder / "weights.pt")
