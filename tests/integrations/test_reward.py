"""Score and credit per policy token, from a model of this process and from a server."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.toys import Offline, save_policy, save_reward_model

from attnshape.integrations import reward
from attnshape.integrations.reward import ATTEMPTS, Unscored, reward_model, token_rewards
from attnshape.text.model import Scored
from attnshape.text.turns import spans_of

PROMPTS = {
    "messages": [{"role": "user", "content": "Was the film any good?"}],
    "text": "<|im_start|>user\nWas it?<|im_end|>\n<|im_start|>assistant\n",
}
TURNS = [
    ("Let me look that up.<|im_end|>", 1),
    ("\n<|im_start|>tool\nThe search found three reviews<|im_end|>\n<|im_start|>assistant\n", 0),
    ("All of them good!<|im_end|>", 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_reward_model(folder / "reward_model")
    return folder


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    return save_policy(folder / "policy")


@pytest.fixture(scope="module")
def response(policy: Any) -> tuple[list[int], list[int]]:
    """Ids of a response with a tool's turn, and its mask."""
    parts = [(policy(text, add_special_tokens=False)["input_ids"], mask) for text, mask in TURNS]
    return [t for ids, _ in parts for t in ids], [mask for ids, mask in parts for _ in ids]


def ask(judge: Any, *arguments: Any) -> Scored:
    return asyncio.run(judge(*arguments))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_credit_is_that_of_eager_attention(folder: Path, policy: Any, response: Any, prompt: Any) -> None:
    ids, mask = response
    judge = reward_model(model=str(folder / "reward_model"))
    scored = ask(judge, prompt, *spans_of(policy, ids, mask))
    score, credit = Offline(folder / "reward_model", policy)(prompt, ids, mask)
    assert scored.score == pytest.approx(score, rel=1e-5)
    assert scored.credit == pytest.approx(credit.tolist(), rel=1e-4, abs=1e-7)
    assert all(c == 0 for c, m in zip(scored.credit, mask, strict=True) if not m)
    assert judge is reward_model(model=str(folder / "reward_model"))


def test_spans_of_a_tools_tokens_are_empty(policy: Any, response: Any) -> None:
    ids, mask = response
    text, spans = spans_of(policy, ids, mask)
    assert text == policy.decode(ids, skip_special_tokens=True)
    own = "".join(text[s:e] for s, e in spans)
    assert own == "Let me look that up.All of them good!"
    assert len(spans) == len(ids)


def test_a_reward_that_is_not_finite_is_an_error(folder: Path, policy: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    with torch.no_grad():
        model.score.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "reward_model").save_pretrained(tmp_path)
    with pytest.raises(Unscored, match="score or attention is not finite"):
        ask(reward_model(model=str(tmp_path)), "Good? ", "Yes", [(0, 3)])


@pytest.mark.parametrize("settings", [{}, {"url": "http://127.0.0.1:9", "model": "x"}])
def test_one_source_of_rewards(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="want either url or model of the reward model, got url="):
        reward_model(**settings)


def test_token_rewards() -> None:
    credit, mask = [0.5, 0.3, 0.1, 0.1], [1, 1, 0, 1]
    rewards = token_rewards(2.0, credit, mask, dense_share=0.75, terminal_reward=3.0)
    # The masked token's credit is shared by the others.
    expected = [1.5 * 0.5 / 0.9, 1.5 * 0.3 / 0.9, 0.0, 1.5 * 0.1 / 0.9 + 0.5 + 3.0]
    assert rewards.tolist() == pytest.approx(expected, rel=1e-6)
    assert token_rewards(2.0, [0.0] * 4, mask, dense_share=0.75).tolist() == pytest.approx([0, 0, 0, 2.0])
    with pytest.raises(ValueError, match="credit: got 3 weights for a response of 4 tokens"):
        token_rewards(2.0, credit[:3], mask, dense_share=0.75)
    signed = token_rewards(3.0, None, mask, dense_share=0.5, signed=[2.0, -1.0, 0.0, -1.0])
    assert signed.tolist() == pytest.approx([0.5 + 1.0, 0.5 - 0.5, 0.0, 0.5 - 0.5 + 1.5])
    for both in ({}, {"signed": [0.0] * 4}):
        with pytest.raises(ValueError, match="want either credit or signed token rewards"):
            token_rewards(2.0, credit if both else None, mask, dense_share=0.75, **both)


