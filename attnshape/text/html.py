"""Completions as a self-contained web page, each token coloured by what credit pays it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

FULL = 6.0
"""Even shares at which a token has its full colour; at one it is pale."""


@dataclass(frozen=True)
class View:
    """What one source says of a completion: ``rewards[i]`` is what the text ``tokens[i]`` is paid."""

    source: str
    rewards: Sequence[float]
    """Score times credit, or an even share of the score and a token reward: they sum to the score."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Shown beside it, such as ``entropy``; of the first view completions are sorted by them."""


@dataclass(frozen=True)
class CreditItem:
    """One completion, as one source or several see it."""

    prompt: str
    tokens: Sequence[str]
    score: float
    views: Sequence[View]
    note: str = ""


def credit_page(title: str, items: Iterable[CreditItem]) -> str:
    """One page without anything from outside; every text is escaped, and no script but its own can run.

    A page too long for memory is ``page_head``, a ``credit_section`` per completion, and ``PAGE_FOOT``.

    Raises:
        ValueError: a view has not as many rewards as there are tokens.
    """
    sections = (credit_section(number, item) for number, item in enumerate(items, 1))
    return "".join([page_head(title), *sections, PAGE_FOOT])


def page_head(title: str, note: str = "") -> str:
    told = f"<p>{escape(note)}</p>\n" if note else ""
    return _HEAD.replace("TITLE", escape(title)).replace("NOTE\n", told)


def credit_section(number: int, item: CreditItem) -> str:
    for view in item.views:
        if len(item.tokens) != len(view.rewards):
            raise ValueError(
                f"tokens and rewards must be as many, got {len(item.tokens)} and {len(view.rewards)}"
            )
    keys = {"score": item.score, **(item.views[0].metrics if item.views else {})}
    data = "".join(f' data-{name.replace("_", "-")}="{_number(x)}"' for name, x in keys.items())
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    prompt = f'<p class="text prompt">{_visible(item.prompt)}</p>' if item.prompt else ""
    views = "".join(_view(view, item) for view in item.views)
    return (
        f'<section id="c{number}"{data}><h2><a href="#c{number}">{number}</a> '
        f'<span>score {_number(item.score)}</span></h2>{note}{prompt}<div class="views">{views}</div>'
        "</section>\n"
    )


def _view(view: View, item: CreditItem) -> str:
    facts = "".join(
        f" <span>{escape(name.replace('_', ' '))} {_number(x)}</span>" for name, x in view.metrics.items()
    )
    sizes = [abs(r) for r in view.rewards if math.isfinite(r)]
    even = sum(sizes) / len(sizes) if sizes else 0.0
    tokens = "".join(
        _token(text, reward, even, first=i == 0)
        for i, (text, reward) in enumerate(zip(item.tokens, view.rewards, strict=True))
    )
    source = escape(view.source)
    return (
        f'<figure><figcaption><b>{source}</b>{facts}</figcaption><p class="text" role="group" '
        f'aria-label="{source}: tokens, arrow keys move">{tokens}</p></figure>'
    )


def _token(text: str, reward: float, even: float, *, first: bool) -> str:
    stop = ' tabindex="0"' if first else ""
    word = text.lstrip(" ") or text  # where a line breaks, a coloured space would be left behind
    before = text[: len(text) - len(word)]
    if not math.isfinite(reward):
        return f'{before}<span class="t bad" title="{reward}"{stop}>{_visible(word)}</span>'
    shares = abs(reward) / even if even else 0.0
    sign = " minus" if reward < 0 else ""
    return (
        f'{before}<span class="t{sign}" style="--a:{min(shares / FULL, 1):.3f}" '
        f'title="{_number(reward)}, {shares:.1f} × even"{stop}>{_visible(word)}</span>'
    )


def _number(x: float) -> str:
    return f"{x:.3g}"


def _visible(text: str) -> str:
    """Line breaks and empty tokens would leave nothing to point at."""
    return escape(text).replace("\n", "⏎\n") if text else "∅"


