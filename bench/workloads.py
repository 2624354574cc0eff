"""Parameter lists of real models as data: shapes only, no weights and no network.

Matrices are in the layout of `torch.nn.Linear`, [out, in]; tied weights are counted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """What one optimizer has to step.

    Attributes:
        name: as in the results.
        shapes: makes the shapes of its parameters, in the model's order.
        groups: parameter groups over which they are spread evenly, in order.
    """

    name: str
    shapes: Callable[[], Iterator[Shape]]
    groups: int = 1


def elements(shapes: Iterator[Shape]) -> int:
    """Entries of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def resnet50() -> Iterator[Shape]:
    """torchvision's ResNet-50: 161 tensors, 25 557 032 entries."""

    def conv(out: int, into: int, size: int) -> Iterator[Shape]:
        yield (out, into, size, size)
        yield from [(out,)] * 2  # its batch norm

    yield from conv(64, 3, 7)
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv(width, width_in, 1)
            yield from conv(width, width, 3)
            yield from conv(4 * width, width, 1)
            if block == 0:
                yield from conv(4 * width, width_in, 1)
            width_in = 4 * width
    yield from ((1000, 2048), (1000,))


def vit_b16() -> Iterator[Shape]:
    """torchvision's ViT-B/16 at 224 pixels: 152 tensors, 86 567 656 entries."""
    width = 768
    yield from ((1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width))
    for _ in range(12):
        yield from _transformer_layer(width)
    yield from ((width,), (width,), (1000, width), (1000,))


def gpt2(width: int, layers: int) -> Iterator[Shape]:
    """GPT-2 with its vocabulary of 50257, context of 1024 and tied head."""
    yield from ((50257, width), (1024, width))
    for _ in range(layers):
        yield from _transformer_layer(width)
    yield from ((width,), (width,))


def _transformer_layer(width: int) -> Iterator[Shape]:
    """A pre-norm layer with biases: attention, then a four times wider perceptron."""
    yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
    yield from ((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,))


def llama3_8b(layers: int = 32, *, head: bool = True) -> Iterator[Shape]:
    """Llama-3-8B, or its embedding and first layers: hidden 4096, 32 heads of which 8 for k, v."""
    hidden, inner, keys = 4096, 14336, 8 * 128
    yield (128256, hidden)
    for _ in range(layers):
        yield from ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
        yield from ((inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,))
    if head:
        yield from ((hidden,), (128256, hidden))


def moe_10k() -> Iterator[Shape]:
    """A mixture of experts in 10 000 tensors: 13 layers of 254 small experts."""
    hidden, inner = 512, 64
    yield (32000, hidden)
    for _ in range(13):
        yield from [(hidden, hidden)] * 4 + [(hidden,)] * 2 + [(254, hidden)]
        yield from [(inner, hidden), (inner, hidden), (hidden, inner)] * 254
    yield from ((hidden,), (32000, hidden))


def detector() -> Iterator[Shape]:
    """465 tensors, for a group each: a convolutional backbone and two transformer towers."""
    yield from resnet50()
    yield from vit_b16()
    yield from vit_b16()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("resnet50", resnet50),
        Workload("vit-b16", vit_b16),
        Workload("gpt2-124m", lambda: gpt2(768, 12)),
        Workload("gpt2-1.5b", lambda: gpt2(1600, 48)),
        Workload("llama3-8b-shard", lambda: llama3_8b(8, head=False)),
        Workload("moe-10k", moe_10k),
        Workload("many-1000x1000", lambda: iter([(1000,)] * 1000)),
        # small enough that the host is what a step waits for
        Workload("host-300", lambda: iter([(64, 64)] * 300)),
        # more entries than a signed 32-bit index can count
        Workload("one-2.2e9", lambda: iter([(2_200_000_000,)])),
        Workload("groups-465", detector, groups=465),
    )
}

# for `--device cpu`, where kernels run in the interpreter: the code is tried, not the speed
DRY_RUN = {
    "dry-run": Workload("dry-run", lambda: iter([(24, 16), (9, 7), (130,), (1,)])),
    "dry-run-groups": Workload("dry-run-groups", lambda: iter([(24, 16), (130,)]), groups=2),
}
