"""The coloured page: what a reader sees, what a browser loads, and that no text gets out of its place."""

import itertools
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnshape.text.html import PAGE_FOOT, CreditItem, credit_page, credit_section, page_head

ATTACK = "</span><script>alert(1)</script><img src=x onerror=alert(1)> & \"' <!--"
VOID = {"meta"}


class Page(HTMLParser):
    """Token texts with their attributes, and everything else by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.tokens: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
            if "t" in dict(attrs).get("class", "").split():
                self.tokens.append(("", dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        classes = attributes.get("class", "").split()
        if "t" in classes:
            self.tokens[-1] = (self.tokens[-1][0] + data, attributes)
        for key in [tag, *classes]:
            self.texts[key] = self.texts.get(key, "") + data


def strength(attributes: dict) -> float:
    return float(re.fullmatch(r"--a:([\d.]+)", attributes["style"])[1])


def test_tokens_carry_value_and_colour() -> None:
    item = CreditItem("Is it?", ["Not", " bad", "!"], [0.25, 0.5, -0.125], 1.5, "a note")
    page = Page(credit_page("A title", [item]))
    assert [text for text, _ in page.tokens] == ["Not", " bad", "!"]
    assert [attributes["title"] for _, attributes in page.tokens] == ["0.25", "0.5", "-0.125"]
    assert [strength(attributes) for _, attributes in page.tokens] == [0.5, 1.0, 0.25]
    assert ["minus" in attributes["class"] for _, attributes in page.tokens] == [False, False, True]
    assert page.texts["title"] == page.texts["h1"] == "A title"
    assert page.texts["prompt"] == "Is it?"
    assert page.texts["note"] == "a note"
    assert "score 1.5" in page.texts["span"]
    assert "colour" in page.texts["legend"]


def test_empty_and_degenerate_completions() -> None:
    nan, inf = float("nan"), float("inf")
    items = [CreditItem("p", [], [], 0.0), CreditItem("p", ["a", ""], [0.0, 0.0], nan)]
    items.append(CreditItem("p", ["a", "b", "c"], [nan, inf, 1.0], 0.0))
    page = Page(credit_page("t", items))
    assert [text for text, _ in page.tokens] == ["a", "∅", "a", "b", "c"]
    assert ["bad" in attributes["class"] for _, attributes in page.tokens] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert strength(page.tokens[-1][1]) == 1.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="tokens and credit must be as many, got 1 and 2"):
        credit_page("t", [CreditItem("p", ["a"], [0.5, 0.5], 0.0)])


@given(st.lists(st.text() | st.just(ATTACK), max_size=4), st.text() | st.just(ATTACK))
def test_no_text_gets_out_of_its_place(tokens: list[str], text: str) -> None:
    text = text.replace("\r", "")
    item = CreditItem(text, tokens, [0.1] * len(tokens), 0.0, text)
    page = Page(credit_page(text, [item, item]))
    assert [shown for shown, _ in page.tokens] == [t.replace("\n", "⏎\n") or "∅" for t in tokens] * 2
    assert page.texts.get("title", "") == page.texts.get("h1", "") == text
    assert {tag for tag, _ in page.elements} <= set(
        "html head meta title style body h1 h2 p a span section".split()
    )


def test_nothing_is_loaded_or_run() -> None:
    page = Page(credit_page("t", [CreditItem("p", ["a"], [1.0], 0.0)] * 2))
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert not any(name.startswith("on") or name in {"src", "srcset"} for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", page.texts["style"])
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_a_page_is_its_pieces() -> None:
    items = [CreditItem("p", ["a"], [1.0], 0.0), CreditItem("q", ["b"], [1.0], 1.0)]
    pieces = [page_head("t"), credit_section(1, items[0]), credit_section(2, items[1]), PAGE_FOOT]
    assert credit_page("t", items) == "".join(pieces)


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark() -> None:
    """WCAG 2 AA, 4.5 : 1, for every strength of both colours."""
    themes = re.findall(r":root \{([^}]*--page[^}]*)\}", Page(credit_page("t", [])).texts["style"])
    assert len(themes) == 2
    for theme in themes:
        colours = {
            name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
            for name, value in re.findall(r"--(\w+): #(\w{6})", theme)
        }
        assert contrast(colours["page"], colours["soft"]) >= 4.5
        for hue, percent in itertools.product(("plus", "minus"), range(0, 101, 5)):
            mixed = tuple(
                h * percent / 100 + p * (1 - percent / 100)
                for h, p in zip(colours[hue], colours["page"], strict=True)
            )
            assert contrast(mixed, colours["ink"]) >= 4.5
