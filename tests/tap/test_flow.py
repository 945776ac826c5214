"""What layers move, and rollouts of it, against explicit contributions of every head and token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.tap_models import FAMILIES, LENGTH, SIZE, Lora, batch, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnshape
from attnshape import Response, credit
from attnshape.tap import AttentionTap

OLD = transformers.__version__ < "5"
PROJECTIONS = {"gpt2": "c_proj", "gpt_neox": "dense", "opt": "out_proj", "gptj": "out_proj"}
NORM_AFTER = ("gemma2", "gemma3", "olmo2")
MODELS = [name for name in FAMILIES if not (OLD and name == "stablelm")]
HEADS = 4


def made(name: str, **options: Any) -> Any:
    """With eager attention, which returns what the tests are written in terms of."""
    if name == "granite":
        options["residual_multiplier"] = 0.4
    return build(name, implementation="eager", **options)


def layers_of(model: Any) -> list[nn.Module]:
    base = model.base_model
    for attribute in ("decoder", "model"):
        base = getattr(base, attribute, base)
    return list(base.h if hasattr(base, "h") else base.layers)


def attention_of(layer: nn.Module) -> Any:
    return next(m for name, m in layer.named_children() if name in ("attn", "self_attn", "attention"))


def output_weight(name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The output projection as ``[Hq, Dv, hidden]``, and its bias."""
    projection = getattr(attention_of(layer), PROJECTIONS.get(name, "o_proj"))
    weight = projection.weight if name == "gpt2" else projection.weight.T
    bias = projection.bias if projection.bias is not None else torch.zeros(weight.shape[1])
    return weight.detach().view(HEADS, -1, weight.shape[1]), bias.detach()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-5)


