"""Which tensors the kernels can serve, found out without importing Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..tensors import dispatches

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, decided once as Triton decides it."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def why_not_memory(tensor: Tensor) -> str | None:
    """Why a tensor's entries are not what lies at its address; None if they are."""
    if dispatches(tensor):
        return f"it is a {type(tensor).__name__}, whose entries are not plain memory"
    try:
        addressed = bool(tensor.data_ptr()) or not tensor.numel() or tensor.is_meta
    except RuntimeError:
        addressed = False
    if not addressed:
        return "it has no memory (inside a transform of torch.func, or zeros that none stores)"
    return None


def why_not(tensor: Tensor) -> str | None:
    """Why the kernels cannot serve a dense float tensor, with the way out; None if they can.

    Of a DTensor, ask with the part that this process holds.
    """
    if not has_triton():
        return "Triton is not installed; install it, or use fused=False"
    reason = why_not_memory(tensor)
    if reason:
        return f"{reason}; use fused=None or fused=False"
    if tensor.dtype not in FUSED_DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in FUSED_DTYPES)
        return f"the kernels take {served}, got {tensor.dtype}; use fused=None or fused=False"
    kind = tensor.device.type
    if kind == "cpu":
        if interpreting():
            return None
        return (
            "it is on the CPU; move it to a GPU first, use fused=False, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if interpreting():
        return f"TRITON_INTERPRET=1 runs kernels on the CPU, it is on {tensor.device}; unset it"
    if kind not in ("cuda", "xpu"):
        return f"Triton has no backend for {tensor.device}; use fused=None or fused=False"
    if kind == "cuda" and not torch.version.hip:
        # Triton's own lower bound
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if major < 8:
            return f"Triton needs compute capability 8.0, {tensor.device} has {major}.{minor}"
    if kind == "xpu" and not torch.xpu.get_device_properties(tensor.device).has_fp64:
        return f"{tensor.device} has no float64 for the statistics; use fused=None or fused=False"
    return None
