"""Every causal and sequence-classification class of transformers, and what the tap gives of it.

    python -m tests.model_sweep --part 1/8      # tries an eighth of the classes, but what was already tried
    python -m tests.model_sweep --table         # writes docs/models.md

A tiny random model of each class runs on rows of 14, 9 and 5 tokens, not padded, padded left, padded right.
What a source hands out is held to the model with eager attention (``output_attentions=True``), to what each
head gives when the others are silenced, or to finite differences of the score, for relevance with the
attention weights and the norms' denominators of the undisturbed run (``tests/support/held_fixed.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn

import attnshape
from attnshape.credit import gradient_weights
from attnshape.tap import AttentionTap
from attnshape.tap.find import attention_layers, layers_around, lookups
from attnshape.tap.tap import RELEVANCE_UP
from attnshape.text.load import SourceName
from tests.support import zoo
from tests.support.held_fixed import HeldFixed

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "models.md"
RESULTS = Path.home() / ".cache" / "attnshape" / f"model_sweep-{transformers.__version__}.jsonl"

SOURCES = tuple(name for name in get_args(SourceName) if name != "leave_one_out")  # which taps nothing
GRADIENTS = {
    "gradient_value": (1 / 64, 0.05),
    "gradient_embedding": (1 / 64, 0.05),
    "relevance": (1 / 1024, 0.01),
}
"""The larger step of their differences, and of the largest, what they may differ by."""
LENGTH, LENGTHS = 14, (14, 9, 5)
PADDINGS = ("none", "left", "right")
EQUAL = "equal"
DONE = "equal to what eager attention does, which is not all that it reports"


class Differs(AssertionError):
    """What was handed out is not what the model did."""


# A model and its input ---------------------------------------------------------------------------------


def batch(padding: str, model: Any) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS if padding != "none" else ()):
        gone = slice(None, LENGTH - length) if padding == "left" else slice(length, None)
        ids[row, gone], mask[row, gone] = zoo.PAD, 0
    if model.config.is_encoder_decoder:  # their heads score the end of the text
        last = (mask * torch.arange(LENGTH)).argmax(-1)
        ids[torch.arange(3), last] = zoo.EOS
    return {"input_ids": ids, "attention_mask": mask}


def attention_of(model: Any) -> dict[str, nn.Module]:
    models = {n: m for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}
    try:
        names = attention_layers(model, models)
    except ValueError:
        return {}
    return {name: model.get_submodule(name) for name in names}


def sharpen(model: Any) -> None:
    """Attention far from uniform, and other modules, norms and biases whose part is not lost beside it."""
    generator = torch.Generator().manual_seed(0)
    for module in attention_of(model).values():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.4, generator=generator)
            elif "bias" in name or "sink" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    done = {p for module in (*attention_of(model).values(), *embeddings) for p in module.parameters()}
    for parameter in (p for p in model.parameters() if p not in done and p.is_floating_point()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (
            noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else parameter.data + 0.2 * noise
        )


def scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A number per row: the classifier's score, or a logit of the last token."""
    logits = model(**inputs).logits
    return logits[:, 0] if logits.ndim == 2 else logits[:, -1, 7]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def eager_attention(model: Any, inputs: dict[str, Tensor], *, done: bool = False) -> list[Tensor]:
    """Of every layer, ``[B, Hq, S, S]``, float64: what eager attention reports, or what it has ``done``.

    What it has done is what it gives of values that are one where the key is and zero elsewhere.
    """
    layers, reported, found = attention_of(model), {}, {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
                reported[name] = output[1].double()

        return hook

    def pick(name: str) -> Callable[..., Any]:
        def attend(value: Tensor, call: Callable[[Tensor], Any]) -> Any:
            batch, heads, length, _ = value.shape
            given = call(torch.eye(length).to(value).expand(batch, heads, -1, -1))[0]
            found[name] = given.transpose(1, 2).double()
            return call(value)

        return attend

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager(model))
        for name, module in layers.items():
            handle = module.register_forward_hook(keep(name))
            stack.callback(handle.remove)
            if done:
                stack.enter_context(replaced_attention(module, pick(name)))
        given = model(**inputs, output_attentions=True, **_no_cache(model))
    if done:
        return [found[name] for name in layers]
    if len(reported) == len(layers):
        return [reported[name] for name in layers]
    attentions = [a.double() for a in getattr(given, "attentions", None) or () if a is not None]
    if len(attentions) != len(layers):
        raise Differs(f"eager attention reports {len(attentions)} of {len(layers)} layers")
    return attentions


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


