"""The command line: ``attnshape …``, also ``python -m attnshape``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import attnshape
from attnshape.files import whole_file
from attnshape.text.load import (
    RewardModelConfig,
    SourceName,
    check_device,
    parse_layers,
    parse_query_position,
)
from attnshape.text.score_fn import parse_score_fn
from attnshape.types import Backend

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from typer.core import TyperGroup
except ModuleNotFoundError:
    sys.exit("the command line needs: pip install typer rich")

if TYPE_CHECKING:
    from attnshape.bench.measure import Measurement
    from attnshape.compare import Case, Worst
    from attnshape.doctor import Report
    from attnshape.text.partial import Partial

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


def main() -> None:
    app()


errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def _fail(message: object) -> typer.Exit:
    errors.print(" ".join(str(message).split()), style="red")
    return typer.Exit(1)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True)


def _checked_device(device: str | None) -> str | None:
    if device is not None:
        try:
            check_device(device)
        except ValueError as error:
            raise _fail(error) from error
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
_DEVICE = typer.Option(callback=_checked_device, help="Where to compute: cpu, cuda, cuda:1, …")
Device = Annotated[str, _DEVICE]
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


def _reward_model(
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


@app.command()
def compare(
    *,
    backend: Annotated[Backend, typer.Option(help="The implementation under test.")] = "auto",
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Triton kernels in its interpreter.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes only.")] = False,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Compare the fast implementation with the float64 reference; exit status 1 if they differ.

    Printed is the error of each output's worst element beside its bound, over masks, padding sides, mask
    semantics, discounts and kinds of attention layer.
    """
    if interpret and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # it reads the variable when it is imported
            os.execv(sys.executable, [sys.executable, "-m", "attnshape", *sys.argv[1:]])
    if interpret and backend == "auto":
        backend = "triton"
    from attnshape.compare import compare as compare_case
    from attnshape.compare import grid

    cases = list(grid(quick))
    worst: dict[tuple[str, str], dict[str, Worst]] = {}
    failures: list[tuple[Case, str, Worst]] = []
    with _progress() as progress:
        for case in progress.track(cases, description="comparing"):
            try:
                outputs = compare_case(case, backend, device)
            except (ValueError, RuntimeError) as error:
                raise _fail(f"{error} (in {_name(case)})") from error
            row = worst.setdefault(
                (" ".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")), {}
            )
            for name, found in outputs.items():
                row[name] = max(row.get(name, found), found, key=lambda w: w.fraction)
                if not found.ok:
                    failures.append((case, name, found))

    console = Console(highlight=False)
    console.print(_table(worst, f"backend {backend} on {device}"))
    for case, name, found in failures:
        console.print(
            f"{name}: error {found.error:.3g}, bound {found.bound:.3g} in {_name(case)}", style="red"
        )
    console.print(f"{len(cases)} cases, {len(failures)} outputs beyond their bounds")
    if failures:
        raise typer.Exit(1)


def _table(worst: dict[tuple[str, str], dict[str, Worst]], title: str) -> Table:
    table = Table("B S R Hq Hkv D", "dtype", "output", title=title)
    for heading in ("error", "bound", "of bound"):
        table.add_column(heading, justify="right")
    for group, row in worst.items():
        for name, w in row.items():
            figures = (f"{w.error:.1e}", f"{w.bound:.1e}", f"{w.fraction:.0%}")
            table.add_row(*group, name, *figures, style=None if w.ok else "red")
            group = ("", "")
        table.add_section()
    return table


def _name(case: Case) -> str:
    settings = {**case.shape._asdict(), "dtype": case.dtype, **case.setting._asdict()}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@app.command()
def doctor(
    *, as_json: Annotated[bool, typer.Option("--json", help="For a bug report or a machine.")] = False
) -> None:
    """Say what this installation can do: versions, devices, and which backend each kind of input takes.

    Each kind of input is tried on each device and held against the float64 reference. Exit status 1 if one is
    wrong, or a package that is needed is missing.
    """
    from attnshape.doctor import examine

    report = examine()
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        console.print_json(json.dumps(dataclasses.asdict(report) | {"healthy": report.healthy}, default=str))
    else:
        _print_report(console, report)
    if not report.healthy:
        raise typer.Exit(1)


def _print_report(console: Console, report: Report) -> None:
    console.print(", ".join(f"{name} {version or 'missing'}" for name, version in report.versions.items()))
    for device, name in report.devices.items():
        console.print(f"{device}: {name}")
    if report.no_gpu:
        console.print(f"no GPU: {report.no_gpu}")
    table = Table("device", "attention in", "backend", "why not Triton", "against the reference")
    for x in report.checked:
        verdict = "an error, below" if isinstance(x.error, str) else f"{x.error:.0%} of its bound"
        row = (x.device, x.dtype, x.backend or "none", x.why_not_triton or "", verdict)
        table.add_row(*row, style=None if x.right else "red")
    console.print(table)
    for x in report.checked:
        if isinstance(x.error, str):
            console.print(f"{x.device}, {x.dtype}: {x.error}", style="red", markup=False)
    kept = report.kept_in or "nowhere: each process compiles them; set NUMBA_CACHE_DIR"
    console.print(f"compiled loops are kept in: {kept}")
    for extra, packages in report.missing.items():
        if packages:
            console.print(f"for attnshape {extra}: pip install {' '.join(packages)}")
    if report.used_with:
        installed = ", ".join(f"{name} {version}" for name, version in report.used_with.items())
        console.print(f"installed beside it: {installed}")


@app.command()
def bench(
    *,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each call is timed, about.")] = 0.5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write every figure to, with its spread.")
    ] = None,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Time every operation on this machine, beside plain PyTorch and a copy of as many bytes.

    Plain PyTorch is what a PPO code writes without this library: eager attention over repeated keys, a loop
    over tokens. The copy is the limit of what moves bytes only. A result is first compared with the float64
    reference: one that is wrong is not timed, and the exit status is 1. On a CPU or a GPU, in about a minute.
    """
    from attnshape.bench.machine import in_words, machine_facts
    from attnshape.bench.measure import WrongResultError, measure, quick_cases

    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise _fail(f"there is no folder {json_file.resolve().parent}")
    where = torch.device(device)
    loads = [os.getloadavg()[0]]
    cases = list(quick_cases(where))
    measured: list[Measurement] = []
    wrong: list[str] = []
    with _progress() as progress:
        for case in progress.track(cases, description="measuring"):
            try:
                measured.append(measure(case, where, seconds))
            except WrongResultError as error:
                wrong.append(str(error))
    loads.append(os.getloadavg()[0])
    machine = machine_facts(where)
    if json_file is not None:
        rows = [m.facts() | {"ratios": {n: r._asdict() for n, r in m.ratios.items()}} for m in measured]
        json_file.write_text(
            json.dumps({"machine": machine, "load": loads, "measured": rows}, indent=1) + "\n"
        )
    console = Console(highlight=False)
    console.print(in_words(machine))
    console.print(f"load before {loads[0]:.1f}, after {loads[1]:.1f}, of {os.cpu_count()} processors")
    console.print(_bench_table(measured))
    for message in wrong:
        console.print(message, style="red")
    if wrong:
        raise typer.Exit(1)


def _bench_table(measured: list[Measurement]) -> Table:
    caption = (
        "fused: shape_rewards on queries and keys; apart: attention_credit, then shape_rewards; sweep: "
        "shape_rewards on given credit. ratio: how many times as long as ours, the median over repeats and "
        "their 10th and 90th percentile; unsteady: it moved by more than that meanwhile, so there is none."
    )
    table = Table("call", caption=caption, caption_justify="left")
    baselines = list(dict.fromkeys(name for m in measured for name in m.baselines))
    on_gpu = any(m.ours.how != "clock" for m in measured)  # where a call takes longer than its kernels
    for heading in ("ours", *(["full call"] if on_gpu else [])):
        table.add_column(heading, justify="right")
    for name in baselines:
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
    for heading in ("MB", "share of copy"):
        table.add_column(heading, justify="right")
    for m in measured:
        cells = [m.case.name, _time(m.ours.seconds), *([_time(m.ours.wall)] if on_gpu else [])]
        for name in baselines:
            timing = m.baselines.get(name)
            gain = "" if timing is None else str(m.steady_gain(name) or "unsteady")
            cells += ["" if timing is None else _time(timing.seconds), gain]
        share = m.of_copy.value
        table.add_row(*cells, f"{m.case.bytes / 1e6:.2f}", f"{share:.0%}" if share >= 0.1 else f"{share:.1%}")
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


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
            help="JSONL to write, - for standard output; by default JSONL's name + .credit.jsonl, or - for -."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page to write, each token coloured by its credit.")
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
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Score completions with a reward model and write each token's credit.

    Sources with signs (signed_rollout, gradient_value, gradient_embedding, leave_one_out) give token rewards
    in its place, which sum to zero beside a score that is spread evenly.

    Lines that cannot be read or scored are named with their number and skipped; the exit status is then 1.
    Ctrl-C keeps what is written, in a file of its own whose name is said.
    """
    from attnshape.text.file import credit_file, credit_lines
    from attnshape.text.model import CreditModel
    from attnshape.text.partial import Partial

    if out is None:
        out = STANDARD if completions == STANDARD else completions.with_suffix(".credit.jsonl")
    _check_files(completions, out, html, resume)
    partial: Partial | None = None
    try:
        config = _reward_model(model, score_fn, query_position, trust_remote_code, source, layer, span)
        if out != STANDARD:
            # Lines are known by their numbers, so only in a file that is the same, and of the same model.
            read = [completions.resolve(), *_state(completions)] if completions.is_file() else []
            weights = [_state(path) for path in sorted(Path(model).glob("*"))]
            settings = {**vars(config), "completions": read, "weights": weights, "page": html is not None}
            partial = Partial(out, html, settings, resumable=completions.is_file())
            partial.check(resume)
    except ValueError as error:
        raise _fail(error) from error
    try:
        credit_model = CreditModel.load(config, device)
        credit_model.probe()
        with _progress() as progress, contextlib.ExitStack() as stack:
            total = completions.stat().st_size if completions.is_file() else None
            task = progress.add_task(completions.name, total=total)
            lines = (
                sys.stdin.buffer if completions == STANDARD else stack.enter_context(completions.open("rb"))
            )
            options: dict[str, Any] = {
                "title": f"Credit of {completions.name}",
                "batch_size": batch_size,
                "on_skip": lambda line, reason: errors.print(f"{completions}:{line}: skipped: {reason}"),
                "on_read": lambda size: progress.advance(task, size),
            }
            if partial is not None:
                counts = credit_file(credit_model, lines, partial, **options)
            else:
                page = None if html is None else stack.enter_context(whole_file(html))
                counts = credit_lines(credit_model, lines, sys.stdout, page, **options)
    except (ValueError, OSError) as error:
        raise _fail(f"{error}{_kept(partial)}") from error
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


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check_files(source: Path, out: Path, html: Path | None, resume: bool) -> None:
    """Before work starts."""
    paths = [path for path in (source, out, html) if path is not None and path != STANDARD]
    if html == STANDARD:
        raise _fail("--html: got -, want a file")
    if len({path.resolve() for path in paths}) < len(paths):
        raise _fail("the files that are read and written must be different ones")
    if source != STANDARD and (not source.exists() or source.is_dir()):
        raise _fail(f"{source}: there is no such file")
    for path in paths[source != STANDARD :]:
        if not path.resolve().parent.is_dir():
            raise _fail(f"there is no folder {path.parent}")
        if path.is_dir():
            raise _fail(f"{path} is a folder, want a file")
    if resume and (out == STANDARD or not source.is_file()):
        raise _fail("--resume: want files; standard input cannot be read again")


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
        raise _fail("attnshape serve needs: pip install fastapi uvicorn prometheus-client") from error

    every = devices or ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "cpu"
    try:
        config = ServeConfig(
            **vars(_reward_model(model, score_fn, query_position, trust_remote_code, source, layer, span)),
            devices=tuple(device.strip() for device in every.split(",")),
            max_batch_tokens=max_batch_tokens,
            max_pending=max_pending,
            max_body_bytes=max_body_bytes,
            api_key=api_key,
        )
        errors.print(f"loading {model} on {every}")
        run(config, host, port, lambda url: errors.print(f"{model} on {every} is served at {url}"))
    except (ValueError, OSError) as error:
        raise _fail(error) from error


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
    device: Annotated[str | None, _DEVICE] = None,
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
        raise _fail("attnshape demo needs: pip install matplotlib") from error

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
        raise _fail(error) from error
