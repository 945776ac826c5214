"""What is around a model, beside it and in its modules: towers, adapters, offloaded or compiled parts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import transformers
from support import zoo
from support.tap_models import LENGTH, batch, build, offload, randomise
from torch import nn

from attnshape.tap import AttentionTap
from attnshape.tap.tap import Source
from attnshape.text.source import CreditSource
from attnshape.types import Response

SOURCES = get_args(Source)


def weights(model, source, ids, mask, positions=LENGTH):
    """Of all positions, by ``source``, and the tap's own refusal where it has one."""
    source = CreditSource(source)
    with source.opened(tap := source.tap(model)):
        score = model(ids, attention_mask=mask).logits[:, 0]
    response = Response(torch.ones(len(ids), positions), start=torch.zeros(len(ids), dtype=torch.int32))
    return source.weights(tap.take(), score, response)


class Towers(nn.Module):
    """A tower that sees beside a model that reads, as codes of their own put them together."""

    def __init__(self, text, first):
        super().__init__()
        config = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=4,
            patch_size=2,
        )  # fmt: skip
        towers = {"sees": transformers.CLIPVisionModel(config).eval(), "reads": text}
        for name in ("sees", "reads") if first == "sees" else ("reads", "sees"):
            setattr(self, name, towers[name])

    def forward(self, input_ids, attention_mask):
        self.sees(pixel_values=torch.zeros(len(input_ids), 3, 4, 4))
        return self.reads(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("first", ["sees", "reads"])
@pytest.mark.parametrize("source", ["attention", "gradient_embedding"])
def test_a_tower_that_sees_is_not_taken_for_the_model_that_reads(source, first):
    text = build("llama")
    ids, mask = batch("right")
    wanted = weights(text, source, ids, mask)
    torch.testing.assert_close(weights(Towers(text, first), source, ids, mask), wanted)


class Ensemble(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, input_ids, attention_mask):
        scores = [model(input_ids, attention_mask=attention_mask).logits for model in self.models]
        return torch.stack(scores).mean(0)


@pytest.mark.parametrize("source", SOURCES)
def test_several_models_that_read_are_refused(source):
    ensemble = Ensemble(build("llama"), build("qwen2"))
    with pytest.raises(ValueError, match=r"2 models that read text \(models\.0, models\.1\).*one on each"):
        AttentionTap(ensemble, source=source)
    AttentionTap(ensemble.models[1], source=source)


class LoraEmbedding(nn.Module):
    """An adapter on an embedding as PEFT has it: the embedding inside, its weight in sight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Embedding(base.num_embeddings, 2)
        self.b = nn.Linear(2, base.embedding_dim, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, ids):
        return self.base(ids) + self.b(self.a(ids))


@pytest.mark.parametrize("source", SOURCES)
def test_an_adapter_on_the_embedding(source):
    model, merged = build("llama"), build("llama")
    adapter = LoraEmbedding(model.get_input_embeddings())
    model.set_input_embeddings(adapter)
    with torch.no_grad():
        merged.get_input_embeddings().weight += adapter.b(adapter.a.weight)
    ids, mask = batch("right")
    torch.testing.assert_close(weights(model, source, ids, mask), weights(merged, source, ids, mask))


@pytest.mark.parametrize("source", SOURCES)
def test_weights_that_are_offloaded(source):
    ids, mask = batch("left")
    wanted = weights(build("llama"), source, ids, mask)
    torch.testing.assert_close(weights(offload(build("llama")), source, ids, mask), wanted)


def test_a_head_that_is_tried_with_its_weights_offloaded():
    ids, mask = batch("right")
    model = zoo.build("BertForSequenceClassification")
    wanted = weights(model, "attention", ids, mask)
    torch.testing.assert_close(weights(offload(model), "attention", ids, mask), wanted)


class Prompted(nn.Module):
    """Prompt tuning as PEFT has it: two tokens of its own come first."""

    def __init__(self, model):
        super().__init__()
        self.model, self.own = model, nn.Parameter(torch.randn(2, 32))

    def forward(self, input_ids, attention_mask):
        own = self.own.expand(len(input_ids), -1, -1)
        embeddings = torch.cat([own, self.model.get_input_embeddings()(input_ids)], 1)
        mask = nn.functional.pad(attention_mask, (2, 0), value=1)
        return self.model(inputs_embeds=embeddings, attention_mask=mask)


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "gradient_embedding"])
def test_tokens_that_come_before_the_models_are_refused(source):
    model = Prompted(build("llama", head=False))
    ids, mask = batch("none")
    with AttentionTap(model, source=source) as tap:
        model(ids, mask)
    with pytest.raises(ValueError, match=r"given \[3, 14\] tokens and reads \[3, 16\].*the model inside"):
        tap.take()


def test_the_model_inside_counts_what_it_reads():
    model = Prompted(build("llama", head=False))
    ids, mask = batch("none")
    with AttentionTap(model.model) as tap:
        model(ids, mask)
    assert tap.take().key.shape[2] == LENGTH + 2


class Trimmed(nn.Module):
    """Leaves columns out that are padding in every row, as loops do that sort by length."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        live = attention_mask.any(0)
        return self.model(input_ids[:, live], attention_mask=attention_mask[:, live])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_be_trimmed_where_positions_stay(side):
    ids, mask = (nn.functional.pad(x, (3, 0) if side == "left" else (0, 3)) for x in batch(side))
    model = Trimmed(build("llama"))
    with AttentionTap(model) as tap:
        model(ids, mask)
    if side == "left":
        with pytest.raises(ValueError, match=r"given \[3, 17\] tokens and reads \[3, 14\]"):
            tap.take()
    else:
        assert tap.take().key.shape[2] == LENGTH


def test_a_forward_that_failed_says_nothing_of_the_next():
    model = Prompted(build("llama"))
    ids, mask = batch("none")
    with AttentionTap(model) as tap, torch.no_grad():
        handle = model.model.model.embed_tokens.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, mask)
        with pytest.raises(ZeroDivisionError):
            model.model(ids, attention_mask=mask)
        handle.remove()
        model.model(ids[:, :9], attention_mask=mask[:, :9])
    assert tap.take().key.shape[2] == 9


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_forward_that_is_compiled(where):
    """Not the module: its ``forward`` is put in the place of its own."""
    torch._dynamo.reset()
    model = zoo.build("BertForSequenceClassification")
    randomise(model)
    ids, mask = batch("right")
    wanted = weights(model, "attention", ids, mask)
    part = model if where == "model" else model.bert.encoder.layer[-1]
    part.forward = torch.compile(part.forward, backend="eager")
    torch.testing.assert_close(weights(model, "attention", ids, mask), wanted)
    with pytest.raises(ValueError, match=r"model: compiled.*gradient_value"):
        AttentionTap(model, source="gradient_value")
