"""`attnshape serve` as it is run: the command, its worker processes and a client on loopback."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.processes import like_spawned, run, start
from support.reward_models import LIMIT, save, tokenizer
from typer.testing import CliRunner

import attnshape
from attnshape import tolerance
from attnshape.cli import app
from attnshape.serve.app import ServeConfig
from attnshape.text.load import load_reward_model
from attnshape.text.score_fn import parse_score_fn

PATIENCE = 180.0
REQUESTS, CLIENTS = 120, 32
WORDS = ["It was great", ", not bad", " at all!", " How was the film?", " awful plot", " 😀", "\nno", " é"]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)  # each look is a request to the server, which has better things to do


@dataclass
class Server:
    process: BaseProcess
    errors: Path
    client: httpx2.Client

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.client.get("/health").json()
        return health

    def pids(self) -> list[int]:
        return [worker["pid"] for worker in self.health()["workers"]]

    def post(self, body: Any) -> httpx2.Response:
        return self.client.post("/score", json=body)

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def serve(errors: Path, arguments: list[str]) -> None:
    """The command, in a process that has imported it; its workers are copies of one that it spawns."""
    sys.warnoptions = ["error"]  # of the workers
    context = like_spawned("attnshape.serve.process")
    multiprocessing.get_context = lambda _: context  # type: ignore[assignment]
    with errors.open("w", buffering=1) as sys.stderr:
        os.dup2(sys.stderr.fileno(), 2)
        app(["serve", *arguments])


@contextmanager
def serving(folder: Path, errors: Path, *options: str) -> Iterator[Server]:
    process = start(serve, errors, [str(folder), "--port", "0", *options])
    try:
        address = None
        while address is None:
            assert process.is_alive(), errors.read_text()
            time.sleep(0.1)
            said = errors.read_text() if errors.exists() else ""
            address = re.search(r"http://127\.0\.0\.1:\d+(?=\n)", said)
        assert f"loading {folder} on " in said
        limits = httpx2.Limits(max_connections=CLIENTS + 8)
        with httpx2.Client(base_url=address[0], timeout=PATIENCE, limits=limits, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            yield Server(process, errors, client)
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    errors = tmp_path_factory.mktemp("server") / "errors"
    # Batches of a few completions, so that there are many.
    with serving(folder, errors, "--devices", "cpu,cpu", "--max-batch-tokens", "256") as server:
        wait_for(lambda: all(worker["state"] == "ready" for worker in server.health()["workers"]))
        yield server


class Offline:
    """The same in this process: a batch of one, `attention_credit` and `align_texts`."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_reward_model(str(folder), "cpu")

    def __call__(self, text: str, ids: Sequence[int]) -> tuple[float, torch.Tensor, float]:
        """Score, credit per token of ``ids``, and the largest attention logit, which sets the tolerance."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad(), attnshape.AttentionTap(self.model) as tap:
            score = self.model(**encoded).logits.item()
        inputs = tap.take()
        said, _ = attnshape.decoded_spans(self.tokenizer, ids)
        alignment = attnshape.align_texts(
            self.tokenizer,
            [text],
            self.tokenizer,
            [ids],
            start=[text.rindex(said)],
            input_ids=encoded["input_ids"],
        )
        response = attnshape.Response(alignment.source_mask, start=torch.zeros(1, dtype=torch.int32))
        credit = attnshape.attention_credit(inputs, response)
        keys = inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], 1)
        logits = inputs.scaling * torch.einsum("bhd,bhsd->bhs", inputs.query, keys)
        return score, alignment(credit)[0], logits.abs().max().item()

    def agrees(self, request: dict[str, Any], ids: Sequence[int], answer: dict[str, Any]) -> None:
        text = "<s>" + request["prompt"] + request["response"]
        score, credit, max_logit = self(text, ids)
        assert answer["score"] == pytest.approx(score, rel=1e-4, abs=1e-5)
        given = torch.tensor(answer["credit"])
        bound = tolerance.credit_bound(credit.double(), max_logit)
        assert tolerance.error_fraction(given, credit, bound).max() <= 1
        assert abs(given.double().sum() - 1) <= 2 * tolerance.CREDIT_SUM  # each is rounded to eight digits


@pytest.fixture(scope="module")
def offline(folder: Path) -> Offline:
    return Offline(folder)


def draw(rng: random.Random) -> tuple[dict[str, Any], list[int]]:
    """A request, and the policy's tokens whose spans it gives; the policy has the same tokenizer."""
    tok = tokenizer()
    prompt = "".join(rng.choices(WORDS, k=rng.randint(0, 2)))
    ids = [tok.vocab_size - 1 - rng.randrange(60) for _ in range(rng.randint(0, 4))]
    ids += tok("".join(rng.choices(WORDS, k=rng.randint(1, 3))), add_special_tokens=False)["input_ids"]
    response, offsets = attnshape.decoded_spans(tok, ids)
    return {"prompt": prompt, "response": response, "offsets": offsets}, ids


