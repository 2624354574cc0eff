"""Float32 weights in and out of models of narrower parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngd_triton import BNGD, fp32_state_dict, load_fp32_state_dict
from support.paths import StepPath


def make(path: StepPath, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, BNGD]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 2)).to(path.device)
    model[0].to(dtype)
    return model, BNGD(model.parameters(), 1e-3, weight_decay=0.1, fused=path.fused, **options)


def train(model: nn.Module, optimizer: BNGD, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.device, param.dtype)
        optimizer.step()


def bits(state: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (value.dtype, value.tolist()) for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_go_out_and_come_back(dtype: torch.dtype, path: StepPath) -> None:
    model, optimizer = make(path, dtype)
    train(model, optimizer, range(5))
    weights = fp32_state_dict(model, optimizer)
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    # they hold more than the parameters do, which are their roundings
    assert not torch.equal(weights["0.weight"].to(dtype).float(), weights["0.weight"])
    torch.testing.assert_close(
        model[0].weight.float(), weights["0.weight"], rtol=2.0**-8, atol=0, check_dtype=False
    )

    again, resumed = make(path, dtype)
    train(again, resumed, range(40, 42))
    resumed.load_state_dict(optimizer.state_dict())
    load_fp32_state_dict(again, resumed, weights)
    assert bits(fp32_state_dict(again, resumed)) == bits(weights)
    train(model, optimizer, range(5, 8))
    train(again, resumed, range(5, 8))
    assert bits(fp32_state_dict(again, resumed)) == bits(fp32_state_dict(model, optimizer))


def test_a_new_optimizer_takes_float32_weights(path: StepPath) -> None:
    """Before its first gradient: a float32 model goes on in bfloat16 without losing a bit."""
    wide, optimizer = make(path, torch.float32)
    train(wide, optimizer, range(3))
    narrow, fresh = make(path, torch.bfloat16)
    load_fp32_state_dict(narrow, fresh, wide.state_dict())
    assert narrow[0].weight.dtype == torch.bfloat16
    assert bits(fp32_state_dict(narrow, fresh)) == bits(wide.state_dict())


def test_without_a_master_parameters_stay_as_they_are(path: StepPath) -> None:
    model, optimizer = make(path, torch.bfloat16, master_weights=None)
    train(model, optimizer, range(2))
    assert bits(fp32_state_dict(model, optimizer)) == bits(model.state_dict())


def test_another_model_is_refused(path: StepPath) -> None:
    model, optimizer = make(path, torch.bfloat16)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fp32_state_dict(make(path, torch.bfloat16)[0], optimizer)
    with pytest.raises(TypeError, match="got Sequential and SGD"):
        load_fp32_state_dict(model, torch.optim.SGD(model.parameters(), 0.1), {})


def test_wrong_names_are_torchs_error(path: StepPath) -> None:
    model, optimizer = make(path, torch.bfloat16)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_fp32_state_dict(model, optimizer, {})
