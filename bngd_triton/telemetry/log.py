"""A log of `BNGD.grad_stats`: in memory, as JSON, and in TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_files import replace_file
from ..state import GradStats, kappa_of
from ..state_dicts import names_in

COLUMNS = GradStats._fields
_MEAN, _STD, _SKIPPED = (COLUMNS.index(name) for name in ("mean", "std", "skipped"))


class LoggedStep(NamedTuple):
    """What one logged step left.

    Attributes:
        step: its number.
        names: of the parameters that have had a gradient.
        values: [names, columns] in float64, on the CPU: one row for each parameter as a whole, with
            the columns of `GradStats`. Parameters with rows of their own have the mean and the
            standard deviation of all their entries here, of the rows with finite statistics (NaN
            if there are none), and the number of all rows skipped so far.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor


class GradStatsLog:
    """Logged steps in order; each takes 40 bytes for each parameter.

    Attributes:
        steps: `LoggedStep` each; a list, to cut or to extend.

    Example:
        >>> log = GradStatsLog.load("stats.json")
        >>> names, numbers, std = log.table("std")
    """

    def __init__(self) -> None:
        self.steps: list[LoggedStep] = []

    def table(self, column: str) -> tuple[list[str], list[int], Tensor]:
        """One statistic of every parameter at every logged step.

        Args:
            column: "mean", "std", "rms", "kappa" or "skipped".

        Returns:
            The names, in order of appearance; the numbers of the steps; and a float64 tensor
            [names, steps], NaN where a parameter has not had a gradient yet.

        Raises:
            ValueError: there is no such column.
        """
        if column not in COLUMNS:
            raise ValueError(f"column must be one of {', '.join(COLUMNS)}, got {column!r}")
        names = list(dict.fromkeys(name for logged in self.steps for name in logged.names))
        place = {name: i for i, name in enumerate(names)}
        shape = len(names), len(self.steps)
        found = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for i, logged in enumerate(self.steps):
            lines = [place[name] for name in logged.names]
            found[lines, i] = logged.values[:, COLUMNS.index(column)]
        return names, [logged.step for logged in self.steps], found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON; an older file of that name is replaced when it is complete.

        ``{"columns": [...], "steps": [{"step": 0, "stats": {name: [...]}}]}``, where "nan", "inf"
        and "-inf" stand for what JSON has no numbers for.

        Args:
            path: in an existing folder.
        """
        steps = [
            {"step": step, "stats": dict(zip(names, map(_to_json, values.tolist())))}
            for step, names, values in self.steps
        ]
        text = json.dumps({"columns": COLUMNS, "steps": steps}, allow_nan=False) + "\n"
        replace_file(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradStatsLog:
        """Read what `save` wrote.

        Args:
            path: the file.

        Raises:
            ValueError: the file is no such log.
        """
        log = cls()
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if tuple(document["columns"]) != COLUMNS:
                raise ValueError(f"its columns are {document['columns']}")
            for entry in document["steps"]:
                rows = [[float(value) for value in row] for row in entry["stats"].values()]
                values = torch.tensor(rows, dtype=torch.float64, device="cpu")
                values = values.view(len(rows), len(COLUMNS))
                log.steps.append(LoggedStep(int(entry["step"]), tuple(entry["stats"]), values))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a log of GradStatsLog.save: {error!r}") from error
        return log


class GradStatsLogger:
    """Takes `BNGD.grad_stats` every so many steps, into memory and, if wanted, TensorBoard.

    A logged step costs one copy from each device that has parameters, and waits for it; the steps
    between cost nothing. TensorBoard gets the scalars ``grad_mean/<name>``, ``grad_std/<name>`` and
    so on for each column of `GradStats`, and with ``granularity="row"`` histograms of the rows'
    own values, ``grad_rows_std/<name>`` and so on, of those that are finite. Under ``"global"`` all
    parameters of a group have the group's values. Of sharded parameters each rank logs what it has
    a part of.

    The logger is no part of a checkpoint. A resumed run makes a new one, with `first_step` the
    number of steps that the checkpoint had behind it: numbers then go on, TensorBoard hides what
    the dead run wrote beyond that step, and `log` starts empty (`GradStatsLog.load` brings back a
    saved one). Counts of skipped slices start at 0, as the optimizer's own do.

    Args:
        optimizer: has `grad_stats`, as `BNGD` does; of a wrapper, the optimizer inside. Named
            parameters (``BNGD(model.named_parameters())``) give their names to the log.
        every: a step is logged if its number is a multiple of this.
        writer: a `SummaryWriter`, or anything with ``add_scalar(tag, value, step)`` and
            ``add_histogram(tag, values, step)``; the caller closes it.
        path: a folder for TensorBoard's files, instead of `writer`; `close` closes them.
        first_step: the number of the first step.
        model: gives its parameters' names to the log where the optimizer was made from unnamed
            ones, as timm, Transformers and Lightning do.

    Attributes:
        log: a `GradStatsLog`.

    Raises:
        TypeError: `optimizer` has no `grad_stats`, or `writer` lacks one of its two methods.
        ValueError: `every` or `first_step` is out of bounds, or both `writer` and `path` are given.
        ModuleNotFoundError: `path` is given and tensorboard is not installed.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = BNGD(model.named_parameters(), lr=1e-2)
        >>> logger = GradStatsLogger(optimizer, every=100)
        >>> optimizer.step()
        >>> logger.step()  # after every step of the optimizer
    """

    def __init__(
        self,
        optimizer: Any,
        every: int = 100,
        writer: Any = None,
        path: str | os.PathLike[str] | None = None,
        *,
        first_step: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        if not callable(getattr(optimizer, "grad_stats", None)):
            raise TypeError(
                f"optimizer must be a BNGD, got {type(optimizer).__name__}, which has no "
                "grad_stats; of a wrapper give the optimizer inside"
            )
        _check_count("every", every, 1)
        _check_count("first_step", first_step, 0)
        if writer is not None and path is not None:
            raise ValueError(f"give a writer or a path, not both; got {writer!r} and {path!r}")
        for method in ("add_scalar", "add_histogram"):
            if writer is not None and not callable(getattr(writer, method, None)):
                raise TypeError(f"writer must have {method}, got {type(writer).__name__}")
        self.log = GradStatsLog()
        self._stats: Callable[[], dict[str, GradStats]] = optimizer.grad_stats
        self._renamed = {} if model is None else names_in(model, optimizer)
        self._every = every
        self._next = first_step
        self._own = _summary_writer(path, first_step) if path is not None else None
        self._writer = writer if self._own is None else self._own

    def step(self) -> None:
        """Count a step, and log it where it is its turn. Call it after the optimizer's `step`.

        Raises:
            RuntimeError: no parameter has had a gradient; the step is not counted.
        """
        number = self._next
        if number % self._every == 0:
            self._take(number)
        self._next = number + 1

    def latest(self) -> dict[str, float]:
        """The last logged step as plain numbers, for any logger: ``wandb.log(logger.latest())``.

        Returns:
            ``{"grad_mean/<name>": ..., "grad_std/<name>": ...}``, the tags that TensorBoard gets;
            empty before the first logged step.
        """
        if not self.log.steps:
            return {}
        _, names, values = self.log.steps[-1]
        return {
            f"grad_{column}/{name}": value
            for name, row in zip(names, values.tolist())
            for column, value in zip(COLUMNS, row)
        }

    def close(self) -> None:
        """Close TensorBoard's files where `path` was given."""
        if self._own is not None:
            self._own.close()

    def _take(self, number: int) -> None:
        stats = {self._renamed.get(name, name): of for name, of in self._stats().items()}
        if not stats:
            raise RuntimeError(
                f"step {number} has no statistics, since no parameter has had a gradient: call "
                "logger.step() after optimizer.step()"
            )
        slices = _to_host(stats)
        values = torch.stack([_whole(rows) for rows in slices.values()])
        self.log.steps.append(LoggedStep(number, self._shared(tuple(slices)), values))
        if self._writer is None:
            return
        for (name, rows), whole in zip(slices.items(), values.tolist()):
            for column, value in zip(COLUMNS, whole):
                self._writer.add_scalar(f"grad_{column}/{name}", value, number)
            if rows.dim() < 2:
                continue
            for column, of_rows in zip(COLUMNS[:_SKIPPED], rows.unbind(-1)):
                finite = of_rows[of_rows.isfinite()]
                # TensorBoard refuses NaN, and an empty histogram
                if finite.numel():
                    self._writer.add_histogram(f"grad_rows_{column}/{name}", finite, number)

    def _shared(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The last step's names if they are the same, so that they are kept once."""
        last = self.log.steps[-1].names if self.log.steps else ()
        return last if last == names else names


def _to_host(stats: dict[str, GradStats]) -> dict[str, Tensor]:
    """By name [columns], or [rows, columns] for rows: one copy for each device."""
    stacked = {name: torch.stack(entry, dim=-1) for name, entry in stats.items()}
    found: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in stacked.values()}:
        here = {name: tensor for name, tensor in stacked.items() if tensor.device == device}
        flat = torch.cat([tensor.reshape(-1) for tensor in here.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in here.values()])
        found.update((name, part.view(here[name].shape)) for name, part in zip(here, parts))
    return {name: found[name] for name in stats}


