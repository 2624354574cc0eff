"""Which tensors a step accepts; the rest is refused by name before anything changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .options import Options
from .records import slices_of
from .tensors import dispatches, is_sharded, reach

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# attributes by which wrappers know parameters that they merged into flat ones and cut into shards
FLAT_MARKS = {
    "_fsdp_flattened": "FSDP1 (FullyShardedDataParallel)",
    "ds_id": "DeepSpeed ZeRO",
    "_hp_mapping": "DeepSpeed ZeRO",
}

# the way out for a parameter that is not meant to be trained
FROZEN = "; without a gradient (requires_grad_(False), .grad = None) it is left alone"


def is_served(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind that a step knows; one that has no shape yet is of none."""
    return not is_lazy(tensor) and tensor.layout is torch.strided and tensor.dtype in FLOAT_DTYPES


def check_float(what: str, tensor: Tensor, way_out: str = "") -> None:
    """Refuse a tensor whose kind the definition does not cover.

    Raises:
        TypeError: sparse, complex, integer or 8-bit float; the message starts with `what`, and ends
            with `way_out`.
        NotImplementedError: a DTensor, or a device without float64.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{what} is {tensor.layout}; BNGD needs dense tensors "
            f"(an Embedding with sparse=False gives dense gradients){way_out}"
        )
    if tensor.is_complex():
        raise TypeError(
            f"{what} has dtype {tensor.dtype}; BNGD does not define complex statistics (train a "
            "real parameter with a last dimension of 2, and use "
            f"torch.view_as_complex(parameter) in forward){way_out}"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{what} has dtype {tensor.dtype}; BNGD takes {allowed}{way_out}")
    if tensor.device.type == "mps":
        raise NotImplementedError(
            f"{what} is on {tensor.device}, which has no float64 for the statistics; "
            "keep the model on the CPU"
        )
    if is_sharded(tensor):
        raise NotImplementedError(
            f"{what} is sharded (DTensor), whose statistics need all ranks: step it with BNGD, or "
            "pass the whole tensor (.full_tensor())"
        )
    if dispatches(tensor):
        _check_arithmetic(what, tensor)


def _check_arithmetic(what: str, tensor: Tensor) -> None:
    """Refuse a tensor subclass that would break a step off in the middle."""
    try:
        tensor[...].double().mul(1.0)
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            f"{what} is a {type(tensor).__name__}, which cannot be multiplied; BNGD needs tensors "
            "with arithmetic: dequantize it (momentum_dtype=torch.bfloat16 halves momentum)"
        ) from error


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse a parameter that has a gradient, and that a step cannot write to.

    Raises:
        TypeError: as `check_float`.
        NotImplementedError: as `check_float` or `check_whole`.
        RuntimeError: made under `torch.inference_mode`.
        ValueError: entries share memory, or have none.
    """
    check_float(name, param, FROZEN)
    check_whole(name, param)
    _check_writable(name, param)
    needed = param.element_size() * (param.storage_offset() + reach(param))
    if not dispatches(param) and param.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"{name}, of shape {tuple(param.shape)}, has a storage of "
            f"{param.untyped_storage().nbytes()} bytes and needs {needed}; bring its memory back "
            "before the step"
        )
    if overlaps(param):
        raise ValueError(
            f"{name} overlaps itself in memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}); a step cannot write to it: use .clone() or .contiguous(){FROZEN}"
        )


def check_whole(name: str, param: Tensor) -> None:
    """Refuse what is not one whole parameter.

    FSDP1 and DeepSpeed ZeRO mark the parameters that they flatten, except for the partitions of
    ZeRO 1 and 2: `check_unpartitioned` looks for those. Other libraries' flat shards that come as
    plain tensors, such as those of Megatron's distributed optimizer, cannot be told from
    parameters.

    Raises:
        NotImplementedError: flattened by FSDP1 or DeepSpeed ZeRO.
    """
    for mark, wrapper in FLAT_MARKS.items():
        if getattr(param, mark, None) is not None:
            raise _flattened(name, param, wrapper)


def _check_writable(what: str, tensor: Tensor) -> None:
    """Refuse what torch would not write, half way through a step."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what}, of shape {tuple(tensor.shape)}, was made under torch.inference_mode() and "
            "cannot be written outside of it; make it outside, or take a .clone()"
        )


def _flattened(name: str, param: Tensor, wrapper: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}, of shape {tuple(param.shape)}, belongs to {wrapper}, which merges parameters "
        "and cuts them where no tensor ends: statistics would be those of a piece; use "
        "fully_shard (FSDP2) or DistributedDataParallel, which keep tensors apart"
    )


def check_unpartitioned(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse the flat partition that DeepSpeed ZeRO 1 and 2 put in place of a group's parameters.

    It bears no mark. It is a plain tensor with one dimension, alone in its group, where DeepSpeed
    is loaded; a vector of one's own that looks so is a `torch.nn.Parameter` as a rule.

    Args:
        params: the group's parameters.
        names: what to call them in an error.

    Raises:
        NotImplementedError: the group looks like a flat partition.
    """
    alone = params[0] if len(params) == 1 else None
    if type(alone) is Tensor and alone.dim() == 1 and "deepspeed" in sys.modules:
        raise _flattened(names[0], alone, "DeepSpeed ZeRO")


