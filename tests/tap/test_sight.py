"""What a query sees, as the layer is told: masks, windows, biases, either of them alone."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import transformers
from support.tap_models import (
    LENGTH,
    SIZE,
    assert_row,
    batch,
    build,
    eager_rows,
    positions_of,
    randomise,
    square,
)
from torch.nn.attention.flex_attention import create_block_mask

from attnshape.reference import attention_row
from attnshape.tap import AttentionTap


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["int", "bool", "square bool", "square float", "holes", "none"])
def test_masks(kind, padding):
    model, eager = build("llama", head=False), build("llama", head=False, implementation="eager")
    ids, mask = batch(padding if kind != "none" else "none")
    if kind == "holes":
        mask[:, LENGTH // 2 - 3 : LENGTH // 2 - 1] = 0
    given = {
        "int": mask,
        "bool": mask.bool(),
        "square bool": square(mask, torch.bool),
        "square float": square(mask, torch.float32),
        "holes": mask,
        "none": None,
    }[kind]
    with AttentionTap(model) as tap:
        model(ids, attention_mask=given)
    inputs = tap.take()
    positions = positions_of(mask)
    assert inputs.query_position.tolist() == positions
    oracle = square(mask, torch.float32) if kind.startswith("square") else mask
    assert_row(inputs, eager_rows(eager, -1, positions, input_ids=ids, attention_mask=oracle))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["padding", "block", "packed"])
def test_flex_attention(kind):
    model, eager = build("llama", head=False, implementation="flex_attention"), build("llama", head=False)
    eager.set_attn_implementation("eager")
    ids, mask = batch("left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "block":
        padding = mask.bool()

        def visible(b, h, q, k):
            return padding[b, k] & (k <= q)

        inputs["attention_mask"] = create_block_mask(
            visible, 3, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=128
        )
    if kind == "packed":
        inputs = {
            "input_ids": ids[:1],
            "position_ids": torch.tensor([[*range(6), *range(8)]]),
            "use_cache": False,
        }
    with torch.compiler.set_stance("force_eager"), AttentionTap(model) as tap:
        tapped = model(**inputs).logits
    taken = tap.take()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(**inputs).logits, tapped)
    if kind == "packed":
        parts = [eager_rows(eager, -1, [len(s[0]) - 1], input_ids=s)[0] for s in ids[:1].split([6, 8], 1)]
        assert_row(taken, torch.cat(parts))
    else:
        assert_row(taken, eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask))


# Masks that say more than which keys are padding


def prefix(mask):
    """Causal, and the first six live tokens see each other: a prefix, or the tokens of an image."""
    rank = mask.cumsum(1)
    early = (rank <= 6)[:, None, :, None] & (rank <= 6)[:, None, None, :]
    return (square(mask, torch.bool) | early) & mask.bool()[:, None, None]


def per_head(mask):
    """Causal, and each head sees its own share of the keys."""
    keys, heads = torch.arange(LENGTH), torch.arange(4)[:, None, None]
    own = ((keys + heads) % 3 != 0) | torch.eye(LENGTH, dtype=torch.bool)
    return square(mask, torch.bool) & own


def slopes(mask):
    """Causal, and each head takes off as much per token of distance as in ALiBi."""
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(min=0)
    return square(mask, torch.float32) - 0.5 ** torch.arange(1, 5)[:, None, None] * distance


def window(mask):
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return square(mask, torch.bool) & (distance < 4)


def both_ways(mask):
    return mask.bool()[:, None, None].expand(-1, 1, LENGTH, -1)


def added(seen):
    """As eager attention takes it."""
    if seen.dtype != torch.bool:
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


SQUARES = [prefix, per_head, slopes, window, both_ways]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SQUARES)
def test_the_row_is_that_of_the_mask(kind, implementation, padding):
    model, eager = build("llama", implementation=implementation), build("llama", implementation="eager")
    ids, mask = batch(padding)
    for positions in (positions_of(mask), [9, 6, 11] if padding == "left" else [4, 6, 3]):
        given = added(kind(mask)) if implementation == "eager" else kind(mask)
        with AttentionTap(model, [-1, -2], query_position=torch.tensor(positions), check="always") as tap:
            model(ids, attention_mask=given)
        for layer, inputs in zip((-1, -2), tap.take(), strict=True):
            expected = eager_rows(eager, layer, positions, input_ids=ids, attention_mask=added(kind(mask)))
            assert_row(inputs, expected)
        if kind in (per_head, slopes):
            assert inputs.mask_row.shape == (3, 4, LENGTH)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("kind", [prefix, per_head, window])
def test_the_row_is_that_of_a_block_mask(kind):
    model, eager = build("llama", head=False, implementation="flex_attention"), build("llama", head=False)
    eager.set_attn_implementation("eager")
    ids, mask = batch("left")
    seen = kind(mask)
    heads = seen.shape[1]

    def visible(b, h, q, k):
        return seen[b, h if heads > 1 else 0, q, k]

    blocks = create_block_mask(visible, 3, heads, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=128)
    positions = [LENGTH - 1, 7, 11]
    with (
        torch.compiler.set_stance("force_eager"),
        AttentionTap(model, query_position=torch.tensor(positions), check="always") as tap,
    ):
        model(input_ids=ids, attention_mask=blocks)
    assert_row(tap.take(), eager_rows(eager, -1, positions, input_ids=ids, attention_mask=added(seen)))


def every_row(inputs, attention, mask):
    """Of every query that is not padding."""
    for p in range(LENGTH):
        live = mask[:, p] != 0
        row = attention_row(dataclasses.replace(inputs, query_position=torch.full((3,), p)))
        torch.testing.assert_close(row[live], attention[live, :, p].mean(1), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("kind", ["padding", window, both_ways])
@pytest.mark.parametrize("source", ["columns", "rollout"])
def test_every_query_of_a_square_mask_that_can_be_said(kind, source, padding):
    model, eager = build("llama"), build("llama", implementation="eager")
    ids, mask = batch(padding)
    given = square(mask, torch.bool) if kind == "padding" else kind(mask)
    options = {"query_position": "all"} if source == "columns" else {"source": "rollout"}
    with AttentionTap(model, check="always", **options) as tap:
        model(ids, attention_mask=given)
    taken = tap.take()
    inputs = taken if source == "columns" else taken[-1]
    attention = eager(ids, attention_mask=added(given), output_attentions=True).attentions[-1]
    every_row(inputs, attention, mask)
    assert inputs.causal == (kind is not both_ways)
    assert inputs.sliding_window == (4 if kind is window else None)


@pytest.mark.parametrize("kind", [prefix, per_head, slopes])
@pytest.mark.parametrize("source", ["columns", "rollout", "signed_rollout", "mean"])
def test_every_query_of_a_mask_that_says_more_is_refused(kind, source):
    model = build("llama")
    ids, mask = batch("left")
    bare = model(ids, attention_mask=kind(mask)).logits
    options = {"columns": {"query_position": "all"}, "mean": {"query_position": "mean"}}
    with AttentionTap(model, **options.get(source, {"source": source})) as tap:
        assert torch.equal(model(ids, attention_mask=kind(mask)).logits, bare)
    with pytest.raises(ValueError, match=r"square mask that says more.*'pooled'.*gradient_embedding"):
        tap.take()


def assert_says_more(model, ids, mask, **options):
    with AttentionTap(model, **options) as tap:
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="says more"):
        tap.take()


# Windows and directions, as models have them


def beside_eager(model, implementation="sdpa"):
    """The model with other weights, and its copy that attends as transformers' eager code does."""
    randomise(model.eval())
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    return model, eager


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_window_that_lives_in_the_mask_alone(implementation):
    config = transformers.PhimoeConfig(**SIZE, num_local_experts=2, sliding_window=5)
    model, eager = beside_eager(transformers.PhimoeForCausalLM(config), implementation)
    ids, mask = batch("left")
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=mask)
    expected = eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask)
    assert (expected[0, : LENGTH - 5] == 0).all()
    assert_row(tap.take(), expected)
    with AttentionTap(model, query_position="all", check="always") as tap:
        model(ids, attention_mask=mask)
    attention = eager(ids, attention_mask=mask, output_attentions=True).attentions[-1]
    every_row(tap.take(), attention, mask)


