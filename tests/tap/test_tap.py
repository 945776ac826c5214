"""The tap's mechanism: what it changes, what it holds, when it refuses. The families are elsewhere."""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
import transformers
from support.tap_models import LENGTH, PAD, Adapted, Lora, ValueHead, batch, build, eager_rows, randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

from attnshape import Response
from attnshape.credit import gradient_weights
from attnshape.problems import mapped
from attnshape.reference import attention_row
from attnshape.tap import AttentionTap


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def everything_is_restored():
    eager = modeling_llama.eager_attention_forward
    yield
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == {}
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert modeling_llama.eager_attention_forward is eager


def state(model):
    """What a tap could leave behind in a model."""
    return {
        name: (
            set(vars(m)),
            dict(m._forward_hooks),
            dict(m._forward_pre_hooks),
            dict(m._forward_pre_hooks_with_kwargs),
        )
        for name, m in model.named_modules()
    }


def positions_of(mask):
    return [int(row.nonzero().max()) for row in mask]


def assert_row(inputs, expected):
    torch.testing.assert_close(attention_row(inputs).double(), expected, rtol=2e-4, atol=2e-6)


def assert_same(a, b):
    assert torch.equal(a.query, b.query)
    assert torch.equal(a.key, b.key)
    assert torch.equal(a.query_position, b.query_position)


# Entering and leaving


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_exception_leaves_the_model_as_it_was(implementation):
    model = build("llama", implementation=implementation)
    before = state(model)
    ids, mask = batch("left")

    def interrupt(*_):
        raise KeyboardInterrupt

    with AttentionTap(model, [-1, 0]):
        assert state(model) != before
    handle = model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), AttentionTap(model, [-1, 0]):
        model(ids, attention_mask=mask)
    handle.remove()
    assert state(model) == before


def test_take_after_a_forward_that_failed():
    model = build("llama")
    ids, mask = batch("left")

    def fail(*_):
        raise ZeroDivisionError

    with AttentionTap(model) as tap:
        handle = model.model.layers[0].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(ids, attention_mask=mask)
        handle.remove()
        with pytest.raises(RuntimeError, match="ran 0"):
            tap.take()
        model(ids, attention_mask=mask)
        assert tap.take().query.shape == (3, 4, 8)


def test_a_tap_can_be_entered_again_but_not_twice():
    model = build("llama")
    ids, mask = batch("left")
    tap = AttentionTap(model)
    for _ in range(2):
        with tap:
            model(ids, attention_mask=mask)
            with pytest.raises(RuntimeError, match="open already"):
                tap.__enter__()
        tap.take()


def other_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def test_a_function_that_somebody_else_registers_meanwhile_stays():
    try:
        with AttentionTap(build("llama")):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = other_attention
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other_attention
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_local_override_is_wrapped_and_put_back():
    model = build("llama")
    ids, mask = batch("left")
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = other_attention
        with AttentionTap(model) as tap:
            model(ids, attention_mask=mask)
        tap.take()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other_attention
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_taps_nest_and_close_in_any_order():
    model, other = build("llama"), build("qwen2")
    ids, mask = batch("right")
    before = state(model)
    last, first = AttentionTap(model), AttentionTap(model, 0)
    elsewhere = AttentionTap(other)
    alone = []
    for tap in (last, first):
        with tap:
            model(ids, attention_mask=mask)
        alone.append(tap.take())
    last.__enter__()
    elsewhere.__enter__()
    first.__enter__()
    model(ids, attention_mask=mask)
    assert_same(last.take(), alone[0])
    last.__exit__(None, None, None)
    model(ids, attention_mask=mask)
    with pytest.raises(RuntimeError, match="ran 2"):
        first.take()
    model(ids, attention_mask=mask)
    other(ids, attention_mask=mask)
    first.__exit__(None, None, None)
    assert_same(first.take(), alone[1])
    elsewhere.take()
    other(ids, attention_mask=mask)
    elsewhere.__exit__(None, None, None)
    elsewhere.take()
    with pytest.raises(RuntimeError, match="ran 0"):
        last.take()
    assert state(model) == before


