"""Sizes of the work items that a step is cut into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Sizes of the work items, in elements unless named otherwise; all powers of two.

    Attributes:
        wide: stream statistics in float64 lanes; else in float32 tiles.
        block: lanes of a statistics program; times `unroll`, the granule of a slice.
        unroll: rows of `block` per trip of the streaming loop.
        slice: least size of a slice. A segment has at most `max_partials` slices.
        max_partials: bounds the table of partial results, and the merge by one program.
        merge: partial results merged per trip.
        update_block: elements per trip of an update program.
        chunk: elements per update program.
        tile: entries held in registers by a program that finishes rows or small tensors; rows
            longer than this are segments.
        warps: per program of the first launch.
        update_warps: per program of the second launch.
        form: "two-launch" or "single-launch"; None leaves it to `launch.form_for`.
        single_from: bytes of gradient in a plan from which on one launch is taken.
        single_to: bytes of gradient below which it is; 0 for never.
        wave: most bytes of gradient in a wave of the single launch; see `devices.wave_for`.
            Programs wait where two waves have fewer slices than there are programs: 8 MiB are 256
            slices of 8192 float32, and an H200 runs 528 programs.
        programs_per_sm: of the single launch; 4 fit the registers of an SM, 3 with tiles.
    """

    wide: bool = True
    block: int = 512
    unroll: int = 4
    slice: int = 8192
    max_partials: int = 4096
    merge: int = 256
    update_block: int = 1024
    chunk: int = 8192
    tile: int = 2048
    warps: int = 4
    update_warps: int = 4
    form: str | None = None
    single_from: int = 0
    single_to: int = 0
    wave: int = 8 << 20
    programs_per_sm: int = 4

    @property
    def tile_columns(self) -> tuple[int, ...]:
        """Row capacities of the tile's shapes; the narrowest that holds a row is used."""
        return tuple(self.tile >> shrink for shrink in (6, 4, 2, 0))

    def tile_rows(self, columns: int) -> int:
        """Rows of the tile that has this many columns."""
        return max(1, self.block // columns)


def gpu_tuning(*, wide: bool, wave: int) -> Tuning:
    """The sizes for a GPU whose warps have `wave` lanes."""
    # two waves of 64 are the threads of four warps; with four, 16-byte loads become 8-byte ones
    return Tuning(wide=wide, warps=128 // wave)