def test_a_window_that_lives_in_the_option_alone():
    model, eager = build("mistral"), build("mistral", implementation="eager")
    ids, mask = batch("left")
    given = square(mask, torch.bool)  # the caller's own, without a window
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=given)
    assert_row(
        tap.take(), eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=added(given))
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("position", ["rows", "all"])
def test_a_model_that_looks_both_ways(position, padding):
    model, eager = build("llama", is_causal=False), build("llama", is_causal=False, implementation="eager")
    ids, mask = batch(padding)
    given = mask if padding != "none" else None
    attention = eager(ids, attention_mask=given, output_attentions=True).attentions[-1]
    assert attention[0, :, 3, 9].max() > 0
    at = torch.tensor([9, 10, 11])
    with AttentionTap(model, query_position=at if position == "rows" else "all", check="always") as tap:
        model(ids, attention_mask=given)
    if position == "all":
        every_row(tap.take(), attention, mask)
    else:
        assert_row(tap.take(), torch.stack([attention[b, :, p].mean(0) for b, p in enumerate(at)]).double())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chunked_attention(implementation):
    config = transformers.Llama4TextConfig(
        **SIZE,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["full_attention", "chunked_attention"],
    )
    model, eager = beside_eager(transformers.Llama4ForCausalLM(config), implementation)
    ids, mask = batch("left")
    expected = eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask)
    assert (expected[0, :12] == 0).all()
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=mask)
    assert_row(tap.take(), expected)
    assert_says_more(model, ids, mask, query_position="all")


