"""Whole training steps on random data, with and without the optimizer: its share of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arms import STORAGES, Arm, UnavailableError, start
from .measure import Clock, quantile

LR = 1e-4


@dataclass(frozen=True)
class Size:
    """Of the models: those of GPT-2 124M and ResNet-50, or small ones for a dry run."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    tokens: int = 1024
    sequences: int = 8
    planes: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    pixels: int = 224
    images: int = 64


DRY_RUN = Size(8, 1, 2, 4, 1, planes=2, blocks=(1,), pixels=8, images=2)


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention, as GPT-2's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3, 1x1, with a projection where the shape changes."""

    def __init__(self, into: int, planes: int, stride: int):
        super().__init__()
        out = 4 * planes
        self.body = nn.Sequential(
            *_conv(into, planes, 1), nn.ReLU(), *_conv(planes, planes, 3, stride), nn.ReLU(),
            *_conv(planes, out, 1),
        )  # fmt: skip
        same = into == out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*_conv(into, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def _conv(into: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]


def gpt2_blocks(size: Size, device: torch.device) -> tuple[nn.Module, Tensor]:
    """GPT-2's layers without the embedding, and an input."""
    model = nn.Sequential(*(Layer(size.width, size.heads) for _ in range(size.layers)))
    x = torch.randn(size.sequences, size.tokens, size.width, device=device)
    return model.to(device), x


def resnet50_convolutions(size: Size, device: torch.device) -> tuple[nn.Module, Tensor]:
    """ResNet-50 without its head, and images."""
    parts = [*_conv(3, size.planes, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    into = size.planes
    for stage, blocks in enumerate(size.blocks):
        planes = size.planes * 2**stage
        for block in range(blocks):
            parts.append(Bottleneck(into, planes, 2 if stage and not block else 1))
            into = 4 * planes
    x = torch.randn(size.images, 3, size.pixels, size.pixels, device=device)
    return nn.Sequential(*parts).to(device), x


MODELS = {"gpt2-blocks": gpt2_blocks, "resnet50-convs": resnet50_convolutions}


def run(
    name: str, arms: Sequence[Arm], clock: Clock, size: Size, windows: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Time a model's iteration without an optimizer, then with each arm; windows in turn.

    Returns:
        Rows, and the arms that could not run.
    """
    model, x = MODELS[name](size, clock.device)
    params = [param for param in model.parameters() if param.requires_grad]

    def gradients() -> None:
        for param in params:
            param.grad = None
        with torch.autocast(clock.device.type, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()

    iterations: dict[str, Callable[[], None]] = {"": gradients}
    unavailable = []
    for arm in arms:
        gradients()
        try:
            stepper = start(arm, params, 1, STORAGES["fp32"], LR)
        except UnavailableError as error:
            unavailable.append(
                {"workload": name, "dtype": "fp32", "arm": arm.name, "reason": str(error)}
            )
            continue

        def iteration(step: Callable[[], Any] = stepper.step) -> None:
            gradients()
            step()

        iterations[arm.name] = iteration

    # a dry run's windows are single steps
    steps = 5 if clock.device.type == "cuda" else 1
    times: dict[str, list[float]] = {arm: [] for arm in iterations}
    for window in range(windows + 1):
        for arm_name, once in iterations.items():

            def several(once: Callable[[], None] = once) -> None:
                for _ in range(steps):
                    once()

            clock.synchronize()
            taken = clock.span(several) / steps
            # the first window warms up
            if window:
                times[arm_name].append(taken)
    without = quantile(times.pop(""), 0.5)
    rows = []
    for arm_name, taken in times.items():
        median = quantile(taken, 0.5)
        rows.append(
            {
                "model": name,
                "arm": arm_name,
                "parameters": sum(param.numel() for param in params),
                "iteration_us": median,
                "p20_us": quantile(taken, 0.2),
                "p80_us": quantile(taken, 0.8),
                "n": len(taken),
                "without_optimizer_us": without,
                "optimizer_share": 1 - without / median,
            }
        )
    return rows, unavailable
