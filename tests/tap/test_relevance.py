"""Gradients with attention and norms held fixed, beside models whose own code holds them fixed."""

from __future__ import annotations

import pytest
import torch
from support.tap_models import FAMILIES, SIZE, ValueHead, batch, build
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DogeConfig,
    DogeForSequenceClassification,
)

from attnshape import Response
from attnshape.credit import gradient_weights
from attnshape.tap import AttentionTap
from attnshape.tap.relevance import centers_of

ENCODER = "bert"
MASK_OF_VALUES = "doge"
"""Its attention's mask is made of the values."""


def make(name, **options):
    if name == ENCODER:
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=1,
        )
        model = BertForSequenceClassification._from_config(config)
    elif name == MASK_OF_VALUES:
        model = DogeForSequenceClassification._from_config(DogeConfig(**SIZE, num_labels=1))
    else:
        return build(name, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return model.eval()


def score_of(model, ids, mask, **options):
    out = model(ids, attention_mask=mask, **options)
    return out, out.logits[:, 0] if out.logits.ndim == 2 else out.logits[:, -1, 7]


@pytest.fixture
def held_fixed(monkeypatch):
    """A model's own code, with the attention's softmax and every norm's gain as constants."""
    softmax = torch.nn.functional.softmax

    def attention(x, *args, **options):
        found = softmax(x, *args, **options)
        return found.detach() if x.ndim == 4 else found  # a router's has fewer

    def hold(model, centred):
        model.set_attn_implementation("eager")
        monkeypatch.setattr(torch.nn.functional, "softmax", attention)
        for module in model.modules():
            if "Norm" in type(module).__name__:

                def forward(x, module=module, forward=module.forward):
                    bias = 0 if getattr(module, "bias", None) is None else module.bias
                    d = x - x.mean(-1, keepdim=True) if centred else x
                    gain = (forward(x) - bias) / torch.where(d == 0, 1.0, d)  # a padding token is zeros
                    return d * gain.detach() + bias

                monkeypatch.setattr(module, "forward", forward)

    return hold


CENTRED = (ENCODER, "gpt2", "gptj", "gpt_neox", "opt", "cohere", "starcoder2", "stablelm")


@pytest.mark.parametrize("name", [ENCODER, MASK_OF_VALUES, *FAMILIES])
@pytest.mark.parametrize("layer", [0, 1])
def test_relevance_is_the_gradient_of_a_model_held_fixed(name, layer, held_fixed):
    """Norms after attention, with offset weights, on heads, beside it; MoE; both ways of eager attention."""
    model = make(name)
    ids, mask = batch("left" if name != ENCODER else "right")
    with AttentionTap(model, layer, source="relevance") as tap:
        _, score = score_of(model, ids, mask)
    response = Response(mask, start=torch.zeros(3, dtype=torch.int64))
    found = gradient_weights(score, tap.take(), response)
    held_fixed(model, name in CENTRED)
    out, again = score_of(model, ids, mask, output_hidden_states=True)
    hidden = out.hidden_states[layer]
    (gradient,) = torch.autograd.grad(again.sum(), hidden)
    expected = (gradient * hidden).sum(-1).detach().masked_fill(mask == 0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_model_that_is_trained_on_is_read_as_it_is_now():
    """What is kept of a norm is its kind, not its weights."""
    ids, mask = batch("right")
    response = Response(mask, start=torch.zeros(3, dtype=torch.int64))

    def relevance(model):
        with AttentionTap(model, source="relevance") as tap:
            score = model(ids, attention_mask=mask).logits[:, 0]
        return gradient_weights(score, tap.take(), response)

    used, fresh = make("gpt2"), make("gpt2")
    relevance(used)
    for model in (used, fresh):
        for path, parameter in model.named_parameters():
            if "ln_" in path:
                parameter.data += 0.5
    assert torch.equal(relevance(used), relevance(fresh))


@pytest.mark.parametrize("name", [ENCODER, "llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("layer", [0, -1])
def test_without_what_is_not_linear_the_tokens_sum_to_the_score(name, layer):
    """No MLP, no biases: all that is left is attention and norms, and nothing of the score is lost there."""
    model = make(name)
    for path, parameter in model.named_parameters():
        if "mlp" in path or "intermediate" in path or path.endswith("bias"):
            parameter.data.zero_()
    if name == ENCODER:
        model.bert.pooler.activation = nn.Identity()
    ids, mask = batch("right")
    with AttentionTap(model, layer, source="relevance") as tap:
        score = model(ids, attention_mask=mask).logits[:, 0]
    weights = gradient_weights(score, tap.take(), Response(mask, start=torch.zeros(3, dtype=torch.int64)))
    assert score.abs().min() > 1e-3
    torch.testing.assert_close(weights.sum(1), score.detach(), rtol=1e-3, atol=1e-4)


def test_two_taps_at_once_hold_each_norm_fixed_once():
    model = build("llama")
    ids, mask = batch("right")
    response = Response(mask, start=torch.zeros(3, dtype=torch.int64))
    with AttentionTap(model, source="relevance") as tap:
        score = model(ids, attention_mask=mask).logits[:, 0]
    alone = gradient_weights(score, tap.take(), response)
    with AttentionTap(model, source="relevance") as tap, AttentionTap(model, source="relevance"):
        score = model(ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(gradient_weights(score, tap.take(), response), alone)


def test_it_is_taken_a_third_of_the_way_up():
    model = build("llama", num_hidden_layers=6)
    ids, mask = batch("right")
    with AttentionTap(model, source="relevance") as tap:
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(tap.take(), hidden[2])


class ByName(nn.Module):
    def __init__(self, norm, name):
        super().__init__()
        self.norm, self.name = norm, name

    def forward(self, x):
        return self.norm(**{self.name: x})


def test_a_norm_that_is_called_by_name_is_held_fixed_too():
    ids, mask = batch("right")
    weights = []
    for wrap in (False, True):
        model = build("llama")
        if wrap:
            model.model.norm = ByName(model.model.norm, "hidden_states")
        with AttentionTap(model, source="relevance") as tap:
            score = model(ids, attention_mask=mask).logits[:, 0]
        response = Response(mask, start=torch.zeros(3, dtype=torch.int64))
        weights.append(gradient_weights(score, tap.take(), response))
    assert torch.equal(*weights)


def test_a_norm_in_a_head_around_the_model_is_held_fixed_too():
    torch.manual_seed(0)
    wrapped = ValueHead(build("llama", head=False))
    wrapped.value = nn.Sequential(nn.LayerNorm(32, bias=False), nn.Linear(32, 1, bias=False))
    for layer in wrapped.model.model.layers:
        nn.init.zeros_(layer.mlp.down_proj.weight)
    ids, mask = batch("right")
    with AttentionTap(wrapped, source="relevance") as tap:
        score = wrapped(ids, mask)
    weights = gradient_weights(score, tap.take(), Response(mask, start=torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(weights.sum(1), score.detach(), rtol=1e-3, atol=1e-4)


class Offset(nn.Module):
    """As Gemma has it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x):
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)).to(x.dtype)


class PerHead(nn.Module):
    """A norm of parts of a token."""

    def forward(self, x):
        return nn.functional.layer_norm(x.unflatten(-1, (4, -1)), (8,)).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make_norm", "centers"),
    [
        (lambda: nn.LayerNorm(32), True),
        (lambda: nn.LayerNorm(32, elementwise_affine=False), True),
        (lambda: nn.RMSNorm(32), False),
        (lambda: Offset(32), False),
    ],
)
def test_norms_are_found_by_what_they_do(make_norm, centers, dtype):
    torch.manual_seed(0)
    module = make_norm().to(dtype)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert centers_of(module, torch.randn(2, 3, 32, dtype=dtype)) is centers


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(32, 32),
        nn.Identity(),
        nn.GELU(),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Softmax(-1),
        nn.Tanh(),
        nn.Embedding(4, 32),
        nn.Linear(32, 8),
        PerHead(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_modules_are_no_norms(module, dtype):
    torch.manual_seed(0)
    assert centers_of(module.to(dtype), torch.randn(2, 3, 32, dtype=dtype)) is None


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_what_cannot_be_held_fixed_is_refused():
    model = build("llama")
    ids, mask = batch("right")
    model.gradient_checkpointing_enable()
    model.train()
    with AttentionTap(model, source="relevance") as tap:
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"gradient checkpointing runs it again later; want model.eval\(\)"):
        tap.take()
    model.eval()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    model.model.norm = nn.Identity()
    with AttentionTap(model, source="relevance") as tap:
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="no module that divides a token by its size"):
        tap.take()
