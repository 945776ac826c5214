"""Encoders: the query whose state is scored sees all that is not padding; who mixes otherwise is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import zoo
from support.tap_models import LENGTH, assert_row, batch, build, eager_rows, positions_of, randomise, state
from torch import Tensor, nn

from attnshape import Response
from attnshape.credit import gradient_weights
from attnshape.reference import attention_row
from attnshape.tap import AttentionTap

FIRST = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
}


def made(name, **options):
    model = zoo.build(name, **options)
    randomise(model)
    return model


def eager_attention(model, layer=-1, **inputs):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with torch.no_grad():
        return other(**inputs, output_attentions=True).attentions[layer].double()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", FIRST)
def test_the_first_token_is_read_and_sees_all_that_is_not_padding(name, padding):
    model = made(FIRST[name])
    ids, mask = batch(padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        bare = model(**inputs).logits
        with AttentionTap(model, [-1, -2], check="always") as tap:
            assert torch.equal(model(**inputs).logits, bare)
    for layer, taken in zip((-1, -2), tap.take(), strict=True):
        assert taken.query_position.tolist() == [0, 0, 0]
        attention = eager_attention(model, layer, **inputs)
        expected = attention[:, :, 0].mean(1)
        assert (expected[:, 1:3] > 0).all() or padding == "left"
        if padding != "left":  # there the first token is padding
            assert_row(taken, expected)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", FIRST)
def test_any_query_and_every_query_of_an_encoder(name, padding):
    model = made(FIRST[name])
    ids, mask = batch(padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    attention = eager_attention(model, **inputs)
    positions = positions_of(mask)
    with torch.no_grad(), AttentionTap(model, query_position="last_visible", check="always") as tap:
        model(**inputs)
    assert_row(tap.take(), torch.stack([attention[b, :, p].mean(0) for b, p in enumerate(positions)]))
    with torch.no_grad(), AttentionTap(model, query_position="all", check="always") as tap:
        model(**inputs)
    every = tap.take()
    assert not every.causal
    assert_row(every, torch.stack([attention[b, :, p].mean(0) for b, p in enumerate(positions)]))


def mean_row(attention: Tensor, mask: Tensor) -> Tensor:
    weights = mask.double() / mask.sum(1, keepdim=True)
    return torch.einsum("bhst,bs->bt", attention, weights) / attention.shape[1]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_head_that_averages_has_the_mean_row(padding):
    model = made(FIRST["modernbert"], classifier_pooling="mean")
    ids, mask = batch(padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), AttentionTap(model, [-1, 0], check="always") as tap:
        model(**inputs)
    for layer, taken in zip((-1, 0), tap.take(), strict=True):
        assert_row(taken, mean_row(eager_attention(model, layer, **inputs), mask))
    with AttentionTap(model, source="rollout") as tap, torch.no_grad():
        model(**inputs)
    with pytest.raises(ValueError, match="averages its tokens, and a rollout starts from one"):
        tap.take()


class MeanHead(nn.Module):
    """A wrapper that averages what the model says of every token that is not padding."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(32, 1)

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        live = attention_mask[..., None]
        return self.head((hidden * live).sum(1) / live.sum(1))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_mean_row_where_it_is_asked_for(name, padding):
    model, eager = build(name), build(name, implementation="eager")
    ids, mask = batch(padding)
    with torch.no_grad():
        attention = eager(ids, attention_mask=mask, output_attentions=True).attentions[-1].double()
        with AttentionTap(MeanHead(model.model), query_position="mean", check="always") as tap:
            tap._models[0].module(ids, attention_mask=mask)
    assert_row(tap.take(), mean_row(attention, mask))


def test_the_mean_row_of_packed_sequences():
    model = build("llama", head=False)
    ids = torch.randint(3, 60, (1, 17), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[*range(5), *range(3), *range(9)]])
    with torch.no_grad(), AttentionTap(model, query_position="mean", check="always") as tap:
        model(ids, position_ids=positions, use_cache=False)
        together = attention_row(tap.take())
        parts = []
        for sequence in ids.split([5, 3, 9], 1):
            model(sequence)
            parts.append(attention_row(tap.take())[0])
    torch.testing.assert_close(together, torch.cat(parts))


