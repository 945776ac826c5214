"""Ways of running a tapped model: caches, checkpointing, compiled, wrapped."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import zoo
from support.tap_models import (
    LENGTH,
    PAD,
    Adapted,
    Lora,
    ValueHead,
    assert_row,
    assert_same,
    batch,
    build,
    eager_rows,
    positions_of,
    randomise,
    square,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from attnshape.reference import attention_row
from attnshape.tap import AttentionTap


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_eager_model_is_tapped_too():
    eager = build("llama", implementation="eager")
    ids, mask = batch("right")
    bare = eager(ids, attention_mask=mask).logits
    with AttentionTap(eager) as tap:
        assert modeling_llama.eager_attention_forward.__wrapped__ is not None
        assert torch.equal(eager(ids, attention_mask=mask).logits, bare)
    assert_row(tap.take(), eager_rows(eager, -1, positions_of(mask), input_ids=ids, attention_mask=mask))


def test_use_cache_makes_no_difference():
    model = build("llama")
    ids, mask = batch("left")
    taken = []
    for use_cache in (True, False):
        with AttentionTap(model) as tap:
            model(ids, attention_mask=mask, use_cache=use_cache)
        taken.append(tap.take())
    assert_same(*taken)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@torch.enable_grad()
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask)
    expected = tap.take()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    model.model.layers[-1].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model.model.embed_tokens.register_forward_hook(lambda *args: args[-1].requires_grad_())
    with AttentionTap(model) as tap:
        for _ in range(2):
            model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
            assert_same(tap.take(), expected)
        loss = model(ids, attention_mask=mask, use_cache=False).logits.sum()
        taken = tap.take()
        loss.backward()
        assert_same(taken, expected)
        with pytest.raises(RuntimeError, match="ran 0"):
            tap.take()
    assert len(runs) == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("compile_", "padding"), [("torch.compile", "left"), ("Module.compile", "none")])
def test_compiled_model_is_compiled_once_for_all_taps(compile_, padding):
    torch._dynamo.reset()
    model, plain = build("llama"), build("llama")
    # One is compiled for good; the other has the same graphs.
    graphs = CompileCounterWithBackend("aot_eager" if compile_ == "torch.compile" else "eager")
    if compile_ == "torch.compile":
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
    else:
        model.compile(fullgraph=True, backend=graphs)
        compiled = model
    ids, mask = batch(padding)
    bare = compiled(ids, attention_mask=mask).logits
    assert graphs.frame_count == 1
    for i in range(12):
        with AttentionTap(compiled if i % 2 else model) as tap, AttentionTap(plain) as expected:
            assert torch.equal(compiled(ids, attention_mask=mask).logits, bare)
            plain(ids, attention_mask=mask)
        assert_same(tap.take(), expected.take())
    assert graphs.frame_count == 2
    assert torch.equal(compiled(ids, attention_mask=mask).logits, bare)
    assert graphs.frame_count == 2
    if compile_ == "Module.compile":
        with AttentionTap(model, -2) as tap, AttentionTap(plain, -2) as expected:
            compiled(ids, attention_mask=mask)
            plain(ids, attention_mask=mask)
        assert_same(tap.take(), expected.take())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_packed_input():
    torch._dynamo.reset()
    model, plain = build("llama"), build("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False}
    with AttentionTap(model) as tap, AttentionTap(plain) as expected:
        compiled(ids, **packed)
        plain(ids, **packed)
    assert_same(tap.take(), expected.take())


def test_value_head():
    wrapper = ValueHead(build("olmo2"))
    eager = build("olmo2", implementation="eager")
    randomise(wrapper.value)
    for padding in ("left", "right"):
        ids, mask = batch(padding)
        bare = wrapper(ids, mask)
        with AttentionTap(wrapper) as tap:
            assert torch.equal(wrapper(ids, mask), bare)
        assert_row(tap.take(), eager_rows(eager, -1, positions_of(mask), input_ids=ids, attention_mask=mask))


def test_adapter_around_a_classifier():
    model = build("llama")
    attention = model.model.layers[-1].self_attn
    attention.q_proj, attention.k_proj = Lora(attention.q_proj), Lora(attention.k_proj)
    randomise(attention)
    wrapped = Adapted(model)
    ids, mask = batch("right", pad=PAD)
    # Attended padding: only the head, which the wrapper calls past its hooks, knows to skip it.
    mask[:, -1] = 1
    with AttentionTap(wrapped) as tap:
        logits = wrapped(ids, attention_mask=mask).logits
    inputs = tap.take()
    assert torch.equal(logits, wrapped(ids, attention_mask=mask).logits)
    assert inputs.query_position.tolist() == [LENGTH - 1, 8, 4]
    model.set_attn_implementation("eager")
    assert_row(inputs, eager_rows(wrapped, -1, [LENGTH - 1, 8, 4], input_ids=ids, attention_mask=mask))


class Outer(transformers.LlamaPreTrainedModel):
    """Prepares embeddings and masks for the model inside, as multimodal models do."""

    def __init__(self, inner):
        super().__init__(inner.config)
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        embeddings = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=embeddings, attention_mask=square(attention_mask, torch.bool))


def test_the_outermost_model_says_what_the_input_is():
    model = Outer(build("llama", head=False))
    ids, mask = batch("right")
    with AttentionTap(model, query_position="all") as tap, AttentionTap(model) as rows:
        model(ids, mask)
    assert tap.take().attention_mask is mask
    expected = eager_rows(
        build("llama", head=False, implementation="eager"),
        -1,
        positions_of(mask),
        input_ids=ids,
        attention_mask=mask,
    )
    assert_row(rows.take(), expected)


def test_attention_is_found_whatever_its_class_is_called():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, 0) as tap:
        model(ids, attention_mask=mask)
    expected = tap.take()
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("Sharded", (type(layer),), {})
    with AttentionTap(model, 0) as tap:
        model(ids, attention_mask=mask)
    assert_same(tap.take(), expected)


def test_bare_backbone():
    model = build("llama")
    ids, mask = batch("right")
    mask[:, -1] = 1
    with AttentionTap(model.model) as tap:
        model.model(ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [LENGTH - 1] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_encoder():
    """At the position that is pooled, and at all of them."""
    torch._dynamo.reset()
    model = zoo.build("BertForSequenceClassification")
    randomise(model)
    plain = copy.deepcopy(model)
    ids, mask = batch("right")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def taken(model):
        with (
            AttentionTap(model, query_position="pooled", check="always") as pooled,
            AttentionTap(model, query_position="all", check="always") as every,
        ):
            model(input_ids=ids, attention_mask=mask)
        return pooled.take(), every.take()

    (pooled, every), (wanted, every_wanted) = taken(compiled), taken(plain)
    torch.testing.assert_close(attention_row(pooled), attention_row(wanted))
    torch.testing.assert_close(attention_row(every), attention_row(every_wanted))
    assert pooled.query_position.tolist() == [0, 0, 0]
    assert (every.causal, every_wanted.causal) == (False, False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_checked(monkeypatch):
    def longer(module, query, key, value, mask, **options):
        return sdpa_attention_forward(module, 1.3 * query, key, value, mask, **options)

    torch._dynamo.reset()
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", longer)
    model = build("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = batch("left")
    with AttentionTap(compiled) as tap:
        compiled(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="times its values"):
        tap.take()


def test_a_static_cache_is_refused():
    model = build("llama", head=False)
    ids, mask = batch("left")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="without earlier past_key_values or a static cache"):
        tap.take()


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_cache_of_a_window_makes_no_difference(name):
    model, eager = build(name, head=False), build(name, head=False, implementation="eager")
    ids, mask = batch("left")
    cache = transformers.DynamicCache(config=model.config)
    with AttentionTap(model, [0, 1], check="always") as tap:
        model(ids, attention_mask=mask, past_key_values=cache)
    for layer, inputs in enumerate(tap.take()):
        assert_row(inputs, eager_rows(eager, layer, [LENGTH - 1] * 3, input_ids=ids, attention_mask=mask))


class Rounded(nn.Module):
    """A linear layer in eight bits, as quantised checkpoints have it: no weight of its shape to look at."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x) * self.scale)


