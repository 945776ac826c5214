"""vLLM's real server with the plugin, under many clients.

Score and credit through the adapters' own ``ServedRewardModel`` are held against ``LocalRewardModel`` in this
process, while other clients hang up on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from integrations.vllm import models

from attnshape import decoded_spans
from attnshape.integrations.reward import LocalRewardModel, ServedRewardModel
from attnshape.text.load import RewardModelConfig

KEY = "secret"
CLIENTS, ROUNDS = 24, 2
SCORE_BOUND, CREDIT_BOUND = 2e-4, 1e-4
PATIENCE = 600.0


@contextlib.contextmanager
def served(path: Path, log: Path, *options: str) -> Iterator[str]:
    """The server's address; it cannot answer yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=variables) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def ask(url: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
    """Status, and the answer's JSON, or its text."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            status, found = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, found = error.code, error.read()
    try:
        return status, json.loads(found)
    except ValueError:
        return status, found.decode()


def await_server(url: str) -> float:
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        with contextlib.suppress(OSError):
            if ask(f"{url}/attnshape/health")[0] == 200:
                return time.monotonic() - started
        time.sleep(1)
    raise AssertionError("the server does not start")


def completions(tokenizer: Any) -> list[tuple[Any, str, list[tuple[int, int]]]]:
    """Prompt (text, or messages), response, and spans of a policy's tokens."""
    draw, words = random.Random(0), models.WORDS.split()

    def text(n: int) -> str:
        return " ".join(draw.choice(words) for _ in range(n))

    found: list[tuple[Any, str, list[tuple[int, int]]]] = []
    for n in (1, 3, 10, 20, 40, 60, 5, 30, 50, 2, 7, 25):
        prompt, ids = text(draw.randrange(1, 30)) + " ", tokenizer(text(n))["input_ids"][:200]
        response, spans = decoded_spans(tokenizer, ids)
        found.append((prompt, response, spans))
        found.append(([{"role": "user", "content": prompt}], response, spans))
    return found