def check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    buffered: bool,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse lists that do not belong together.

    Args:
        params: n tensors, written in place.
        grads: n tensors of the same shapes and devices; the dtypes may differ.
        momentum_buffers: n tensors of the same shapes, or None when not `buffered`.
        buffered: whether the options need momentum buffers.
        names: what to call the parameters in an error.

    Raises:
        ValueError: lengths, shapes or devices differ, or a buffer is missing.
        TypeError: a tensor is not dense and of a supported float dtype.
    """
    if len(params) != len(grads):
        raise ValueError(f"got {len(params)} params but {len(grads)} grads")
    if buffered and momentum_buffers is None:
        raise ValueError("momentum or accumulation_steps needs momentum_buffers, got None")
    buffers = momentum_buffers if buffered else None
    if buffers is not None and len(buffers) != len(params):
        raise ValueError(f"got {len(params)} params but {len(buffers)} momentum_buffers")
    for i, (param, grad) in enumerate(zip(params, grads)):
        name = names[i] if names else f"params[{i}]"
        check_parameter(name, param)
        check_float(f"the gradient of {name}", grad)
        others = [("gradient", grad)]
        if buffers is not None:
            check_float(f"the momentum buffer of {name}", buffers[i])
            _check_writable(f"the momentum buffer of {name}", buffers[i])
            others.append(("momentum buffer", buffers[i]))
        for kind, other in others:
            if other.shape != param.shape:
                raise ValueError(
                    f"the {kind} of {name} has shape {tuple(other.shape)}, "
                    f"the parameter {tuple(param.shape)}"
                )
            if other.device != param.device:
                raise ValueError(
                    f"the {kind} of {name} is on {other.device}, the parameter on {param.device}"
                )


def check_masters(
    params: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None,
    windows: Sequence[Tensor] | None,
    options: Options,
) -> None:
    """Refuse masters and windows that do not belong to the parameters.

    Raises:
        ValueError: lengths, shapes, dtypes or devices are wrong, windows are missing, or a
            parameter has both a master and stochastic rounding.
    """
    if options.accumulation_steps > 1 and windows is None:
        raise ValueError(f"accumulation_steps={options.accumulation_steps} needs windows, got None")
    for kind, tensors in (("masters", masters), ("windows", windows)):
        if tensors is not None and len(tensors) != len(params):
            raise ValueError(f"got {len(params)} params but {len(tensors)} {kind}")
    for i, (param, master) in enumerate(zip(params, masters or ())):
        if master is None:
            continue
        if options.master_weights == "stochastic":
            raise ValueError(f"masters[{i}] and a rounding_key exclude each other; drop one")
        allowed = {torch.bfloat16: (torch.int16, torch.float32), torch.float16: (torch.float32,)}
        if master.dtype not in allowed.get(param.dtype, ()):
            raise ValueError(
                f"masters[{i}] has dtype {master.dtype}, params[{i}] {param.dtype}: bfloat16 takes "
                "int16 or float32, float16 takes float32, others have no master (None)"
            )
        if master.shape != param.shape or master.device != param.device:
            raise ValueError(
                f"masters[{i}] has shape {tuple(master.shape)} on {master.device}, "
                f"params[{i}] {tuple(param.shape)} on {param.device}"
            )
    for i, (param, window) in enumerate(zip(params, windows or ())):
        slices = slices_of(param.shape, options.granularity)
        if window.shape != (slices,) or window.dtype is not torch.uint8:
            raise ValueError(
                f"windows[{i}] must be uint8 of shape ({slices},), "
                f"got {window.dtype} of shape {tuple(window.shape)}"
            )
        if not window.is_contiguous() or window.device != param.device:
            raise ValueError(f"windows[{i}] must be contiguous and on {param.device}")


def nonfinite(name: str, where: str = "") -> FloatingPointError:
    """The error of a gradient that is not finite."""
    return FloatingPointError(
        f"the gradient of {name} has an inf or a NaN{where}; nothing was changed "
        "(nonfinite='skip' leaves such slices as they are)"
    )


def nonfinite_somewhere(name: str) -> FloatingPointError:
    """The error of every rank where one of them has a non-finite part of a gradient."""
    return nonfinite(name, ", here or on another rank")


def overlaps(tensor: Tensor) -> bool:
    """Whether two indices of `tensor` may share memory.

    No two do if each stride steps over all that the smaller strides span.
    """
    if tensor.is_contiguous():
        return False
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= span:
            return True
        span += stride * (size - 1)
    return False


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    options: Options,
    *,
    names: Sequence[str] | None = None,
    finite: Sequence[bool] | None = None,
) -> None:
    """Refuse what only this combination of options and tensors rules out.

    Args:
        params: of one group.
        grads: of the parameters.
        options: the group's.
        names: what to call the parameters in an error.
        finite: in which gradients to look for non-finite entries under ``nonfinite="raise"``;
            None for all.

    Raises:
        ValueError: ``granularity="global"`` with parameters on several devices.
        FloatingPointError: ``nonfinite="raise"`` and a gradient with an inf or a NaN; this
            reads every gradient and synchronises.
    """
    if options.granularity == "global":
        devices = sorted({str(param.device) for param in params})
        if len(devices) > 1:
            raise ValueError(
                "granularity='global' needs all parameters of a group on one device, "
                f"got {', '.join(devices)}: make one group per device"
            )
    if options.nonfinite == "raise":
        looked = [i for i in range(len(grads)) if finite is None or finite[i]]
        flags = [torch.isfinite(grads[i]).all() for i in looked]
        for i, flag in zip(looked, flags):
            if not flag:
                raise nonfinite(names[i] if names else f"params[{i}]")