class Explicit:
    """One layer's contributions, all of them: what moves from ``t`` to ``s`` through ``h``; in float64."""

    def __init__(self, name: str, layer: Any, attention: Tensor, stream: Tensor, value: Tensor, out: Tensor):
        weight, bias = (x.double() for x in output_weight(name, layer))
        attention, stream, value, out = (x.double() for x in (attention, stream, value, out))
        value = value.repeat_interleave(HEADS // value.shape[1], 1)
        self.moved = torch.einsum("bhtd,hde->bhte", value, weight)  # W_O,h v[h, t]
        parts = torch.einsum("bhst,bhte->bhste", attention, self.moved)
        assert_close(parts.sum((1, 3)) + bias, out)  # they are all there is
        added = out
        if name in NORM_AFTER:
            added = layer.post_attention_layernorm(out.float()).double()
        if name == "granite":
            added = out * layer.residual_multiplier
        self.attention, self.stream, self.added, self.out = attention, stream, added, out
        self.parts = parts

    @property
    def factor(self) -> Tensor:
        return self.added.norm(dim=-1) / self.out.norm(dim=-1)

    def norm_weighted(self, r: Tensor, b: int) -> Tensor:
        """spec.md 2.4, with what is added to the stream as long as it is."""
        below = torch.zeros_like(r)
        for s in range(len(r)):
            if r[s] == 0:
                continue
            length = self.factor[b, s] * (self.attention[b, :, s] * self.moved[b].norm(dim=-1)).sum(0)  # [S]
            total = length.sum() + self.stream[b, s].norm()
            below += r[s] * length / total
            below[s] += r[s] * self.stream[b, s].norm() / total
        return below

    def signed(self, r: Tensor, b: int) -> Tensor:
        below = torch.zeros_like(r)
        for s in range(len(r)):
            if r[s] == 0:
                continue
            y = self.stream[b, s] + self.added[b, s]
            share = self.factor[b, s] * (self.parts[b, :, s].sum(0) @ y) / (y @ y)  # [S]
            below += r[s] * share
            below[s] += r[s] * (1 - share.sum())
        return below


def explicit_layers(name: str, model: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> list[Explicit]:
    layers, values, outs, streams = layers_of(model), [], [], []
    place: Any = __import__(type(layers[0]).__module__, fromlist=["_"])
    attribute = "eager_attention_forward"
    if name == "gptj":
        place, attribute = type(attention_of(layers[0])), "_attn"
    eager = getattr(place, attribute)

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        values.append(value)
        return eager(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(place, attribute, recording)
    handles = []
    for layer in layers:
        handles.append(attention_of(layer).register_forward_hook(lambda m, a, out: outs.append(out[0])))
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    return [Explicit(name, *parts) for parts in zip(layers, attentions, streams, values, outs, strict=True)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_rollouts_are_those_of_explicit_contributions(name, padding, monkeypatch):
    model = made(name)
    ids, mask = batch(padding)
    lengths = mask.sum(1).tolist()
    start = torch.tensor([LENGTH - n if padding == "left" else 0 for n in lengths])
    response = Response(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], start=start)
    taken = {}
    with torch.no_grad():
        bare = model(ids, attention_mask=mask).logits
        for source in ("rollout", "signed_rollout"):
            with AttentionTap(model, source=source) as tap:
                assert torch.equal(model(ids, attention_mask=mask).logits, bare)
            taken[source] = tap.take()
    got = attnshape.attention_rollout(taken["rollout"], response)
    signed = credit.signed_rollout(taken["signed_rollout"], response)
    explicit = explicit_layers(name, model, monkeypatch, input_ids=ids, attention_mask=mask)
    assert len(explicit) == len(taken["rollout"]) == 2
    for layer, inputs in zip(explicit, taken["rollout"], strict=True):
        seen = mask.bool()
        expected = layer.moved.norm(dim=-1).transpose(1, 2)
        assert_close(inputs.value_norm.transpose(1, 2)[seen], expected[seen])
        expected = layer.stream.norm(dim=-1) / layer.factor
        assert_close(inputs.residual_norm[seen], expected[seen])
    for b, n in enumerate(lengths):
        first = int(start[b])
        for rollout, step in ((got, Explicit.norm_weighted), (signed, Explicit.signed)):
            r = torch.zeros(LENGTH, dtype=torch.float64)
            r[first + n - 1] = 1
            for layer in reversed(explicit):
                r = step(layer, r, b)
            assert_close(rollout[b, :n], r[first : first + n])
            assert_close(rollout[b].sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_packed_sequences_are_rolled_out_as_if_alone(name, source):
    model = made(name, head=False)
    lengths = [5, 3, 9]
    ids = torch.randint(3, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    roll = attnshape.attention_rollout if source == "rollout" else credit.signed_rollout
    with torch.no_grad(), AttentionTap(model, source=source) as tap:
        model(ids, position_ids=positions, use_cache=False)
        packed = tap.take()
        inside = torch.arange(9) < torch.tensor(lengths)[:, None]
        together = roll(packed, Response(inside, start=torch.zeros(3, dtype=torch.int32)))
        for b, sequence in enumerate(ids.split(lengths, dim=1)):
            model(sequence)
            response = Response(torch.ones_like(sequence), start=torch.zeros(1, dtype=torch.int32))
            alone = roll(tap.take(), response)
            torch.testing.assert_close(together[b, : lengths[b]], alone[0])


def test_the_row_that_is_rolled_out_is_the_one_asked_for():
    model = made("llama")
    ids, mask = batch("none")
    position = torch.tensor([13, 6, 3])
    start = torch.zeros(3, dtype=torch.int32)
    with torch.no_grad(), AttentionTap(model, source="rollout", query_position=position) as tap:
        model(ids, attention_mask=mask)
        layers = tap.take()
        got = attnshape.attention_rollout(layers, Response(mask, start=start))
        tap.query_position = "last_response"
        model(ids, attention_mask=mask)
        response = Response(torch.arange(LENGTH) <= position[:, None], start=start)
        resolved = attnshape.attention_rollout(tap.take(), response)
    assert all(layer.query.shape == (3, HEADS, LENGTH, 8) for layer in layers)
    torch.testing.assert_close(resolved, got)
    for b, p in enumerate(position.tolist()):
        assert got[b, p] > 0
        assert (got[b, p + 1 :] == 0).all()


def test_projection_inside_an_adapter():
    plain, adapted = made("llama"), made("llama")
    ids, mask = batch("left")
    start = torch.zeros(3, dtype=torch.int32)
    for kind, model in (("merged", plain), ("adapter", adapted)):
        for layer in layers_of(model):
            attention = layer.self_attn
            torch.manual_seed(0)
            lora = Lora(attention.o_proj)
            nn.init.normal_(lora.up.weight)
            if kind == "adapter":
                attention.o_proj = lora
            else:
                attention.o_proj.weight.data += lora.up.weight.data @ lora.down.weight.data
    rolled = []
    for model in (plain, adapted):
        with torch.no_grad(), AttentionTap(model, source="rollout") as tap:
            model(ids, attention_mask=mask)
        rolled.append(attnshape.attention_rollout(tap.take(), Response(mask, start=start)))
    torch.testing.assert_close(*rolled)


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_heads_that_are_changed_before_the_projection_are_refused(source):
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**SIZE)).eval()
    ids, mask = batch("none")
    with torch.no_grad(), AttentionTap(model, source=source) as tap:
        bare = model(ids, attention_mask=mask).logits
        with pytest.raises(ValueError, match=r"BitNetAttention does not pass on.*source='attention'"):
            tap.take()
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, bare)


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_no_square_matrix(source, monkeypatch):
    monkeypatch.setattr("attnshape.vectorized.attention.SCORE_ELEMENTS", 1)  # one query at a time
    model = build("llama", max_position_embeddings=600)
    roll = attnshape.attention_rollout if source == "rollout" else credit.signed_rollout
    largest = []
    for length in (256, 512):
        ids = torch.randint(3, 60, (1, length))
        response = Response(torch.ones_like(ids), start=torch.zeros(1, dtype=torch.int32))
        with torch.no_grad(), AttentionTap(model, source=source) as tap, Largest() as mode:
            model(ids)
            roll.__wrapped__(tap.take(), response)
        largest.append(mode.numel)
    assert largest[1] <= 2 * largest[0]


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_autocast_rounds_the_forward_alone(source):
    model = build("llama")
    ids, mask = batch("left")
    start = torch.zeros(3, dtype=torch.int32)
    roll = attnshape.attention_rollout if source == "rollout" else credit.signed_rollout
    rolled = []
    for enabled in (False, True):
        with torch.no_grad(), AttentionTap(model, source=source) as tap:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(ids, attention_mask=mask)
            taken = tap.take()
        measured = [x.value_norm if source == "rollout" else x.pull for x in taken]
        assert all(x.dtype == torch.float32 for x in measured)
        rolled.append(roll(taken, Response(mask, start=start)))
    torch.testing.assert_close(*rolled, rtol=0.1, atol=0.02)


def scaled_residual(factor: Any, side_by_side: bool) -> Any:
    """A decoder layer's forward that puts a factor on what its attention adds, in code alone."""

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **options)
        if side_by_side:
            return hidden_states + factor * attended + 0.5 * self.mlp(normed)
        stream = hidden_states + factor * attended
        return stream + self.mlp(self.post_attention_layernorm(stream))

    return forward


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_that_only_the_code_knows(monkeypatch, side_by_side, dtype):
    ids, mask = batch("left")
    response = Response(mask, start=torch.zeros(3, dtype=torch.int32))
    rolled = []
    for in_code in (False, True):
        model = build("llama").to(dtype)
        layer = type(model.model.layers[0])
        monkeypatch.setattr(layer, "forward", scaled_residual(0.25 if in_code else 1.0, side_by_side))
        if not in_code:
            for each in model.model.layers:
                each.self_attn.o_proj.weight.data *= 0.25
        for source, of in (
            ("rollout", attnshape.attention_rollout),
            ("signed_rollout", credit.signed_rollout),
        ):
            with torch.no_grad(), AttentionTap(model, source=source) as tap:
                model(ids, attention_mask=mask)
            rolled.append(of(tap.take(), response))
    bound = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-3}
    torch.testing.assert_close(rolled[2:], rolled[:2], **bound)


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_a_factor_of_its_own_for_every_channel_is_refused(monkeypatch, source, side_by_side):
    model = build("llama")
    factor = torch.linspace(0.5, 1.5, 32)
    monkeypatch.setattr(type(model.model.layers[0]), "forward", scaled_residual(factor, side_by_side))
    ids, mask = batch("left")
    with torch.no_grad(), AttentionTap(model, source=source) as tap:
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="LlamaAttention is part of a layer that adds something else"):
        tap.take()


