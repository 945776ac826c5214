"""The calls of the README and of the documentation run as they stand there."""

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

import attnshape
from attnshape.serve.protocol import Completion

ROOT = Path(__file__).parents[1]
PAGES = ("quickstart", "groups", "serving", "frameworks/presets", "frameworks/trl")
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
]
B, S, R = 4, 12, 5


def block(words: str) -> str:
    """The one block that holds these words."""
    [found] = [text for text in BLOCKS if words in text]
    return found


@pytest.fixture
def names() -> dict[str, Any]:
    """What the pages leave to the reader: a reward model and a batch."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0
    )
    ids, mask = torch.randint(1, 50, (B, S)), torch.ones(B, S, dtype=torch.long)
    response_mask = torch.ones(B, R, dtype=torch.long)
    start = torch.full((B,), S - R)
    halves = [
        SimpleNamespace(
            input_ids=ids[half],
            attention_mask=mask[half],
            response_mask=response_mask[half],
            start=start[half],
        )
        for half in (slice(0, 2), slice(2, 4))
    ]
    return {
        "attnshape": attnshape,
        "torch": torch,
        "reward_model": GPT2ForSequenceClassification(config).eval(),
        "input_ids": ids,
        "mask": mask,
        "response_mask": response_mask,
        "response_start": start,
        "micro_batches": halves,
        "values": torch.randn(B, R),
        "logprobs": -torch.rand(B, R),
        "ref_logprobs": -torch.rand(B, R),
    }


def test_the_first_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    code, printed = example
    assert len(code.splitlines()) <= 15
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_the_readme_is_a_first_screen() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 950


def test_both_shapes_of_loop_agree(names: dict[str, Any]) -> None:
    exec(block("# a Hugging Face reward model"), names)
    credit, score = names["out"].credit, names["score"]
    assert names["out"].rewards.shape == (B, R)
    assert credit[:, :-1].sum() > 0
    exec(block("# where the trainer is"), names)
    torch.testing.assert_close(names["score"], score)
    torch.testing.assert_close(names["out"].credit, credit)
    torch.testing.assert_close(names["out"].rewards.sum(1), score)
    torch.testing.assert_close(names["advantages"].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_credit_of_another_tokenizer(names: dict[str, Any]) -> None:
    vocabulary = ["<pad>", "<s>", "good", "plot", "but", "slow", "user", "assistant"]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    by_letter = Tokenizer(models.BPE({letter: i for i, letter in enumerate("godpltbuswĠ")}, []))
    by_letter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_letter.decoder = decoders.ByteLevel()
    reward_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word, bos_token="<s>", pad_token="<pad>", padding_side="right"
    )
    policy_tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_letter)
    # As Llama 3's and Gemma's, it adds a token; here it comes out of the template too, with an instruction.
    reward_tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %} user good"
    )
    texts = ["good plot", "slow but good"]
    conversations = [
        [{"role": "user", "content": "plot good"}, {"role": "assistant", "content": text}] for text in texts
    ]
    responses = [policy_tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, responses))
    names |= {
        "conversations": conversations,
        "response_ids": responses,
        "reward_tokenizer": reward_tokenizer,
        "policy_tokenizer": policy_tokenizer,
    }
    names["response_mask"] = torch.tensor([[i < len(ids) for i in range(width)] for ids in responses])
    exec(block("# [B, S], on the reward model"), names)
    torch.testing.assert_close(names["out"].rewards.sum(1), names["score"])
    # Letters of one word share that word's credit equally: "good" of the first response, at its place.
    ids = names["alignment"].input_ids
    assert ids[0].tolist()[:7] == reward_tokenizer("user plot good assistant good plot")["input_ids"]
    with torch.no_grad():
        eager = names["reward_model"]
        eager.set_attn_implementation("eager")
        row = eager(ids[:1], attention_mask=names["alignment"].attention_mask[:1], output_attentions=True)
    last = int(names["alignment"].attention_mask[0].sum()) - 1
    weights = row.attentions[-1][0, :, last, 5:7].mean(0)
    word = weights[0] / weights.sum()
    torch.testing.assert_close(names["out"].credit[0, :4], (word / 4).expand(4))


def test_a_framework_s_numbers(names: dict[str, Any]) -> None:
    names |= {"score": torch.randn(B), "credit": torch.rand(B, R)}
    exec(block("ShapingConfig.verl("), names)
    kl = 0.001 * (names["logprobs"] - names["ref_logprobs"])
    torch.testing.assert_close(names["out"].rewards.sum(1), names["score"] - kl.sum(1))
    torch.testing.assert_close(names["advantages"].std(), torch.tensor(1.0))


def test_groups_without_a_critic(names: dict[str, Any]) -> None:
    names |= {"score": torch.tensor([1.0, 0.0, 0.5, 0.5]), "credit": torch.rand(B, R)}
    exec(block("shaped.completion"), names)
    a = 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(names["shaped"].completion, torch.tensor([a, -a, 0.0, 0.0]))
    torch.testing.assert_close(names["shaped"].advantages.mean(1), names["shaped"].completion)


def test_scores_over_http(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    reply = SimpleNamespace(json=dict, raise_for_status=lambda: None)
    session = SimpleNamespace(
        mount=lambda *_: None, post=lambda *at, **what: asked.append((at, what)) or reply
    )
    adapters = SimpleNamespace(HTTPAdapter=lambda **_: None)
    requests = SimpleNamespace(Session=lambda: session, adapters=adapters)
    monkeypatch.setitem(sys.modules, "requests", requests)
    monkeypatch.setitem(sys.modules, "urllib3.util", SimpleNamespace(Retry=lambda *_, **__: None))
    words = Tokenizer(models.WordLevel({"good": 0, "plot": 1}, unk_token="good"))
    words.decoder = decoders.Fuse()
    names |= {
        "policy_tokenizer": PreTrainedTokenizerFast(tokenizer_object=words),
        "response_ids": [0, 1],
        "prompt": "how was it?",
    }
    exec(block("decoded_spans("), names)
    [(at, what)] = asked
    assert at == ("http://127.0.0.1:8000/score",)
    assert Completion.model_validate_json(json.dumps(what["json"])).offsets == [(0, 4), (4, 8)]


def test_several_reward_models_and_a_rule(names: dict[str, Any]) -> None:
    names |= {name: torch.randn(B) for name in ("score", "second_score", "rule_reward")}
    names |= {name: torch.rand(B, R) for name in ("credit", "second_credit")}
    exec(block("# a second reward model"), names)
    dense = 0.8 * (
        names["score"][:, None] * names["credit"] / names["credit"].sum(1, True)
        + 0.3 * names["second_score"][:, None] * names["second_credit"] / names["second_credit"].sum(1, True)
    )
    dense[:, -1] += 0.2 * (names["score"] + 0.3 * names["second_score"]) + names["rule_reward"]
    kl = names["logprobs"] - names["ref_logprobs"]
    torch.testing.assert_close(names["out"].rewards, dense - 0.05 * kl)


def test_credit_for_trl(names: dict[str, Any]) -> None:
    test_credit_of_another_tokenizer(names)
    given: list[Any] = []
    names |= {
        "tokenizer": names["policy_tokenizer"],
        "queries": [torch.ones(1, dtype=torch.long)] * 2,
        "responses": [torch.tensor(ids) for ids in names["response_ids"]],
        "trainer": SimpleNamespace(step=lambda *rest, credits: given.extend([*rest, credits])),
    }
    exec(block("credits = alignment("), names)
    torch.testing.assert_close(torch.stack(given[2]), names["score"])
    torch.testing.assert_close(given[3], names["out"].credit)


def test_every_block_of_the_pages_is_python() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            compile(code, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in ROOT.rglob("*.md"):
        if ".venv" in page.parts or any(part.startswith(".") for part in page.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
