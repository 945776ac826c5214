"""Completions as a self-contained web page, each token coloured by its credit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class CreditItem:
    """One completion: ``credit[i]`` belongs to the text ``tokens[i]``."""

    prompt: str
    tokens: Sequence[str]
    credit: Sequence[float]
    score: float
    note: str = ""


def credit_page(title: str, items: Iterable[CreditItem]) -> str:
    """One page, without scripts and without anything from outside; every text is escaped.

    A page too long for memory is ``page_head``, a ``credit_section`` per completion, and ``PAGE_FOOT``.

    Raises:
        ValueError: an item has not as many tokens as credits.
    """
    sections = (credit_section(number, item) for number, item in enumerate(items, 1))
    return "".join([page_head(title), *sections, PAGE_FOOT])


def page_head(title: str) -> str:
    return _HEAD.replace("TITLE", escape(title))


def credit_section(number: int, item: CreditItem) -> str:
    if len(item.tokens) != len(item.credit):
        raise ValueError(f"tokens and credit must be as many, got {len(item.tokens)} and {len(item.credit)}")
    peak = max((abs(c) for c in item.credit if math.isfinite(c)), default=0.0)
    tokens = "".join(_token(text, c, peak) for text, c in zip(item.tokens, item.credit, strict=True))
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    return (
        f'<section id="c{number}"><h2><a href="#c{number}">{number}</a> '
        f"<span>score {item.score:.4g}</span> <span>largest credit {peak:.3g}</span></h2>{note}"
        f'<p class="text"><span class="prompt">{escape(item.prompt)}</span>{tokens}</p></section>\n'
    )


def _token(text: str, credit: float, peak: float) -> str:
    if not math.isfinite(credit):
        return f'<span class="t bad" title="{credit}">{_visible(text)}</span>'
    strength = abs(credit) / peak if peak else 0.0
    sign = " minus" if credit < 0 else ""
    return f'<span class="t{sign}" style="--a:{strength:.3f}" title="{credit:.4g}">{_visible(text)}</span>'


def _visible(text: str) -> str:
    """Line breaks and empty tokens would leave nothing to point at."""
    return escape(text).replace("\n", "⏎\n") if text else "∅"


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1f; --soft: #5c5f66; --line: #d9dbe0;
  --plus: #f5a623; --minus: #7db4f5; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --ink: #f2f2f4; --soft: #a3a7b0;
  --line: #353941; --plus: #a65a00; --minus: #1f5fbf; } }
body { background: var(--page); color: var(--ink); font: 1rem/1.7 system-ui, sans-serif; max-width: 52rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: .9rem; margin: 0; color: var(--soft); font-weight: 600; }
h2 span { margin-left: 1em; font-variant-numeric: tabular-nums; }
a { color: inherit; }
section { border-top: 1px solid var(--line); padding: .8rem 0; }
.note, .prompt, .legend { color: var(--soft); }
.note { margin: .2rem 0; }
.text { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { --hue: var(--plus); border-radius: .2em; padding: .1em 0;
  background: color-mix(in srgb, var(--hue) calc(var(--a, 0) * 100%), var(--page)); }
.t:hover { outline: 2px solid var(--ink); }
.minus { --hue: var(--minus); }
.bad { text-decoration: underline wavy; }
.scale { display: inline-block; width: 8rem; height: 1em; vertical-align: -.15em;
  border: 1px solid var(--line);
  background: linear-gradient(to right, var(--minus), var(--page), var(--plus)); }
</style>
</head>
<body>
<h1>TITLE</h1>
<p class="legend">Each token is coloured by its credit, relative to the largest in its completion:
negative <span class="scale" role="img" aria-label="from blue over none to orange"></span> positive.
Point at a token to read its value. The prompt is grey.</p>
"""
PAGE_FOOT = "</body>\n</html>\n"