class Pooled(transformers.LlamaForSequenceClassification):
    """A head of its own: what it scores is for the tap to find out."""

    rule = "last"

    def forward(self, input_ids=None, attention_mask=None, **options):
        hidden = self.model(input_ids, attention_mask=attention_mask, **options)[0]
        place = torch.arange(hidden.shape[1])
        at = {
            "first": torch.zeros(len(hidden), dtype=torch.long),
            "first_visible": (attention_mask * place.flip(0)).argmax(1),
            "last": torch.full((len(hidden),), hidden.shape[1] - 1),
            "last_visible": (attention_mask * place).argmax(1),
            "last_non_pad": ((input_ids != 0) * place).argmax(1),
        }[self.rule]
        logits = self.score(torch.tanh(hidden[torch.arange(len(hidden)), at]))
        return transformers.modeling_outputs.SequenceClassifierOutputWithPast(logits=logits)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["first", "first_visible", "last", "last_visible", "last_non_pad"])
def test_what_a_head_scores_is_found_by_trying(rule, padding, dtype):
    model = Pooled(build("llama").config).eval().to(dtype).train()
    model.rule = rule
    ids, mask = batch(padding)
    mask[0, -1] = 0  # not padding by its id
    before = state(model), model.training
    with torch.no_grad(), AttentionTap(model) as tap:
        model(input_ids=ids, attention_mask=mask)
    assert (state(model), model.training) == before
    start = [int(row.nonzero().min()) for row in mask]
    expected = {
        "first": [0, 0, 0],
        "first_visible": start,
        "last": [LENGTH - 1] * 3,
        "last_visible": positions_of(mask),
        "last_non_pad": positions_of(ids != 0),
    }[rule]
    assert tap.take().query_position.tolist() == expected


@pytest.mark.parametrize("kind", ["sum", "largest", "two tokens", "raises"])
def test_other_heads_are_refused_by_name_and_served_where_told(kind):
    class Odd(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, **options):
            hidden = self.model(input_ids, attention_mask=attention_mask, **options)[0]
            if kind == "raises" and len(hidden) != 3:
                raise ZeroDivisionError
            live = attention_mask[..., None].to(hidden)
            pooled = {
                "sum": lambda: (hidden * live).sum(1),
                "largest": lambda: hidden.masked_fill(live == 0, -9).amax(1),
                "two tokens": lambda: hidden[:, 0] + hidden[:, 1],
                "raises": lambda: hidden[:, 0],
            }[kind]()
            logits = self.score(pooled)
            return transformers.modeling_outputs.SequenceClassifierOutputWithPast(logits=logits)

    model = Odd(build("llama").config).eval()
    ids, mask = batch("left")
    with torch.no_grad(), AttentionTap(model) as tap:
        model(input_ids=ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"'pooled': which token Odd scores.*'last_visible'"):
            tap.take()
        tap.query_position = "last_visible"
        model(input_ids=ids, attention_mask=mask)
        tap.take()


# No row to be had


REFUSED = {
    "DebertaForSequenceClassification": "takes its function from transformers' AttentionInterface",
    "DebertaV2ForSequenceClassification": "takes its function from transformers' AttentionInterface",
    "T5ForSequenceClassification": "reads the text in an encoder and a decoder",
    "BartForSequenceClassification": "reads the text in an encoder and a decoder",
    "MBartForSequenceClassification": "reads the text in an encoder and a decoder",
}


