"""Steps on tensors of any memory layout, against a float64 computation that goes by index."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.verify.oracle import oracle_step

LR = 0.1
STEPS = 2
# parameters are below 8, where half a unit of float32 is 2.4e-7; two steps, with rounding of ghat
# (values up to 4, times LR) on top. A misapplied gradient is off by about LR.
ATOL = 2e-6
# in the memory around a view
BETWEEN = 77.0


class Layout(NamedTuple):
    desc: str
    # from contiguous values of this shape to a parameter, or a gradient, with the layout
    shape: tuple[int, ...]
    param: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor], Tensor]


def contiguous(x):
    return x.clone()


def channels_last(x):
    return x.clone(memory_format=torch.channels_last)


def permuted(*dims):
    """Memory in the order of `dims`, the shape unchanged."""
    inverse = [dims.index(i) for i in range(len(dims))]
    return lambda x: x.permute(dims).contiguous().permute(inverse)


transposed = permuted(1, 0)


def strided(step, dim):
    """Every `step`-th entry of a larger tensor along `dim`, with other values between."""

    def make(x):
        shape = list(x.shape)
        shape[dim] *= step
        base = torch.full(shape, BETWEEN, dtype=x.dtype, device=x.device)
        picked = base[tuple([slice(None)] * dim + [slice(None, None, step)])]
        return picked.copy_(x)

    return make


def offset(by):
    """A view that starts `by` entries into a larger buffer and ends `by` entries before its end."""

    def make(x):
        base = torch.full((x.numel() + 2 * by,), BETWEEN, dtype=x.dtype, device=x.device)
        return base[by : by + x.numel()].view(x.shape).copy_(x)

    return make


def with_strides(*strides):
    """Strides that no rule would choose, for dimensions of size 1."""
    return lambda x: x.clone().as_strided(x.shape, strides)


def expanded(dim):
    """One entry along `dim`, repeated with stride 0."""
    return lambda x: x.narrow(dim, 0, 1).clone().expand(x.shape)


def one_value(x):
    return x.flatten()[:1].clone().view([1] * x.dim()).expand(x.shape)


def negated_view(x):
    """A view whose memory holds the opposite sign, as autograd makes for complex arithmetic."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS = [
    Layout("channels_last", (4, 3, 2, 5), channels_last, channels_last),
    Layout("channels_last_contiguous_grad", (4, 3, 2, 5), channels_last, contiguous),
    Layout("contiguous_channels_last_grad", (4, 3, 2, 5), contiguous, channels_last),
    Layout("channels_last_1x1", (4, 6, 1, 1), channels_last, contiguous),
    Layout("channels_last_depthwise", (6, 1, 3, 3), contiguous, channels_last),
    Layout("transposed", (5, 7), transposed, transposed),
    Layout("transposed_contiguous_grad", (5, 7), transposed, contiguous),
    # the one that optimi and lion-pytorch misapply; square, so that no shape gives it away
    Layout("contiguous_transposed_grad", (6, 6), contiguous, transposed),
    Layout("contiguous_transposed_grad_oblong", (5, 7), contiguous, transposed),
    Layout("rows_innermost", (4, 3, 5), permuted(2, 1, 0), permuted(2, 1, 0)),
    Layout("rows_in_the_middle", (4, 3, 5), permuted(1, 0, 2), permuted(1, 0, 2)),
    Layout("rows_outermost_rest_permuted", (4, 3, 5), permuted(0, 2, 1), permuted(0, 2, 1)),
    Layout("two_permutations", (4, 3, 5), permuted(2, 0, 1), permuted(1, 2, 0)),
    Layout("grad_expanded_rows", (5, 7), contiguous, expanded(0)),
    Layout("grad_expanded_columns", (5, 7), contiguous, expanded(1)),
    Layout("grad_one_value", (5, 7), contiguous, one_value),
    Layout("grad_one_value_vector", (9,), contiguous, one_value),
    Layout("grad_strided", (5, 7), contiguous, strided(2, 1)),
    Layout("strided_columns", (5, 7), strided(2, 1), contiguous),
    Layout("strided_rows", (5, 7), strided(3, 0), contiguous),
    Layout("strided_both", (5, 7), strided(2, 1), strided(2, 1)),
    Layout("strided_vector", (9,), strided(2, 0), strided(2, 0)),
    Layout("odd_strides_of_size_1", (1, 6, 1), with_strides(99, 1, 7), contiguous),
    Layout("odd_strides_of_one_column", (6, 1), with_strides(1, 50), with_strides(1, 3)),
    Layout("odd_strides_of_one_row", (1, 6), with_strides(5, 1), with_strides(1, 1)),
    # 4 bytes past a 16-byte boundary: wide accesses would fault or shift
    Layout("grad_at_odd_offset", (5, 16), contiguous, offset(1)),
    Layout("param_at_odd_offset", (5, 16), offset(3), contiguous),
    Layout("both_at_odd_offsets", (5, 16), offset(3), offset(1)),
    # rows longer than a tile's 2048 entries, so that streaming programs walk them too
    Layout("long_transposed_grad", (3, 4500), contiguous, transposed),
    Layout("long_transposed", (3, 4500), transposed, contiguous),
    Layout("long_grad_at_odd_offset", (3, 4501), contiguous, offset(1)),
    Layout("grad_negated_view", (5, 7), contiguous, negated_view),
    Layout("grad_negated_view_of_one_entry", (1,), contiguous, negated_view),
]


def named(cases):
    return [case.desc for case in cases]


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=named(LAYOUTS))
def test_layout(layout, granularity, path):
    start = torch.randn(layout.shape, device=path.device)
    param = Parameter(layout.param(start))
    assert torch.equal(param, start), "the case itself is wrong"
    # a contiguous companion: one group holds layouts side by side
    other = Parameter(torch.randn(3, 4, device=path.device))
    base, stride, address = param.detach(), param.stride(), param.data_ptr()
    memory = torch.empty(0, device=path.device).set_(base.untyped_storage())
    neighbours = memory == BETWEEN
    options = {"lr": LR, "granularity": granularity, "weight_decay": 0.1}
    optimizer = BNGD([param, other], fused=path.fused, flatten=False, **options)

    expected, buffers = [start, other.detach().clone()], [None, None]
    for _ in range(STEPS):
        values = [layout.grad(torch.randn_like(start) + 0.5), torch.randn_like(other)]
        # what `.grad =` keeps of a layout is torch's business: this is what the optimizer will see
        param.grad, other.grad = values
        assert param.grad.stride() == values[0].stride()
        before = [value.clone() for value in values]
        expected, buffers = oracle_step(expected, values, buffers, **options)
        optimizer.step()
        assert all(torch.equal(now, then) for now, then in zip(values, before)), "wrote a gradient"

    for got, want in zip((param, other), expected):
        torch.testing.assert_close(got.detach().cpu().double(), want, rtol=0, atol=ATOL)
    for got, want in zip((param, other), buffers):
        buffer = optimizer.state[got]["momentum_buffer"]
        torch.testing.assert_close(buffer.cpu().double(), want, rtol=0, atol=ATOL)
        # dense, in the parameter's order
        assert buffer.stride() == torch.empty_like(got).stride()
    assert (param.stride(), param.data_ptr()) == (stride, address)
    # a view made before sees the step: the parameter was written where it is, and nothing else
    assert torch.equal(base, param)
    assert torch.equal(memory == BETWEEN, neighbours)
