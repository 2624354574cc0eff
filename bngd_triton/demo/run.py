"""`bngd demo`: BNGD beside SGD and AdamW on scikit-learn's digits, in two experiments.

"exploding" trains a network of 20 ReLU layers whose weights start too large, so that the first
gradients have norms of 1e3 to 1e4. "loss scale" trains a small network under a loss multiplied by
c, for c over 27 decades. Both leave a table, a PNG and a JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from ..optimizer import BNGD
from .plot import draw, print_tables, write_json
from .results import Results, Run, Settings
from .resume import NAME as RESUME_NAME
from .resume import keep
from .tasks import Split, exploding_task, generator, loss_scale_task

BATCH = 64
MOMENTUM = 0.9
JSON_NAME = "bngd-demo.json"
PNG_NAME = "bngd-demo.png"


@dataclass(frozen=True)
class Arm:
    """One optimizer of a comparison; `make` takes parameters and a learning rate."""

    name: str
    make: Callable[..., Optimizer]
    lr: float
    clip: float | None = None


_SGD = partial(SGD, momentum=MOMENTUM)
_ADAMW = partial(AdamW, betas=(MOMENTUM, 0.999))
_BNGD = partial(BNGD, momentum=MOMENTUM, granularity="tensor")
_ROW = partial(_BNGD, granularity="row")

# the best of 5 to 9 rates each by the mean test accuracy of seeds 10 to 14: 46.0, 84.6, 79.6, 93.2,
# 85.3, 90.3 and 90.5 in this order
EXPLODING = (
    Arm("SGD", _SGD, 2e-4),
    Arm("SGD, clip 1", _SGD, 1e-1, 1.0),
    Arm("AdamW", _ADAMW, 1e-2),
    Arm("AdamW, clip 1", _ADAMW, 7e-3, 1.0),
    Arm("BNGD tensor", _BNGD, 2e-3),
    Arm("BNGD row", _ROW, 5e-3),
    Arm("BNGD row, center_1d", partial(_ROW, center_1d=True), 5e-3),
)
LOSS_SCALE = (
    Arm("SGD", _SGD, 1e-2),
    Arm("SGD, clip 1", _SGD, 1e-2, 1.0),
    Arm("AdamW", _ADAMW, 1e-2),
    Arm("BNGD, eps 0", partial(_BNGD, eps=0.0), 1e-2),
    Arm("BNGD, eps 1e-8", _BNGD, 1e-2),
)


def train(
    run: Run,
    arm: Arm,
    task: tuple[Split, nn.Sequential],
    epochs: int,
    settings: Settings,
    watch: Callable[[Run], None],
) -> None:
    """Fill `run` epoch by epoch; `watch` sees it after each."""
    split, model = task
    device = torch.device(settings.device)
    split = Split(*(part.to(device) for part in split))
    model.to(device)
    params = list(model.parameters())
    optimizer = arm.make(params, lr=arm.lr)
    total = epochs * math.ceil(len(split.x) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    order = generator(settings.seed)
    for _ in range(epochs):
        batches = torch.randperm(len(split.x), generator=order).to(device).split(BATCH)
        losses, norms = [], []
        for rows in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(split.x[rows]), split.y[rows])
            (run.loss_scale * loss).backward()
            norms.append(_norm(params, arm.clip))
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        sizes = [len(rows) for rows in batches]
        _record(run, torch.stack(losses), torch.stack(norms), sizes, split, model)
        if (
            run.status == "running"
            and settings.target_loss is not None
            and run.losses[-1] < settings.target_loss
        ):
            run.status = "target loss"
        watch(run)
        if run.status != "running":
            return
    run.status = "finished"


def _norm(params: list[nn.Parameter], clip: float | None) -> Tensor:
    """The norm of the whole gradient; clips it in place where asked."""
    norm = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(params, clip, norm)
    return norm


@torch.no_grad()
def _record(
    run: Run, losses: Tensor, norms: Tensor, sizes: list[int], split: Split, model: nn.Module
) -> None:
    """Add one epoch's figures."""
    if not run.losses:
        run.first_loss = losses[0].item()
    weights = torch.tensor(sizes, dtype=torch.float64, device=losses.device)
    run.losses.append(((losses * weights).sum() / weights.sum()).item())
    finite = norms[norms.isfinite()].tolist() + run.grad_norms
    run.grad_norms = [min(finite), max(finite)] if finite else []
    if all(bool(param.isfinite().all()) for param in model.parameters()):
        hits = model(split.test_x).argmax(1) == split.test_y
        run.accuracies.append(100 * hits.double().mean().item())
    else:
        run.status = "not finite"
        run.accuracies.append(math.nan)


