"""The application, its errors, and the options that several commands have."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch

import attnshape
from attnshape.files import is_stream
from attnshape.text.load import (
    RewardModelConfig,
    SourceName,
    check_device,
    parse_layers,
    parse_query_position,
)
from attnshape.text.score_fn import parse_score_fn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from typer.core import TyperGroup
except ModuleNotFoundError:
    sys.exit("the command line needs: pip install typer rich")

# Some releases of typer bring a click of their own.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
INTERRUPTED = 130


class _OneLineErrors(TyperGroup):
    """Commands whose errors of usage are one line each."""

    def main(self, *args: Any, **settings: Any) -> Any:
        standalone = settings.pop("standalone_mode", True)
        settings["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **settings)
        try:
            status = super().main(*args, **settings)
        except _UsageError as error:
            message = error.format_message()
            is_help = type(error).__name__ == "NoArgsIsHelpError"
            errors.print(message if is_help else " ".join(message.split()), style=None if is_help else "red")
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Dense rewards for PPO from the reward model's own attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def fail(message: object) -> typer.Exit:
    errors.print(" ".join(str(message).split()), style="red")
    return typer.Exit(1)


def check_output(path: Path) -> None:
    """Before work starts, that a file can be written there."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise fail(f"there is no folder {path.parent}")
    if path.is_dir():
        raise fail(f"{path} is a folder, want a file")
    if not os.access(path if is_stream(path) else folder, os.W_OK):
        raise fail(f"{path}: you may not write there")


def check_input(path: Path) -> None:
    """Before work starts, that it can hold JSON lines; what is read once only is left alone."""
    if not path.exists() or path.is_dir():
        raise fail(f"{path}: there is no such file")
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(4096)
    if any(byte < 32 and byte not in b"\t\n\r" for byte in start):
        raise fail(f"{path} is no text in UTF-8; what is compressed comes as: zcat {path} | attnshape … -")
    if start.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].strip() == b"[":
        raise fail(f"{path} is one JSON list, want an object per line, as of: jq -c '.[]' {path}")


def standard(stream: TextIO | None) -> TextIO:
    """Standard input or output, which a process may have been started without."""
    if stream is None:
        raise fail("-: standard input or output is closed")
    return stream


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True)


def _checked_device(device: str | None) -> str | None:
    if device is not None:
        try:
            check_device(device)
        except ValueError as error:
            raise fail(error) from error
    return device


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnshape {attnshape.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Dense rewards for PPO from the reward model's own attention."""
    if errors.is_terminal:
        log = logging.getLogger("attnshape.cpu")
        log.addHandler(_ProgressLine())
        log.setLevel(logging.INFO)


class _ProgressLine(logging.Handler):
    """What takes a while before there is progress to show."""

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="dim")


# The options that several commands have.
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = typer.Option(callback=_checked_device, help="Where to compute: cpu, cuda, cuda:1, …")
Device = Annotated[str, DEVICE]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Reward model: a folder or hub name of a sequence classifier.")
]
ScoreFnText = Annotated[str, typer.Option(help="The score, such as 'logit[1] - logit[0]'.")]
Source = Annotated[
    SourceName, typer.Option(help="Where credit is read from; `attnshape audit` says which one to take.")
]
Layer = Annotated[
    str | None,
    typer.Option(help="Attention layer that is read, negative from the last; several, as 0,1, or all."),
]
Span = Annotated[
    int, typer.Option(min=1, help="Tokens that leave_one_out deletes together: so many times faster.")
]
Position = Annotated[
    str,
    typer.Option(
        metavar="POSITION",
        help="Token that gives the score, whose attention is read: pooled (the head's own), last_visible, "
        "last_response, or an integer from the first (0) or the last (-1).",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python files that the model's folder or repository brings, as you."
    ),
]


def reward_model_config(
    model: str,
    score_fn: str,
    query_position: str,
    trust_remote_code: bool,
    source: SourceName = "attention",
    layer: str | None = None,
    span: int = 1,
) -> RewardModelConfig:
    return RewardModelConfig(
        model=model,
        score_fn=parse_score_fn(score_fn),
        source=source,
        layer=parse_layers(layer),
        span=span,
        query_position=parse_query_position(query_position),
        trust_remote_code=trust_remote_code,
    )
