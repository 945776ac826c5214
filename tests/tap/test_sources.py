"""Sources other than attention."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
import transformers
from support.tap_models import (
    LENGTH,
    SIZE,
    VOCABULARY,
    Adapted,
    ValueHead,
    assert_same,
    batch,
    build,
    randomise,
    state,
)
from transformers.modeling_utils import AttentionInterface

from attnshape import Response
from attnshape.credit import gradient_weights
from attnshape.problems import mapped
from attnshape.tap import AttentionTap


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


GRADIENTS = ["gradient_value", "gradient_embedding", "relevance"]
SOURCES = ["rollout", "signed_rollout", *GRADIENTS]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("source", SOURCES)
def test_sources_keep_the_logits_and_leave_the_model_as_it_was(source, implementation):
    model = build("llama", implementation=implementation)
    before = state(model)
    ids, mask = batch("left")
    with torch.enable_grad():
        bare = model(ids, attention_mask=mask).logits
        with AttentionTap(model, source=source) as tap:
            assert torch.equal(model(ids, attention_mask=mask).logits, bare)
            tap.take()
            with pytest.raises(RuntimeError, match="ran 0"):
                tap.take()
            model(ids, attention_mask=mask)
            model(ids, attention_mask=mask)
            with pytest.raises(RuntimeError, match="ran 2"):
                tap.take()
    assert state(model) == before
    handle = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with torch.enable_grad(), pytest.raises(ZeroDivisionError), AttentionTap(model, source=source):
        model(ids, attention_mask=mask)
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("source", SOURCES)
def test_sources_through_wrappers(source):
    model = build("llama", head=False)
    ids, mask = batch("right")
    score, wrapped = ValueHead(model), ValueHead(Adapted(model))
    wrapped.value = score.value
    taken = []
    for module in (score, wrapped):
        with torch.enable_grad(), AttentionTap(module, source=source) as tap:
            module(ids, mask)
        taken.append(tap.take())
    if source == "rollout":
        for plain, adapted in zip(*taken, strict=True):
            assert_same(plain, adapted)
            assert torch.equal(plain.value_norm, adapted.value_norm)
            assert torch.equal(plain.residual_norm, adapted.residual_norm)
    elif source == "signed_rollout":
        for plain, adapted in zip(*taken, strict=True):
            assert_same(plain.inputs, adapted.inputs)
            assert torch.equal(plain.pull, adapted.pull)
    else:
        assert torch.equal(*taken)


@pytest.mark.parametrize("source", GRADIENTS)
def test_gradients_are_those_of_a_row_alone(source):
    model = build("llama")
    ids, mask = batch("right")
    response = Response(mask[:, 2:], start=torch.full((3,), 2))
    rows = []
    with torch.enable_grad(), AttentionTap(model, source=source) as tap:
        score = model(ids, attention_mask=mask).logits[:, 0]
        together = gradient_weights(score, tap.take(), response)
        for b in range(3):
            score = model(ids[b : b + 1], attention_mask=mask[b : b + 1]).logits[:, 0]
            alone = mapped(response, lambda x, b=b: x[b : b + 1])
            rows.append(gradient_weights(score, tap.take(), alone))
    torch.testing.assert_close(together, torch.cat(rows))


@pytest.mark.parametrize("source", ["gradient_value", "gradient_embedding"])
def test_training_goes_on_through_what_is_taken(source):
    model = build("llama")
    ids, mask = batch("left")
    gradients = []
    for tapped in (False, True):
        model.zero_grad()
        with torch.enable_grad():
            if tapped:
                with AttentionTap(model, source=source):
                    loss = model(ids, attention_mask=mask).logits.sum()
            else:
                loss = model(ids, attention_mask=mask).logits.sum()
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("source", GRADIENTS)
def test_a_gradient_source_needs_a_graph(source):
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, source=source) as tap:
        model(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"forward under torch.enable_grad\(\), got one without"):
            tap.take()
        with torch.enable_grad():
            model(ids, attention_mask=mask)
        assert tap.take().requires_grad


@pytest.mark.parametrize("source", SOURCES)
def test_sources_see_the_forwards_of_their_own_thread(source):
    model = build("llama")
    ids, mask = batch("left")

    def elsewhere():
        with torch.enable_grad():
            model(ids, attention_mask=mask)

    with torch.enable_grad(), AttentionTap(model, source=source) as tap:
        model(ids, attention_mask=mask)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    tap.take()


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_a_rollout_keeps_keys_by_reference_and_no_hidden_states(source):
    model = build("llama")
    ids, mask = batch("left")
    streams = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda m, args: streams.append(weakref.ref(args[0]))
    )
    with AttentionTap(model, source=source) as tap:
        cache = model(ids, attention_mask=mask).past_key_values
        taken = [x if source == "rollout" else x.inputs for x in tap.take()]
        assert streams[0]() is None
    handle.remove()
    assert [x.key.data_ptr() for x in taken] == [layer.keys.data_ptr() for layer in cache.layers]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compile_", ["torch.compile", "Module.compile"])
def test_other_sources_than_attention_refuse_compiled_models(source, compile_):
    model = build("llama")
    if compile_ == "torch.compile":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=f"model: compiled.*{source}"):
        AttentionTap(model, source=source)


@pytest.mark.parametrize(
    ("source", "layer", "message"),
    [
        ("attn", None, "source: got 'attn', want one of"),
        ("rollout", -1, "layer: got -1, want none for source='rollout'"),
        ("signed_rollout", [0, 1], "layer: got"),
        ("gradient_embedding", 0, "layer: got 0, want none"),
        ("gradient_value", [0], r"layer: got \[0\], want int"),
        ("relevance", [0, 1], r"layer: got \[0, 1\], want int"),
        ("gradient_value", 2, "layer: got 2, the model has 2"),
    ],
)
def test_sources_and_layers_that_do_not_fit(source, layer, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AttentionTap(build("llama"), layer, source=source)


@pytest.mark.parametrize("source", GRADIENTS)
def test_layers_that_run_without_gradients_are_refused(source):
    model = build("llama")
    before = []

    def stop(*_):
        before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def go_on(*_):
        torch.set_grad_enabled(before.pop())

    model.model.layers[1].register_forward_pre_hook(stop)
    model.model.layers[1].register_forward_hook(go_on)
    ids, mask = batch("left")
    with torch.enable_grad(), AttentionTap(model, source=source) as tap:
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=f"runs a LlamaDecoderLayer without gradients.*'{source}'"):
        tap.take()


def shared_keys_and_values():
    """A decoder whose upper layers attend with the values of lower ones, and read embeddings again."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        **SIZE | {"num_hidden_layers": 4}, num_kv_shared_layers=2, num_global_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5, head_dim=8,
        global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="sdpa")
    randomise(model)
    return model.double().eval()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("layer", [0, 3])