READY = json.dumps({"status": "ready", "workers": []})


class Server:
    """Answers requests with what ``answers`` holds for the path, the last one again and again."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, str]]] = {"/health": [(200, READY)]}
        self.got: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.torn: set[int] = set()
        """Statuses whose bodies end before their length."""
        parent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers = parent.answers[self.path]
                status, body = answers.pop(0) if len(answers) > 1 else answers[0]
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                if status in parent.torn:
                    self.send_header("Content-Length", str(len(body) + 1))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_POST(self) -> None:
                parent.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                parent.keys.append(self.headers["Authorization"])
                assert self.headers["Content-Type"] == "application/json"
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(reward, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    server = Server()
    thread = threading.Thread(target=server.server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()
    server.server.server_close()


ANSWER = json.dumps({"score": 1.5, "credit": [0.25, 0.75], "metrics": {"entropy": 0.5}})


def test_a_served_reward_model(server: Server) -> None:
    server.answers["/score"] = [(200, ANSWER)]
    judge = reward_model(url=server.url + "/")
    assert ask(judge, PROMPTS["text"], "Yes!", [(0, 3), (3, 4)]) == Scored(
        1.5, [0.25, 0.75], {"entropy": 0.5}
    )
    ask(judge, PROMPTS["messages"], "Yes!", [(0, 3), (3, 4)])
    assert server.got == [
        {"prompt": PROMPTS["text"], "response": "Yes!", "offsets": [[0, 3], [3, 4]]},
        {
            "messages": [*PROMPTS["messages"], {"role": "assistant", "content": "Yes!"}],
            "offsets": [[0, 3], [3, 4]],
        },
    ]


def test_an_overloaded_server_is_asked_again(server: Server) -> None:
    server.answers["/score"] = [(429, "busy"), (503, "starting"), (0, ""), (200, ANSWER)]
    assert ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 2), (2, 3)]).score == 1.5
    assert len(server.got) == 4


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_there_is_waited_for_as_one_that_loads(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A large model that is loaded again takes longer than ``ATTEMPTS``."""
    monkeypatch.setattr(reward, "LAST_PAUSE", 0.001)
    server.answers["/score"] = [(status, "come again")] * (2 * ATTEMPTS) + [(200, ANSWER)]
    judge = reward_model(url=server.url)
    assert ask(judge, "Good? ", "Yes", [(0, 2), (2, 3)]).score == 1.5
    assert len(server.got) == 2 * ATTEMPTS + 1
    monkeypatch.setattr(reward, "LOADING_SECONDS", 0.0)
    server.answers["/score"] = [(status, "come again")]
    with pytest.raises(RuntimeError, match=f"/score: {status} come again, {ATTEMPTS} times in "):
        ask(judge, "Good? ", "Yes", [(0, 3)])


def test_a_server_that_stays_away(server: Server) -> None:
    server.answers["/score"] = [(0, "")]
    with pytest.raises(RuntimeError, match=f"/score: .*, {ATTEMPTS} times in "):
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 3)])
    assert len(server.got) == ATTEMPTS


def test_a_refusal_that_breaks_off_is_known_by_its_status(server: Server) -> None:
    server.torn = {502, 422}
    server.answers["/score"] = [(502, "bad gate"), (200, ANSWER)]
    judge = reward_model(url=server.url)
    assert ask(judge, "Good? ", "Yes", [(0, 2), (2, 3)]).score == 1.5
    server.answers["/score"] = [(422, '{"err')]
    with pytest.raises(Unscored, match="/score: 422 nothing"):
        ask(judge, "Good? ", "Yes", [(0, 3)])


