"""Two steps of OpenRLHF's own command with credit, on one GPU, with models made on the spot.

    PYTHONPATH=.:tests python -m parity.openrlhf_on_gpu FOLDER

where OpenRLHF 0.11.2, vLLM and flash attention are installed. Passes if the command does and its log, in
``FOLDER/logs`` for TensorBoard, holds the credit's entropy. It has not been run yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from parity.toys import CORPUS, save_policy, small_llama
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

PROMPTS = 16


def arguments(folder: Path) -> list[str]:
    """Policy, reference, critic, reward model and vLLM share the GPU; the reward model's input is packed."""
    given = {
        "actor.model_name_or_path": folder / "policy",
        "reward.model_name_or_path": folder / "reward",
        "data.prompt_dataset": folder / "prompts.jsonl",
        "data.input_key": "input",
        "data.max_len": 256,
        "data.max_samples": PROMPTS,
        "rollout.max_new_tokens": 32,
        "rollout.batch_size": PROMPTS // 2,
        "rollout.micro_batch_size": 3,
        "train.batch_size": PROMPTS // 2,
        "train.micro_batch_size": 4,
        "train.num_episodes": 1,
        "vllm.num_engines": 1,
        "vllm.gpu_memory_utilization": 0.3,
        "ckpt.output_dir": folder / "trained",
        "logger.tensorboard_dir": folder / "logs",
    }
    given |= {f"{role}.num_gpus_per_node": 1 for role in ("actor", "ref", "critic", "reward")}
    switches = ("data.apply_chat_template", "ds.packing_samples", "train.colocate_all", "vllm.enable_sleep")
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*options, *(f"--{name}" for name in (*switches, "ds.enable_sleep"))]


def save_models(folder: Path) -> None:
    tokenizer = save_policy(folder / "policy")
    wide = {"hidden_size": 256, "intermediate_size": 256}
    config = small_llama(tokenizer, eos_token_id=tokenizer.eos_token_id, **wide)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).bfloat16().save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    lines = [json.dumps({"input": CORPUS[i % 3][: 20 + 2 * i]}) + "\n" for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(lines))


def main(folder: Path) -> None:
    save_models(folder)
    command = [
        sys.executable,
        "-m",
        "attnshape.integrations.openrlhf",
        "--abc.dense_share",
        "0.8",
        *arguments(folder),
    ]
    subprocess.run(command, check=True)
    events = b"".join(path.read_bytes() for path in (folder / "logs").rglob("*") if path.is_file())
    if b"credit_entropy" not in events:
        sys.exit("the log does not hold credit_entropy: the reward workers sent no attention")
    print("OpenRLHF trained with credit")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