@pytest.mark.parametrize("source", ["attention", "rollout"])
def test_quantised_models(source):
    model = build("llama")
    whole = build("llama")
    for layer, other in zip(model.model.layers, whole.model.layers, strict=True):
        for name, linear in list(layer.self_attn.named_children()):
            rounded = Rounded(linear)
            setattr(layer.self_attn, name, rounded)
            getattr(other.self_attn, name).weight.data = rounded.packed.float() * rounded.scale
    ids, mask = batch("left")
    taken = []
    for each in (model, whole):
        with AttentionTap(each, source=source, check="always") as tap:
            each(ids, attention_mask=mask)
        taken.append(tap.take())
    if source == "attention":
        torch.testing.assert_close(*map(attention_row, taken))
    else:
        for one, other in zip(*taken, strict=True):
            torch.testing.assert_close(one.value_norm, other.value_norm)


def test_data_parallel_on_one_device():
    model = build("llama")
    ids, mask = batch("left")
    wrapped = nn.DataParallel(model)
    with AttentionTap(wrapped) as tap, AttentionTap(model) as plain:
        wrapped(ids, attention_mask=mask)
    assert_same(tap.take(), plain.take())


@pytest.mark.parametrize("source", ["rollout", "gradient_value"])
def test_a_trial_keeps_the_random_state_and_the_cache(source):
    model = build("llama", attention_dropout=0.1).train()
    ids, mask = batch("left")
    with torch.enable_grad():
        torch.manual_seed(3)
        bare = model(ids, attention_mask=mask).logits
        torch.manual_seed(3)
        with AttentionTap(model, source=source) as tap:
            tapped = model(ids, attention_mask=mask).logits
    assert torch.equal(tapped, bare)
    tap.take()