def test_threads_see_their_own_forwards():
    model = build("llama")
    expected, results, barrier = {}, {}, threading.Barrier(4, timeout=60)
    inputs = {
        n: torch.randint(3, 60, (2, 8 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)
    }
    for n, ids in inputs.items():
        with AttentionTap(model) as tap:
            model(ids)
        expected[n] = tap.take()

    def work(n):
        with torch.no_grad():
            for _ in range(3):
                with AttentionTap(model) as tap:
                    barrier.wait()
                    model(inputs[n])
                    barrier.wait()
                    results[n] = tap.take()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert_same(results[n], expected[n])


def test_a_forward_in_another_thread_is_not_seen():
    model = build("llama")
    with AttentionTap(model) as tap:
        thread = threading.Thread(target=lambda: model(torch.full((1, 4), 5)))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match=r"thread that entered it.* ran 0"):
            tap.take()


# What take() gives


def test_take_wants_exactly_one_forward():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match=r"layer 'model\.layers\.1\.self_attn' ran 0"):
            tap.take()
        model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="ran 2"):
            tap.take()
        model(ids, attention_mask=mask)
        tap.take()
        with pytest.raises(RuntimeError, match="ran 0"):
            tap.take()


def test_int_layer_gives_one_and_a_sequence_gives_a_tuple():
    model = build("llama")
    ids, mask = batch("left")
    with (
        AttentionTap(model, -2) as one,
        AttentionTap(model, (0,)) as several,
        AttentionTap(model, [1, 0]) as both,
    ):
        model(ids, attention_mask=mask)
    first = one.take()
    assert_same(several.take()[0], first)
    second, again = both.take()
    assert_same(again, first)
    assert not torch.equal(second.key, first.key)


