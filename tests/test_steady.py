"""Steps that repeat the one before: recognised, and never by mistake."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import capture
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD, kept
from bngd_triton.stepper import Stepper


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts how often a step was laid out or checked in full since the last call."""
    count = 0
    full = Stepper.lay_out_and_step

    def counting(*args: Any) -> None:
        nonlocal count
        count += 1
        full(*args)

    monkeypatch.setattr(Stepper, "lay_out_and_step", counting)

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    return since


def pair(device: torch.device, **options: Any) -> Iterator[tuple[list[Parameter], BNGD]]:
    """The same parameters under the kernels and under the reference."""
    for fused in (True, False):
        torch.manual_seed(0)
        params = [
            Parameter(torch.randn(shape, device=device)) for shape in ((4, 8), (600, 5), (16,))
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
        yield params, BNGD(groups, fused=fused, **options)


def give_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        values = torch.randn(param.shape, generator=generator).to(param.device)
        param.grad = values


def assert_same(found: list[Parameter], want: list[Parameter]) -> None:
    for one, other in zip(found, want):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_steps_in_a_row_are_laid_out_once(device: torch.device, layouts: Callable[[], int]) -> None:
    (params, optimizer), (twins, reference) = pair(device, weight_decay=0.1)
    for step in range(5):
        for group, twin in zip(optimizer.param_groups, reference.param_groups):
            group["lr"] = twin["lr"] = 1e-2 / (step + 1)
        give_gradients(params, step)
        give_gradients(twins, step)
        optimizer.step()
        assert layouts() == (step == 0)
        reference.step()
        layouts()
        assert_same(params, twins)


def swap_storage(params: list[Parameter], optimizer: BNGD) -> None:
    params[0].data = params[0].data.clone()


def replace_momentum(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.state[params[1]]["momentum_buffer"] = torch.ones_like(params[1])


def replace_entry(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.state[params[1]] = {"momentum_buffer": torch.ones_like(params[1])}


def replace_state(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def copy_state(params: list[Parameter], optimizer: BNGD) -> None:
    """The same groups, and a state of its own."""
    copies = {p: {k: v.clone() for k, v in entry.items()} for p, entry in optimizer.state.items()}
    optimizer.state = defaultdict(dict, copies)


def swap_equal_states(params: list[Parameter], optimizer: BNGD) -> None:
    state = optimizer.state
    state[params[0]], state[params[1]] = dict(state[params[0]]), dict(state[params[1]])
    state[params[0]]["momentum_buffer"] = state[params[0]]["momentum_buffer"].clone()


def pass_state_on(params: list[Parameter], optimizer: BNGD) -> None:
    """The last parameter's state, under another key: in its place, so values are the same."""
    entry = optimizer.state.pop(params[2])
    optimizer.state[Parameter(params[2].detach().clone())] = entry


def same_memory(params: list[Parameter], optimizer: BNGD) -> None:
    """Another parameter in the memory of the first; it has no momentum yet."""
    new = Parameter(params[0].data)
    new.grad = params[0].grad
    optimizer.param_groups[0]["params"][0] = new


def drop_gradient(params: list[Parameter], optimizer: BNGD) -> None:
    params[1].grad = None


def other_strides(params: list[Parameter], optimizer: BNGD) -> None:
    params[1].grad = params[1].grad.t().contiguous().t()


def unaligned(params: list[Parameter], optimizer: BNGD) -> None:
    memory = torch.empty(params[1].numel() + 1, device=params[1].device)
    params[1].grad = memory[1:].view_as(params[1]).copy_(params[1].grad)


def no_momentum(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.param_groups[0]["momentum"] = 0.0


def by_row(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.param_groups[0]["granularity"] = "row"


def centre_vectors(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.param_groups[1]["center_1d"] = True


def fewer_parameters(params: list[Parameter], optimizer: BNGD) -> None:
    del optimizer.param_groups[0]["params"][1]


def another_parameter(params: list[Parameter], optimizer: BNGD) -> None:
    new = Parameter(params[0].detach().clone())
    new.grad = params[0].grad
    optimizer.param_groups[0]["params"][0] = new


def one_more_parameter(params: list[Parameter], optimizer: BNGD) -> None:
    new = Parameter(params[0].detach().clone())
    new.grad = params[0].grad
    optimizer.param_groups[1]["params"].append(new)


def another_group(params: list[Parameter], optimizer: BNGD) -> None:
    new = Parameter(torch.ones(8, device=params[0].device))
    new.grad = torch.arange(8.0, device=params[0].device)
    optimizer.add_param_group({"params": [new]})


def raise_on_nonfinite(params: list[Parameter], optimizer: BNGD) -> None:
    optimizer.param_groups[0]["nonfinite"] = "raise"


CHANGES = [
    swap_storage, replace_momentum, replace_entry, replace_state, copy_state, swap_equal_states,
    pass_state_on, same_memory, drop_gradient, other_strides, unaligned, no_momentum, by_row,
    centre_vectors, fewer_parameters, another_parameter, one_more_parameter, another_group,
    raise_on_nonfinite,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(
    change: Callable[[list[Parameter], BNGD], None],
    device: torch.device,
    layouts: Callable[[], int],
) -> None:
    done = []
    for params, optimizer in pair(device):
        for step in range(4):
            give_gradients(params, step)
            if step == 2:
                layouts()
                change(params, optimizer)
            optimizer.step()
            if step == 2:
                assert layouts() == 1
        done.append(params)
    assert_same(*done)


def grad_transposed(square: Parameter) -> None:
    assert square.grad is not None
    square.grad.t_()


def grad_data_transposed(square: Parameter) -> None:
    assert square.grad is not None
    square.grad.data = square.grad.data.t()


def grad_data_halved(square: Parameter) -> None:
    assert square.grad is not None
    square.grad.data = square.grad.data.view(torch.float16)[:, ::2]


def grad_set(square: Parameter) -> None:
    grad = square.grad
    assert grad is not None
    grad.set_(grad.untyped_storage(), 0, (8, 8), (1, 8))  # type: ignore[call-overload]


def param_data_transposed(square: Parameter) -> None:
    square.data = square.data.t()


def param_set(square: Parameter) -> None:
    with torch.no_grad():
        square.set_(square.untyped_storage(), 0, (8, 8), (1, 8))  # type: ignore[call-overload]


IN_PLACE = [
    grad_transposed, grad_data_transposed, grad_data_halved, grad_set, param_data_transposed,
    param_set,
]  # fmt: skip


@pytest.mark.parametrize("change", IN_PLACE, ids=lambda change: change.__name__)
def test_another_layout_of_the_same_object_at_the_same_address_is_noticed(
    change: Callable[[Parameter], None], device: torch.device, layouts: Callable[[], int]
) -> None:
    done = []
    for fused in (True, False):
        torch.manual_seed(0)
        square = Parameter(torch.randn(8, 8, device=device))
        rest = Parameter(torch.randn(16, device=device))
        optimizer = BNGD([square, rest], 1e-2, granularity="row", fused=fused)
        give_gradients([square, rest], 0)
        for step in range(3):
            optimizer.step()
            assert layouts() == (step == 0 or not fused)
        addresses = square.data_ptr(), square.grad.data_ptr()
        change(square)
        assert (square.data_ptr(), square.grad.data_ptr()) == addresses
        optimizer.step()
        assert layouts() == 1
        done.append([square, rest])
    assert_same(*done)


@pytest.mark.parametrize("size", [1, 8])
def test_equal_values_are_not_the_same_momentum(
    size: int, device: torch.device, layouts: Callable[[], int]
) -> None:
    param = Parameter(torch.randn(size, device=device))
    optimizer = BNGD([param], fused=True)
    give_gradients([param], 0)
    for _ in range(2):
        optimizer.step()
    assert layouts() == 1
    old = optimizer.state[param]["momentum_buffer"]
    new = optimizer.state[param]["momentum_buffer"] = old.clone()
    optimizer.step()
    assert layouts() == 1
    assert not torch.equal(new, old)


def test_swapped_momentum_data_does_not_free_what_the_kernels_write(device: torch.device) -> None:
    param = Parameter(torch.randn(600, 5, device=device))
    optimizer = BNGD([param], fused=True)
    give_gradients([param], 0)
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    optimizer.step()
    storage = torch.multiprocessing.reductions.StorageWeakRef(buffer.untyped_storage())
    buffer.data = buffer.data.clone()
    assert not storage.expired()


@pytest.mark.parametrize("moved", [range(3), [0], [1]], ids=["all", "the first", "another"])
def test_state_moved_by_data_is_noticed(
    moved: Sequence[int], device: torch.device, layouts: Callable[[], int]
) -> None:
    """At once where all or the first moved; another alone when its turn comes."""
    params = [Parameter(torch.randn(8, device=device)) for _ in range(3)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    # it is the turn of the last
    for _ in range(11):
        optimizer.step()
    layouts()
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
    for i in moved:
        buffers[i].data = torch.zeros_like(buffers[i])
    for _ in range(3 if moved == [1] else 1):
        optimizer.step()
    assert layouts() == 1
    optimizer.step()
    assert layouts() == 0
    for i in moved:
        assert buffers[i].abs().max() > 0


def test_a_negated_view_after_plain_gradients(device: torch.device) -> None:
    done = []
    for params, optimizer in pair(device, momentum=0.0):
        for step in range(5):
            give_gradients(params, step)
            if step > 1:
                for param in params:
                    assert param.grad is not None
                    param.grad = torch._neg_view(param.grad)
            optimizer.step()
        done.append(params)
    assert_same(*done)


@pytest.mark.parametrize("patience", [2, 10**9], ids=["known to stay", "looked at anew"])
def test_an_empty_parameter_that_grows(
    patience: int,
    device: torch.device,
    layouts: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "PATIENCE", patience)
    params = [Parameter(torch.randn(n, device=device)) for n in (8, 0)]
    optimizer = BNGD(params, momentum=0.0, fused=True)
    give_gradients(params, 0)
    for _ in range(6):
        optimizer.step()
    assert layouts() == 1
    params[1].data = torch.zeros(8, device=device)
    params[1].grad = torch.arange(8.0, device=device)
    optimizer.step()
    assert layouts() == 1
    assert params[1].abs().max() > 0


def test_state_of_the_users_own(device: torch.device, layouts: Callable[[], int]) -> None:
    param = Parameter(torch.randn(8, device=device))
    optimizer = BNGD([param], fused=True)
    optimizer.state["epoch"] = 3  # type: ignore[index]
    give_gradients([param], 0)
    for _ in range(3):
        optimizer.step()
    assert layouts() == 1


def test_modules_are_converted_by_swapping(device: torch.device) -> None:
    """torch refuses to swap tensors that have weak references."""
    model = torch.nn.Linear(4, 3, device=device)
    optimizer = BNGD(model.parameters(), fused=True, flatten=False)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        give_gradients(list(model.parameters()), 0)
        for _ in range(12):
            optimizer.step()
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.bfloat16


def test_a_late_gradient_is_noticed(device: torch.device, layouts: Callable[[], int]) -> None:
    done = []
    for params, optimizer in pair(device):
        for step in range(4):
            give_gradients(params, step)
            if step < 2:
                params[2].grad = None
            optimizer.step()
        done.append(params)
    assert_same(*done)


@pytest.mark.parametrize("patience", [2, 10**9], ids=["known to stay", "looked at anew"])
@pytest.mark.parametrize("change", [*CHANGES, *IN_PLACE], ids=lambda change: change.__name__)
def test_a_change_is_noticed_among_gradients_that_stay(
    change: Callable[..., None],
    patience: int,
    device: torch.device,
    layouts: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above, but that gradients are tensors that stay, with new values."""
    monkeypatch.setattr(kept, "PATIENCE", patience)
    done = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [
            Parameter(torch.randn(shape, device=device)) for shape in ((8, 8), (600, 5), (16,))
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
        optimizer = BNGD(groups, fused=fused)
        give_gradients(params, 0)
        for step in range(6):
            for param in params:
                if param.grad is not None:
                    param.grad.mul_(0.5)
            if step == 5:
                steady_step = optimizer._stepper.steady
                if fused:
                    assert steady_step is not None
                    assert (steady_step.kept is not None) == (patience == 2)
                layouts()
                change(*([params[0]] if change in IN_PLACE else [params, optimizer]))
            optimizer.step()
            if step == 5 and fused:
                assert layouts() == 1
        done.append(params)
    assert_same(*done)


def test_gradients_that_stay_are_looked_at_ever_more_seldom(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stays and another does not: looking at all of them takes far longer than a step."""
    made = []
    step = 0

    class Counting(kept.Kept):
        def __init__(self, *args: Any) -> None:
            made.append(step)
            super().__init__(*args)

    monkeypatch.setattr(kept, "Kept", Counting)
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    for step in range(60):  # noqa: B007
        params[1].grad = torch.randn(16, device=device)
        optimizer.step()
    assert made == [9, 25, 57]


def test_new_gradients_in_the_place_of_freed_ones(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    """They have the number, and often the address, of those before them."""
    params = [Parameter(torch.randn(16, device=device)) for _ in range(3)]
    optimizer = BNGD(params, fused=True)
    values = torch.randn(16, device=device)
    numbers = set()
    for step in range(60):
        # from the middle on they are new; until then they stay
        if not step or step > 20:
            optimizer.zero_grad()
            for param in params:
                param.grad = values.clone()
        assert params[0].grad is not None
        numbers.add(id(params[0].grad))
        optimizer.step()
        steady_step = optimizer._stepper.steady
        assert steady_step is not None
        assert (steady_step.kept is not None) == (9 <= step <= 20)
    assert layouts() == 1
    assert len(numbers) < 40


def test_gradients_that_stay_are_not_held(device: torch.device) -> None:
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    for _ in range(12):
        optimizer.step()
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None
    memory = [
        torch.multiprocessing.reductions.StorageWeakRef(param.grad.untyped_storage())
        for param in params
        if param.grad is not None
    ]
    optimizer.zero_grad()
    assert [one.expired() for one in memory] == [True, True]


def test_parameters_without_gradients_beside_gradients_that_stay(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    params = [Parameter(torch.randn(n, device=device)) for n in (16, 16, 0)]
    optimizer = BNGD(params, fused=True)
    give_gradients(params, 0)
    params[1].grad = None
    for _ in range(12):
        optimizer.step()
    assert layouts() == 1
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None
    before = params[1].detach().clone()
    params[1].grad = torch.arange(16.0, device=device)
    optimizer.step()
    assert layouts() == 1
    assert not torch.equal(params[1], before)


def test_gradients_from_backward_stay(device: torch.device, layouts: Callable[[], int]) -> None:
    model = torch.nn.Linear(4, 3, device=device)
    optimizer = BNGD(model.parameters(), fused=True)
    for _ in range(14):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(5, 4, device=device)).square().mean().backward()
        optimizer.step()
    assert layouts() == 1
    steady_step = optimizer._stepper.steady
    assert steady_step is not None
    assert steady_step.kept is not None


def test_an_option_changed_alone_or_with_the_rate(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    done = []
    for params, optimizer in pair(device, weight_decay=0.1):
        for step in range(8):
            give_gradients(params, step)
            first, second = optimizer.param_groups
            if step in (2, 3):
                first["lr"] = 1e-2 / step
            if step == 4:
                first["weight_decay"], second["lr"] = 0.3, 1e-2
            if step == 5:
                second["eps"], second["momentum"] = 1e-3, 0.5
            if step == 6:
                second["lr"] = torch.tensor(2e-3)
            if step == 7:
                second["lr"].fill_(4e-3)
            layouts()
            optimizer.step()
            assert layouts() == (step == 0 or optimizer.fused is False)
        done.append(params)
    assert_same(*done)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("lr", True, TypeError), ("lr", -1.0, ValueError), ("lr", float("nan"), ValueError),
     ("eps", True, TypeError), ("centering", 2, ValueError), ("maximize", 1.5, TypeError)],
)  # fmt: skip
def test_a_bad_option_between_steps_is_refused(
    name: str, value: Any, error: type[Exception], device: torch.device
) -> None:
    """Also one that equals the good one before it, as True equals 1."""
    param = Parameter(torch.randn(16, device=device))
    optimizer = BNGD([param], lr=1.0, eps=1.0, fused=True)
    give_gradients([param], 0)
    for _ in range(3):
        optimizer.step()
    group, before = optimizer.param_groups[0], param.detach().clone()
    good, group[name] = group[name], value
    with pytest.raises(error, match=name):
        optimizer.step()
    with pytest.raises(error, match=name):
        optimizer.sync_hyperparameters()
    assert torch.equal(param, before)
    group[name] = good
    optimizer.step()
    assert not torch.equal(param, before)


def test_tensor_learning_rate_changed_in_place(
    device: torch.device, layouts: Callable[[], int]
) -> None:
    lr = torch.tensor(1e-2, device=device)
    param = Parameter(torch.zeros(600, 5, device=device))
    optimizer = BNGD([param], lr, momentum=0.0, fused=True)
    sizes = []
    for value in (1e-2, 1e-1, 0.0):
        lr.fill_(value)
        before = param.detach().clone()
        param.grad = torch.randn_like(param)
        optimizer.step()
        sizes.append(float((param.detach() - before).square().mean().sqrt()))
    assert sizes == pytest.approx([1e-2, 1e-1, 0.0], rel=1e-4)
    assert layouts() == 1


def test_capture_refuses_what_it_could_not_replay(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a CUDA graph: nothing may be uploaded, and nothing changes when that is refused."""
    param = Parameter(torch.randn(600, 5, device=device))
    optimizer = BNGD([param], 1e-2, fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    capture.pretend(monkeypatch)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match="sync_hyperparameters"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    held: list[Tensor] = [param.grad]
    param.grad = param.grad.clone()
    with pytest.raises(RuntimeError, match="a gradient moved"):
        optimizer.step()
    assert torch.equal(param, before)
    assert held


def test_capture_needs_a_step_before_and_every_gradient(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [Parameter(torch.randn(16, device=device)) for _ in range(2)]
    optimizer = BNGD([("weight", params[0]), ("head", params[1])], fused=True)
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    before = [param.detach().clone() for param in params]
    capture.pretend(monkeypatch)
    with pytest.raises(RuntimeError, match="head has no gradient while a CUDA graph"):
        optimizer.step()
    params[1].grad = torch.randn_like(params[1])
    with pytest.raises(RuntimeError, match="must repeat the one before"):
        optimizer.step()
    for param, old in zip(params, before):
        assert torch.equal(param, old)
    assert params[1] not in optimizer.state


def test_sync_hyperparameters_reaches_a_replay(device: torch.device) -> None:
    """A replay runs the launches alone; options reach it through the device table."""
    param = Parameter(torch.zeros(600, 5, device=device))
    optimizer = BNGD([param], 1e-2, momentum=0.0, fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    step = optimizer._stepper.prepared
    assert step is not None
    for lr in (1e-1, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.sync_hyperparameters()
        before = param.detach().clone()
        step.run_at([param.grad.data_ptr()], optimizer._pass([True]))
        size = (param.detach() - before).square().mean().sqrt()
        assert float(size) == pytest.approx(lr, rel=1e-4)


def test_compiled_training_step(device: torch.device) -> None:
    """torch.compile breaks its graph at `step`, and compiles once under any schedule."""
    torch._dynamo.reset()
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = torch.nn.Linear(8, 8, device=device)
    optimizer = BNGD(model.parameters(), 1e-2, fused=True, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    @torch.compile(backend=backend)
    def train(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(16, 8, device=device)
    losses = [float(train(x).detach())]
    losses += [float(train(x).detach())]
    after_two = compiled
    for _ in range(6):
        schedule.step()
        losses.append(float(train(x).detach()))
    assert compiled == after_two > 0
    assert losses[-1] < losses[0]