_SCRIPT = """
const main = document.querySelector("main"), readout = document.querySelector("body > output");
const sections = [...main.children], controls = document.querySelector("form");
const key = (section, name) => parseFloat(section.getAttribute("data-" + name));
function arrange() {
  const by = controls.sort.value, sign = controls.down.checked ? -1 : 1;
  const words = controls.words.value.toLowerCase();
  const low = controls.low.value || -Infinity, high = controls.high.value || Infinity;
  const order = sections.map((s, i) => [by === "order" ? i : key(s, by), i, s]);
  order.sort((a, b) => (isNaN(a[0]) - isNaN(b[0])) || sign * (a[0] - b[0]) || a[1] - b[1]);
  let shown = 0;
  for (const [, , section] of order) {
    const score = key(section, "score");
    const texts = [...section.querySelectorAll(".text")].map((text) => text.textContent);
    section.hidden = !texts.join("\\n").toLowerCase().includes(words) || score < low || score > high;
    shown += !section.hidden;
    main.append(section);
  }
  controls.count.value = shown + " of " + sections.length;
}
function tell(token) {
  const at = [...token.parentNode.children].indexOf(token), lines = [];
  document.querySelectorAll(".now").forEach((t) => t.classList.remove("now"));
  for (const text of token.closest(".views").querySelectorAll(".text")) {
    const twin = text.children[at];
    twin.classList.add("now");
    lines.push(text.previousSibling.firstChild.textContent + ": " + twin.title);
  }
  readout.value = "“" + token.textContent + "”  " + lines.join("   ");
}
function focus(token) {
  for (const stop of token.parentNode.querySelectorAll("[tabindex]")) stop.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}
main.addEventListener("pointerover", (event) => event.target.matches(".t") && tell(event.target));
main.addEventListener("focusin", (event) => event.target.matches(".t") && tell(event.target));
main.addEventListener("click", (event) => {
  if (event.target.matches(".t") && getSelection().isCollapsed) focus(event.target);
});
main.addEventListener("keydown", (event) => {
  const token = event.target;
  if (!token.matches(".t") || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const to = { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
    Home: token.parentNode.firstElementChild, End: token.parentNode.lastElementChild }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to) focus(to);
});
controls.addEventListener("input", arrange);
controls.addEventListener("submit", (event) => event.preventDefault());
for (const option of [...controls.sort.options])
  if (option.value !== "order" && !sections.some((s) => !isNaN(key(s, option.value)))) option.remove();
controls.hidden = sections.length < 2;
arrange();
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-HASH'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1f; --soft: #5c5f66; --line: #d9dbe0;
  --plus: #f5a623; --minus: #7db4f5; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --ink: #f2f2f4; --soft: #a3a7b0;
  --line: #353941; --plus: #a65a00; --minus: #1f5fbf; } }
body { background: var(--page); color: var(--ink); font: 1rem/1.7 system-ui, sans-serif; max-width: 80rem;
  margin: 2rem auto 6rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: .95rem; margin: 0; }
h2 span, figcaption span { margin-left: 1em; font-variant-numeric: tabular-nums; }
a { color: inherit; }
section { border-top: 1px solid var(--line); padding: .8rem 0; }
.note, .prompt, .legend, figcaption, form { color: var(--soft); }
.note { margin: .2rem 0; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: .6rem 2rem; }
figure { margin: .2rem 0; }
figcaption { font-size: .85rem; }
.text { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { --hue: var(--plus); border-radius: .2em; padding: .1em 0; print-color-adjust: exact;
  background: color-mix(in srgb, var(--hue) calc(var(--a, 0) * 100%), var(--page)); }
.t:hover, .t:focus, .now { outline: 2px solid var(--ink); }
.minus { --hue: var(--minus); }
.bad { text-decoration: underline wavy; }
.scale { display: inline-block; width: 8rem; height: 1em; vertical-align: -.15em;
  border: 1px solid var(--line);
  background: linear-gradient(to right, var(--minus), var(--page), var(--plus)); }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: baseline; padding-bottom: .6rem; }
form[hidden] { display: none; }
input[type=number] { width: 6em; }
body > output { position: fixed; inset: auto 0 0 0; padding: .4rem 1rem; background: var(--page);
  border-top: 1px solid var(--line); font: .85rem/1.5 system-ui, sans-serif; max-height: 30vh; overflow: auto;
  font-variant-numeric: tabular-nums; white-space: pre-wrap; }
body > output:empty { display: none; }
</style>
</head>
<body>
<h1>TITLE</h1>
NOTE
<p class="legend">Colour is what a token is paid: score times credit, or, of a source with signs, an even
share of the score and the token's own reward. Negative <span class="scale" role="img"
aria-label="from blue over none to orange"></span> positive, full from FULL times an even share on, so that
even credit is pale. Point at a token, tap it, or move to it (Tab, then arrow keys) to read its number.
Prompts are grey.</p>
<form hidden>
<label>sort by <select name="sort"><option value="order">order</option><option value="score">score</option>
<option value="entropy">entropy</option><option value="response-attention">response attention</option>
</select></label>
<label><input type="checkbox" name="down"> largest first</label>
<label>with the words <input type="search" name="words"></label>
<label>score from <input type="number" step="any" name="low"></label>
<label>to <input type="number" step="any" name="high"></label>
<output name="count"></output>
</form>
<main>
""".replace("HASH", _HASH).replace("FULL", f"{FULL:g}")
PAGE_FOOT = f'</main>\n<output aria-live="polite"></output>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
