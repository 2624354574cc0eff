"""Sizes of the work items, by architecture, and what an architecture can do.

No row has been timed yet. A row's reason is what ahead-of-time compilation (`tests/aot.py`) and
public specifications show; nothing is tuned while a program runs. A measurement replaces a row's
sizes and its reason together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .tables import SHAPES_OF_TILES, UNALIGNED_SHAPE


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work items, in elements unless named otherwise; all powers of two.

    Attributes:
        wide: stream statistics in float64 lanes; else in blocks of float32.
        block: lanes of a statistics program; times `unroll`, the granule of a span.
        unroll: rows of `block` per trip of the streaming loop.
        span: least size of a span. A slice has at most `max_spans` of them.
        max_spans: bounds the table of partial results, and the merge by one program.
        merge: partial results merged per trip.
        update_block: elements per trip of an update program.
        chunk: elements per update program.
        tile: longest row that a program finishes, and entries of rows that it reads before it reads
            them again: longer rows are cut into spans.
        tile_block: elements per trip of such a program.
        warps: per program of statistics or tiles.
        update_warps: per program of the second launch.
        form: "two-launch" or "single-launch"; None leaves it to `launch.form_for`.
        single_from: bytes of gradient in a plan from which on one launch is taken.
        single_to: bytes of gradient below which it is; 0 for never.
        wave: most bytes of gradient in a wave of the single launch; see `devices.wave_for`.
            Programs wait where two waves have fewer spans than there are programs: 8 MiB are 256
            spans of 8192 float32, and an H200 runs 528 programs.
        programs_per_sm: of the single launch; 6 or 7 fit the registers of an SM.
        hints: tell the caches what is read again and what is not.
    """

    wide: bool = True
    block: int = 512
    unroll: int = 4
    span: int = 8192
    max_spans: int = 4096
    merge: int = 256
    update_block: int = 1024
    chunk: int = 8192
    tile: int = 8192
    tile_block: int = 512
    warps: int = 4
    update_warps: int = 4
    form: str | None = None
    single_from: int = 0
    single_to: int = 0
    wave: int = 8 << 20
    programs_per_sm: int = 4
    hints: bool = True

    def tile_shape(self, length: int, aligned: bool) -> int | None:
        """The shape of tiles of rows of this length: the most of them that `tile` holds."""
        least = 0 if aligned else UNALIGNED_SHAPE
        shapes = range(least, len(SHAPES_OF_TILES))
        return next((i for i in shapes if length * SHAPES_OF_TILES[i] <= self.tile), None)


def gpu_tuning(*, wide: bool, wave: int) -> Tuning:
    """The sizes for a GPU whose warps have `wave` lanes."""
    # two waves of 64 are the threads of four warps; with four, 16-byte loads become 8-byte ones
    return Tuning(wide=wide, warps=128 // wave)


class Row(NamedTuple):
    """The sizes for an architecture, and why."""

    tuning: Tuning
    reason: str


# float64 at half the float32 rate (H100: 1/2 by the specification): lanes of it cost no time
_LANES = Row(
    gpu_tuning(wide=True, wave=32),
    "float64 at 1/2; 80 registers leave 6 programs to an SM; 16-byte accesses",
)
# float64 at 1/64 or less: blocks of float32 in registers, merged as scalars
_BLOCKS = Row(
    gpu_tuning(wide=False, wave=32),
    "float64 at 1/64; 80 registers in the streaming loop; 16-byte accesses",
)

TABLE: dict[str, Row] = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _LANES),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), _BLOCKS),
    # float64 at its float32 rate or half of it; two waves of 64 lanes are the threads of four
    # warps, and with four waves 16-byte loads become 8-byte ones
    "gfx90a": Row(gpu_tuning(wide=True, wave=64), "float64 at the rate of float32; 16-byte loads"),
    "gfx942": Row(gpu_tuning(wide=True, wave=64), "float64 at 1/2; 16-byte loads by two waves"),
    "gfx950": Row(gpu_tuning(wide=True, wave=64), "float64 at 1/2, as gfx942; not compiled here"),
    "interpreter": Row(
        Tuning(block=4096, unroll=1, span=65536, update_block=16384, chunk=65536, tile_block=8192),
        "a program costs the interpreter 50 us and a trip 0.1 ms, whatever its width",
    ),
}
# what the others share is that nothing is known of their float64
OTHERS = {
    32: Row(
        _BLOCKS.tuning,
        "an architecture without a row: float64 may be slow, float32 never is",
    ),
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