def test_a_completion_that_the_server_refuses(server: Server) -> None:
    server.answers["/score"] = [(422, '{"error": "too long"}')]
    with pytest.raises(Unscored, match=r'/score: 422 {"error": "too long"}'):
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 3)])
    server.answers["/score"] = [(200, '{"error": "not finite"}')]
    with pytest.raises(Unscored, match="/score: not finite"):
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 3)])
    server.answers["/score"] = [(401, '{"error": "no key"}')]  # of more than this completion
    with pytest.raises(ValueError, match="401") as caught:
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 3)])
    assert not isinstance(caught.value, Unscored)
    assert len(server.got) == 3


def test_a_server_whose_source_has_signs(server: Server) -> None:
    answer = {"score": -0.5, "credit": None, "token_rewards": [0.25, -0.25], "metrics": {}}
    server.answers["/score"] = [(200, json.dumps(answer))]
    judge = reward_model(url=server.url)
    assert ask(judge, "Good? ", "Yes!", [(0, 3), (3, 4)]) == Scored(-0.5, None, {}, [0.25, -0.25])
    for wrong in ([0.25], [0.25, "x"], None):
        server.answers["/score"] = [(200, json.dumps(answer | {"token_rewards": wrong}))]
        with pytest.raises(ValueError, match="/score: want token_rewards"):
            ask(judge, "Good? ", "Yes!", [(0, 3), (3, 4)])


def test_a_server_is_waited_for_while_it_loads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/health"] = [(503, "loading")] * 3 + [(200, READY)]
    reward_model(url=server.url)
    assert server.answers["/health"] == [(200, READY)]
    server.answers["/health"] = [(503, "loading")]
    monkeypatch.setattr(reward, "LOADING_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match=r"503.*is `attnshape serve` running there"):
        reward_model(url=server.url + "//")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9/health: .*is `attnshape serve` running there"):
        reward_model(url="http://127.0.0.1:9")


HTML = "<!doctype html>\n<html><title>502 Bad Gateway</title>" + "x" * 5000
GIVEN = {"score": 1.5, "credit": [0.25, 0.75], "metrics": {"entropy": 0.5}}
WRONG: dict[str, tuple[str, str]] = {
    "a page": (HTML, "want a JSON object, got <!doctype html> <html><title>502 Bad Gateway"),
    "nothing": ("", "want a JSON object, got nothing"),
    "a list": ("[1]", "want a JSON object, got [1]"),
    "half of it": (json.dumps(GIVEN)[:-9], "want a JSON object, got"),
    "deep": ("[" * 100_000, "want a JSON object, got [[["),
    "a number": ("7", "want a JSON object, got 7"),
    "no score": (json.dumps({**GIVEN, "score": None}), "want a finite number as score"),
    "a score in words": (json.dumps({**GIVEN, "score": "1.5"}), "want a finite number as score"),
    "a score that is true": (json.dumps({**GIVEN, "score": True}), "want a finite number as score"),
    "an infinite score": (json.dumps({**GIVEN, "score": float("inf")}), "want a finite number as score"),
    "NaN": (json.dumps({**GIVEN, "score": float("nan")}), "want a finite number as score"),
    "a huge score": ('{"score": 1' + "0" * 400 + "}", "want a finite number as score"),
    "another server's": (json.dumps({"rewards": [1.5]}), "want a finite number as score, got {"),
    "no credit": (json.dumps({"score": 1.5}), "want credit of 2 tokens"),
    "credit of others": (json.dumps({**GIVEN, "credit": [1.0]}), "want credit of 2 tokens"),
    "credit by name": (json.dumps({**GIVEN, "credit": {"a": 1, "b": 2}}), "want credit of 2 tokens"),
    "negative credit": (json.dumps({**GIVEN, "credit": [1.5, -0.5]}), "finite and not negative"),
    "credit that is NaN": (json.dumps({**GIVEN, "credit": [float("nan"), 1]}), "finite and not negative"),
    "credit in words": (json.dumps({**GIVEN, "credit": ["a", 1]}), "finite and not negative"),
    "metrics in words": (json.dumps({**GIVEN, "metrics": {"entropy": "low"}}), "want metrics"),
    "no metrics": (json.dumps({**GIVEN, "metrics": None}), "want metrics"),
}


@pytest.mark.parametrize(("body", "message"), WRONG.values(), ids=WRONG)
def test_an_answer_that_is_none_is_shown(server: Server, body: str, message: str) -> None:
    server.answers["/score"] = [(200, body)]
    with pytest.raises(ValueError) as caught:
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 2), (2, 3)])
    said = str(caught.value)
    assert said.startswith(f"{server.url}/score: ")
    assert message in said
    assert len(said) < 400
    assert len(said.splitlines()) == 1
    assert len(server.got) == 1