# What each source is held to ---------------------------------------------------------------------------


def held(what: str, actual: Tensor, expected: Tensor, rtol: float = 5e-4, atol: float = 5e-6) -> None:
    if not torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=atol):
        error = (actual.double() - expected.double()).abs().max()
        raise Differs(f"{what} differs by {error:.2g} of {expected.abs().max():.2g}")


def scored_positions(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Of each row, where the last layer's output has a gradient of the score."""
    if model(**inputs).logits.ndim != 2:
        return [[int(row.nonzero().max())] for row in inputs["attention_mask"]]
    streams: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Any) -> Any:
        stream = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        streams.append(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    layer = layers_around(model, list(attention_of(model).values())[-1])[0][-1]
    handle = layer.register_forward_hook(leaf)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scores(model, inputs).sum(), streams[-1])
    handle.remove()
    return [row.abs().amax(-1).nonzero().flatten().tolist() for row in gradient]


def expected_rows(attention: Tensor, positions: list[list[int]]) -> Tensor:
    return torch.stack([attention[b, :, p].mean((0, 1)) for b, p in enumerate(positions)])


def check_attention(model: Any, inputs: dict[str, Tensor], *, done: bool) -> None:
    with torch.no_grad(), AttentionTap(model, check="always") as tap:
        model(**inputs, **_no_cache(model))
    row, positions = attnshape.attention_row(tap.take()), scored_positions(model, inputs)
    live = [b for b, p in enumerate(positions) if inputs["attention_mask"][b, p].any()]  # not of padding
    expected = expected_rows(eager_attention(model, inputs, done=done)[-1], positions)
    held("the row", row[live], expected[live])


def check_queries(layer: Any, attention: Tensor, mask: Tensor) -> None:
    """Every query that is not padding."""
    for p in range(LENGTH):
        live = mask[:, p] != 0
        at = dataclasses.replace(layer, query_position=torch.full((len(mask),), p, dtype=torch.int32))
        held(f"query {p}", attnshape.attention_row(at)[live], attention[live, :, p].mean(1))


def check_columns(model: Any, inputs: dict[str, Tensor], *, done: bool) -> None:
    with torch.no_grad(), AttentionTap(model, query_position="all", check="always") as tap:
        model(**inputs, **_no_cache(model))
    check_queries(tap.take(), eager_attention(model, inputs, done=done)[-1], inputs["attention_mask"])


