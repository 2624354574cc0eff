"""What an interrupted `bngd demo` had finished: one file, replaced after each run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint_files import load_checkpoint, save_checkpoint
from .results import Results, Run, Settings

NAME = "bngd-demo.pt"


def keep(results: Results, settings: Settings, path: Path) -> None:
    """Write the runs so far, all of them finished."""
    save_checkpoint(path, about=_about(settings), **asdict(results))


def finished_runs(settings: Settings, path: Path) -> Results:
    """The runs of an earlier demo; none if there is no file.

    Raises:
        ValueError: the file is damaged, or of a demo that trained something else.
    """
    try:
        saved = load_checkpoint(path)
    except FileNotFoundError:
        return Results()
    about = saved.get("about", {})
    for name, value in _about(settings).items():
        if about.get(name) != value:
            raise ValueError(
                f"{path} is of a demo with {name} = {about.get(name)}, not {value}: give it the "
                "same arguments, or another folder, or start anew without --resume"
            )
    return Results(*([Run(**run) for run in saved[name]] for name in ("exploding", "loss_scale")))


def _about(settings: Settings) -> dict[str, Any]:
    """All that decides a run's figures."""
    return {**asdict(settings), "bngd_triton": __version__, "torch": str(torch.__version__)}