@pytest.fixture
def spied(monkeypatch):
    """A model whose attention function notes the tensors it is given, last layer last."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((weakref.ref(query.untyped_storage()), query.data_ptr(), key.data_ptr(), key.stride()))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "spy", spy)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "spy", sdpa_mask)
    return build("llama", implementation="spy"), seen


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", ["pooled", "last_visible", torch.tensor([3, 2, 1])])
def test_rows_are_copied_and_keys_are_not(spied, use_cache, position):
    model, seen = spied
    ids, mask = batch("right")
    with AttentionTap(model, query_position=position) as tap:
        model(ids, attention_mask=mask, use_cache=use_cache)
        queries, _, key, stride = seen[-1]
        assert queries() is None
        inputs = tap.take()
    assert inputs.key.data_ptr() == key
    assert inputs.key.stride() == stride
    assert inputs.key.shape == (3, 2, LENGTH, 8)
    assert inputs.query.untyped_storage().nbytes() == 3 * 4 * 8 * 4


@pytest.mark.parametrize("position", ["all", "last_response"])
def test_all_queries_are_kept_by_reference(spied, position):
    model, seen = spied
    ids, mask = batch("right")
    with AttentionTap(model, query_position=position) as tap:
        model(ids, attention_mask=mask)
    inputs = tap.take()
    assert inputs.query.data_ptr() == seen[-1][1]
    assert inputs.query.shape == (3, 4, LENGTH, 8)
    assert inputs.query_position == (None if position == "all" else position)
    assert inputs.attention_mask is mask
    assert_row(
        inputs if position == "all" else replaced(inputs),
        eager_rows(
            build("llama", implementation="eager"), -1, positions_of(mask), input_ids=ids, attention_mask=mask
        ),
    )


def replaced(inputs):
    inputs = copy.copy(inputs)
    object.__setattr__(inputs, "query_position", None)
    return inputs


def test_packed_keys_are_not_copied(spied):
    model, seen = spied
    with AttentionTap(model) as tap:
        model(
            torch.full((1, 9), 5), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False
        )
        assert seen[-1][0]() is None
        inputs = tap.take()
    assert inputs.key.shape == (9, 2, 8)
    assert inputs.key.data_ptr() == seen[-1][2]


def test_a_second_forward_frees_the_first(spied):
    model, seen = spied
    ids, mask = batch("left")
    with AttentionTap(model, query_position="all") as tap:
        model(ids, attention_mask=mask)
        assert seen[-1][0]() is not None
        model(ids, attention_mask=mask)
        assert [queries() for queries, *_ in seen] == [None] * 4
        with pytest.raises(RuntimeError, match="ran 2"):
            tap.take()


@torch.enable_grad()
def test_what_is_taken_is_detached():
    model = build("llama")
    ids, mask = batch("left")
    for position in ("pooled", "all"):
        with AttentionTap(model, query_position=position) as tap:
            model(ids, attention_mask=mask)
        inputs = tap.take()
        assert not inputs.query.requires_grad
        assert not inputs.key.requires_grad


def test_positions_of_micro_batches():
    model, eager = build("llama"), build("llama", implementation="eager")
    ids, mask = batch("right")
    explicit = torch.tensor([11, 3, 4])
    with AttentionTap(model) as tap:
        for i in range(3):
            tap.query_position = explicit[i : i + 1]
            model(ids[i : i + 1], attention_mask=mask[i : i + 1])
            inputs = tap.take()
            assert inputs.query_position.tolist() == explicit[i : i + 1].tolist()
            expected = eager_rows(
                eager, -1, [int(explicit[i])], input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]
            )
            assert_row(inputs, expected)


def test_positions_outside_are_left_to_the_shaping():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, query_position=torch.tensor([LENGTH, -1, 5])) as tap:
        model(ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [LENGTH, -1, 5]


def test_positions_in_packed_input_count_from_each_sequence():
    model = build("llama")
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False}
    with AttentionTap(model, query_position="all") as tap:
        model(ids, **packed)
        queries = tap.take().query
        assert queries.shape == (9, 4, 8)
        tap.query_position = torch.tensor([2, 1])
        model(ids, **packed)
        inputs = tap.take()
        assert torch.equal(inputs.query, queries[[2, 5]])
        assert inputs.query_position.tolist() == [2, 1]
        tap.query_position = torch.tensor([2, 1, 0])
        model(ids, **packed)
        with pytest.raises(ValueError, match="query_position: got 3 positions for 2 sequences"):
            tap.take()


# Masks, as the model may be called with


def square(mask, dtype):
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


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
    if kind in ("int", "bool", "holes"):
        assert inputs.attention_mask is given


@pytest.mark.parametrize("position", ["all", "last_response"])
def test_square_masks_go_with_rows_only(position):
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, query_position=position) as tap:
        model(ids, attention_mask=square(mask, torch.bool))
    with pytest.raises(ValueError, match=f"attention_mask: got 4-D.*{position}"):
        tap.take()


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


# Ways of running a model


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
    graphs = CompileCounterWithBackend("aot_eager")
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


# Refusals


def test_generation_inside_a_tap_goes_on_and_take_refuses():
    model = build("llama", head=False)
    ids, mask = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    bare = model.generate(ids, **options)
    with AttentionTap(model) as tap:
        assert torch.equal(model.generate(ids, **options), bare)
        with pytest.raises(RuntimeError, match="ran 3"):
            tap.take()


def test_earlier_keys_are_refused():
    model = build("llama", head=False)
    ids, mask = batch("left")
    past = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True).past_key_values
    with AttentionTap(model) as tap:
        model(ids[:, -2:], attention_mask=mask, past_key_values=past)
    with pytest.raises(ValueError, match=r"2 queries for 14 keys.*past_key_values"):
        tap.take()


def test_packed_sequences_in_a_batch_are_refused():
    model = build("llama")
    ids, _ = batch("none")
    positions = torch.tensor([[*range(6), *range(8)]]).expand(3, -1)
    with AttentionTap(model) as tap:
        model(ids, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="position_ids: packed sequences in a batch of 3"):
        tap.take()


def test_position_ids_that_do_not_restart_are_no_packing():
    model = build("llama")
    ids, _ = batch("none")
    with AttentionTap(model) as tap:
        model(ids, position_ids=torch.arange(3, LENGTH + 3)[None])
    assert tap.take().cu_seqlens is None


def test_a_head_that_pools_in_its_own_way_needs_a_position():
    class MeanForSequenceClassification(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids, attention_mask):
            return self.score(self.model(input_ids, attention_mask=attention_mask)[0]).mean(1)

    model = MeanForSequenceClassification(build("llama").config)
    with pytest.raises(ValueError, match=r"'pooled'.*MeanForSequenceClassification.*last_visible"):
        AttentionTap(model)
    with AttentionTap(model, query_position="last_visible") as tap:
        model(*batch("left"))
        with pytest.raises(ValueError, match="MeanForSequenceClassification"):
            tap.query_position = "pooled"
    assert tap.take().query_position.tolist() == [LENGTH - 1] * 3


def test_a_subclass_that_defers_to_the_head_of_transformers_pools_as_it():
    class Mine(transformers.LlamaForSequenceClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Mine(build("llama").config)
    ids, mask = batch("right")
    mask[:, -1] = 1
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [LENGTH - 1, 8, 4]


def test_a_layer_that_runs_twice_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="attends more than once"):
        tap.take()


def test_chunked_attention_is_refused():
    config = build("llama").config
    config.layer_types = ["full_attention", "chunked_attention"]
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*chunked_attention"):
        AttentionTap(model)
    with AttentionTap(model, 0):
        pass


def test_ring_attention_is_refused(monkeypatch):
    def ring(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    ring.__module__ = "ring_flash_attn.adapters.hf_adapter"
    monkeypatch.setitem(AttentionInterface._global_mapping, "ring", ring)
    with pytest.raises(ValueError, match=r"ring_flash_attn.*shards the keys"):
        AttentionTap(build("llama", implementation="ring"))


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_keys_are_refused(monkeypatch, mesh):
    rotate = modeling_llama.apply_rotary_pos_emb

    def sharded(*args, **kwargs):
        query, key = rotate(*args, **kwargs)
        return query, DTensor.from_local(key, mesh, [Shard(2)])

    def gathering(module, query, key, *args, **kwargs):
        return sdpa_attention_forward(module, query, key.to_local(), *args, **kwargs)

    model = build("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", sharded)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", gathering)
    ids, mask = batch("none")
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="key: sharded over devices"):
        tap.take()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"model": "a name"}),
        (ValueError, {"model": nn.Linear(2, 2)}),
        (ValueError, {"layer": 2}),
        (ValueError, {"layer": -3}),
        (ValueError, {"layer": []}),
        (TypeError, {"layer": "last"}),
        (TypeError, {"layer": 1.0}),
        (ValueError, {"query_position": "first"}),
        (ValueError, {"query_position": torch.tensor([1.0])}),
        (ValueError, {"query_position": torch.tensor([[1]])}),
        (ValueError, {"query_position": torch.tensor([True])}),
    ],
)
def test_bad_arguments(error, arguments):
    with pytest.raises(error, match=next(iter(arguments))):
        AttentionTap(**{"model": build("llama")} | arguments)


@pytest.mark.parametrize(
    ("position", "mask", "message"),
    [
        (torch.tensor([1, 2]), None, "query_position: got 2 positions for 3 sequences"),
        ("pooled", torch.ones(3, 4, LENGTH, LENGTH, dtype=torch.bool).tril(), r"attention_mask: got \[3, 4"),
    ],
)
def test_bad_forwards_are_reported_by_take(position, mask, message):
    model = build("llama")
    ids, _ = batch("none")
    bare = model(ids, attention_mask=mask).logits
    with AttentionTap(model, query_position=position) as tap:
        assert torch.equal(model(ids, attention_mask=mask).logits, bare)
        with pytest.raises(ValueError, match=message):
            tap.take()
        tap.query_position = "pooled"
        model(ids)
        assert tap.take().query.shape == (3, 4, 8)


# Other sources than attention


SOURCES = ["rollout", "signed_rollout", "gradient_value", "gradient_embedding"]


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


@pytest.mark.parametrize("source", ["gradient_value", "gradient_embedding"])
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


@pytest.mark.parametrize("source", ["gradient_value", "gradient_embedding"])
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
        ("gradient_value", 2, "layer: got 2, the model has 2"),
    ],
)
def test_sources_and_layers_that_do_not_fit(source, layer, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AttentionTap(build("llama"), layer, source=source)


def test_a_rollout_of_square_masks_is_refused():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, source="rollout") as tap:
        model(ids, attention_mask=square(mask, torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask: got 4-D, want \[B, S\] for a rollout"):
        tap.take()
