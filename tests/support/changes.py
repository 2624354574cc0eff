"""Changes between two steps, each of which the second must notice."""

import torch
from torch.nn import Parameter

from bngd_triton import BNGD


def pair(device, **options):
    """The same parameters under the kernels and under the reference."""
    for fused in (True, False):
        torch.manual_seed(0)
        params = [
            Parameter(torch.randn(shape, device=device)) for shape in ((8, 8), (60, 50), (16,))
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
        options = {"granularity": "tensor", **options}
        yield params, BNGD(groups, fused=fused, **options)


def replace_momentum(params, optimizer):
    optimizer.state[params[1]]["momentum_buffer"] = torch.ones_like(params[1])


def replace_entry(params, optimizer):
    optimizer.state[params[1]] = {"momentum_buffer": torch.ones_like(params[1])}


def swap_equal_states(params, optimizer):
    state = optimizer.state
    state[params[0]], state[params[1]] = dict(state[params[0]]), dict(state[params[1]])
    state[params[0]]["momentum_buffer"] = state[params[0]]["momentum_buffer"].clone()


def pass_state_on(params, optimizer):
    """The last parameter's state, under another key: in its place, so values are the same."""
    entry = optimizer.state.pop(params[2])
    optimizer.state[Parameter(params[2].detach().clone())] = entry


def same_memory(params, optimizer):
    """Another parameter in the memory of the first; it has no momentum yet."""
    new = Parameter(params[0].data)
    new.grad = params[0].grad
    optimizer.param_groups[0]["params"][0] = new


def drop_gradient(params, optimizer):
    params[1].grad = None


def other_strides(params, optimizer):
    params[1].grad = params[1].grad.t().contiguous().t()


def unaligned(params, optimizer):
    memory = torch.empty(params[1].numel() + 1, device=params[1].device)
    params[1].grad = memory[1:].view_as(params[1]).copy_(params[1].grad)


def no_momentum(params, optimizer):
    optimizer.param_groups[0]["momentum"] = 0.0


def by_row(params, optimizer):
    optimizer.param_groups[0]["granularity"] = "row"


def centre_vectors(params, optimizer):
    optimizer.param_groups[1]["center_1d"] = True


def fewer_parameters(params, optimizer):
    del optimizer.param_groups[0]["params"][1]


def one_more_parameter(params, optimizer):
    new = Parameter(params[0].detach().clone())
    new.grad = params[0].grad
    optimizer.param_groups[1]["params"].append(new)


def next_group(params, optimizer):
    """In the lists themselves: the parameters' order and addresses are as they were."""
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())


def raise_on_nonfinite(params, optimizer):
    optimizer.param_groups[0]["nonfinite"] = "raise"


def move_momentum(params, optimizer):
    """The same object elsewhere."""
    buffer = optimizer.state[params[2]]["momentum_buffer"]
    buffer.data = torch.ones_like(buffer)


def negated(params, optimizer):
    """Views whose memory holds the opposite sign."""
    for param in params:
        param.grad = torch._neg_view(param.grad)


# from here on the same objects, at the same addresses


def grad_transposed(params, optimizer):
    params[0].grad.t_()


def grad_data_transposed(params, optimizer):
    params[0].grad.data = params[0].grad.data.t()


def grad_data_halved(params, optimizer):
    params[0].grad.data = params[0].grad.data.view(torch.float16)[:, ::2]


def grad_set(params, optimizer):
    grad = params[0].grad
    grad.set_(grad.untyped_storage(), 0, (8, 8), (1, 8))


def param_data_transposed(params, optimizer):
    params[0].data = params[0].data.t()


def param_set(params, optimizer):
    with torch.no_grad():
        params[0].set_(params[0].untyped_storage(), 0, (8, 8), (1, 8))


CHANGES = [
    replace_momentum, move_momentum, replace_entry, swap_equal_states, pass_state_on, same_memory,
    drop_gradient, other_strides, unaligned, negated, no_momentum, by_row, centre_vectors,
    raise_on_nonfinite, fewer_parameters, one_more_parameter, next_group, grad_transposed,
    grad_data_transposed, grad_data_halved, grad_set, param_data_transposed, param_set,
]  # fmt: skip
