"""What is compiled ahead of time, and the registers and cache hints that each of it may have."""

import dataclasses
import itertools
from collections import Counter

from support.machine_code import VERSION

# one of each vendor, in every form
ALWAYS = ["sm_90", "gfx942"]
# parameter, gradient, momentum
FP32, BF16 = ("fp32", "fp32", "fp32"), ("bf16", "bf16", "fp32")
COMBINATIONS = (FP32, BF16, ("fp16", "fp16", "fp32"), ("bf16", "fp32", "fp32"))
# with the storage types for which each is the default or is asked for
MASTER_COMBINATIONS = (
    ("remainder", BF16),
    ("remainder", ("bf16", "fp32", "fp32")),
    ("master", ("fp16", "fp16", "fp32")),
    ("stochastic", ("bf16", "bf16", "bf16")),
    ("stochastic", ("fp16", "fp16", "fp32")),
)
# kernels of one form: module, constants, warps
SIMPLE_KERNELS = {
    "column_moments": ("columns", {"UNROLL": 8, "COLUMNS": 32}, 1),
    "standardize": ("columns", {"SOFT": False, "ROWS": 64, "COLUMNS": 32}, 4),
    "publish": ("publish", {"WIDE": True, "WINDOWS": True}, 1),
    "rates": ("rates", {}, 1),
}
# Registers per thread by target, in the order of `TARGETS`: the most that a dtype takes, rounded up
# to what hardware gives out; `find_loose` tells what is more. Of 128 threads to a program, 48
# registers leave 10 programs to an SM of sm_90, 56 leave 9, 72 leave 7, 80 leave 6, 128 leave 4.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
STEP = 8
BUDGETS = {
    "update": (40, 40, 40, 40),
    "lanes": (56, 56, 48, 48),
    "stream": (72, 64, 72, 64),
    "tiles": (72, 80, 80, 64),
    "column_moments": (56, 56, 56, 32),
    "standardize": (80, 80, 80, 48),
    "publish": (48, 48, 48, 24),
    "rates": (24, 24, 24, 8),
    # the loop over tickets keeps values for every kind of item
    "single lanes": (96, 72, 80, 128),
    "single stream": (128, 128, 128, 128),
}
# with a master, stochastic rounding or micro-batches
LARGER_BUDGETS = {"update": (56, 56, 48, 48), "tiles": (80, 80, 80, 72)}
# not aligned, where every element has an address of its own: one target of each vendor
UNALIGNED_BUDGETS = {
    "update": (0, 40, 0, 48),
    "lanes": (0, 56, 0, 48),
    "stream": (0, 72, 0, 88),
    "tiles": (0, 168, 0, 144),
    "single lanes": (0, 96, 0, 136),
    "single stream": (0, 128, 0, 160),
}
# bytes outside the loops that ptxas trades for a step of registers
SPILLS = {"tiles": 16, "statistics": 8}
# that of constraints.txt; others may take a step more: 3.6.0 172 in unaligned tiles, where 3.9.0
# spills 64 bytes, and 8 in an unaligned single launch
PINNED = (3, 7)
OTHER_SPILLS = SPILLS | {"tiles": 64, "single": 8}
# the update reads again what statistics load: evict_last on each row of a trip and on the rest
READ_AGAIN = {"lanes": 5, "stream": 1}
# nothing reads again what moves: evict_first on the loads of gradient, parameter and momentum and
# on the stores of the last two; once for each shape of a tile, or in the update's loop and after it
MOVED = {"update": 2, "single": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: str
    target: str
    dtypes: tuple[str, str, str] = FP32
    aligned: bool = True
    wide: bool = True
    master: str = "plain"
    windows: bool = False
    tables: bool = False
    hinted: bool = True

    @property
    def variant(self):
        """The kernel and its form: a key of `BUDGETS`."""
        if self.kernel in ("update", "tiles", *SIMPLE_KERNELS):
            return self.kernel
        form = "single " if self.kernel == "single" else ""
        return form + ("lanes" if self.wide else "stream")

    @property
    def budget(self):
        """Registers it may take."""
        budgets = BUDGETS
        if self.master != "plain" or self.windows:
            budgets = BUDGETS | LARGER_BUDGETS
        if not self.aligned:
            budgets = UNALIGNED_BUDGETS
        other = STEP * (VERSION != PINNED)
        return budgets[self.variant][TARGETS.index(self.target)] + other

    @property
    def spill(self):
        """Bytes it may keep elsewhere than in registers."""
        return (SPILLS if VERSION == PINNED else OTHER_SPILLS).get(self.kernel, 0)

    @property
    def windowed(self):
        """Whether it opens and closes windows."""
        return self.kernel == "publish" or (self.windows and self.kernel != "update")

    @property
    def hints(self):
        """How many accesses ask for which eviction policy."""
        # a tile's shapes: all five, or the last three
        shapes = 5 if self.aligned else 3
        parts = self.variant.split()
        again = sum(READ_AGAIN.get(part, 0) for part in parts)
        moved = sum(MOVED.get(part, 0) for part in parts)
        if self.kernel == "tiles":
            again, moved = 2 * shapes, shapes
        master = self.master in ("remainder", "master")
        wanted = {
            "load evict_last": again,
            "load evict_first": (3 + master) * moved,
            "store evict_first": (2 + master) * moved,
        }
        return +Counter(wanted) if self.hinted else Counter()

    @property
    def is_quick(self):
        """Whether it is soon compiled, and tells of more than itself."""
        # long to compile, and of nothing but what the others check by themselves
        usual = self.master == "plain" and self.hinted and not (self.windows or self.tables)
        if usual:
            return self.variant != "single stream" and self.aligned and self.dtypes in (FP32, BF16)
        if self.kernel == "statistics":
            return True
        narrow = (self.master, self.dtypes, self.windows) == ("remainder", BF16, False)
        return self.kernel == "update" and (narrow or not self.hinted)

    def __str__(self):
        kind = "aligned" if self.aligned else "any"
        dtypes = ",".join(self.dtypes)
        extras = self.master + " windows" * self.windows + " no hints" * (not self.hinted)
        return f"{self.variant:19s} {dtypes:14s} {extras:19s} {kind:7s} {self.target:6s}"


def cases(quick, targets, only):
    """What to compile, the longest first."""
    found = []
    variants = [("tiles", True)]
    variants += itertools.product(("single", "statistics"), (True, False))
    variants += [(kernel, True) for kernel in ("update", *SIMPLE_KERNELS)]
    for (kernel, wide), target, dtypes in itertools.product(variants, targets, COMBINATIONS):
        if kernel in ("single", *SIMPLE_KERNELS) and dtypes not in (FP32, BF16):
            continue
        case = Case(kernel, target, dtypes, wide=wide)
        found.append(case)
        if target in ALWAYS and kernel not in SIMPLE_KERNELS and dtypes == FP32:
            found.append(dataclasses.replace(case, aligned=False))
    # with masters, stochastic rounding or micro-batches
    kinds = [(*kind, False) for kind in MASTER_COMBINATIONS]
    kinds += [("plain", FP32, True), ("remainder", BF16, True)]
    for kernel, (master, dtypes, windows), target in itertools.product(
        ("tiles", "update"), kinds, targets
    ):
        found.append(Case(kernel, target, dtypes, master=master, windows=windows))
    for kernel, target in itertools.product(("statistics", "update", "tiles", "single"), targets):
        found.append(Case(kernel, target, hinted=False))
        if kernel == "statistics":
            found += [Case(kernel, target, tables=True), Case(kernel, target, windows=True)]
    return [case for case in found if case.variant in only and (not quick or case.is_quick)]


def find_loose(taken):
    """Budgets that are a step or more above all that is taken, where everything was compiled."""
    most = {}
    for case, registers in taken:
        key = case.variant, case.target, case.budget
        most[key] = max(most.get(key, 0), registers)
    return [
        f"{variant} on {target}: {registers} of {budget} registers are taken"
        for (variant, target, budget), registers in most.items()
        if registers <= budget - STEP
    ]
