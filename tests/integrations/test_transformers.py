"""Hugging Face's Trainer makes, schedules, saves and resumes a BNGD."""

import inspect
import textwrap

import pytest
import torch

from bngd_triton import BNGD

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LENGTH = 32


def text_blocks():
    """A module of the standard library as blocks of byte-level ids."""
    ids = torch.tensor(list(inspect.getsource(textwrap).encode()))
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trainer_in(folder):
    args = transformers.TrainingArguments(
        str(folder), max_steps=40, save_steps=20, logging_steps=1, weight_decay=0.1,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    choice = (BNGD, {"lr": 1e-2, "granularity": "row"})
    return transformers.Trainer(
        tiny_gpt2(), args, train_dataset=text_blocks(), optimizer_cls_and_kwargs=choice
    )


def test_trains_and_resumes(tmp_path):
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    # log(256) = 5.5 is chance, 3.2 the entropy of the text's single bytes
    assert losses[0] > 5.3
    assert sum(losses[-10:]) / 10 < 3.2
    # the Trainer's dropout and shuffling are in the checkpoint too
    resumed = trainer_in(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    optimizer = whole.optimizer.optimizer
    assert type(optimizer) is BNGD
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    # matrices decay, biases and norms do not
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(param.dim() == 2 for param in optimizer.param_groups[0]["params"])
    assert all(param.dim() == 1 for param in optimizer.param_groups[1]["params"])
