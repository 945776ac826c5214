"""The tap against eager ``output_attentions=True``, and its pooled position against the real heads."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from support.tap_models import EOS, FAMILIES, LENGTH, PAD, batch, build, eager_rows, reference_attention
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.gptj.modeling_gptj import GPTJAttention

from attnshape import Response
from attnshape.credit import gradient_weights
from attnshape.reference import attention_row
from attnshape.tap import AttentionTap

OLD = transformers.__version__ < "5"
TAPPED = [name for name in FAMILIES if not (OLD and name == "stablelm")]
CLASSIFIERS = [name for name in TAPPED if FAMILIES[name].classifier]

model = functools.cache(build)


def assert_rows(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", TAPPED)
def test_rows_are_those_of_eager_attention(name, padding):
    ids, mask = batch(padding)
    fast, eager = model(name), model(name, implementation="eager")
    positions = [max(t for t in range(LENGTH) if ids[b, t] != PAD) for b in range(len(ids))]
    with torch.no_grad():
        bare = fast(ids, attention_mask=mask).logits
        with AttentionTap(fast, [-1, -2]) as tap:
            logits = fast(ids, attention_mask=mask).logits
    assert torch.equal(logits, bare)
    for layer, inputs in zip((-1, -2), tap.take(), strict=True):
        expected = eager_rows(eager, layer, positions, input_ids=ids, attention_mask=mask)
        assert expected.amax(-1).min() > 1.5 / LENGTH
        assert inputs.query_position.tolist() == positions
        assert_rows(attention_row(inputs), expected)


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``input_ids`` and ``position_ids`` of sequences end to end, ``[1, N]``, and the sequences alone."""
    ids = torch.randint(3, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return ids, positions, list(ids.split(lengths, dim=1))


def assert_packed(inputs, layer, eager, sequences):
    """One row per sequence, each as the eager model attends when it is given the sequence alone."""
    lengths = [sequence.shape[1] for sequence in sequences]
    assert inputs.cu_seqlens.dtype == torch.int32
    assert inputs.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert inputs.query_position.tolist() == [n - 1 for n in lengths]
    assert inputs.query.shape[0] == len(lengths)
    assert inputs.key.shape[0] == sum(lengths)
    alone = [
        eager_rows(eager, layer, [n - 1], input_ids=s)[0] for s, n in zip(sequences, lengths, strict=True)
    ]
    assert_rows(attention_row(inputs), torch.cat(alone))


# Of these families transformers does not tell the mask the position ids.
NEVER_APART = ("opt", "gpt_oss", *["gptj"] * OLD)


@pytest.mark.parametrize("name", [name for name in TAPPED if name not in NEVER_APART])
def test_packed_by_position_ids(name):
    ids, position_ids, sequences = packed([5, 3, 9])
    fast, eager = model(name, head=False), model(name, head=False, implementation="eager")
    with torch.no_grad():
        bare = fast(ids, position_ids=position_ids, use_cache=False).logits
        with AttentionTap(fast, [-1, -2]) as tap:
            logits = fast(ids, position_ids=position_ids, use_cache=False).logits
    assert torch.equal(logits, bare)
    for layer, inputs in zip((-1, -2), tap.take(), strict=True):
        assert_packed(inputs, layer, eager, sequences)


@pytest.mark.parametrize(
    ("name", "use_cache"), [("opt", False), ("gpt_oss", False), ("llama", True), ("gemma2", True)]
)
def test_packed_input_that_the_model_does_not_keep_apart(name, use_cache):
    ids, position_ids, _ = packed([5, 3, 9])
    fast, eager = model(name, head=False), model(name, head=False, implementation="eager")
    with torch.no_grad():
        attention = eager(
            ids, position_ids=position_ids, use_cache=use_cache, output_attentions=True
        ).attentions
        with AttentionTap(fast) as tap:
            fast(ids, position_ids=position_ids, use_cache=use_cache)
    assert attention[-1][0, :, 5, 4].max() > 0
    with pytest.raises(ValueError, match=r"attended across sequences.*use_cache=False"):
        tap.take()


@pytest.fixture
def flash(monkeypatch):
    """An attention function of the caller's under a name of its own, called as flash attention is."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "a_flash", reference_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "a_flash", flash_attention_mask)

    def make(name, **options):
        made = build(name, **options)
        # Asked for by name, transformers 5 would look for the flash kernels themselves.
        made.config._attn_implementation = "a_flash"
        return made

    return make


FLASH = ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "granite"]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", FLASH)
def test_flash_calling_convention(flash, name, padding):
    ids, mask = batch(padding)
    fast, eager = flash(name), model(name, implementation="eager")
    positions = [max(t for t in range(LENGTH) if ids[b, t] != PAD) for b in range(len(ids))]
    with torch.no_grad(), AttentionTap(fast, [-1, -2]) as tap:
        fast(ids, attention_mask=mask)
    for layer, inputs in zip((-1, -2), tap.take(), strict=True):
        expected = eager_rows(eager, layer, positions, input_ids=ids, attention_mask=mask)
        assert_rows(attention_row(inputs), expected)


@pytest.mark.parametrize("by", ["cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("name", FLASH)
def test_packed_flash(flash, name, by):
    ids, position_ids, sequences = packed([5, 3, 9])
    fast, eager = (
        flash(name, head=False),
        model(name, head=False, implementation="eager"),
    )
    varlen = {}
    if by == "cu_seq_lens_q":
        bounds = torch.tensor([0, 5, 8, 17], dtype=torch.int32)
        varlen = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    with torch.no_grad(), AttentionTap(fast, [-1, -2]) as tap:
        fast(ids, position_ids=position_ids, **varlen)
    for layer, inputs in zip((-1, -2), tap.take(), strict=True):
        assert_packed(inputs, layer, eager, sequences)


def derivatives(score, width):
    """For every token, of ``score`` by a factor on what belongs to it: ``[B, width]``, by differences."""

    def difference(t, step):
        factors = torch.ones(2, width, dtype=torch.float64)
        factors[:, t] += torch.tensor([step, -step])
        up, down = map(score, factors)
        return (up - down) / (2 * step)

    columns = [(4 * difference(t, 1 / 64) - difference(t, 1 / 32)) / 3 for t in range(width)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("padding", ["left", "right"])
# Not OPT: its ReLU has corners, and differences cannot tell where.
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "gptj", "starcoder2"])
@pytest.mark.parametrize("source", ["first layer", "last layer", "embeddings"])
def test_gradient_sources(flash, monkeypatch, name, padding, source):
    ids, mask = batch(padding)
    model = (build(name) if name == "gptj" else flash(name)).double()
    layer = {"first layer": 0, "last layer": 1, "embeddings": None}[source]
    factors = torch.ones(LENGTH, dtype=torch.float64)

    def scaled(module, query, key, value, *args, **options):
        if module.layer_idx == layer:
            value = value * factors[:, None]
        return reference_attention(module, query, key, value, *args, **options)

    def score(given):
        factors.copy_(given)
        return model(ids, attention_mask=mask).logits[:, 0]

    def scaled_method(module, query, key, value, *rest):
        if module.layer_idx == layer:
            value = value * factors[:, None]
        return method(module, query, key, value, *rest)

    method = GPTJAttention._attn
    monkeypatch.setattr(GPTJAttention, "_attn", scaled_method)
    monkeypatch.setitem(AttentionInterface._global_mapping, "a_flash", scaled)
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda m, a, out: out * factors[:, None] if layer is None else out
    )
    with torch.no_grad():
        expected = derivatives(score, LENGTH)
    handle.remove()
    of = {"source": "gradient_embedding"} if layer is None else {"source": "gradient_value", "layer": layer}
    with AttentionTap(model, **of) as tap:
        moved = score(torch.ones(LENGTH))
    response = Response(torch.ones_like(ids), start=torch.zeros(3, dtype=torch.int32))
    weights = gradient_weights(moved, tap.take(), response)
    assert expected.abs().amax(1).min() > 0.05
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)  # the graph then begins where the tap says
    with AttentionTap(model, **of) as tap:
        frozen = score(torch.ones(LENGTH))
    assert torch.equal(frozen, moved)
    leaf = tap.take()
    assert leaf.is_leaf
    again = gradient_weights(frozen, leaf, response)
    torch.testing.assert_close(again, weights)


def scored_positions(classifier, **inputs):
    """For each row, the positions whose final hidden state moves the score."""
    shift = torch.zeros(1, LENGTH, 1)

    def perturb(_, args):
        return (args[0] + shift,)

    with torch.no_grad():
        base = classifier(**inputs).logits
        handle = classifier.score.register_forward_pre_hook(perturb)
        moved = []
        for t in range(LENGTH):
            shift.zero_()[0, t] = 0.5
            moved.append((classifier(**inputs).logits != base).flatten())
        handle.remove()
    return [torch.stack(moved)[:, b].nonzero().flatten().tolist() for b in range(len(base))]


@pytest.mark.parametrize("case", ["left", "right", "pad is eos"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pooled_query_is_the_one_that_is_scored(name, case):
    if case == "pad is eos":
        # Sequences that end in eos, attended to: the head goes past it.
        classifier = build(name, pad_token_id=EOS)
        ids, mask = batch("right", pad=EOS)
        lengths = mask.sum(-1)
        ids[torch.arange(len(ids)), lengths - 1] = EOS
        expected = (lengths - 2).tolist()
    else:
        classifier = model(name)
        ids, mask = batch(case)
        expected = [LENGTH - 1] * 3 if case == "left" else (mask.sum(-1) - 1).tolist()
    with torch.no_grad(), AttentionTap(classifier) as tap:
        classifier(input_ids=ids, attention_mask=mask)
    pooled = tap.take().query_position.tolist()
    assert pooled == expected
    assert scored_positions(classifier, input_ids=ids, attention_mask=mask) == [[p] for p in pooled]
    with torch.no_grad(), AttentionTap(classifier, query_position="last_visible") as tap:
        classifier(input_ids=ids, attention_mask=mask)
    last = [max(t for t in range(LENGTH) if mask[b, t]) for b in range(len(ids))]
    assert tap.take().query_position.tolist() == last


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma3"])
@pytest.mark.parametrize("case", ["embeddings", "no pad token"])
def test_pooled_query_without_padding_to_go_by(name, case):
    rows = 3 if case == "embeddings" else 1
    classifier = model(name) if case == "embeddings" else build(name, pad_token_id=None)
    ids, mask = batch("right")
    inputs = {"attention_mask": mask[-rows:]}
    if case == "embeddings":
        inputs["inputs_embeds"] = classifier.get_input_embeddings()(ids).detach()
    else:
        inputs["input_ids"] = ids[-rows:]
    with torch.no_grad(), AttentionTap(classifier) as tap:
        classifier(**inputs)
    pooled = tap.take().query_position.tolist()
    assert pooled == [LENGTH - 1] * rows
    assert scored_positions(classifier, **inputs) == [[p] for p in pooled]


@pytest.mark.parametrize(
    "options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_scaling_of_gpt2(options, implementation):
    ids, mask = batch("left")
    tapped, eager = (build("gpt2", implementation=i, **options) for i in (implementation, "eager"))
    if implementation == "sdpa" and OLD:
        # sdpa is not told of the layer's scaling there, so the model attends as plain GPT-2.
        eager = build("gpt2", implementation="eager")
    with torch.no_grad(), AttentionTap(tapped, [-1, -2]) as tap:
        tapped(ids, attention_mask=mask)
    for layer, inputs in zip((-1, -2), tap.take(), strict=True):
        expected = eager_rows(eager, layer, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask)
        assert_rows(attention_row(inputs), expected)


@pytest.mark.skipif(not OLD, reason="transformers 5 raises in sdpa instead of dropping the soft cap")
def test_soft_cap_that_sdpa_drops_is_not_reported():
    ids, mask = batch("left")
    tapped = build("gemma2", implementation="sdpa")
    eager = build("gemma2", implementation="eager", attn_logit_softcapping=None)
    with torch.no_grad(), AttentionTap(tapped) as tap:
        tapped(ids, attention_mask=mask)
    expected = eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask)
    assert_rows(attention_row(tap.take()), expected)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "gpt_neo", "codegen"])
def test_models_that_bypass_the_interface(name):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    config, kind = {
        "bloom": (transformers.BloomConfig(**size, n_head=4), transformers.BloomForSequenceClassification),
        "mpt": (
            transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64),
            transformers.MptForSequenceClassification,
        ),
        "falcon": (
            transformers.FalconConfig(**size, num_attention_heads=4),
            transformers.FalconForSequenceClassification,
        ),
        "gpt_neo": (
            transformers.GPTNeoConfig(
                vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
            ),
            transformers.GPTNeoForSequenceClassification,
        ),
        "codegen": (
            transformers.CodeGenConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
            transformers.CodeGenForCausalLM,
        ),
    }[name]
    bypassing = kind(config)
    before = {n: set(vars(m)) for n, m in bypassing.named_modules()}
    with pytest.raises(ValueError, match=f"{kind.__name__}.*AttentionInterface"), AttentionTap(bypassing):
        pass
    assert {n: set(vars(m)) for n, m in bypassing.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in bypassing.modules())


def test_gptj_gets_its_method_back_and_is_not_tapped_compiled():
    ids, mask = batch("left")
    gptj = build("gptj")
    layers = [m for m in gptj.modules() if isinstance(m, GPTJAttention)]
    with torch.no_grad():
        with AttentionTap(gptj) as outer, AttentionTap(gptj, 0) as inner:
            gptj(ids, attention_mask=mask)
        with pytest.raises(IndexError), AttentionTap(gptj, [0, 1]):
            gptj(ids + 99, attention_mask=mask)
    assert outer.take().query.shape == inner.take().query.shape == (3, 4, 8)
    assert not any("_attn" in vars(layer) for layer in layers)
    with pytest.raises(ValueError, match="model: compiled, want the model as it was for GPTJAttention"):
        AttentionTap(torch.compile(gptj, backend="eager"))


@pytest.mark.skipif(not OLD, reason="goes through the interface since transformers 5")
def test_stablelm_bypassed_the_interface():
    with pytest.raises(ValueError, match="StableLmForSequenceClassification"):
        AttentionTap(build("stablelm"))
