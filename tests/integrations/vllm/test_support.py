"""What is refused, by name, and when: at the start, and loudly where the plugin was asked for by name."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnshape.integrations import vllm
from attnshape.integrations.vllm import support
from attnshape.integrations.vllm.support import Settings, config_refusal, layer_refusal


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.28.0", None),
        ("0.32.0", None),
        ("0.33.1.dev3+gabc", None),
        ("0.27.1", "vLLM 0.27.1 is not supported, want 0.28 to 0.33"),
        ("0.34.0", "vLLM 0.34.0 is not supported, want 0.28 to 0.33"),
        ("1.0", "vLLM 1.0 is not supported"),
        ("dev", "vLLM dev is not supported"),
        (None, "no vLLM is installed"),
    ],
)
def test_versions(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_installed", lambda: version)
    found = support.version_refusal()
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_another_vllm_ends_the_start_only_where_the_plugin_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(support, "_installed", lambda: "0.34.0")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with caplog.at_level(logging.WARNING):
        vllm.register()
    assert "attnshape gives no attention rows here: vLLM 0.34.0 is not supported" in caplog.text
    monkeypatch.setenv("VLLM_PLUGINS", "other,attnshape")
    with pytest.raises(RuntimeError, match=r"attnshape: vLLM 0\.34\.0 is not supported"):
        vllm.register()


def config(**changes: Any) -> Any:
    parts = {
        "parallel_config": {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1},
        "model_config": {"use_mla": False},
        "cache_config": {"kv_sharing_fast_prefill": False},
    }
    for name, value in changes.items():
        part = next((p for p in parts if name in parts[p]), "parallel_config")
        parts[part][name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()})


@pytest.mark.parametrize(
    ("changes", "pooling", "reason"),
    [
        ({}, "LAST", None),
        ({}, "CLS", "the model pools CLS"),
        ({}, "MEAN", "the model pools MEAN"),
        ({"use_mla": True}, "LAST", "the model's attention is MLA"),
        ({"decode_context_parallel_size": 2}, "LAST", "DCP "),
        ({"prefill_context_parallel_size": 4}, "LAST", "PCP "),
        ({"enable_dbo": True}, "LAST", "DBO "),
        ({"use_ubatching": True}, "LAST", "DBO "),
        ({"kv_sharing_fast_prefill": True}, "LAST", "kv_sharing_fast_prefill "),
    ],
)
def test_configurations(changes: dict[str, Any], pooling: str, reason: str | None) -> None:
    found = config_refusal(config(**changes), pooling)
    assert found is None if reason is None else found is not None and found.startswith(reason)


class Attention(SimpleNamespace):
    """As vLLM's layer of that name."""


class ChunkedLocalAttention(Attention):
    pass


def layer(kind: type = Attention, backend: str = "FLASH_ATTN", **changes: Any) -> Any:
    impl = {"alibi_slopes": None, "isa": None}
    of_impl = {name: changes.pop(name, value) for name, value in impl.items()}
    settings = {
        "kv_cache_dtype": "auto",
        "head_size": 64,
        "head_size_v": 64,
        "dtype": torch.bfloat16,
        "_k_scale": torch.ones(1),
        "_v_scale": torch.ones(1),
        "_q_scale": torch.ones(1),
    }
    named = SimpleNamespace(get_name=lambda: backend)
    return kind(impl=SimpleNamespace(**of_impl), attn_backend=named, **settings | changes)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (layer(), None),
        (layer(kv_cache_dtype="fp8_e5m2"), None),
        (layer(backend="CPU_ATTN", isa="vec"), None),
        (layer(ChunkedLocalAttention), "the last layer is of the class ChunkedLocalAttention"),
        (layer(backend="TURBOQUANT"), "the attention backend is TURBOQUANT"),
        (layer(backend="CPU_ATTN", isa="amx"), "the CPU backend packs keys for AMX"),
        (layer(kv_cache_dtype="nvfp4"), "the cache's dtype is NVFP4"),
        (layer(kv_cache_dtype="int8_per_token_head"), "the cache's dtype is int8_per_token_head"),
        (
            layer(kv_cache_dtype="fp8", _k_scale=torch.ones(8)),
            "keys, values or queries are quantised per head",
        ),
        (layer(alibi_slopes=torch.ones(4)), "the layer has an ALiBi bias"),
        (layer(head_size_v=32), "values are 32 wide and keys 64"),
    ],
)
def test_layers(found: Any, reason: str | None) -> None:
    refusal = layer_refusal(found)
    assert refusal is None if reason is None else refusal is not None and refusal.startswith(reason)


def test_a_cpu_with_amx_is_refused_before_it_has_packed_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    refusal = layer_refusal(layer(backend="CPU_ATTN"))
    assert refusal is not None
    assert "AMX" in refusal
    assert layer_refusal(layer(backend="CPU_ATTN", dtype=torch.float32)) is None


@pytest.mark.parametrize("given", [{}, None, {"attnshape": {}}, {"other": 1}])
def test_settings_that_are_not_given(given: object) -> None:
    assert Settings.of(given) == Settings()


def test_settings() -> None:
    score_fn = Settings.of({"attnshape": {"score_fn": "logit[1] - logit[0]"}}).score_fn
    assert score_fn(torch.tensor([[1.0, 3.0]])).tolist() == [2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "columns"}, "source: got 'columns', but vLLM keeps the keys of one forward"),
        ({"layer": 2}, r"additional_config: got attnshape=\{'layer': 2\}, want an object with"),
        ("attention", "additional_config: got attnshape='attention', want an object with"),
        ({"score_fn": "logit["}, "score_fn"),
    ],
)
def test_settings_that_there_are_none_of(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.of({"attnshape": given})