def test_a_refusal_is_not_longer_than_a_line(server: Server) -> None:
    server.answers["/score"] = [(404, HTML)]
    with pytest.raises(ValueError, match=r"/score: 404 <!doctype html> <html>") as caught:
        ask(reward_model(url=server.url), "Good? ", "Yes", [(0, 3)])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("health", [HTML, "{}", '{"status": "ok"}', "[]"])
def test_another_server_is_no_reward_server(server: Server, health: str) -> None:
    server.answers["/health"] = [(200, health)]
    with pytest.raises(RuntimeError, match=r"/health: .*is `attnshape serve` running there") as caught:
        reward_model(url=server.url + "///")
    assert len(str(caught.value)) < 600


def test_the_key_of_a_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/score"] = [(200, json.dumps(GIVEN))]
    spans = [(0, 2), (2, 3)]
    ask(reward_model(url=server.url, api_key="given"), "Good? ", "Yes", spans)
    monkeypatch.setenv("ATTNSHAPE_API_KEY", "of the environment")
    ask(reward_model(url=server.url + "/"), "Good? ", "Yes", spans)
    monkeypatch.delenv("ATTNSHAPE_API_KEY")
    ask(reward_model(url=server.url), "Good? ", "Yes", spans)
    assert server.keys == ["Bearer given", "Bearer of the environment", None]
    monkeypatch.setenv("ATTNSHAPE_API_KEY", "")
    ask(reward_model(url=server.url + "//"), "Good? ", "Yes", spans)
    assert server.keys[3:] == [None]


@pytest.mark.parametrize("key", ["secret\n", "sécret", " secret"])
def test_a_key_that_no_header_carries_is_not_shown(server: Server, key: str) -> None:
    with pytest.raises(ValueError, match="api_key, or ATTNSHAPE_API_KEY in the environment: want") as caught:
        reward_model(url=server.url, api_key=key)
    assert "cret" not in str(caught.value)


def test_a_reply_that_the_template_changed_is_scored(folder: Path, policy: Any, tmp_path: Path) -> None:
    """One sample does not end a run: sparse credit, and its metric says so."""
    from transformers import AutoTokenizer

    shutil.copytree(folder / "reward_model", tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}\n{% endfor %}Good?"
    )
    tokenizer.save_pretrained(tmp_path)
    judge = reward_model(model=str(tmp_path))
    for reply, left in [("All of it</think>Good!", "Good!"), ("Good!</think>", "")]:
        ids = policy(reply, add_special_tokens=False)["input_ids"]
        text, spans = spans_of(policy, ids, [1] * len(ids))
        scored = ask(judge, PROMPTS["messages"], text, spans)
        assert scored.metrics["changed"] is True
        weights = dict(zip(spans, scored.credit, strict=True))
        assert all(weight == 0 for (start, end), weight in weights.items() if end <= len(text) - len(left))
        assert sum(scored.credit) == pytest.approx(1.0 if left else 0.0)
        rewards = token_rewards(scored.score, scored.credit, [1] * len(ids), dense_share=1.0)
        assert rewards.sum().item() == pytest.approx(scored.score, rel=1e-5)