def is_ready(server: Server) -> bool:
    return all(worker["state"] == "ready" for worker in server.health()["workers"])


def test_no_request_is_lost_and_each_gets_what_offline_gives(server: Server, offline: Offline) -> None:
    """While a worker is killed and comes back."""
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(REQUESTS)]
    victim, _ = server.pids()

    def ask(i: int) -> httpx2.Response:
        if i == REQUESTS // 5:
            os.kill(victim, signal.SIGKILL)
        return server.post(drawn[i][0])

    with ThreadPoolExecutor(CLIENTS) as clients:
        responses = list(clients.map(ask, range(REQUESTS)))
    assert {response.status_code for response in responses} == {200}
    for (request, ids), response in zip(drawn, responses, strict=True):
        offline.agrees(request, ids, response.json())
    assert server.metric("attnshape_requests_total") == REQUESTS
    assert server.metric("attnshape_batch_completions_count") < REQUESTS
    wait_for(lambda: is_ready(server) and victim not in server.pids())
    assert [worker["restarts"] for worker in server.health()["workers"]] == [1, 0]


def test_a_killed_workers_completions_are_scored_by_another(server: Server, offline: Offline) -> None:
    wait_for(lambda: is_ready(server))
    dies, lives = server.pids()
    retried = server.metric("attnshape_retried_completions_total")
    rng = random.Random(1)
    drawn = [draw(rng), draw(rng)]
    with ThreadPoolExecutor(2) as clients:
        try:
            for pid in (dies, lives):
                os.kill(pid, signal.SIGSTOP)
            asked = []
            for i, (request, _) in enumerate(drawn):  # the first is with one worker when the second comes
                asked.append(clients.submit(server.post, request))
                wait_for(lambda held=i + 1: server.metric("attnshape_pending_completions") == held)
                wait_for(lambda: server.metric("attnshape_waiting_completions") == 0)
            os.kill(dies, signal.SIGKILL)
        finally:
            os.kill(lives, signal.SIGCONT)
        for (request, ids), future in zip(drawn, asked, strict=True):
            response = future.result(PATIENCE)
            assert response.status_code == 200
            offline.agrees(request, ids, response.json())
    assert server.metric("attnshape_retried_completions_total") == retried + 1