async def hang_up(url: str, body: bytes, after: float) -> None:
    """A client that asks, and goes before it is answered."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /attnshape/score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(after)
    writer.close()
    del reader


async def under_load(url: str, cases: list[Any], local: LocalRewardModel) -> dict[str, float]:
    served_model = ServedRewardModel(f"{url}/attnshape", KEY)
    served_model.check()
    wanted = [await local(*case) for case in cases]
    score = credit = metrics = 0.0
    aborted = 0
    for _ in range(ROUNDS):
        asking = [asyncio.create_task(served_model(*case)) for case in cases[:CLIENTS]]
        leaving = []
        for i, (prompt, response, spans) in enumerate(cases):
            if isinstance(prompt, str):
                body = json.dumps([{"prompt": prompt, "response": response, "offsets": spans}] * 4).encode()
                leaving.append(asyncio.create_task(hang_up(url, body, 0.01 * i)))
                aborted += 1
        found = await asyncio.gather(*asking)
        await asyncio.gather(*leaving)
        for x, y in zip(found, wanted, strict=True):
            score = max(score, abs(x.score - y.score))
            credit = max([credit, *(abs(a - b) for a, b in zip(x.credit, y.credit, strict=True))])
            metrics = max([metrics, *(abs(float(x.metrics[k]) - float(y.metrics[k])) for k in y.metrics)])
            assert x.metrics.keys() == y.metrics.keys()
    assert score <= SCORE_BOUND, score
    assert credit <= CREDIT_BOUND, credit
    return {"score": score, "credit": credit, "metrics": metrics, "aborted": aborted}


def other_ways(url: str, cases: list[Any], local: LocalRewardModel) -> dict[str, float]:
    """``/pooling`` with data, vLLM's own routes, and what is refused."""
    data = [
        {"prompt": p, "response": r, "offsets": s}
        if isinstance(p, str)
        else {"messages": [*p, {"role": "assistant", "content": r}], "offsets": s}
        for p, r, s in cases
    ]
    status, reply = ask(f"{url}/pooling", {"data": data})
    assert status == 200, reply
    status, routed = ask(f"{url}/attnshape/score", data)
    assert status == 200, routed
    credit = 0.0
    for x, y, case in zip(reply["data"], routed, cases, strict=True):
        wanted = asyncio.run(local(*case))
        for found in (x, y):
            credit = max([credit, *(abs(a - b) for a, b in zip(found["credit"], wanted.credit, strict=True))])
            assert abs(found["score"] - wanted.score) <= SCORE_BOUND
    assert credit <= CREDIT_BOUND, credit

    prompt, response, _ = cases[6]
    wanted = asyncio.run(local(*cases[6]))
    status, found = ask(f"{url}/classify", {"input": prompt + response, "use_activation": False})
    assert status == 200
    assert abs(found["data"][0]["probs"][-1] - wanted.score) <= SCORE_BOUND
    assert len(found["data"][0]["probs"]) == 1, "vLLM's own answer holds a row"
    status, found = ask(f"{url}/pooling", {"input": prompt + response, "task": "classify"})
    assert status == 200
    assert len(found["data"][0]["data"]) == 1

    one = {"prompt": prompt, "response": response}
    for body, wants, says in (
        ({**one, "offsets": [[0, 9999]]}, 422, "offsets[0]: got [0, 9999]"),
        ({**one, "prompt": "good bad " * 2000}, 422, "that the model takes"),
        ({"prompt": "a"}, 422, "want prompt and response, or messages"),
    ):
        status, found = ask(f"{url}/attnshape/score", body)
        assert (status, says in found["error"]) == (wants, True), (status, found)
        status, found = ask(f"{url}/pooling", {"data": body})
        assert status == 400, (status, found)
        assert says in json.dumps(found), found
    assert ask(f"{url}/attnshape/score", one, key=None)[0] == 401
    assert ask(f"{url}/attnshape/health", key=None)[0] == 200
    _, text = ask(f"{url}/metrics")
    counted = {
        line.split()[0]: float(line.split()[-1]) for line in text.splitlines() if line[:1] not in ("#", "")
    }
    assert counted['attnshape_rows_total{outcome="given"}'] >= CLIENTS * ROUNDS, text[:2000]
    assert 'attnshape_rows_total{outcome="refused"}' not in counted
    return {"pooling": credit}


def fuzzed(url: str, paths: str) -> None:
    """Requests drawn from the server's own description, and others: none of them is answered with a 500."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--include-path-regex", paths, "--checks", "not_a_server_error", "--max-examples", "60"]
    command += ["--generation-deterministic", "--phases", "examples,coverage,fuzzing"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--suppress-health-check", "all"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


SERVE = """
import sys
from attnshape.serve.app import ServeConfig, run
config = ServeConfig(model=sys.argv[1], api_key=sys.argv[2])
run(config, "127.0.0.1", 0, lambda url: print(url, flush=True))
"""


@contextlib.contextmanager
def attnshape_serve(path: Path) -> Iterator[str]:
    command = [sys.executable, "-W", "ignore", "-c", SERVE, str(path), KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def serve(path: Path) -> None:
    """Serves, and prints the address of the protocol when it can answer: what other tests start."""
    with served(path, path / "server.log") as url:
        await_server(url)
        print(f"{url}/attnshape", flush=True)
        signal.pause()


def main() -> None:
    if sys.argv[1] == "serve":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        serve(Path(sys.argv[2]))
        return
    folder, out = Path(sys.argv[2]), Path(sys.argv[3])
    path = models.save(folder, "llama")
    cases = completions(models.tokenizer())
    options = ("--api-key", KEY, "--io-processor-plugin", "attnshape")
    with served(path, folder / "server.log", *options) as url:
        loading = await_server(url)
        local = LocalRewardModel(RewardModelConfig(model=str(path)), "cpu")
        found = asyncio.run(under_load(url, cases, local))
        found |= other_ways(url, cases, local)
        fuzzed(url, "^/attnshape/")
    with attnshape_serve(path) as url:
        fuzzed(url, "^/")
    found["drawn requests answered with a 500"] = 0
    out.write_text(json.dumps({"loading": loading, **found}))


if __name__ == "__main__":
    main()