@pytest.mark.parametrize("source", ["attention", "rollout", "gradient_value"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_row_are_refused_with_a_way_out(name, source):
    model = made(name)
    before = state(model)
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[name]}.*source='gradient_embedding'"):
        AttentionTap(model, source=source)
    assert state(model) == before


@pytest.mark.parametrize(
    "name", [*REFUSED, "BertForSequenceClassification", "BloomForSequenceClassification"]
)
def test_gradients_by_embeddings_need_no_attention(name):
    model = made(name).double()
    for parameter in model.parameters():
        parameter.data *= 0.5  # a smooth score
    ids, mask = batch("none")
    ids[:, -1] = zoo.EOS
    factors = torch.ones(LENGTH, dtype=torch.float64)
    embedding = model.get_input_embeddings()
    modules = {embedding} | {
        m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is embedding.weight
    }

    def scaled(module, args, output):
        own = factors
        if not torch.equal(args[0], ids):  # a decoder reads the text one position later
            own = torch.cat([torch.ones(1, dtype=torch.float64), factors[:-1]])
        return output * own[:, None]

    handles = [module.register_forward_hook(scaled) for module in modules]
    columns = []
    with torch.no_grad():
        for t in range(LENGTH):
            sides = []
            for step in (1 / 128, -1 / 128, 1 / 64, -1 / 64):
                factors[t] = 1 + step
                sides.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
            factors[t] = 1
            columns.append((4 * 64 * (sides[0] - sides[1]) - 32 * (sides[2] - sides[3])) / 3)
    for handle in handles:
        handle.remove()
    expected = torch.stack(columns, 1)
    with AttentionTap(model, source="gradient_embedding") as tap:
        score = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    response = Response(mask, start=torch.zeros(3, dtype=torch.int32))
    got = gradient_weights(score, tap.take(), response)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_positions_added_in_place_do_not_reach_what_is_handed_out():
    model = build("llama").double()
    ids, mask = batch("none")
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with AttentionTap(model, source="gradient_embedding") as tap:
        inner = model.model.embed_tokens.register_forward_hook(lambda m, args, out: out.add_(shift))
        model(ids, attention_mask=mask)
        inner.remove()
    torch.testing.assert_close(tap.take(), model.model.embed_tokens(ids))


def test_a_model_that_embeds_other_tokens_as_well_is_refused():
    model = made("BartForSequenceClassification")
    ids, mask = batch("none")
    ids[:, -1] = zoo.EOS
    with AttentionTap(model, source="gradient_embedding") as tap:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids.roll(3, 1))
    with pytest.raises(ValueError, match="embeds other tokens as well"):
        tap.take()


# Layers that mix tokens without attention


HYBRIDS = [
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "BambaForCausalLM",
    "Lfm2ForCausalLM",
    "Qwen3NextForCausalLM",
    "Zamba2ForCausalLM",
    "FalconH1ForCausalLM",
]


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_have_a_row_and_no_rollout(name):
    model = zoo.build(name)
    ids, mask = batch("left")
    for source in ("rollout", "signed_rollout", "gradient_value", "relevance"):
        with AttentionTap(model, source=source) as tap:
            model(ids, attention_mask=mask)
        match = f"'{source}' takes it that attention alone.*other modules that do.*gradient_embedding"
        with pytest.raises(ValueError, match=match):
            tap.take()
    with AttentionTap(model, source="gradient_embedding") as tap:
        model(ids, attention_mask=mask)
    assert tap.take().requires_grad


class Mixing(nn.Module):
    """In the place of a model's MLP: what it says of a token depends on the one before."""

    def __init__(self, mlp, share):
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, x):
        return self.mlp(x) + self.share * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("source", ["rollout", "gradient_value"])
def test_mixing_is_found_wherever_it_is(source, share, dtype):
    model = build("llama").to(dtype).train()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, share)
    ids, mask = batch("left")
    bare = model(ids, attention_mask=mask).logits
    before = state(model)
    with AttentionTap(model, source=source) as tap:
        assert torch.equal(model(ids, attention_mask=mask).logits, bare)
    assert state(model) == before
    assert all(module.training for module in model.modules())
    if share:
        with pytest.raises(ValueError, match="LlamaModel has other modules that do"):
            tap.take()
    else:
        tap.take()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "gptj", "gemma3"])
def test_experts_and_windows_are_no_mixing(name):
    model = build(name)
    ids, mask = batch("left")
    with AttentionTap(model, source="rollout") as tap, torch.no_grad():
        model(ids, attention_mask=mask)
    tap.take()


def test_a_model_that_cannot_be_tried_is_refused(monkeypatch):
    model = build("llama")
    ids, mask = batch("left")
    plain = type(model.model).forward

    def picky(self, input_ids=None, **options):
        if len(input_ids) != 3:
            raise ZeroDivisionError("three rows")
        return plain(self, input_ids, **options)

    monkeypatch.setattr(type(model.model), "forward", picky)
    with AttentionTap(model, source="rollout") as tap, torch.no_grad():
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"LlamaModel could not be tried \(ZeroDivisionError: three rows\)"):
        tap.take()


def test_trials_are_seen_by_no_other_tap():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model) as outer, AttentionTap(model, source="rollout") as tap, torch.no_grad():
        model(ids, attention_mask=mask)
    tap.take()
    eager = build("llama", implementation="eager")
    assert_row(outer.take(), eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask))


def test_models_that_see_are_tapped_where_they_read():
    model = zoo.build("Gemma3ForSequenceClassification")
    tap = AttentionTap(model)
    assert "language_model" in tap._layers[0].name
    ids, mask = batch("right")
    with tap, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == positions_of(mask)
