"""What a worker's process says through its pipe, here in a thread of this one."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reward_models import save, tokenizer
from transformers import AutoConfig

import attnshape
from attnshape.serve.process import Job, work
from attnshape.text import model as text_model
from attnshape.text.load import RewardModelConfig, load_reward_model
from attnshape.text.model import CreditModel, Scored
from attnshape.text.reader import Example, Reader
from attnshape.text.score_fn import parse_score_fn

PATIENCE = 180.0


@pytest.fixture(autouse=True)
def ignored(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """The signals that a worker ignores; they and its number of threads are not this process's."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return handlers


@contextmanager
def working(model: Path, score_fn: str = "logit", device: str = "cpu", **source: Any) -> Iterator[Connection]:
    ours, pipe = multiprocessing.Pipe()
    config = RewardModelConfig(model=str(model), score_fn=parse_score_fn(score_fn), **source)
    job = Job(config, device, 1)
    thread = threading.Thread(target=work, args=(job, pipe), daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    pipe.close()


def answer(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE)
    return pipe.recv()


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("causal", {}, "cpu: .* is no reward model: it lacks score.weight"),
        ("two_labels", {}, "cpu: score_fn: the model has 2 labels"),
        ("llama", {"layer": 7}, "cpu: layer"),
        ("llama", {"source": "rollout", "layer": 0}, "cpu: layer: got 0, want none for source='rollout'"),
        ("llama", {"device": "meta"}, "meta: device: got 'meta'"),
    ],
)
def test_it_says_what_is_wrong_and_ends(
    tmp_path: Path, kind: str, wrong: dict[str, Any], message: str
) -> None:
    with working(save(tmp_path, kind), **wrong) as pipe:
        assert re.match(message, answer(pipe))


@pytest.mark.parametrize("change", ["written", "linked"])
def test_a_worker_that_is_started_again_has_the_servers_model(tmp_path: Path, change: str) -> None:
    """Otherwise a newer checkpoint would answer beside the one that other workers hold."""
    old, new, latest = tmp_path / "old", tmp_path / "new", tmp_path / "latest"
    save(old, "llama")
    latest.symlink_to(old)
    ours, pipe = multiprocessing.Pipe()
    job = Job(RewardModelConfig(model=str(latest)), "cpu", 1)
    if change == "linked":
        save(new, "llama")
        latest.unlink()
        latest.symlink_to(new)
    else:
        (old / "config.json").write_text((old / "config.json").read_text() + "\n")
    work(job, pipe)
    assert answer(ours) == f"cpu: {latest} has changed since the server started; start the server anew"


def offline(folder: Path, example: Example) -> tuple[float, torch.Tensor]:
    """Score and credit on the reward model's tokens, of a batch of one."""
    model, _ = load_reward_model(str(folder), "cpu")
    with torch.no_grad(), attnshape.AttentionTap(model) as tap:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits
    index = torch.tensor([example.positions])
    response = attnshape.Response(torch.ones_like(index), index=index)
    credit = attnshape.attention_credit(tap.take(), response)
    return logits.item(), credit[0]


def test_it_scores_until_its_pipe_is_closed(tmp_path: Path, ignored: dict[int, Any]) -> None:
    folder = save(tmp_path, "llama")
    reader = Reader(tokenizer(), AutoConfig.from_pretrained(folder))
    examples = [reader.read("How was it? ", response) for response in ("great", "not bad at all!")]
    with working(folder) as pipe:
        assert answer(pipe) is None
        for batch in (examples, examples[:1]):
            pipe.send(batch)
            for example, scored in zip(batch, answer(pipe), strict=True):
                score, credit = offline(folder, example)
                assert scored.score == pytest.approx(score, rel=1e-4)
                assert scored.credit == pytest.approx(credit.tolist(), rel=1e-4, abs=1e-7)
    assert ignored == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


def test_a_source_with_signs_gives_token_rewards(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    reader = Reader(tokenizer(), AutoConfig.from_pretrained(folder))
    example = reader.read("How was it? ", "not bad at all!")
    model, _ = load_reward_model(str(folder), "cpu")
    index = torch.tensor([example.positions])
    response = attnshape.Response(torch.ones_like(index), index=index)
    with torch.enable_grad(), attnshape.AttentionTap(model, source="gradient_value") as tap:
        score = model(input_ids=torch.tensor([example.input_ids])).logits[:, 0]
    weights = attnshape.credit.gradient_weights(score, tap.take(), response)
    expected = attnshape.credit.centered(weights, response)[0]
    with working(folder, source="gradient_value") as pipe:
        assert answer(pipe) is None
        pipe.send([example])
        (scored,) = answer(pipe)
    assert scored.credit is None
    assert scored.token_rewards == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)


def test_a_batch_that_does_not_fit_the_memory_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "llama")
    model, tok = load_reward_model(str(folder), "cpu")
    examples = [Reader(tok, model.config).read("How was it? ", response) for response in ("great", "not bad")]
    sizes: list[int] = []

    def fits_one(head: Any, arguments: tuple[torch.Tensor]) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("too much")

    model.score.register_forward_pre_hook(fits_one)  # after the attention that is tapped
    monkeypatch.setattr(text_model, "load_reward_model", lambda *_, **__: (model, tok))
    with working(folder) as pipe:
        assert answer(pipe) is None
        pipe.send(examples)
        scores = [scored.score for scored in answer(pipe)]
    assert scores == pytest.approx([offline(folder, example)[0] for example in examples], rel=1e-4)
    assert sizes == [1, 2, 1, 1]


@pytest.fixture
def credit_model(tmp_path: Path) -> CreditModel:
    return CreditModel.load(RewardModelConfig(model=str(save(tmp_path, "llama"))), "cpu")


def of_tokens(*lengths: int) -> list[Example]:
    return [Example("", "", [0] * length, [], []) for length in lengths]


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("too much"), "out of memory: too much"), (ValueError("no"), "no")],
)
def test_only_what_cannot_be_scored_alone_has_no_answer(
    credit_model: CreditModel, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    seen: list[int] = []

    def score(self: CreditModel, examples: Sequence[Example]) -> list[Scored]:
        seen.append(len(examples))
        if sum(len(example.input_ids) for example in examples) > 4:
            raise error
        return [Scored(float(len(example.input_ids)), [1.0], {}) for example in examples]

    monkeypatch.setattr(CreditModel, "score", score)
    answers = credit_model.score_each(of_tokens(1, 2, 3, 9, 2))
    assert [a if isinstance(a, str) else a.score for a in answers] == [1, 2, 3, said, 2]
    assert seen == [5, 2, 3, 1, 2, 1, 1]


def test_a_worker_that_cannot_go_on_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with working(save(tmp_path, "llama")) as pipe:
        assert answer(pipe) is None

        def broken(self: CreditModel, examples: Sequence[Example]) -> list[Scored]:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(CreditModel, "score", broken)
        pipe.send(of_tokens(2))
        assert answer(pipe) == "RuntimeError: CUDA error: device-side assert triggered"
