"""A small character transformer, its parameters sharded by FSDP2, trained on Python's own sources.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py

It writes a checkpoint every so often; ``--resume`` goes on from the newest complete one, with this
number of processes or another. At the end the first process trains the same model alone, on whole
batches, and prints how far losses and weights are apart: gradients are summed in another order,
and training makes more of the difference with every step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bngd_triton import BNGD

CONTEXT, BATCH, WIDTH, LAYERS = 32, 16, 64, 2
LR = 3e-3


class Transformer(nn.Module):
    """Predicts the next byte at each place of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes [batch, context + 1] to the mean loss of all but the first."""
        x = self.embedding(text[:, :-1]) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, text.device, x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), text[:, 1:].flatten())


def corpus() -> Tensor:
    """Sources of two modules that every Python has, as bytes."""
    text = "".join(Path(module.__file__).read_text("utf-8") for module in (argparse, textwrap))
    return torch.tensor(list(text.encode()))


def make_model() -> Transformer:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Transformer()


def make_optimizer(model: nn.Module) -> BNGD:
    """Rows of FSDP's shards are whole: only the vectors' statistics travel."""
    return BNGD(model.parameters(), lr=LR, granularity="row", weight_decay=0.1)


def train_step(
    model: nn.Module, optimizer: BNGD, text: Tensor, step: int, steps: int, rank: int, world: int
) -> Tensor:
    """One step on this rank's part of the batch; returns that part's mean loss."""
    # of the step alone, so that a resumed run sees what an uninterrupted one would have seen
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator).chunk(world)
    windows = text[starts[rank].unsqueeze(1) + torch.arange(CONTEXT + 1)]
    loss = model(windows.to(next(model.parameters()).device))
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = LR * (1 - step / steps)
    optimizer.step()
    return loss.detach()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: its ``.metadata`` is written when all else is there."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(folder: Path, step: int, steps: int, model: nn.Module, optimizer: BNGD) -> None:
    """Every checkpoint into a folder of its own: a crash leaves those before it as they are."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "step": step, "steps": steps}
    dcp.save(saved, checkpoint_id=folder / f"step-{step}")


def load(path: Path, steps: int, model: nn.Module, optimizer: BNGD) -> int:
    """Model and optimizer in place; returns the number of steps made."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "step": 0, "steps": 0}
    dcp.load(saved, checkpoint_id=path)
    if saved["steps"] != steps:
        raise SystemExit(
            f"{path} is of a run of {saved['steps']} steps, whose learning rate falls to 0 there; "
            f"resume it with --steps {saved['steps']}, or start anew without --resume"
        )
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    return saved["step"]


@contextlib.contextmanager
def progress(
    what: str, start: int, steps: int, shown: bool
) -> Iterator[Callable[[int, float], None]]:
    """A bar if rich is installed, else a line now and then; nothing on other ranks."""
    if not shown:
        yield lambda step, loss: None
    elif importlib.util.find_spec("rich"):
        from rich.progress import Progress

        with Progress() as bar:
            task = bar.add_task(what, total=steps, completed=start)
            yield lambda step, loss: bar.update(
                task, completed=step, description=f"{what}, loss {loss:.3f}"
            )
    else:

        def line(step: int, loss: float) -> None:
            if step % max(1, steps // 10) == 0:
                print(f"{what}: step {step} of {steps}, loss {loss:.3f}", flush=True)

        yield line


def units(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the last place of the largest entry."""
    largest = theirs.abs().max()
    unit = torch.nextafter(largest, largest + 1) - largest
    return float((ours - theirs).abs().max() / unit)


def compare(losses: dict[int, float], weights: list[Tensor], steps: int) -> None:
    """Train alone, and print how far the sharded run is from that."""
    model, text = make_model().to(weights[0].device), corpus()
    optimizer, alone = make_optimizer(model), {}
    with progress("one process", 0, steps, True) as show:
        for step in range(steps):
            alone[step] = float(train_step(model, optimizer, text, step, steps, 0, 1))
            show(step + 1, alone[step])
    apart = max(abs(loss - alone[step]) for step, loss in losses.items())
    pairs = list(zip(weights, (param.detach() for param in model.parameters())))
    last = alone[steps - 1]
    print(f"losses differ by at most {apart:.1e}, the last one is {last:.3f}", flush=True)
    print(
        f"weights differ by at most {max(float((a - b).abs().max()) for a, b in pairs):.1e}, "
        f"{max(units(*pair) for pair in pairs):.0f} ulp of their tensor's largest",
        flush=True,
    )


def main() -> None:
    """Train, save, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("fsdp2-checkpoints"))
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, if any")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_fsdp2.py")
    kind = "cpu"
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        kind = "cuda"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        parser.error(f"the batch of {BATCH} must divide by the number of processes, got {world}")

    mesh = init_device_mesh(kind, (world,))
    model, text = make_model().to(kind), corpus()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model)
    start, found = 0, latest_checkpoint(options.folder)
    if options.resume and found:
        start = load(found, options.steps, model, optimizer)
        if rank == 0:
            print(f"resumed {found} at step {start}", flush=True)
    losses: dict[int, float] = {}
    with progress(f"{world} processes", start, options.steps, rank == 0) as show:
        for step in range(start, options.steps):
            loss = train_step(model, optimizer, text, step, options.steps, rank, world)
            dist.all_reduce(loss)
            losses[step] = float(loss) / world
            show(step + 1, losses[step])
            if (step + 1) % options.save_every == 0:
                save(options.folder, step + 1, options.steps, model, optimizer)
    with torch.no_grad():
        weights = [
            param.full_tensor() if isinstance(param, DTensor) else param
            for param in model.parameters()
        ]
    if rank == 0 and losses:
        compare(losses, weights, options.steps)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
