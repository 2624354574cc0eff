"""Parameters and gradients whose memory, strides or dtype change between steps."""

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from bngd_triton.verify.oracle import oracle_step
from support import steps


class Run:
    """An optimizer and the oracle, which goes on from where the parameters are said to be."""

    def __init__(self, params, fused, **options):
        self.params, self.options = params, {"lr": 0.1, **options}
        self.optimizer = BNGD(params, fused=fused, **self.options)
        self.expected = steps.values(params)
        self.buffers = [None] * len(params)

    def step(self, grads):
        """With gradients of any dtype."""
        for param, grad in zip(self.params, grads):
            param.grad = grad.to(param.dtype)
            # as it lies; torch checks the dtype only on assignment
            param.grad.data = grad
        before = self.expected, grads, self.buffers
        self.expected, self.buffers = oracle_step(*before, **self.options)
        self.optimizer.step()

    def check(self, **bound):
        steps.assert_close(self.params, self.expected, **bound)
        steps.assert_close(steps.momenta(self.optimizer, self.params), self.buffers)


def test_a_swapped_storage_is_noticed(path):
    run = Run(steps.make_params(path.device), path.fused)
    run.step(steps.make_grads(run.params, 0))
    old = [param.data for param in run.params]
    frozen = steps.values(old)
    for param in run.params:
        param.data = param.data.clone()
    run.step(steps.make_grads(run.params, 1))
    run.check()
    steps.assert_equal(old, frozen)


def test_new_values_assigned_to_data_are_used(path):
    run = Run(steps.make_params(path.device), path.fused)
    run.step(steps.make_grads(run.params, 0))
    run.expected = [torch.randn_like(param) for param in run.params]
    for param, value in zip(run.params, run.expected):
        param.data = value.clone()
    run.step(steps.make_grads(run.params, 1))
    run.check()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("turned", ["parameter", "gradient"])
def test_other_strides_at_the_same_address_are_noticed(turned, granularity, path):
    # square, so that the transposed view has the same shape, address and entries
    param, memory = (torch.randn(6, 6, device=path.device) for _ in range(2))
    run = Run([Parameter(param)], path.fused, granularity=granularity)
    for seed in range(3):
        if turned == "parameter" and seed == 1:
            (param,) = run.params
            param.grad = None
            param.data = param.data.t()
            run.expected = [run.expected[0].t()]
        run.step([memory.t() if turned == "gradient" and seed == 1 else memory])
    run.check()


SHIFTS = [
    lambda grad: grad.clone(),
    lambda grad: grad.t().clone().t() if grad.dim() == 2 else grad.clone(),
    lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
]


def test_gradients_that_change_memory_in_every_step(path):
    run, kept = Run(steps.make_params(path.device), path.fused), []
    for seed, shift in enumerate(SHIFTS * 2):
        # kept alive, so that no address is used twice
        kept.append([shift(grad) for grad in steps.make_grads(run.params, seed)])
        run.step(kept[-1])
    run.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_of_another_dtype_is_noticed(dtype, path):
    # the kernels do not read float64: those gradients need the choice left open
    run = Run(steps.make_params(path.device), None if dtype == torch.float64 else path.fused)
    for seed, its_dtype in enumerate((torch.float32, dtype, torch.float32)):
        run.step([grad.to(its_dtype) for grad in steps.make_grads(run.params, seed)])
    run.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_cast_to_another_dtype_steps_on(dtype, path):
    model = torch.nn.Linear(5, 4).to(path.device)
    run = Run(list(model.parameters()), path.fused)
    run.step(steps.make_grads(run.params, 0))
    model.to(dtype)
    run.expected, run.buffers = (
        steps.values(run.params),
        steps.values(steps.momenta(run.optimizer, run.params)),
    )
    run.step(steps.make_grads(run.params, 1))
    # one unit of the storage type for values below 1: a GPU rounds, the interpreter truncates
    run.check(atol=torch.finfo(dtype).eps)
    assert all(buffer.dtype == torch.float32 for buffer in steps.momenta(run.optimizer, run.params))


def test_a_gradient_wider_than_the_kernels_is_refused_by_name(device):
    param = Parameter(torch.ones(3, device=device))
    optimizer = BNGD([("bias", param)], lr=0.1, fused=True)
    param.grad = torch.ones_like(param)
    param.grad.data = param.grad.double()
    with pytest.raises(RuntimeError, match=r"fused=True cannot serve bias .* got torch.float64"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert not optimizer.state


def test_momentum_wider_than_the_kernels_is_served(device):
    # a float64 model trained eagerly, then cast: its momentum stays float64
    model = torch.nn.Linear(5, 4).to(device, torch.float64)
    run = Run(list(model.parameters()), None)
    run.step(steps.make_grads(run.params, 0))
    model.float()
    run.expected = steps.values(run.params)
    run.optimizer.fused = True
    with pytest.raises(RuntimeError, match="fused=True cannot serve"):
        steps.take_steps(run.optimizer, run.params, [1])
    run.optimizer.fused = None
    run.step(steps.make_grads(run.params, 1))
    run.check()
