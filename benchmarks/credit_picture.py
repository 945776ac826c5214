"""The README's picture: what a pretrained reward model's credit pays each token of a review.

``python -m benchmarks.credit_picture`` scores ``REVIEW``, writes ``credit.json`` and draws it. The model is
one of ``python -m benchmarks.language models``. Of the sources that the package knows by name, this one
agreed best with people there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from attnshape import CreditModel
from attnshape.demo.plots import GAIN, LOSS
from attnshape.files import whole_file
from attnshape.text.html import FULL
from benchmarks.language.models import default_cache

OUT = Path(__file__).parent / "results" / "credit-picture"
MODEL, SOURCE = "minilm_verdict_sentences_seed-0", "leave_one_out"
REVIEW = "The plot is not bad at all, and the ending is lovely. Still, two hours of it are far too long."
"""Written for the picture."""
WIDTH, LINE, MARGIN, GAP = 7.0, 0.46, 0.1, 0.03
"""Inches; a page shows it about as wide as it is."""


def measured() -> dict[str, object]:
    """Score of the review, and what each of its tokens is paid: together the score."""
    judge = CreditModel(str(default_cache() / MODEL), source=SOURCE)
    example = judge.reader().read("", REVIEW)
    [found] = judge.score([example])
    tokens = [REVIEW[start:end] for start, end in example.offsets]
    return {
        "model": MODEL,
        "source": SOURCE,
        "review": REVIEW,
        "score": found.score,
        "tokens": tokens,
        "rewards": found.rewards,
    }


def draw(tokens: Sequence[str], rewards: Sequence[float], path: Path) -> None:
    """Every token on the colour of what it is paid, as in ``attnshape credit --html``, its number below."""
    sizes = np.abs(rewards)
    strength = np.minimum(sizes / (FULL * sizes.mean()), 1.0)
    figure = Figure(figsize=(WIDTH, 1.0), facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    x, line, placed = MARGIN, 0, []
    for token, reward, full in zip(tokens, rewards, strength, strict=True):
        word = figure.text(0, 0, token, fontsize=10.5, ha="center", va="center", parse_math=False)
        number = figure.text(0, 0, f"{reward:+.1f}", fontsize=7.5, ha="center", va="center", color="#5c5f66")
        wide = max(text.get_window_extent(renderer).width for text in (word, number)) / figure.dpi + 0.06
        if x + wide > WIDTH - MARGIN:
            x, line = MARGIN, line + 1
        placed.append((word, number, x + wide / 2, line))
        hue = np.array(to_rgb(GAIN if reward >= 0 else LOSS))
        word.set_bbox({"facecolor": 1 + (hue - 1) * full, "edgecolor": "none", "pad": 2.0})
        x += wide + GAP
    height = (line + 1) * LINE + MARGIN
    figure.set_size_inches(WIDTH, height)
    for word, number, center, row in placed:
        top = height - MARGIN - row * LINE
        word.set_position((center / WIDTH, (top - 0.1) / height))
        number.set_position((center / WIDTH, (top - 0.29) / height))
    figure.savefig(path, dpi=200)


def main() -> None:
    found = measured()
    OUT.mkdir(exist_ok=True)
    with whole_file(OUT / "credit.json") as out:
        out.write(json.dumps(found, indent=2) + "\n")
    draw(found["tokens"], found["rewards"], OUT / "credit.png")  # type: ignore[arg-type]
    print(f"score {found['score']:+.2f}: {OUT / 'credit.png'}")


if __name__ == "__main__":
    main()