def test_a_conversation_and_a_list(server: Server, offline: Offline) -> None:
    turns = [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": " not bad "}]
    request, ids = draw(random.Random(2))
    response = server.post([{"messages": turns}, {**request, "label": None}])
    assert response.status_code == 200
    first, second = response.json()
    offline.agrees(request, ids, second)
    text = tokenizer().apply_chat_template(turns, tokenize=False)
    own = tokenizer()("not bad")["input_ids"][1:]
    score, credit, _ = offline(text, own)
    assert first["score"] == pytest.approx(score, rel=1e-4)
    assert first["credit"] == pytest.approx(credit.tolist(), rel=1e-3)
    assert [" not bad "[start:end] for start, end in first["offsets"]] == [
        tokenizer().decode([i]) for i in own
    ]


def test_long_and_wrong_requests_over_the_wire(server: Server) -> None:
    def spaces() -> Iterator[bytes]:
        for _ in range(6 << 4):
            yield b" " * (1 << 16)

    headers = {"content-type": "application/json"}
    response = server.client.post("/score", content=spaces(), headers=headers)
    assert (response.status_code, response.json()["error"]) == (413, "the body is longer than 4194304 bytes")
    assert server.post({"prompt": "", "response": "bad " * LIMIT}).status_code == 422
    assert server.client.post("/score", content=b"{", headers=headers).status_code == 400


def test_sigterm_answers_what_was_accepted(server: Server, offline: Offline) -> None:
    """The last test of this server."""
    wait_for(lambda: is_ready(server))
    request, ids = draw(random.Random(3))
    pids = server.pids()
    with ThreadPoolExecutor(1) as clients:
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                os.kill(pid, signal.SIGTERM)  # as a service manager sends it to every process
            asked = clients.submit(server.post, request)
            wait_for(lambda: server.metric("attnshape_pending_completions") == 1)
            os.kill(server.process.pid, signal.SIGTERM)
            wait_for(lambda: not takes_connections(server.client.base_url))
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        response = asked.result(PATIENCE)
    assert response.status_code == 200
    offline.agrees(request, ids, response.json())
    server.process.join(PATIENCE)
    assert server.process.exitcode == 0
    assert "Traceback" not in server.errors.read_text()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def takes_connections(address: httpx2.URL) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_model_that_cannot_be_served_ends_it(tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(
        app, ["serve", str(save(tmp_path, "causal")), "--devices", "cpu", "--port", "0"]
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"cpu: {tmp_path} is no reward model: it lacks score.weight"
    assert "Traceback" not in result.output
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("attnshape.serve.app.run", lambda *arguments: calls.append(arguments[:3]))
    assert CliRunner().invoke(app, ["serve", "m", "--devices", "cpu"]).exit_code == 0
    arguments = """
        serve m --host 0.0.0.0 --port 9 --devices cuda:0,cuda:1 --score-fn logit[1] --layer 3 --source columns
        --max-batch-tokens 7 --max-pending 8 --max-body-bytes 9 --query-position -1 --trust-remote-code
        --api-key secret
    """.split()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    default = ServeConfig(model="m", score_fn=parse_score_fn("logit"))
    every = ServeConfig(
        model="m",
        score_fn=parse_score_fn("logit[1]"),
        devices=("cuda:0", "cuda:1"),
        source="columns",
        layer=3,
        max_batch_tokens=7,
        max_pending=8,
        max_body_bytes=9,
        query_position=-1,
        trust_remote_code=True,
        api_key="secret",
    )
    assert calls == [(default, "127.0.0.1", 8000), (every, "0.0.0.0", 9)]


def test_what_cannot_work_is_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in [
            ((tmp_path / "nothing",), "nothing"),
            ((folder, "--score-fn", "logit +"), "score_fn: got 'logit +'"),
            (
                (folder, "--port", taken.getsockname()[1]),
                f":{taken.getsockname()[1]}: Address already in use",
            ),
            ((folder, "--port", "70000"), "'--port'"),
            ((folder, "--port", "http"), "'--port'"),
            ((folder, "--host", "no.such.host.invalid"), "no.such.host.invalid"),
            ((folder, "--devices", "cpu,foo"), "device: got 'foo', want cpu, cuda"),
            ((folder, "--query-position", "first"), "query_position: got 'first', want pooled, last_visible"),
            ((folder, "--api-key", ""), "api_key: want visible ASCII"),
        ]:
            result = CliRunner().invoke(app, ["serve", "--devices", "cpu", *map(str, arguments)])
            assert result.exit_code in (1, 2)
            *_, said = result.stderr.splitlines()
            assert message in said
            assert len(result.stderr.splitlines()) <= 2  # what is loaded, and why not
            assert "Traceback" not in result.output


def test_without_the_extra_it_says_what_to_install() -> None:
    result = run(call_without_fastapi, forget=("attnshape.cli", "attnshape.serve"))
    assert result.returncode == 1
    assert result.stderr == "attnshape serve needs: pip install fastapi uvicorn prometheus-client\n"


def call_without_fastapi() -> None:
    sys.modules["fastapi"] = None  # type: ignore[assignment]
    importlib.import_module("attnshape.cli").app(["serve", "m"])
