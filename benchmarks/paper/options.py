"""The options that `cell` and `all` share, and what all commands print on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

from attnshape.demo.bars import bars_on
from attnshape.demo.models import Stage
from attnshape.demo.run import Setup, read_prompts
from attnshape.text.score_fn import parse_score_fn
from benchmarks.paper.sweep import start_worker
from benchmarks.paper.testbed import Models, own_models

RESULTS = Path(__file__).parents[1] / "results" / "paper-cpu"
console = Console(highlight=False, soft_wrap=True)

Cache = Annotated[Path | None, typer.Option(help="Where the testbed's own models are kept.")]
Out = Annotated[Path, typer.Option(help="Folder of results.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which models are run, and where results go."""

    policy: Annotated[str | None, typer.Option(help="Folder or hub name of a causal model.")] = None
    reward_model: Annotated[str | None, typer.Option(help="Folder or hub name of a sequence classifier.")] = (
        None
    )
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: .jsonl with a prompt per line, or one per line.")
    ] = None
    score_fn: Annotated[str, typer.Option(help="The score, such as 'logit[1] - logit[0]'.")] = "logit"
    dpo_policy: Annotated[
        str | None, typer.Option(help="Folder or hub name of a DPO-trained policy, for RTO.")
    ] = None
    device: Annotated[str | None, typer.Option(help="Of your own models; a GPU if there is one.")] = None
    cache_dir: Cache = None
    out: Out = RESULTS

    def testbed(self, needed: Collection[str]) -> Models:
        """The user's models, or the testbed's own, those of ``needed`` trained where they are not kept."""
        given = {
            "--policy": self.policy,
            "--reward-model": self.reward_model,
            "--prompts": self.prompts,
        }
        if not any(given.values()):
            return self._own(needed)
        if self.policy is None or self.reward_model is None or self.prompts is None:
            missing = ", ".join(name for name, value in given.items() if not value)
            raise typer.BadParameter(f"--policy, --reward-model and --prompts go together, got no {missing}")
        if self.out == RESULTS:
            raise typer.BadParameter("models of your own need a folder of their own: --out")
        parse_score_fn(self.score_fn)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        prompts = read_prompts(self.prompts)
        setup = Setup(self.policy, self.reward_model, prompts, self.score_fn, device, None)
        return Models({"testbed": setup}, None if self.dpo_policy is None else partial(str, self.dpo_policy))

    def _own(self, needed: Collection[str]) -> Models:
        start_worker()  # what models learn depends on the number of threads
        with bars_on(console) as bars:
            tasks: dict[Stage, Any] = {}

            def on_step(stage: Stage, done: int, loss: float) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(f"training the {stage}", total=None)
                bars.update(tasks[stage], completed=done)

            return own_models(needed, self.cache_dir, on_step)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose last parameter is ``Options``, with each of their fields as an option in its place."""
    hints = get_type_hints(Options, include_extras=True)
    fields = [
        field.replace(annotation=hints[name]) for name, field in inspect.signature(Options).parameters.items()
    ]
    *own, _ = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def called(**given: Any) -> None:
        options = Options(**{field.name: given.pop(field.name) for field in fields})
        command(**given, options=options)

    called.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
    return called
