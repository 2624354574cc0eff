"""`bngd verify` as tests run it."""

from __future__ import annotations

import torch

from bngd_triton import cli

CPU = torch.device("cpu")


def run(*arguments: str, device: torch.device = CPU) -> int:
    return cli.main(["verify", "--device", str(device), *arguments])


def cases_of(names: tuple[str, ...]) -> list[str]:
    return [part for name in names for part in ("--case", name)]
