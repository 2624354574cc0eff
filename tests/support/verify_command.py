"""`bngd verify` as tests run it."""

import torch

from bngd_triton import cli

CPU = torch.device("cpu")


def run(*arguments, device=CPU):
    return cli.main(["verify", "--device", str(device), *arguments])


def cases_of(names):
    return [part for name in names for part in ("--case", name)]