def test_a_learned_bias():
    config = transformers.DogeConfig(**SIZE, keep_window_size=64)
    model, eager = beside_eager(transformers.DogeForCausalLM(config))
    for each in (model, eager):
        for name, parameter in each.named_parameters():
            if name.endswith(".A"):
                parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    ids, mask = batch("left")
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=mask)
    inputs = tap.take()
    assert_row(inputs, eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask))
    assert inputs.mask_row.isfinite().any()
    assert inputs.mask_row[inputs.mask_row.isfinite()].abs().max() > 0.01
    assert_says_more(model, ids, mask, source="rollout")


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_bias_that_is_an_option(monkeypatch, padding):
    ids, mask = batch(padding)
    given = mask if padding != "none" else None
    model, eager = build("llama"), build("llama", implementation="eager")
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    bias = torch.sin(distance * torch.arange(1.0, 5)[:, None, None])
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward
    monkeypatch.setattr(
        attention, "forward", functools.wraps(plain)(lambda *a, **k: plain(*a, **k, position_bias=bias[None]))
    )
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=given)
    inputs = tap.take()
    assert_says_more(model, ids, given, query_position="all")
    monkeypatch.undo()
    oracle = square(mask, torch.float32) + bias
    assert_row(inputs, eager_rows(eager, -1, [LENGTH - 1] * 3, input_ids=ids, attention_mask=oracle))


# Packed


@pytest.mark.parametrize("position", ["rows", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_keep_their_windows(name, position):
    lengths = [3, 9, 7]
    ids = torch.randint(3, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model, eager = build(name, head=False), build(name, head=False, implementation="eager")
    with AttentionTap(model, query_position="all" if position == "all" else "pooled", check="always") as tap:
        model(ids, position_ids=positions, use_cache=False)
    inputs = tap.take()
    if position == "all":
        assert inputs.sliding_window == (5 if name == "mistral" else None)
        inputs = dataclasses.replace(inputs, query_position=torch.tensor(lengths) - 1)
    alone = [eager_rows(eager, -1, [s.shape[1] - 1], input_ids=s)[0] for s in ids.split(lengths, 1)]
    assert_row(inputs, torch.cat(alone))
    with AttentionTap(model, query_position=position if position == "all" else "pooled") as tap:
        model(ids, position_ids=positions)  # with a cache transformers does not keep them apart
    with pytest.raises(ValueError, match=r"attended across sequences.*use_cache=False"):
        tap.take()
