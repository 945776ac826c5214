"""``credit``, ``audit`` and ``serve``: what a reward model says of text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from attnshape.cli.base import (
    DEFAULT_DEVICE,
    INTERRUPTED,
    Device,
    Layer,
    Model,
    Position,
    ScoreFnText,
    Source,
    Span,
    TrustRemoteCode,
    app,
    check_input,
    check_output,
    errors,
    fail,
    progress_bar,
    reward_model_config,
    standard,
)
from attnshape.files import followed, is_stream, state, states, whole_file

if TYPE_CHECKING:
    from attnshape.text.partial import Partial

STANDARD = Path("-")


@app.command()
def credit(
    model: Model,
    completions: Annotated[
        Path,
        typer.Argument(
            metavar="JSONL",
            help='One {"prompt": …, "response": …} or {"messages": […]} per line; - for standard input.',
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSONL to write, - for standard output; by default JSONL's name + .credit.jsonl, or - where "
            "JSONL is no file."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page to write, each token coloured by its credit.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Another source that the page shows beside it; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind what an interrupted run with these options wrote.")
    ] = False,
    source: Source = "attention",
    layer: Layer = None,
    span: Span = 1,
    score_fn: ScoreFnText = "logit",
    query_position: Position = "pooled",
    trust_remote_code: TrustRemoteCode = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions per forward.")] = 16,
    ray: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="ACTORS",
            help="Over Ray Data, in so many actors, each with the model on a GPU or a core of its own.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, …")] = DEFAULT_DEVICE,
) -> None:
    """Score completions with a reward model and write each token's credit.

    Sources with signs (signed_rollout, gradient_value, gradient_embedding, relevance, leave_one_out) give
    token rewards in its place, which sum to zero beside a score that is spread evenly.

    Lines that cannot be read or scored are named with their number and skipped; the exit status is then 1.
    Ctrl-C keeps what is written, in a file of its own whose name is said.
    """
    from attnshape.text.file import credited, write, write_files
    from attnshape.text.load import check_device
    from attnshape.text.model import CreditModel
    from attnshape.text.over_ray import credited_over_ray
    from attnshape.text.partial import Partial, Refused
    from attnshape.text.source import CreditSource

    if out is None:
        named = completions.is_file() and completions != STANDARD
        out = completions.with_suffix(".credit.jsonl") if named else STANDARD
    _check_files(completions, out, html, resume)
    if beside and html is None:
        raise fail("--beside: want --html, the page that shows it")
    if ray is not None and not completions.is_file():
        raise fail("--ray: want a file, of which each actor reads its part")
    partial: Partial | None = None
    try:
        config = reward_model_config(model, score_fn, query_position, trust_remote_code, source, layer, span)
        if out != STANDARD and not is_stream(out):
            # Lines are known by their numbers, so only in a file that is the same, and of the same model.
            read = [completions.resolve(), *state(completions)] if completions.is_file() else []
            weights = states(Path(model))
            shown = None if html is None else list(beside or ())
            settings = {**vars(config), "completions": read, "weights": weights, "page": shown}
            real = None if html is None else followed(html)
            partial = Partial(followed(out), real, settings, resumable=completions.is_file())
    except ValueError as error:
        raise fail(error) from error
    try:
        others = [CreditSource(name) for name in beside or ()]  # type: ignore[arg-type]
        with contextlib.ExitStack() as stack:
            if partial is not None:
                stack.enter_context(partial.held())
                partial.check(resume)
            options: dict[str, Any] = {
                "with_page": html is not None,
                "beside": others,
                "batch_size": batch_size,
                "done": () if partial is None else partial.done(),
            }
            if ray is not None:
                found = credited_over_ray(completions, config, device, actors=ray, **options)
            else:
                check_device(device)
                credit_model = CreditModel.load(config, device)
                for other in (None, *others):
                    credit_model.probe(other)
                is_file = completions != STANDARD
                lines = stack.enter_context(completions.open("rb")) if is_file else standard(sys.stdin).buffer
                found = credited(credit_model, lines, **options)
            progress = stack.enter_context(progress_bar())
            total = completions.stat().st_size if completions.is_file() else None
            task = progress.add_task(completions.name, total=total)
            told: dict[str, Any] = {
                "title": f"Credit of {completions.name}",
                "on_skip": lambda line, reason: errors.print(f"{completions}:{line}: skipped: {reason}"),
                "on_read": lambda size: progress.advance(task, size),
            }
            if partial is not None:
                counts = write_files(found, partial, **told)
            else:
                page = None if html is None else stack.enter_context(whole_file(html))
                to = standard(sys.stdout) if out == STANDARD else stack.enter_context(whole_file(out))
                counts = write(found, to, page, **told)
    except Refused as error:
        raise fail(error) from error
    except (ValueError, OSError) as error:
        raise fail(f"{error}{_kept(partial)}") from error
    except KeyboardInterrupt:
        errors.print(f"interrupted{_kept(partial)}")
        raise typer.Exit(INTERRUPTED) from None
    changed = f", {counts.changed} of them changed by the chat template" if counts.changed else ""
    errors.print(f"{counts.written} completions written to {out}{changed}, {counts.skipped} lines skipped")
    if counts.skipped:
        raise typer.Exit(1)


def _kept(partial: Partial | None) -> str:
    """Of a run that ended early."""
    if partial is None or not partial.path.exists():
        return ""
    hint = ", --resume goes on behind it" if partial.resumable else ""
    return f"; what is written is in {partial.path}{hint}"


def _check_files(source: Path, out: Path, html: Path | None, resume: bool) -> None:
    """Before work starts."""
    paths = [path for path in (source, out, html) if path is not None and path != STANDARD]
    if html is not None and (html == STANDARD or is_stream(html)):
        raise fail(f"--html: got {html}, want a file")
    if len({path.resolve() for path in paths}) < len(paths):
        raise fail("the files that are read and written must be different ones")
    if source != STANDARD:
        check_input(source)
    for path in paths[source != STANDARD :]:
        check_output(path)
    if resume and (out == STANDARD or is_stream(out) or not source.is_file()):
        raise fail("--resume: want files; standard input cannot be read again")


@app.command()
def audit(
    model: Model,
    completions: Annotated[
        Path, typer.Argument(metavar="JSONL", help="As for `attnshape credit`; - for standard input.")
    ],
    *,
    source: Annotated[list[str] | None, typer.Option(help="Look at this one only; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Completions that are looked at, the first ones.")] = 100,
    span: Span = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write every figure to.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Page to write: the completions that the sources disagree on most, side by side."),
    ] = None,
    score_fn: ScoreFnText = "logit",
    query_position: Position = "pooled",
    trust_remote_code: TrustRemoteCode = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Of a forward, padding included.")] = 16384,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Measure which source of credit to trust with a reward model, without labels.

    The tokens that a source names are deleted, and the score is looked at: how far it moves against its
    verdict (the side of the mean that it is on), beyond what random deletion does, as a share of what
    leave-one-out reaches with a forward per token. A source that this model does not have is a row that says
    why.
    """
    from attnshape.cli.audit import audit_file

    for path in (json_file, html):
        if path is not None:
            check_output(path)
    if completions != STANDARD:
        check_input(completions)
    try:
        config = reward_model_config(model, score_fn, query_position, trust_remote_code)
        skipped = audit_file(config, completions, device, source, limit, span, batch_tokens, json_file, html)
    except (ValueError, OSError) as error:
        raise fail(error) from error
    if skipped:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model,
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; whoever reaches it can use the model.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    devices: Annotated[
        str | None,
        typer.Option(help="One worker process each: cuda:0,cuda:1 or cpu; by default every GPU."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ATTNSHAPE_API_KEY", help="Token that requests must bring as 'Authorization: Bearer'."
        ),
    ] = None,
    source: Source = "attention",
    layer: Layer = None,
    span: Span = 1,
    score_fn: ScoreFnText = "logit",
    query_position: Position = "pooled",
    trust_remote_code: TrustRemoteCode = False,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Of a batch, padding included; longer completions are refused.")
    ] = 16384,
    max_pending: Annotated[
        int, typer.Option(min=1, help="Completions held at once; more are asked to come again.")
    ] = 2048,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 4 << 20,
) -> None:
    """Answer score and credit per token over HTTP: POST /score, GET /health, GET /metrics.

    Sources with signs answer token_rewards, and null as credit.

    SIGTERM or Ctrl-C ends it when all accepted requests are answered.
    """
    try:
        from attnshape.serve.app import ServeConfig, run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "prometheus_client", "uvicorn"):
            raise
        raise fail("attnshape serve needs: pip install fastapi uvicorn prometheus-client") from error

    every = devices or ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "cpu"
    try:
        config = ServeConfig(
            **vars(
                reward_model_config(model, score_fn, query_position, trust_remote_code, source, layer, span)
            ),
            devices=tuple(device.strip() for device in every.split(",")),
            max_batch_tokens=max_batch_tokens,
            max_pending=max_pending,
            max_body_bytes=max_body_bytes,
            api_key=api_key,
        )
        errors.print(f"loading {model} on {every}")
        run(config, host, port, lambda url: errors.print(f"{model} on {every} is served at {url}"))
    except (ValueError, OSError) as error:
        raise fail(error) from error
