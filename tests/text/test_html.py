"""The coloured page: what a reader sees, what a browser loads, and that no text gets out of its place."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnshape.text.html import FULL, PAGE_FOOT, CreditItem, View, credit_page, credit_section, page_head

ATTACK = "</span><script>alert(1)</script><img src=x onerror=alert(1)> & \"' <!--"
VOID = {"meta", "input"}
BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None
)


def item(
    tokens: list[str], rewards: list[float], score: float, prompt: str = "p", **more: float
) -> CreditItem:
    return CreditItem(prompt, tokens, score, [View("attention", rewards, more)])


class Page(HTMLParser):
    """Token texts with their attributes, and everything else by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.tokens: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.raw: list[tuple[str, str]] = []
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
        self.raw.append((tag, data))
        classes = attributes.get("class", "").split()
        if "t" in classes:
            self.tokens[-1] = (self.tokens[-1][0] + data, attributes)
        for key in [tag, *classes]:
            self.texts[key] = self.texts.get(key, "") + data


def strength(attributes: dict) -> float:
    return float(re.fullmatch(r"--a:([\d.]+)", attributes["style"])[1])


def test_tokens_carry_value_and_colour() -> None:
    views = [
        View("attention", [-0.25, -0.5, -0.25, 0.0], {"entropy": 1.25, "response_attention": 0.5}),
        View("leave_one_out", [1.0, -8.0, 3.0, 0.0]),
    ]
    shown = CreditItem("Is it?", ["Not", " bad", "!", ""], -1.0, views, "a note")
    page = Page("".join([page_head("A title", "of the whole"), credit_section(1, shown), PAGE_FOOT]))
    assert [text for text, _ in page.tokens] == ["Not", "bad", "!", "∅"] * 2
    assert 'title="-0.25, 1.0 × even" tabindex="0">Not</span> <span' in credit_section(1, shown)
    # Even would be a quarter, and three in the second: the score's sign is the colour's.
    titles = [attributes["title"] for _, attributes in page.tokens]
    assert titles[:4] == ["-0.25, 1.0 × even", "-0.5, 2.0 × even", "-0.25, 1.0 × even", "0, 0.0 × even"]
    assert titles[4:] == ["1, 0.3 × even", "-8, 2.7 × even", "3, 1.0 × even", "0, 0.0 × even"]
    strengths = [strength(attributes) for _, attributes in page.tokens]
    assert strengths == pytest.approx([x / FULL for x in (1, 2, 1, 0, 1 / 3, 8 / 3, 1, 0)], abs=1e-3)
    assert ["minus" in a["class"] for _, a in page.tokens] == [
        True,
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    # A stop for the keyboard in each text; arrow keys go on.
    assert [i for i, (_, attributes) in enumerate(page.tokens) if "tabindex" in attributes] == [0, 4]
    (section,) = [attributes for tag, attributes in page.elements if tag == "section"]
    assert section == {
        "id": "c1",
        "data-score": "-1",
        "data-entropy": "1.25",
        "data-response-attention": "0.5",
    }
    assert page.texts["title"] == page.texts["h1"] == "A title"
    assert page.texts["prompt"] == "Is it?"
    assert page.texts["note"] == "a note"
    assert page.texts["b"] == "attentionleave_one_out"
    for shown_number in ("score -1", "entropy 1.25", "response attention 0.5"):
        assert shown_number in page.texts["span"]
    assert "olour" in page.texts["legend"]
    assert "of the whole" in page.texts["p"]


def test_even_credit_is_pale_and_one_token_s_is_not() -> None:
    even, sharp = [0.1] * 10, [0.0] * 9 + [1.0]
    page = Page(credit_page("t", [item(["a"] * 10, even, 1.0), item(["a"] * 10, sharp, 1.0)]))
    assert {strength(a) for _, a in page.tokens[:10]} == {round(1 / FULL, 3)}
    assert [strength(a) for _, a in page.tokens[10:]] == [0.0] * 9 + [1.0]


def test_empty_and_degenerate_completions() -> None:
    nan, inf = float("nan"), float("inf")
    items = [item([], [], 0.0), item(["a", ""], [0.0, 0.0], nan), item(["a", "b", "c"], [nan, inf, 1.0], 0.0)]
    page = Page(credit_page("t", [*items, CreditItem("p", ["x"], 0.0, [])]))
    assert [text for text, _ in page.tokens] == ["a", "∅", "a", "b", "c"]
    assert ["bad" in attributes["class"] for _, attributes in page.tokens] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert strength(page.tokens[-1][1]) == round(1 / FULL, 3)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="tokens and rewards must be as many, got 1 and 2"):
        credit_page("t", [item(["a"], [0.5, 0.5], 0.0)])


@given(st.lists(st.text() | st.just(ATTACK), max_size=4), st.text() | st.just(ATTACK))
def test_no_text_gets_out_of_its_place(tokens: list[str], text: str) -> None:
    text = text.replace("\r", "")
    one = CreditItem(text, tokens, 0.0, [View(text, [0.1] * len(tokens), {"entropy": 1.0})], text)
    page = Page("".join([page_head(text, text), credit_section(1, one), credit_section(2, one), PAGE_FOOT]))
    assert [shown for shown, _ in page.tokens] == [t.replace("\n", "⏎\n") or "∅" for t in tokens] * 2
    assert page.texts.get("title", "") == page.texts.get("h1", "") == text
    assert {tag for tag, _ in page.elements} <= set(
        "html head meta title style body h1 h2 p a b span section div figure figcaption form label input "
        "select option output main script".split()
    )
    scripts = [data for tag, data in page.raw if tag == "script"]
    assert scripts == [PAGE_FOOT.partition("<script>")[2].partition("</script>")[0]]


