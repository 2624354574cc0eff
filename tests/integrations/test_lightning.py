"""Lightning's Trainer trains, clips, saves and resumes a BNGD."""

import pytest
import torch
from torch import nn

from bngd_triton import BNGD

lightning = pytest.importorskip("lightning")
LR = 0.05
# of the gradients' norm, which is near 1: every step is clipped
CLIP = 1e-3


def module(make_optimizer):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self):
            return make_optimizer(self.parameters())

    return Net()


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    y = torch.tanh(x[:, :3])
    dataset = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(dataset, batch_size=8)


def make(params):
    return BNGD(params, LR, granularity="row")


def fit(folder, make_optimizer, resume=None, **options):
    net = module(make_optimizer)
    settings = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    quiet = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    trainer = lightning.Trainer(**{**settings, **quiet, **options})
    trainer.fit(net, batches(), ckpt_path=resume)
    return trainer, [param.detach().clone() for param in net.parameters()]


def largest_change(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_clipping_by_norm_changes_nothing(tmp_path):
    def change(make_optimizer):
        _, free = fit(tmp_path, make_optimizer)
        _, clipped = fit(tmp_path, make_optimizer, gradient_clip_val=CLIP)
        return largest_change(free, clipped)

    # 8 steps of LR on weights of size 1: two roundings of 2**-24 in ghat, and what they make of
    # the next gradients
    rounding = 2.0**-20
    assert change(lambda params: BNGD(params, LR, granularity="row", eps=0.0)) < rounding
    # rms of a clipped row of gradients: 1e-5 and more, so eps=1e-8 is at most 1e-3 of it
    with_eps = rounding + 8 * LR * 1e-3
    assert change(make) < with_eps
    # the clipping did happen
    assert change(lambda params: torch.optim.SGD(params, LR)) > 10 * with_eps


def test_mixed_precision_without_clipping(tmp_path):
    _, start = fit(tmp_path, make, max_epochs=0)
    _, end = fit(tmp_path, make, precision="bf16-mixed")
    assert largest_change(start, end) > LR
    # Lightning's rule for every optimizer that unscales gradients itself, torch's fused ones too
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, make, precision="bf16-mixed", gradient_clip_val=CLIP)


def test_resumes(tmp_path):
    trainer, half = fit(tmp_path, make, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, whole = fit(tmp_path, make)
    _, resumed = fit(tmp_path, make, tmp_path / "half.ckpt")
    assert largest_change(half, whole) > 0
    assert largest_change(resumed, whole) == 0
