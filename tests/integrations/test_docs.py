"""Every snippet of docs/integrations.md runs as it stands, after the preamble given here for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bngd_triton import BNGD
from support.checkout import DOCS
from support.processes import run

PAGE = DOCS / "integrations.md"
pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the tests run without the checkout around them"
)


def snippets() -> dict[str, str]:
    """The page's code by heading."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    found = {}
    for section in sections:
        heading = section.splitlines()[0]
        for code in re.findall(r"```python\n(.*?)```", section, re.S):
            assert heading not in found
            found[heading] = code
    return found


def preamble() -> dict[str, Any]:
    """What the page says is the reader's own: a model, batches and a loss function."""
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    return {
        "torch": torch,
        "BNGD": BNGD,
        "model": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        "batches": [(x, torch.tanh(x[:, :3]))] * 24,
        "loss_fn": nn.functional.mse_loss,
    }


def loss(names: dict[str, Any], model: nn.Module) -> float:
    x, y = names["batches"][0]
    device = next(model.parameters()).device
    return names["loss_fn"](model(x.to(device)), y.to(device)).item()


def test_every_snippet_has_a_test() -> None:
    assert list(snippets()) == [
        "Transformers", "Lightning", "Accelerate", "timm", "DistributedDataParallel",
        "ZeroRedundancyOptimizer",
    ]  # fmt: skip


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # the snippet writes to "out"
    monkeypatch.chdir(tmp_path)
    names = preamble()
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    names["model"] = transformers.GPT2LMHeadModel(config)
    ids = torch.tensor(list(PAGE.read_bytes()[:1600])).view(-1, 16)
    names["data"] = [{"input_ids": row, "labels": row} for row in ids]
    exec(snippets()["Transformers"], names)
    assert type(names["trainer"].optimizer.optimizer) is BNGD
    assert names["trainer"].state.global_step == 20


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    names = preamble()
    before = loss(names, names["model"])

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = names["model"]

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

    names["Module"] = Module
    exec(snippets()["Lightning"], names)
    net = names["Net"]()
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(names["batches"], batch_size=None))
    assert loss(names, net.net) < before
    # the schedule has come to its end
    assert type(trainer.optimizers[0]) is BNGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    names = {**preamble(), "Accelerator": accelerate.Accelerator}
    before = loss(names, names["model"])
    if torch.cuda.is_available():
        # the snippet's accelerator takes the GPU, and a list is not moved by it
        names["batches"] = [(x.cuda(), y.cuda()) for x, y in names["batches"]]
    exec(snippets()["Accelerate"], names)
    assert loss(names, names["model"]) < before


def test_timm() -> None:
    pytest.importorskip("timm")
    names = preamble()
    exec(snippets()["timm"], names)
    assert type(names["optimizer"]) is BNGD
    assert [group["weight_decay"] for group in names["optimizer"].param_groups] == [0.0, 0.05]


def run_snippets(codes: list[str]) -> list[tuple[float, float]]:
    """The loss before and after each, on one rank of several."""
    # imported by the workers alone: it compiles TorchScript
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    losses = []
    for code in codes:
        names = preamble()
        names["DistributedDataParallel"] = DistributedDataParallel
        names["ZeroRedundancyOptimizer"] = ZeroRedundancyOptimizer
        before = loss(names, names["model"])
        exec(code, names)
        losses.append((before, loss(names, names["model"])))
    return losses


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_distributed() -> None:
    data_parallel = snippets()["DistributedDataParallel"]
    # the other snippet only makes the optimizer: it takes the place of this one's
    wrap, _, loop = data_parallel.split("\n", 2)
    zero = f"{wrap}\n{snippets()['ZeroRedundancyOptimizer']}\n{loop}"
    for rank in run(2, run_snippets, [data_parallel, zero]):
        for before, after in rank:
            assert after < before