def test_nothing_is_loaded_and_no_other_script_can_run() -> None:
    page = Page(credit_page("t", [item(["a"], [1.0], 0.0)] * 2))
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object"}
        assert not any(name.startswith("on") or name in {"src", "srcset"} for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", page.texts["style"])
    assert not re.search(r"https?:|fetch|XMLHttp|import|innerHTML|eval", page.texts["script"])
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.texts["script"].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_page_is_its_pieces() -> None:
    items = [item(["a"], [1.0], 0.0), item(["b"], [1.0], 1.0)]
    pieces = [page_head("t"), credit_section(1, items[0]), credit_section(2, items[1]), PAGE_FOOT]
    assert credit_page("t", items) == "".join(pieces)


def in_browser(page: str, folder: Path, script: str = "") -> Page:
    """The page's document when its own script and this one have run."""
    if script:  # the page's policy lets no other run, so it goes without
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        page = page.replace("</body>", f"<script>{{{script}}}</script></body>")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=1000",
    ]
    flags += [f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return Page(done.stdout.strip())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    """Under its own policy the page's script runs; what a reader does shows numbers, sorts and filters."""
    views = [View("attention", [0.5, 1.5], {"entropy": 0.5}), View("rollout", [1.25, 0.75])]
    items = [
        CreditItem("first", ["good", " film"], 2.0, views),
        item(["bad", " plot"], [-0.5, -1.0], -1.5, entropy=0.7, response_attention=0.1),
        item(["so", " so"], [0.0, 0.1], 0.1, entropy=0.1),
    ]
    page = credit_page("t", items)
    quiet = in_browser(page, tmp_path)
    assert "3 of 3" in quiet.texts["output"]
    assert [a["value"] for tag, a in quiet.elements if tag == "option"] == [
        "order", "score", "entropy", "response-attention"
    ]  # fmt: skip
    alone = in_browser(credit_page("t", items[2:]), tmp_path)
    assert any(tag == "form" and "hidden" in a for tag, a in alone.elements)
    found = in_browser(
        page,
        tmp_path,
        """
        const said = {}, form = document.forms[0], tokens = document.querySelectorAll(".t");
        const sections = () => [...document.querySelectorAll("section")];
        const order = () => sections().filter((s) => !s.hidden).map((s) => s.id).join(" ");
        // A page without a window has no focus, so what it is told of it is told here.
        const focused = () => {
          document.activeElement.dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
          return bar();
        };
        const bar = () => document.body.querySelector(":scope > output").textContent;
        const set = (name, value) => {
          form[name].type === "checkbox" ? form[name].checked = value : form[name].value = value;
          form[name].dispatchEvent(new Event("input", { bubbles: true }));
        };
        const press = (key) => document.activeElement.dispatchEvent(
          new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
        said.silent = bar();
        tokens[0].focus(); said.focus = focused();
        press("ArrowRight"); said.right = focused();
        said.stop = tokens[1].tabIndex + " " + tokens[0].tabIndex;
        press("Home"); said.home = focused();
        press("ArrowLeft"); said.edge = focused();
        press("End"); said.end = focused();
        tokens[4].click(); said.tap = focused();
        tokens[2].dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); said.hover = bar();
        said.marked = [...document.querySelectorAll(".now")].map((t) => t.textContent).join("|");
        getSelection().selectAllChildren(tokens[0].parentNode); said.selected = getSelection().toString();
        set("sort", "score"); said.score = order();
        set("down", true); said.down = order();
        set("sort", "response-attention"); said.missing_last = order();
        set("sort", "order"); set("down", false); set("words", "FILM"); said.words = order();
        set("words", "first"); said.prompt = order();
        set("words", ""); set("low", "0"); said.low = order();
        set("high", "1"); said.between = order() + " " + form.count.value;
        document.title = JSON.stringify(said);
        """,
    )
    assert json.loads(found.texts["title"]) == {
        "silent": "",
        "focus": "“good”  attention: 0.5, 0.5 × even   rollout: 1.25, 1.2 × even",
        "right": "“film”  attention: 1.5, 1.5 × even   rollout: 0.75, 0.8 × even",
        "stop": "0 -1",
        "home": "“good”  attention: 0.5, 0.5 × even   rollout: 1.25, 1.2 × even",
        "edge": "“good”  attention: 0.5, 0.5 × even   rollout: 1.25, 1.2 × even",
        "end": "“film”  attention: 1.5, 1.5 × even   rollout: 0.75, 0.8 × even",
        "tap": "“bad”  attention: -0.5, 0.7 × even",
        "hover": "“good”  attention: 0.5, 0.5 × even   rollout: 1.25, 1.2 × even",
        "marked": "good|good",
        "selected": "good film",
        "score": "c2 c3 c1",
        "down": "c1 c3 c2",
        "missing_last": "c2 c1 c3",
        "words": "c1",
        "prompt": "c1",
        "low": "c1 c3",
        "between": "c3 1 of 3",
    }


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
