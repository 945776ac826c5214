"""``demo``: PPO with sparse and with attention-based credit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnshape.cli.base import DEVICE, app, fail


@app.command()
def demo(
    *,
    policy: Annotated[str | None, typer.Option(help="Causal model, in place of the demo's own.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="Sequence classifier that scores.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with a prompt per line, or a text file.")
    ] = None,
    score_fn: Annotated[str | None, typer.Option(help="The score, such as 'logit[1] - logit[0]'.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Credit to compare: sparse, ABC, uniform.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of every method.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="PPO steps of a run.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Completions per step.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest completion.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(min=0, help="Shortest completion.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    kl_coef: Annotated[float | None, typer.Option(help="Weight of the KL penalty.")] = None,
    dense_share: Annotated[
        float | None, typer.Option(help="Share of the score that is redistributed, 0 to 1.")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="GAE's lambda.")] = None,
    standardize: Annotated[
        bool | None,
        typer.Option(
            "--standardize/--raw-scores", help="Scores in standard deviations from the initial policy's mean."
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Score to which steps are counted.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that share the runs.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where trained models are kept.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.")] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Train a small reward model and run PPO with sparse and with attention-based credit.

    With --policy, --reward-model and --prompts the same is run on those.
    """
    try:
        from attnshape.demo.config import DemoConfig
        from attnshape.demo.ppo import PPOConfig
        from attnshape.demo.run import run_demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise fail("attnshape demo needs: pip install matplotlib") from error

    def given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    ppo = given(
        steps=steps,
        batch_size=batch_size,
        new_tokens=new_tokens,
        min_new_tokens=min_new_tokens,
        lr=lr,
        kl_coef=kl_coef,
        dense_share=dense_share,
        lam=lam,
    )
    options = given(
        policy=policy,
        reward_model=reward_model,
        prompts=prompts,
        score_fn=score_fn,
        methods=tuple(method) if method else None,
        seeds=None if seeds is None else tuple(range(seeds)),
        standardize=standardize,
        threshold=threshold,
        workers=workers,
        cache_dir=cache_dir,
        out=out,
        device=device,
    )
    try:
        run_demo(DemoConfig(ppo=PPOConfig(**ppo), **options))
    except (ValueError, OSError) as error:
        raise fail(error) from error
