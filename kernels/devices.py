"""Sizes of the work items by architecture, and what an architecture can do.

No row has been timed yet. A row's reason is what ahead-of-time compilation (`tests/aot.py`) and
public specifications show; nothing is tuned while a program runs. A measurement replaces a row's
sizes and its reason together.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from .tuning import Tuning, gpu_tuning


class Row(NamedTuple):
    """The sizes for an architecture, and why."""

    tuning: Tuning
    reason: str


# float64 at half the float32 rate (H100: 1/2 by the specification): lanes of it cost no time
_LANES = gpu_tuning(wide=True, wave=32)
# float64 at 1/64 or less: register tiles in float32, merged as scalars
_TILES = gpu_tuning(wide=False, wave=32)

TABLE: dict[str, Row] = {
    "sm_80": Row(
        _LANES,
        "float64 at 1/2; 80 registers leave 6 programs to an SM; 16-byte accesses",
    ),
    "sm_90": Row(
        _LANES,
        "float64 at 1/2; 80 registers leave 6 programs to an SM; 16-byte accesses",
    ),
    "sm_100": Row(
        _LANES,
        "float64 at 1/2; 80 registers leave 6 programs to an SM; 16-byte accesses",
    ),
    "sm_86": Row(_TILES, "float64 at 1/64; 80 registers in the streaming loop; 16-byte accesses"),
    "sm_89": Row(_TILES, "float64 at 1/64; 80 registers in the streaming loop; 16-byte accesses"),
    "sm_120": Row(_TILES, "float64 at 1/64; 80 registers in the streaming loop; 16-byte accesses"),
    # float64 at its float32 rate or half of it; two waves of 64 lanes are the threads of four
    # warps, and with four waves 16-byte loads become 8-byte ones
    "gfx90a": Row(gpu_tuning(wide=True, wave=64), "float64 at the rate of float32; 16-byte loads"),
    "gfx942": Row(gpu_tuning(wide=True, wave=64), "float64 at 1/2; 16-byte loads by two waves"),
    "gfx950": Row(gpu_tuning(wide=True, wave=64), "float64 at 1/2, as gfx942; not compiled here"),
    "interpreter": Row(
        Tuning(block=4096, unroll=1, slice=65536, update_block=16384, chunk=65536),
        "a program costs the interpreter 50 us and a trip 0.1 ms, whatever its width",
    ),
}
# what the others share is that nothing is known of their float64
OTHERS = {
    32: Row(_TILES, "an architecture without a row: its float64 may be slow, tiles never are"),
    64: Row(gpu_tuning(wide=False, wave=64), "the same, with waves of 64 lanes"),
}


def row_for(architecture: str, wave: int = 32) -> Row:
    """The row of an architecture, as Triton names it, or that of the others with its wave."""
    return TABLE.get(architecture) or OTHERS[wave]


@functools.cache
def architecture_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ``xpu`` and the like; ``interpreter`` for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        # what follows a colon are features, such as xnack
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def tuning_for(device: torch.device) -> Tuning:
    """The sizes for a device."""
    if device.type != "cuda":
        return row_for(architecture_of(device)).tuning
    properties = torch.cuda.get_device_properties(device)
    tuning = row_for(architecture_of(device), properties.warp_size).tuning
    return replace(tuning, wave=wave_for(properties.L2_cache_size, tuning.wave))


def wave_for(l2_bytes: int, most: int) -> int:
    """Bytes of gradient in a wave of the single launch: a power of two.

    Three waves are live at a time, and an L2 in two halves may hold data from the far half twice.
    """
    return min(most, 1 << max(16, (l2_bytes // 6).bit_length() - 1))


# the first Triton that was seen to wait: 3.7.1 raises a flag on gfx942 right after `buffer_wbl2`,
# without `s_waitcnt vmcnt(0)` (https://github.com/llvm/llvm-project/issues/178316)
RELEASES_WAIT_FROM = (3, 9)


@functools.cache
def releases_wait(device: torch.device) -> bool:
    """Whether a flag is raised only after all that it announces can be seen."""
    if device.type != "cuda" or not torch.version.hip:
        return True
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= RELEASES_WAIT_FROM


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at a time, but for those that share a processor."""
    if device.type == "cpu":
        # the interpreter runs one program after the other
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return int(properties.gpu_subslice_count)
    return int(properties.multi_processor_count)
