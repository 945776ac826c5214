"""Scores and credit from a reward model behind HTTP. Start it, then ask:

attnshape serve REWARD_MODEL
python examples/ask_a_server.py http://127.0.0.1:8000 POLICY_TOKENIZER
"""

import json
import os
import sys
import urllib.request

import torch
from transformers import AutoTokenizer

import attnshape


def ask(url: str, completions: list[dict]) -> list[dict]:
    """One request for all of them; the answers come in the same order."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("ATTNSHAPE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/score", json.dumps(completions).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def main(url: str, policy: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = ["Was the film any good? ", "And the ending? "]
    sampled = [tokenizer(text)["input_ids"] for text in ("It was not bad.", "The ending was weak, sadly.")]

    completions = []
    for prompt, ids in zip(prompts, sampled, strict=True):
        text, offsets = attnshape.decoded_spans(tokenizer, ids)  # each token's place in the decoded text
        completions.append({"prompt": prompt, "response": text, "offsets": offsets})
    answers = ask(url, completions)
    for answer in answers:
        if "error" in answer:
            raise SystemExit(answer["error"])

    rows = [torch.tensor(answer["credit"]) for answer in answers]  # one number per sampled token
    credit = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    response_mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(ids)) for ids in sampled], batch_first=True
    )
    score = torch.tensor([answer["score"] for answer in answers])
    out = attnshape.shape_rewards(score, credit, response_mask)
    for ids, total, row in zip(sampled, score, out.rewards, strict=True):
        rewards = (f"{tokenizer.decode([i])!r} {x:+.2f}" for i, x in zip(ids, row.tolist(), strict=False))
        print(f"score {total.item():+.2f}:", *rewards)


if __name__ == "__main__":
    main(*sys.argv[1:])
