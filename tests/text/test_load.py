"""Checkpoints as they are found: their scores are those of the model that saved them, or they are refused."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reward_models import LIMIT, save, tokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from attnshape.tap import AttentionTap
from attnshape.text.load import (
    RewardModelConfig,
    check_device,
    load_reading,
    load_reward_model,
    load_tokenizer,
    parse_query_position,
)
from attnshape.text.model import CreditModel
from attnshape.text.reader import Reader

IDS = torch.tensor([[5, 60, 7, 80, 9]])
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "max_position_embeddings": LIMIT,
}


def edited(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The checkpoint with more tensors, and other entries of its configuration."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights | (tensors or {}), folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    for name in without:
        settings.pop(name, None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def scored(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def loaded(folder: Path, **options: Any) -> Tensor:
    model, _ = load_reward_model(str(folder), "cpu", **options)
    assert not model.training
    return scored(model)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", "llama")


@pytest.fixture
def expected(llama: Path) -> Tensor:
    return scored(LlamaForSequenceClassification.from_pretrained(llama).eval())


def test_a_heads_bias_is_used(llama: Path, expected: Tensor) -> None:
    edited(llama, {"score.bias": torch.tensor([3.0])})
    torch.testing.assert_close(loaded(llama), expected + 3)
    model, _ = load_reward_model(str(llama), "cpu")
    with AttentionTap(model) as tap:  # it is the same class to the tap
        scored(model)
    assert tap.take().query.shape == (1, 4, 4)


def test_a_token_classifiers_head_is_read_at_the_last_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForTokenClassification(LlamaConfig(**SHAPE, num_labels=1)).eval()
    with torch.no_grad():
        model.score.bias.fill_(2.0)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tmp_path), scored(model)[:, -1])


LABELS = ("num_labels", "id2label", "label2id")


@pytest.mark.parametrize("bias", [False, True])
def test_the_number_of_labels_is_the_heads(llama: Path, expected: Tensor, bias: bool) -> None:
    edited(llama, {"score.bias": torch.tensor([3.0])} if bias else {}, without=LABELS)
    torch.testing.assert_close(loaded(llama), expected + 3 * bias)
    model, _ = load_reward_model(str(llama), "cpu")
    assert model.config.num_labels == 1


@pytest.mark.parametrize("file", ["pytorch_model.bin", "shards"])
def test_other_files_hold_the_same(llama: Path, expected: Tensor, file: str) -> None:
    edited(llama, {"score.bias": torch.tensor([3.0])})
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    if file == "shards":
        parts = [dict(list(weights.items())[i::2]) for i in (0, 1)]
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, llama / name, metadata={"format": "pt"})
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (llama / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
        )
    else:
        torch.save(weights, llama / file)
    torch.testing.assert_close(loaded(llama), expected + 3)


HARMLESS: dict[str, dict[str, Tensor]] = {
    "the language model's head": {"lm_head.weight": torch.ones(320, 16)},
    "of every layer's rotation": {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)
    },
    "of the model's rotation": {"model.rotary_emb.inv_freq": torch.ones(2)},
    "another head of the family": {"qa_outputs.weight": torch.ones(2, 16), "qa_outputs.bias": torch.ones(2)},
    "a mask": {"model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
    "a hidden score": {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e9)},
}


@pytest.mark.parametrize("tensors", HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_part_of_the_score_is_let_be(
    llama: Path, expected: Tensor, tensors: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(loaded(edited(llama, tensors)), expected)


LOST = {
    "statistics": ["mean", "std"],
    "statistics of one number": ["reward_mean"],
    "a gate": ["gate.weight"],
    "more of the head": ["score.0.weight"],
    "a scale of the head": ["score.weight_scale"],
    "a norm before the head": ["score_norm.weight"],
    "a value head": ["v_head.summary.weight", "v_head.summary.bias"],
    "biases of the base": ["model.layers.0.self_attn.q_proj.bias"],
    "a bias of a norm": ["model.norm.bias"],
    "another layer": ["model.layers.2.mlp.up_proj.weight"],
    "an adapter in the layers": ["model.layers.0.self_attn.q_proj.lora_A.weight"],
    "a bias of another width": ["score.bias"],
    "a learned number": ["model.layers.0.self_attn.temperature"],
}


@pytest.mark.parametrize("names", LOST.values(), ids=LOST)
def test_what_would_be_lost_is_named(llama: Path, names: list[str]) -> None:
    shapes = {"reward_mean": (), "model.layers.0.self_attn.temperature": ()}
    edited(llama, {name: torch.ones(shapes.get(name, (16,))) for name in names})
    with pytest.raises(ValueError) as caught:
        loaded(llama)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{llama}")
    assert all(name in line for name in names)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "other labels": (
        lambda f: edited(f, config={"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}),
        r"score.weight is \[1, 16\] in the checkpoint and \[2, 16\] in the LlamaForSequenceClassification",
    ),
    "another width": (
        lambda f: edited(f, config={"hidden_size": 32}),
        r"is \[.*16.*\] in the checkpoint and",
    ),
    "too few layers": (lambda f: edited(f, config={"num_hidden_layers": 1}), "no place for.* and 5 more"),
    "too many layers": (lambda f: edited(f, config={"num_hidden_layers": 3}), "it lacks .* and 5 more"),
    "saved by another class": (
        lambda f: edited(f, config={"architectures": ["RewardModel"]}),
        "was saved by RewardModel, which transformers does not have",
    ),
    "code of its own": (
        lambda f: edited(f, config={"auto_map": {"AutoModelForSequenceClassification": "modeling.Gated"}}),
        r"code of its own \(modeling.Gated\); want --trust-remote-code",
    ),
    "a base class of its own": (
        lambda f: edited(f, config={"architectures": ["Gated"], "auto_map": {"AutoModel": "modeling.Gated"}}),
        r"code of its own \(modeling.Gated\); want --trust-remote-code",
    ),
    "unknown kind": (lambda f: edited(f, config={"model_type": "foo"}), "model type `foo`"),
    "no classifier of its kind": (
        lambda f: edited(f, config={"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
        "transformers has no sequence classifier of model_type 'mamba'",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*model.safetensors"),
    "a pointer to weights": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "cannot be loaded",
    ),
    "half of the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-50]),
        "cannot be loaded",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "it holds no config.json"),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "has no tokenizer that can be loaded",
    ),
    "an adapter beside it": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}'),
        "holds a model and an adapter of one",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_loaded_is_one_sentence(
    llama: Path, change: Callable[[Path], object], message: str
) -> None:
    change(llama)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(llama)
    assert len(str(caught.value).splitlines()) == 1
    assert str(llama) in str(caught.value)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: it lacks score\.weight"):
        loaded(save(tmp_path, "causal"))


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing", "~/nothing", "a b"])
def test_a_folder_that_is_not_there(name: str) -> None:
    for load in (load_tokenizer, load_reading, lambda name: load_reward_model(name, "cpu")):
        with pytest.raises(ValueError, match=f"^{name}: there is no such folder$"):
            load(name)


def test_a_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="owner/name is no folder, and no model of the hub that can be had"):
        load_reading("owner/name")


@pytest.mark.parametrize("pad", [-1, 320, 10**9])
def test_a_padding_token_outside_the_vocabulary(llama: Path, pad: int) -> None:
    """The head then takes the last token, in a batch of unequal lengths as alone."""
    alone = LlamaForSequenceClassification.from_pretrained(llama, pad_token_id=None).eval()
    edited(llama, config={"pad_token_id": pad})
    model, tok = load_reward_model(str(llama), "cpu")
    _, config, _ = load_reading(str(llama))
    assert model.config.pad_token_id is config.pad_token_id is None
    reader = Reader(tok, model.config)
    texts = ["great", "It was great, not bad at all!", "awful<pad>", "<s>", "plot<|im_end|>"]
    examples = [reader.read("", text) for text in texts]
    together = CreditModel(model, tok).score(examples)
    for example, found in zip(examples, together, strict=True):
        want = scored(alone, torch.tensor([example.input_ids])).item()
        assert found.score == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert model.config.pad_token_id is None


def test_a_token_that_the_model_has_no_embedding_for(llama: Path) -> None:
    tok = tokenizer()
    tok.add_tokens([f"<{i}>" for i in range(len(tok), 321)])
    model, _ = load_reward_model(str(llama), "cpu")
    with pytest.raises(ValueError, match="token '<320>' is 320, the model has embeddings for 320"):
        Reader(tok, model.config).read("", "It was <320>")


def test_positions_that_are_kept_for_padding_are_not_a_texts(tmp_path: Path) -> None:
    """RoBERTa and its kin count positions from behind their padding token's."""
    torch.manual_seed(0)
    config = RobertaConfig(**SHAPE, pad_token_id=1, num_labels=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = CreditModel(str(tmp_path))
    reader, (tok, reading, most) = model.reader(), load_reading(str(tmp_path))
    assert reader.max_length == most == LIMIT - 2
    longest = reader.read("", "\n" * (LIMIT - 3))
    assert len(longest.input_ids) == LIMIT - 2
    assert model.score([longest])[0].finite
    for other in (reader, Reader(tok, reading, most)):
        with pytest.raises(ValueError, match=f"{LIMIT - 1} tokens are more than the {LIMIT - 2}"):
            other.read("", "\n" * (LIMIT - 2))
    assert model.reader(9).max_length == 9


def test_other_models_have_all_their_positions(llama: Path) -> None:
    assert load_reading(str(llama))[2] is None
    assert CreditModel(str(llama)).reader().max_length == LIMIT


def test_an_unused_pooler_is_no_part_of_the_score(tmp_path: Path) -> None:
    """Of a family whose base model has one: a masked language model's and pretraining's heads too."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    edited(
        tmp_path, {"cls.predictions.bias": torch.ones(320), "cls.seq_relationship.weight": torch.ones(2, 16)}
    )
    torch.testing.assert_close(loaded(tmp_path), scored(model))
    edited(tmp_path, {"classifier.gate": torch.ones(1)})
    with pytest.raises(ValueError, match=r"classifier\.gate"):
        loaded(tmp_path)


OWN = '''
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class Gated(LlamaPreTrainedModel):
    """Reads the last token but one, and squashes the score."""
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.gate = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        last = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(1) - 2
        rows = torch.arange(len(input_ids))
        return SequenceClassifierOutput(logits=torch.tanh(self.gate(hidden[rows, last])))
'''


@pytest.fixture(params=["AutoModelForSequenceClassification", "AutoModel"])
def own(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = save(tmp_path / f"own{len(request.param)}", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["gate.weight"] = weights.pop("score.weight") / 100
    weights["gate.bias"] = torch.tensor([0.25])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edited(folder, config={"architectures": ["Gated"], "auto_map": {request.param: "modeling_own.Gated"}})
    (folder / "modeling_own.py").write_text(OWN)
    return folder


def test_code_of_its_own_is_run_where_it_is_trusted(own: Path) -> None:
    with pytest.raises(ValueError, match="want --trust-remote-code"):
        load_reading(str(own))
    config = RewardModelConfig(model=str(own), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"which token Gated scores is in its own code.*--query-position"):
        CreditModel.load(config, "cpu")
    model = CreditModel.load(
        RewardModelConfig(model=str(own), trust_remote_code=True, query_position=-2), "cpu"
    )
    model.probe()
    examples = [model.reader().read("How was it? ", text) for text in ("It was great", "not bad at all!")]
    eager, _ = load_reward_model(str(own), "cpu", trust_remote_code=True)
    eager.set_attn_implementation("eager")
    for example, found in zip(examples, model.score(examples), strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            attentions = eager.model(ids, output_attentions=True).attentions
        row = attentions[-1][0, :, -2].double().mean(0)[example.positions]
        assert found.score == pytest.approx(scored(eager, ids).item(), abs=1e-5)
        assert found.credit == pytest.approx((row / row.sum()).tolist(), rel=1e-4, abs=1e-6)


def test_positions_that_are_told(llama: Path) -> None:
    """Of the model's own head, whose token is the last."""

    def credit(position: Any) -> list[float]:
        model = CreditModel.load(RewardModelConfig(model=str(llama), query_position=position), "cpu")
        examples = [model.reader().read("How was it? ", text) for text in ("great", "not bad at all!")]
        return [c for found in model.score(examples) for c in found.credit]

    pooled = credit("pooled")
    for position in ("last_visible", "last_response", -1):
        assert credit(position) == pytest.approx(pooled, rel=1e-5)
    assert credit(-2) != pytest.approx(pooled, rel=1e-2)
    with pytest.raises(ValueError, match="query_position: got 40 for a text of"):
        credit(40)
    assert [parse_query_position(text) for text in ("pooled", "last_response", "0", "-3")] == [
        "pooled",
        "last_response",
        0,
        -3,
    ]
    with pytest.raises(ValueError, match="query_position: got 'first', want pooled, last_visible"):
        parse_query_position("first")


@pytest.mark.parametrize("device", ["foo", "meta", "", "cuda:-1", "cpu:x"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(ValueError, match=f"^device: got '{device}', want cpu, cuda") as caught:
        check_device(device)
    assert "\n" not in str(caught.value)


def write_adapter(folder: Path, base: Path) -> None:
    """By its files alone, as a folder is where peft is not installed."""
    folder.mkdir()
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_an_adapter_without_peft(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "peft" else find(name))
    write_adapter(llama.parent / "adapter", llama)
    with pytest.raises(ValueError, match=f"is an adapter of {llama}: want peft .*merge_and_unload"):
        loaded(llama.parent / "adapter")


@pytest.fixture
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("kind", ["causal", "llama"])
def test_an_adapter_is_put_on_its_base_model(tmp_path: Path, peft: Any, kind: str) -> None:
    """Of a language model, to which it brings the head, or of a reward model."""
    base, folder = save(tmp_path / "base", kind), tmp_path / "adapter"
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    want = scored(adapted.eval())
    with adapted.disable_adapter():
        assert not torch.allclose(want, scored(adapted))
    assert not torch.allclose(
        want,
        scored(
            model.base_model.model
            if kind == "x"
            else LlamaForSequenceClassification.from_pretrained(base, num_labels=1).eval()
        ),
    )
    torch.testing.assert_close(loaded(folder), want)
    found, tok = load_reward_model(str(folder), "cpu")
    with AttentionTap(found) as tap:
        scored(found)
    assert tap.take().query.shape == (1, 4, 4)
    assert tok.vocab_size == tokenizer().vocab_size  # the base model's
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.gate.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no place for its base_model\.model\.gate\.weight"):
        loaded(folder)
    some = {key: tensor for key, tensor in weights.items() if "layers.1" not in key}
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is no reward model: it lacks"):
        loaded(folder)