def test_what_is_not_finite_in_padding_does_not_hide_a_factor():
    ids, mask = batch("left")
    model = made("granite")
    response = Response(mask, start=torch.zeros(3, dtype=torch.int32))
    rolled = []
    with torch.no_grad(), AttentionTap(model, source="rollout") as tap:
        for value in (0.0, torch.nan):
            model(ids, attention_mask=mask)
            tap.take()
            handle = model.model.embed_tokens.register_forward_hook(
                lambda m, args, out, value=value: out.masked_fill((mask == 0)[..., None], value)
            )
            model(ids, attention_mask=mask)
            rolled.append(attnshape.attention_rollout(tap.take(), response))
            handle.remove()
    torch.testing.assert_close(rolled[1][0], rolled[0][0])


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
def test_a_massive_activation_is_no_measure_of_other_tokens(source):
    """The first token of large decoders is hundreds of times as long as others, and is rounded so."""
    ids, mask = batch("none")
    ids[:, 0] = 1
    response = Response(mask[:, 1:], start=torch.ones(3, dtype=torch.int32))
    roll = attnshape.attention_rollout if source == "rollout" else credit.signed_rollout
    rolled = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama")
        with torch.no_grad():
            embeddings = model.model.embed_tokens.weight
            embeddings /= embeddings.norm(dim=-1, keepdim=True)
            embeddings[1] *= 300
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= 0.1
            with AttentionTap(model.to(dtype), source=source) as tap:
                model(ids, attention_mask=mask)
        rolled.append(roll(tap.take(), response))
    torch.testing.assert_close(*rolled, rtol=0.1, atol=0.02)
