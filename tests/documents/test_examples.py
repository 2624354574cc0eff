"""The files of examples/ run and do what they say."""

import math
import re

import pytest
import torch
from torch import nn

from bngd_triton.demo.tasks import exploding_task
from support.checkout import EXAMPLES


def test_two_layer(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import two_layer

    assert two_layer.main() == pytest.approx(3, abs=0.01)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.M)]
    assert len(losses) >= 5
    assert losses[-1] < 1e-4 < losses[0]
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert len(re.findall(rf"^  {name} +gradient ", printed, re.M)) == len(losses)
    assert len(re.findall(r"^ +parameter ", printed, re.M)) == 4 * len(losses)
    (prediction,) = re.findall(r"^prediction at x = 3: (\S+)", printed, re.M)
    assert float(prediction) == pytest.approx(3, abs=0.01)


@pytest.fixture
def finder(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import find_exploding_layer

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield find_exploding_layer
    torch.set_num_threads(before)


def stds_of_gradients(split, model, rows):
    """By autograd alone: of the weights and of the biases, the largest first."""
    loss = nn.functional.cross_entropy(model(split.x[rows]), split.y[rows])
    names, params = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss, params)
    stds = {name: grad.double().std(correction=0).item() for name, grad in zip(names, grads)}
    ordered = sorted(stds.items(), key=lambda item: -item[1])
    return ([pair for pair in ordered if kind in pair[0]] for kind in ("weight", "bias"))


@pytest.mark.parametrize("planted", [None, 12, 30], ids=["as it is", "12.weight", "30.weight"])
def test_exploding_layers_are_those_of_the_gradients(finder, planted):
    split, model = exploding_task(finder.SEED)
    if planted is not None:
        with torch.no_grad():
            model[planted].weight.mul_(100)
    (rows,) = finder.batches(split, 1)
    weights, biases = stds_of_gradients(split, model, rows)
    found = finder.find(finder.train(split, model, steps=1))
    for got, want in ((found.weights, weights), (found.biases, biases)):
        assert list(got) == [name for name, _ in want]
        assert list(got.values()) == pytest.approx([std for _, std in want], rel=1e-6)
    stds = dict(biases)
    assert found.factor == pytest.approx(
        max(stds[f"{i}.bias"] / stds[f"{i + 2}.bias"] for i in range(0, 40, 2)), rel=1e-6
    )
    if planted is None:
        assert found.factor < 3
    else:
        assert found.steepest == f"{planted}.weight"
        assert found.factor > 50


def test_find_exploding_layer_prints_and_draws(finder, tmp_path, capsys):
    picture = tmp_path / "stats.png"
    finder.main(picture)
    printed = capsys.readouterr().out
    assert re.findall(r"^step (\d+), ", printed, re.M) == ["0", "58"]
    first, *_ = re.findall(r"biases +0\.bias .*: (\S+) decades$", printed, re.M)
    split, model = exploding_task(0)
    rows = torch.randint(len(split.x), (64,), generator=torch.Generator().manual_seed(0))
    _, biases = stds_of_gradients(split, model, rows)
    assert float(first) == pytest.approx(math.log10(biases[0][1] / biases[-1][1]), abs=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")
