"""``python -m benchmarks.language``: make the models, measure credit, run cells, summarise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.language.data import read_texts
from benchmarks.language.models import default_cache, make_language_models
from benchmarks.paper.sweep import start_worker

Reviews = Annotated[Path, typer.Option(help="Film reviews, .jsonl or .jsonl.gz.", exists=True)]
Treebank = Annotated[Path, typer.Option(help="Labelled sentences, .jsonl or .jsonl.gz.", exists=True)]
Cache = Annotated[Path | None, typer.Option(help="Where the study's models are kept.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def study() -> None:
    """Credit, PPO and group advantages on real language."""


@app.command()
def models(*, reviews: Reviews, treebank: Treebank, cache: Cache = None) -> None:
    """The tokenizer and the language models."""
    start_worker()

    def on_step(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(step, round(loss, 3), flush=True)

    for record in make_language_models(
        read_texts(reviews, treebank), cache or default_cache(), on_step=on_step
    ):
        print(record, flush=True)


if __name__ == "__main__":
    app()
