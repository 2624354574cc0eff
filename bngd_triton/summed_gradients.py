"""Warn once where micro-batches' gradients seem to be summed before they are normalised.

With ``accumulation_steps=K`` each micro-batch is normalised by itself, so its gradient must be
fresh: `zero_grad` belongs before every `backward`. Whoever zeroes once a window, as for other
optimizers, steps by sums in which the first micro-batch counts K times.
"""

from __future__ import annotations

import warnings
from typing import Any


class SummedGradients:
    """Looks at one gradient of each accumulating group after every micro-batch."""

    def __init__(self) -> None:
        self._warned = False
        # which tensor each group's first gradient was, and how often it had been written
        self._before: dict[int, tuple[int, int]] = {}

    def look(self, groups: list[dict[str, Any]]) -> None:
        """Note a micro-batch that was taken in, before it is counted."""
        if self._warned:
            return
        for index, group in enumerate(groups):
            grad = next((p.grad for p in group["params"] if p.grad is not None), None)
            if group["accumulation_steps"] == 1 or grad is None or grad.is_inference():
                continue
            now = id(grad), grad._version
            last = self._before.get(index)
            self._before[index] = now
            # a fresh gradient is another tensor, or written twice: zeroed and added to
            if group["micro_step"] > 0 and last is not None and now == (last[0], last[1] + 1):
                self._warned = True
                warnings.warn(
                    f"the gradients of param_groups[{index}] seem to be summed over micro-batches: "
                    f"they are the tensors of the call before, written once since. With "
                    f"accumulation_steps={group['accumulation_steps']} each micro-batch is "
                    "normalised by itself: call zero_grad() before every backward()",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