def test_values_that_several_layers_share_count_in_their_own(monkeypatch, layer, is_frozen):
    model = shared_keys_and_values().requires_grad_(not is_frozen)
    ids, mask = batch("right")
    attend, factor = AttentionInterface._global_mapping["sdpa"], torch.ones(LENGTH, dtype=torch.float64)

    def scaled(module, query, key, value, *args, **kwargs):
        if module.layer_idx == layer:
            value = value * factor[:, None]
        return attend(module, query, key, value, *args, **kwargs)

    def score():
        return model(ids, attention_mask=mask).logits[torch.arange(3), mask.sum(1) - 1, 5]

    with torch.enable_grad(), AttentionTap(model, layer, source="gradient_value") as tap:
        weights = gradient_weights(
            score(), tap.take(), Response(mask, start=torch.zeros(3, dtype=torch.int32))
        )
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", scaled)
    for token in (0, 2, 4):
        moved = []
        for step in (0.02, -0.02):  # norms compute in float32
            factor[token] = 1 + step
            moved.append(score())
        factor[token] = 1
        difference = (moved[0] - moved[1]) / 0.04
        torch.testing.assert_close(
            weights[:, token], difference, rtol=0, atol=float(weights.abs().max()) / 100
        )


def test_what_else_reads_what_enters_a_layer_is_no_part_of_relevance():
    """The embeddings, of which every layer of this decoder is told again beside its stream."""
    model = shared_keys_and_values()
    ids, mask = batch("right")
    found = []
    for is_frozen in (False, True):
        model.requires_grad_(not is_frozen)
        with torch.enable_grad(), AttentionTap(model, 0, source="relevance") as tap:
            score = model(ids, attention_mask=mask).logits[torch.arange(3), mask.sum(1) - 1, 5]
            response = Response(mask, start=torch.zeros(3, dtype=torch.int32))
            found.append(gradient_weights(score, tap.take(), response))
    torch.testing.assert_close(*found)