@contextmanager
def replaced_attention(module: nn.Module, attend: Callable[..., Any]) -> Iterator[None]:
    """``attend(function, value, call)`` in the place of the module's attention function."""
    entries = [(table, name, table.get(name), function) for table, name, function in lookups(module)]

    def wrapped(function: Any) -> Any:
        if isinstance(function, MethodType):  # GPT-J's, which returns heads first

            def method(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
                def given(v: Tensor) -> Any:
                    heads, weights = function(query, key, v, *args)
                    return heads.transpose(1, 2), weights

                heads, weights = attend(value, given)
                return heads.transpose(1, 2), weights

            return method

        def call(given: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            if given is not module:
                return function(given, query, key, value, *args, **options)
            return attend(value, lambda v: function(given, query, key, v, *args, **options))

        call.__name__ = function.__name__
        return call

    for table, name, _, function in entries:
        table[name] = wrapped(function)
    try:
        yield
    finally:
        for table, name, before, _ in entries:
            if before is None:
                del table[name]
            else:
                table[name] = before


def head_norms(model: Any, module: nn.Module, heads: int, inputs: dict[str, Tensor]) -> Tensor:
    """``|W_O,h v[h, t]|``, by what the module gives when one head passes its values on, and no other."""

    def given(head: int | None) -> Tensor:
        out: list[Tensor] = []

        def alone(value: Tensor, call: Any) -> Any:
            own = value.repeat_interleave(heads // value.shape[1], 1).transpose(1, 2)
            picked = torch.zeros_like(own)
            if head is not None:
                picked[:, :, head] = own[:, :, head]
            return picked, None

        handle = module.register_forward_hook(
            lambda m, a, o: out.append((o[0] if isinstance(o, tuple) else o).double())
        )
        with replaced_attention(module, alone), torch.no_grad():
            model(**inputs, **_no_cache(model))
        handle.remove()
        return out[0]

    nothing = given(None)
    return torch.stack([(given(head) - nothing).norm(dim=-1) for head in range(heads)], 1)


def check_rollout(model: Any, inputs: dict[str, Tensor], source: str, *, done: bool) -> None:
    with torch.no_grad(), AttentionTap(model, source=source, check="always") as tap:  # type: ignore[arg-type]
        model(**inputs, **_no_cache(model))
    taken, attentions = tap.take(), eager_attention(model, inputs, done=done)
    live = inputs["attention_mask"].bool()
    for layer, attention, module in zip(taken, attentions, attention_of(model).values(), strict=True):
        of = layer if source == "rollout" else layer.inputs
        check_queries(of, attention, inputs["attention_mask"])
        if source == "rollout" and inputs["attention_mask"].all():
            norms = head_norms(model, module, of.query.shape[1], inputs).transpose(1, 2)
            held("a head's norm", layer.value_norm.transpose(1, 2)[live], norms[live], rtol=1e-3, atol=1e-5)


def differences(
    score: Callable[[Tensor], Tensor], step: float, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Of the score by a factor on each token, ``[B, S]``, where they do not depend on the step, the largest.

    ``score`` is of as many copies of the rows as a row has tokens; its factors are ``[copies * B, S]``.
    """
    rows = len(LENGTHS)
    own = torch.eye(LENGTH, dtype=torch.float64).repeat_interleave(rows, 0)

    def difference(step: float) -> Tensor:
        return (score(1 + step * own) - score(1 - step * own)).view(LENGTH, rows).T / (2 * step)

    wide, near = difference(step), difference(step / 2)
    found, unsure = (4 * near - wide) / 3, (near - wide).abs()
    if (unsure > 0.4 * tolerance * found.abs().max()).any():  # experts change on the way, or it bends
        wide, near = difference(step / 16), difference(step / 32)
        finer = (near - wide).abs() < unsure
        found = torch.where(finer, (4 * near - wide) / 3, found)
        unsure = torch.where(finer, (near - wide).abs(), unsure)
    largest = float(found.abs().max())
    return found, unsure < 0.4 * tolerance * largest, largest


@contextmanager
def scaled(model: Any, source: str, ids: Tensor, factors: Tensor) -> Iterator[None]:
    """What the source differentiates the score by, times factors ``[B, S]``."""

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        own = factors
        if args[0].shape != ids.shape:  # XLNet's, tokens first
            own = factors.T
        elif not torch.equal(args[0], ids):  # a decoder's, one position later
            own = torch.cat([torch.ones_like(factors[:, :1]), factors[:, :-1]], 1)
        return output * own[..., None].to(output)

    def entered(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        hidden = args[0] if args else options["hidden_states"]
        hidden = hidden * factors[..., None].to(hidden)
        return ((hidden, *args[1:]), options) if args else (args, options | {"hidden_states": hidden})

    with ExitStack() as stack:
        if source == "gradient_value":
            first = next(iter(attention_of(model).values()))
            change = replaced_attention(first, lambda v, call: call(v * factors[:, None, :, None].to(v)))
            stack.enter_context(change)
        elif source == "relevance":
            layers = list(attention_of(model).values())
            _, block = layers_around(model, layers[len(layers) // RELEVANCE_UP])
            stack.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
        else:
            embedding = model.get_input_embeddings()
            same = (m for m in model.modules() if getattr(m, "weight", None) is embedding.weight)
            for module in {embedding, *(m for m in same if isinstance(m, nn.Embedding))}:
                stack.callback(module.register_forward_hook(embedded).remove)
        yield


def check_gradient(model: Any, inputs: dict[str, Tensor], source: str) -> None:
    mask = inputs["attention_mask"]
    if source != "relevance" and not mask.all():
        return
    tap = AttentionTap(model, source=source)  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            weights = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(scores(model, inputs).sum(), weights, allow_unused=True)
    except Exception as error:
        raise ValueError("its own forward or backward raises with gradients enabled") from error
    with torch.enable_grad(), tap:
        score = scores(model, inputs)
    response = attnshape.Response(mask, start=torch.zeros(3, dtype=torch.int32))
    got = gradient_weights(score, tap.take(), response)
    step, tolerance = GRADIENTS[source]
    copies = {name: x.repeat(LENGTH, 1) for name, x in inputs.items()}
    constants = HeldFixed()

    @torch.no_grad()
    def score_of(factors: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(scaled(model, source, copies["input_ids"], factors))
            if source == "relevance":
                for module in attention_of(model).values():
                    stack.enter_context(replaced_attention(module, constants.attend))
                stack.enter_context(constants)
            return scores(model, copies).double()

    undisturbed = score_of(torch.ones(copies["input_ids"].shape, dtype=torch.float64))[:3]
    if not torch.allclose(undisturbed, score.detach().double(), rtol=1e-4, atol=1e-5):
        raise ValueError("it was not compared: it gives another score when nothing is disturbed")
    expected, smooth, largest = differences(score_of, step, tolerance)
    if smooth.double().mean() < 0.5:
        raise ValueError(
            "it was not compared: at half of the tokens differences of its score depend on the step "
            "(experts, codes)"
        )
    expected = expected.masked_fill(mask == 0, 0.0)
    held("the gradient", got[smooth], expected[smooth], rtol=0.0, atol=tolerance * largest + 1e-9)


# All of it ---------------------------------------------------------------------------------------------


def tried(model: Any, source: str) -> str:
    """``EQUAL``, or why the source is refused."""
    if source in GRADIENTS:
        return verdict(model, lambda inputs: check_gradient(model, inputs, source))
    check = {"attention": check_attention, "columns": check_columns}.get(
        source, lambda *args, **options: check_rollout(*args, source, **options)
    )
    found = verdict(model, lambda inputs: check(model, inputs, done=False))
    if (
        found.startswith("differs")
        and verdict(model, lambda inputs: check(model, inputs, done=True)) == EQUAL
    ):
        return DONE
    return found


def verdict(model: Any, check: Callable[[dict[str, Tensor]], None]) -> str:
    for padding in PADDINGS:
        try:
            check(batch(padding, model))
        except Differs as error:
            return f"differs: {error} ({padding} padding)"
        except ValueError as error:
            return f"refused: {reason(str(error))}"
    return EQUAL


def in_float64(model: Any, paddings: Iterable[str]) -> None:
    """Where its forward can do that: differences lose digits."""
    experts = getattr(model.config, "_experts_implementation", None)
    model.double().set_experts_implementation("eager")  # others know no float64
    try:
        with torch.no_grad():
            logits = [model(**batch(padding, model)).logits for padding in paddings]
        fits = all(x.isfinite().all() for x in logits)  # a mask may overflow
    except Exception:
        fits = False
    if not fits:
        model.float().set_experts_implementation(experts)


def reason(message: str) -> str:
    """What went before the advice, without names that differ from layer to layer."""
    message = message.split("; want")[0].replace("\n", " ")
    message = re.sub(r"[\w.]*\.\d+\.[\w.]*", "a layer", message)
    return re.sub(r"[\d.e-]+ of head \d+'s attention is elsewhere, at most [\d.e-]+ is rounding", "", message)


def sweep(name: str, sources: Iterable[str] = SOURCES) -> dict[str, str]:
    """A verdict for each source, or ``{"model": "not built: …"}``."""
    try:
        model = zoo.build(name)
        sharpen(model)
        with torch.no_grad():
            logits = model(**batch("none", model)).logits
        if not logits.isfinite().all():
            return {"model": "not built: its logits are not finite"}
    except Exception as error:
        return {"model": f"not built: {type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    found = {}
    for source in sources:
        if source in GRADIENTS:
            in_float64(model, PADDINGS if source == "relevance" else ("none",))
        try:
            found[source] = tried(model, source)
        except Exception as error:
            found[source] = f"differs: {type(error).__name__}: {error}"
    return found


def known_of(results: Path) -> dict[str, dict[str, str]]:
    """What was found of each class; what was found later counts."""
    known: dict[str, dict[str, str]] = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        name, found = json.loads(line)
        built = {} if "model" in known.get(name, {"model": ""}) else known[name]
        known[name] = found if "model" in found else built | found
    return known


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.model_sweep", description=__doc__)
    parser.add_argument("--part", default="1/1", help="which of how many equal parts")
    parser.add_argument("--only", nargs="*", help="these classes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table of what was found")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    known = known_of(given.results)
    if given.table:
        TABLE.write_text(table(known))
        return
    part, of = (int(x) for x in given.part.split("/"))
    for name in given.only or list(zoo.classes())[part - 1 :: of]:
        tried_already = {} if given.only else known.get(name, {})
        wanted = [source for source in SOURCES if source not in tried_already]
        if "model" in tried_already or not wanted:
            continue
        found = sweep(name, wanted)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a") as file:
            file.write(json.dumps([name, found]) + "\n")
        print(name, json.dumps(found, indent=1), flush=True)


HEADER = """# Models

What `AttentionTap` gives of every causal and sequence-classification class of transformers {version}:
{count} classes. Written by `python -m tests.model_sweep --table`; `tests/tap/test_models.py` tries a sample
again.

Each class was built small, with random weights, and run on rows of 14, 9 and 5 tokens: not padded, padded
left, padded right. **equal** is equal to the same model:

- *attention*: the row of the token that is scored, to the one that eager attention reports
  (`output_attentions=True`) at the token that the gradient of the score leads to;
- *columns*: the rows of all queries;
- *rollout*: those of all layers, and what each head moves, to what a layer gives when the others are silent;
- *signed*: the rows of all layers;
- *value*, *embedding*: gradient × value of the first layer, × embedding, to differences of the score, within
  5% of the largest;
- *relevance*: to differences of the score by factors on the hidden states that enter the layer, within 1% of
  the largest, where attention weights and what norms divide by stay those of the undisturbed run. Weights are
  what the attention function gives of values that are one where the key is and zero elsewhere; what norms
  divide by is found among the operations that run: layer norms, and roots and norms of one number per token.

Differences are compared where they do not depend on the step, at half of the tokens at least: elsewhere other
experts are chosen. Those of *value* and *embedding* are compared without padding.

Numbers are reasons, of refusal mostly, below the table. **equal\\*** is equal to what eager attention does,
where it reports something else (it leaves the sinks out).


"""


def general(text: str) -> str:
    """A reason without the names of the model at hand."""
    text = text.removeprefix("refused: ").removeprefix("source: ").removeprefix("model: ")
    text = re.sub(r"^'\w+' takes it", "the source takes it", text)
    text = re.sub(r"carries \[[\d, ]+\], not one", "carries no one", text)
    return re.sub(
        r"\b(?!Attention(Interface|Inputs))([A-Z]\w*[a-z]\w*[A-Z]\w*|[A-Z]\w+(Model|Attention))", "it", text
    )


def cells(found: dict[str, str]) -> list[str]:
    """What the table says of a class, reasons spelt out."""
    return [{EQUAL: "equal", DONE: "equal\\*"}.get(found[s], general(found[s])) for s in SOURCES]


def table(known: dict[str, dict[str, str]]) -> str:
    built = {name: cells(found) for name, found in sorted(known.items()) if "model" not in found}
    counts = Counter(cell for row in built.values() for cell in row if not cell.startswith("equal"))
    numbers = {text: str(n) for n, (text, _) in enumerate(counts.most_common(), 1)}
    lines = [HEADER.format(version=transformers.__version__, count=len(known))]
    lines += [
        "",
        "| class | attention | columns | rollout | signed | value | embedding | relevance |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(numbers.get(cell, cell) for cell in row)} |" for name, row in built.items()
    ]
    of = {
        source: sum(row[i].startswith("equal") for row in built.values()) for i, source in enumerate(SOURCES)
    }
    lines += [
        f"| **equal, of {len(built)}** | {' | '.join(str(of[source]) for source in SOURCES)} |",
        "",
        "Reasons:",
        "",
        *(f"{number}. {text}" for text, number in numbers.items()),
        "",
        "Not built:",
        "",
    ]
    lines += [
        f"- {name}: {found['model'].removeprefix('not built: ')}"
        for name, found in sorted(known.items())
        if "model" in found
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def sentence(text: str) -> str:
    """What docs/tap.md says of the table."""
    version = re.findall(r"class of transformers ([\w.]+):", text)[0]
    found = re.findall(r"^\| \*\*equal, of (.*) \|$", text, re.M)[0]
    built, row, columns, rollout, _, value, embedding, relevance = re.findall(r"\d+", found)
    return (
        f"Of the {built} causal and sequence-classification classes of transformers {version} that could be "
        f"built small, {row} have a row equal to eager attention's, {columns} all rows, {rollout} a rollout, "
        f"{value} gradient × value, {embedding} gradient × embedding and {relevance} relevance; the table "
        "has the reason of every other, and none differs ([the table](models.md))."
    )


if __name__ == "__main__":
    main()
