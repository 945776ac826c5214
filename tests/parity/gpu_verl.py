"""A whole verl run with the adapter on one GPU: vLLM rollouts, FSDP, ``attnshape serve``, our GAE.

    PYTHONPATH=.:tests python -m parity.gpu_verl

in an environment with verl 0.9.1, vLLM and attnshape[serve]. Small models are made on the spot, or given. It
fails if verl does, if a step has no reward, or if GAE was not replaced. Not run yet: it needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas
import torch
from parity.toys import save_policy, save_reward_model
from transformers import Qwen2Config, Qwen2ForCausalLM

STEPS, PROMPTS = 3, 16
MODULE = "attnshape.integrations.verl"
SERVE = """
import sys
from attnshape.text.score_fn import parse_score_fn
from attnshape.serve.app import ServeConfig, run
config = ServeConfig(model=sys.argv[1], score_fn=parse_score_fn("logit"), devices=("cuda:0",))
run(config, "127.0.0.1", 0, lambda url: print(url, flush=True))
"""


def make_policy(folder: Path) -> None:
    tokenizer = save_policy(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_prompts(file: Path) -> None:
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"Was film {i} any good?" + " Tell me more." * (i % 3)}],
            "ability": "toy",
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i in range(STEPS * PROMPTS)
    ]
    pandas.DataFrame(rows).to_parquet(file)


@contextmanager
def served(reward_model: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, str(reward_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def settings(policy: Path, prompts: Path, url: str) -> dict[str, object]:
    """One GPU; what makes it attnshape stands first."""
    return {
        "reward.custom_reward_function.path": f"pkg://{MODULE}",
        "+reward.custom_reward_function.reward_kwargs.url": url,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.module.path": f"pkg://{MODULE}",
        "reward.reward_manager.name": "RewardManager",
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": f"{MODULE}.AgentLoopManager",
        "reward.num_workers": 2,
        "data.train_files": prompts,
        "data.val_files": prompts,
        "data.train_batch_size": PROMPTS,
        "data.max_prompt_length": 128,
        "data.max_response_length": 64,
        "actor_rollout_ref.model.path": policy,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS // 2,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "critic.model.path": policy,
        "critic.ppo_mini_batch_size": PROMPTS // 2,
        "critic.ppo_micro_batch_size_per_gpu": 4,
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": True,
        "trainer.logger": "[console]",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policy", type=Path, help="a chat model in a folder, in place of a small one")
    parser.add_argument("--reward-model", type=Path, help="a sequence classifier in a folder")
    parser.add_argument("--prompts", type=Path, help="a parquet file as verl reads it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = given.policy or folder / "policy"
        reward_model = given.reward_model or folder / "reward_model"
        prompts = given.prompts or folder / "prompts.parquet"
        if given.policy is None:
            make_policy(policy)
        if given.reward_model is None:
            save_reward_model(reward_model)
        if given.prompts is None:
            make_prompts(prompts)
        with served(reward_model) as url:
            command = [sys.executable, "-m", "verl.trainer.main_ppo"]
            command += [f"{key}={value}" for key, value in settings(policy, prompts, url).items()]
            env = {**os.environ, "ATTNSHAPE_VERL_GAE": "1"}
            done = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
    print(done.stdout)
    if done.returncode:
        sys.exit(f"verl ended with {done.returncode}")
    if "replaced verl" not in done.stdout:
        sys.exit("verl's GAE was not replaced: is attnshape installed, with its entry points?")
    scores = [float(x) for x in re.findall(r"critic/score/mean:(?:np\.float64\()?(-?[\d.e-]+)", done.stdout)]
    if len(scores) != STEPS or not any(scores):
        sys.exit(f"want scores of {STEPS} steps, got {scores}")
    print(f"{STEPS} steps, mean scores {scores}")


if __name__ == "__main__":
    main()