def compare(
    settings: Settings,
    results: Results,
    progress: Progress,
    watch: Callable[[Run], None],
    finished: Callable[[str], None],
) -> None:
    """Train what `results` lacks of both experiments; it holds what is done at any time.

    `watch` sees a run after each epoch, `finished` gets a line about each run that has ended.
    """
    plain = [(arm, 1.0) for arm in EXPLODING]
    scaled = list(product(LOSS_SCALE, settings.scales))
    parts = {
        "exploding network": (results.exploding, exploding_task, settings.epochs, plain),
        "loss scale": (results.loss_scale, loss_scale_task, settings.scale_epochs, scaled),
    }
    bars = {
        part: progress.add_task(part, total=epochs * len(jobs), now="")
        for part, (_, _, epochs, jobs) in parts.items()
    }
    for part, (runs, task, epochs, jobs) in parts.items():
        progress.update(bars[part], completed=epochs * len(runs))
        for arm, scale in jobs[len(runs) :]:
            run = Run(arm.name, arm.lr, arm.clip, scale)
            runs.append(run)
            label = arm.name if task is exploding_task else f"{arm.name}, c = {scale:g}"
            progress.update(bars[part], now=label)

            def show(run: Run, bar: TaskID = bars[part], label: str = label) -> None:
                progress.update(bar, advance=1, now=f"{label}: loss {run.losses[-1]:.3g}")
                watch(run)

            train(run, arm, task(settings.seed), epochs, settings, show)
            finished(
                f"{part} {len(runs)}/{len(jobs)}, {label}: loss {run.losses[-1]:.3g}, "
                f"test {run.accuracies[-1]:.1f} %"
            )
            # a run that stopped early leaves a gap
            progress.update(bars[part], completed=epochs * len(runs))


def demo(
    settings: Settings,
    out: Path,
    console: Console | None = None,
    watch: Callable[[Run], None] = lambda run: None,
    results: Results | None = None,
) -> int:
    """Train, print the tables and write the JSON and the PNG, after Ctrl-C too.

    Until all is done the finished runs are in a file, for `resume.finished_runs`.

    Args:
        settings: what to train.
        out: an existing folder.
        console: where to print.
        watch: called after each epoch of each run.
        results: finished runs, which are not trained again.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    console = console or Console()
    results = results or Results()
    kept = out / RESUME_NAME
    # a file of runs that are not to be resumed
    if not results.exploding:
        kept.unlink(missing_ok=True)
    code = 0
    now = TextColumn("{task.fields[now]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), now)
    watched = console.is_terminal

    def finished(line: str) -> None:
        keep(results, settings, kept)
        if not watched:
            console.print(line, soft_wrap=True)

    try:
        with _one_thread(), Progress(*columns, console=console, disable=not watched) as progress:
            compare(settings, results, progress, watch, finished)
    except KeyboardInterrupt:
        code = 130
        for run in results.exploding + results.loss_scale:
            if run.status == "running":
                run.status = "interrupted"
        console.print(
            "Interrupted: what follows is what was done so far; with --resume, the same command "
            "goes on."
        )
    shared = {"batch": BATCH, "momentum": MOMENTUM, "lr_schedule": "linear to 0"}
    write_json(results, settings, shared, out / JSON_NAME, interrupted=code != 0)
    draw(results, settings, out / PNG_NAME)
    print_tables(results, settings, console)
    if code == 0:
        kept.unlink(missing_ok=True)
    console.print(f"Wrote {out / PNG_NAME} and {out / JSON_NAME}", soft_wrap=True)
    return code


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers of 64 units lose more to the hand-over between threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
