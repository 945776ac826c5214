"""The sources in one calling shape: what each returns, and that it is what its function gives."""

import pytest
import torch
from support.tap_models import LENGTH, batch, build, eager_rows

from benchmarks.paper.sources import SOURCES

START = 2


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


@pytest.fixture(scope="module")
def inputs():
    ids, mask = batch("right")
    response = torch.arange(LENGTH - START) < (mask.sum(1) - START)[:, None]
    return ids, mask, response, torch.full((len(ids),), START)


@pytest.mark.parametrize("name", SOURCES)
def test_scores_and_weights(model, inputs, name):
    ids, mask, response, _ = inputs
    score, weights = SOURCES[name].compute(model, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(score, model(ids, attention_mask=mask).logits[:, 0])
    assert not score.requires_grad
    assert not weights.requires_grad
    assert (weights[~response] == 0).all()
    assert weights[response].isfinite().all()
    if SOURCES[name].signed:
        assert weights.min() < 0
    else:
        torch.testing.assert_close(weights.sum(1), torch.ones(len(ids)))


@pytest.mark.parametrize(("name", "layers"), [("last row", [-1]), ("mean over layers", [0, 1])])
def test_rows(model, inputs, name, layers):
    ids, mask, response, _ = inputs
    eager, last = build("gpt2", implementation="eager"), (mask.sum(1) - 1).tolist()
    rows = [eager_rows(eager, layer, last, input_ids=ids, attention_mask=mask) for layer in layers]
    raw = torch.stack(rows).mean(0)[:, START:].masked_fill(~response, 0.0)
    expected = (raw / raw.sum(1, keepdim=True)).float()
    torch.testing.assert_close(SOURCES[name].compute(model, *inputs)[1], expected, rtol=2e-4, atol=2e-6)


def test_increments_are_differences_of_the_scores_of_prefixes(model, inputs):
    ids, _, response, _ = inputs
    _, rewards = SOURCES["incremental (R3HF)"].compute(model, *inputs)
    with torch.no_grad():
        scores = torch.stack([model(ids[:, :n]).logits[:, 0] for n in range(START, LENGTH + 1)], 1)
    expected = scores.diff(dim=1).masked_fill(~response, 0.0)
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)


def test_norms_and_the_layer_make_a_difference(inputs):
    model = build("gpt2", n_layer=3)  # with two, a third of the way up is the first
    weights = {name: source.compute(model, *inputs)[1] for name, source in SOURCES.items()}
    names = list(weights)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.allclose(weights[name], weights[other], atol=1e-3), (name, other)
