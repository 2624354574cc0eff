"""Steps that compiled kernels take in the tests; kernels are shared by as many as can be."""

from __future__ import annotations

from typing import Any

from support.ptx.steps import BF16, F16, F32, LONG, POISON, StepCase

ROW: Any = ("granularity", "row")
DECAY: Any = ("weight_decay", 0.1)
K = ("accumulation_steps", 2)
SPLIT: dict[str, Any] = {"param": BF16, "grad": BF16, "master": "remainder"}
LONG_POISON = ((0, 4999, "inf"), (1, 8301, "nan"), (4, 8201, "-inf"))

CASES = {
    "fp32": StepCase(options=(DECAY, ("nesterov", True))),
    "fp32 rows": StepCase(options=(DECAY, ROW)),
    "fp32 global": StepCase(options=(("granularity", "global"),)),
    "fp32 no momentum": StepCase(options=(("momentum", 0.0), ("maximize", True))),
    "fp32 partly centred": StepCase(
        options=(("centering", 0.3), ("center_1d", True), ("eps", 0.1)), exact=False
    ),
    "fp32 RMS, eps 0": StepCase(options=(("centering", 0.0), ("eps", 0.0), ROW), exact=False),
    "fp32 random": StepCase(exact=False),
    "fp32 random rows": StepCase(exact=False, options=(ROW, ("nesterov", True))),
    "fp32 cdf": StepCase(exact=False, options=(("normalizer", "cdf"),)),
    "fp32 cdf rows": StepCase(exact=False, options=(("normalizer", "cdf"), ROW, DECAY)),
    "fp32 skips": StepCase(poison=POISON, options=(ROW,)),
    "fp32 global skips": StepCase(poison=POISON[:1], options=(("granularity", "global"),)),
    "fp32 propagates": StepCase(poison=POISON[:2], steps=1, options=(("nonfinite", "propagate"),)),
    "fp32 scaled": StepCase(scale=2.0**10, found_inf=2.0, steps=3, options=(ROW,)),
    "fp32 blocks": StepCase(wide=False, options=(DECAY,)),
    "fp32 blocks, rows": StepCase(wide=False, options=(ROW,), poison=POISON),
    "fp32 no hints": StepCase(hints=False, options=(ROW,)),
    "fp32 blocks, no hints": StepCase(hints=False, wide=False),
    "fp32 unaligned": StepCase(offset=1, options=(DECAY,)),
    "fp32 windows": StepCase(steps=4, poison=POISON, options=(K, ROW)),
    "bf16 split": StepCase(**SPLIT, options=(DECAY,)),
    "bf16 split rows": StepCase(**SPLIT, options=(ROW,)),
    "bf16 split random": StepCase(**SPLIT, exact=False),
    "bf16 split unaligned": StepCase(**SPLIT, offset=3, options=(ROW,)),
    "bf16 split windows": StepCase(**SPLIT, steps=3, options=(("accumulation_steps", 3),)),
    "bf16 stochastic": StepCase(
        param=BF16, grad=BF16, momentum=BF16, options=(ROW, ("rounding_key", 12345678901))
    ),
    "fp16 stochastic": StepCase(param=F16, grad=F16, options=(DECAY, ("rounding_key", 7))),
    "fp16 master": StepCase(param=F16, grad=F16, master="copy", options=(DECAY,)),
    "bf16, fp32 gradients": StepCase(param=BF16, grad=F32),
    "long fp32": StepCase(LONG, poison=LONG_POISON, options=(ROW,)),
    "long fp32 no hints": StepCase(LONG, hints=False, options=(DECAY,)),
    "long fp32 global": StepCase(LONG, options=(("granularity", "global"),)),
    "long fp32 blocks": StepCase(LONG, wide=False, options=(ROW,)),
    "long fp32 unaligned": StepCase(LONG, offset=1, options=(ROW, DECAY)),
    "long fp32 windows": StepCase(LONG, steps=4, poison=LONG_POISON, options=(K, ROW)),
    "long bf16 split": StepCase(LONG, **SPLIT, poison=LONG_POISON),
    "long bf16 split windows": StepCase(
        LONG, **SPLIT, steps=3, options=(("accumulation_steps", 3),)
    ),
    "long fp16 stochastic": StepCase(
        LONG, param=F16, grad=F16, options=(DECAY, ("rounding_key", 7))
    ),
}
# what plain `pytest` runs, by few kernels; the rest is slow
_NAMES = (
    "fp32", "fp32 rows", "fp32 global", "fp32 no momentum", "fp32 random", "fp32 cdf rows",
    "fp32 skips", "fp32 propagates", "fp32 scaled", "fp32 windows", "bf16 split", "long fp32",
    "long fp32 no hints",
)  # fmt: skip
CORE = {
    *((name, form, "random") for name in _NAMES for form in ("two-launch", "single-launch")),
    ("fp32 windows", "two-launch", "warps"),
    ("long fp32", "two-launch", "warps"),
    ("long fp32", "single-launch", "warps"),
}