def _whole(rows: Tensor) -> Tensor:
    """The statistics of a parameter from those of its rows, which have equally many entries."""
    if rows.dim() < 2:
        return rows
    finite = rows[rows[:, _MEAN].isfinite() & rows[:, _STD].isfinite()]
    skipped = rows[:, _SKIPPED].sum()
    if not len(finite):
        return torch.cat([rows.new_full([_SKIPPED], torch.nan), skipped[None]])
    mean, std = finite[:, _MEAN], finite[:, _STD]
    # near 1, so that no square leaves float64's range
    scale = torch.maximum(mean.abs().amax(), std.amax())
    scale = torch.where(scale > 0, scale, 1.0)
    within, between = (std / scale).square().mean(), (mean / scale).var(correction=0)
    average, spread = mean.mean(), scale * (within + between).sqrt()
    rms = torch.hypot(average, spread)
    return torch.stack([average, spread, rms, kappa_of(rms, spread), skipped])


def _summary_writer(path: str | os.PathLike[str], first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorboard":
            raise
        raise ModuleNotFoundError(
            "path needs tensorboard, which is not installed: pip install tensorboard, or give a "
            "writer of your own, or neither",
            name=error.name,
        ) from error
    return SummaryWriter(os.fspath(path), purge_step=first_step or None)


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _to_json(row: list[float]) -> list[float | str]:
    return [value if abs(value) < float("inf") else str(value) for value in row]
