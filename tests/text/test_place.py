"""Where chat templates put a reply: templates whose parts are known, and what they do to replies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reward_models import tokenizer

from attnshape.text.place import Block, Place, place_of_reply, render, whole

USER = {"role": "user", "content": "Was it polite? Say polite or rude."}
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ REPLY }}<|im_end|>\n{% endfor %}"
ASK = "Is the answer above polite? Repeat: polite."
QWEN3 = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- set content = m.content %}{%- set thought = '' %}
{%- if m.role == 'assistant' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def found(template: str, reply: str, *before: dict[str, str]) -> tuple[str, Place]:
    tok = tokenizer()
    tok.chat_template = template.replace("REPLY", "m['content']")
    messages = [*(before or (USER,)), {"role": "assistant", "content": reply}]
    text = render(messages, tok)
    return text, place_of_reply(messages, tok, text)


def kept(text: str, reply: str, place: Place) -> str:
    """The reply's characters that survived, as the reply has them; they are those of the text."""
    for block in place.blocks:
        own = reply[block.reply : block.reply + block.size]
        assert own.casefold() == text[block.text : block.text + block.size].casefold()
    return "".join(reply[b.reply : b.reply + b.size] for b in place.blocks)


AS_IT_STANDS = ["polite", "Is", "assistant", "<|im_end|>\nIs the answer", "a", "", " polite ", "m['content']"]


@pytest.mark.parametrize("reply", AS_IT_STANDS)
@pytest.mark.parametrize("end", ["", ASK, ASK + " {{ messages[0]['content'] }}"])
def test_a_reply_is_where_the_template_puts_it(reply: str, end: str) -> None:
    text, place = found(TURNS + end, reply)
    low = len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n") + len(USER["content"])
    assert place == whole(reply, low)
    assert text[low : low + len(reply)] == reply


CHANGED: dict[str, tuple[str, str, str]] = {
    "stripped": ("m['content'] | trim", "  polite \n", "polite"),
    "in lower case": ("m['content'] | lower", "Polite, YES. ß", "Polite, YES. ß"),
    "in upper case": ("m['content'] | upper", "polite, yes.", "polite, yes."),
    "without its thoughts": (
        "m['content'].split('</think>')[-1] | trim",
        "<think>polite?</think>\n\npolite ",
        "polite",
    ),
    "without thoughts that it began with": (
        "m['content'].split('</think>')[-1].lstrip()",
        "polite</think> polite",
        "polite",
    ),
    "cut": ("m['content'][:9]", "rude and polite and rude", "rude and "),
    "with a word replaced": (
        "m['content'] | replace('rude', '****')",
        "not rude but polite",
        "not  but polite",
    ),
    "with a part taken out": (
        "m['content'] | replace('[1]', '')",
        "so[1] it is[1] polite",
        "so it is polite",
    ),
    "quoted": ("m['content'] | tojson", 'a "b" c\nd', 'a "b" cd'),
    "lost": ("'something else'", "polite", ""),
}


@pytest.mark.parametrize("end", ["", ASK])
@pytest.mark.parametrize(("how", "reply", "left"), CHANGED.values(), ids=CHANGED)
def test_what_survives_of_a_changed_reply(how: str, reply: str, left: str, end: str) -> None:
    text, place = found(TURNS.replace("REPLY", how) + end, reply)
    assert place.changed
    assert text[: place.low].rstrip('"').endswith("assistant\n") or not left
    survived = kept(text, reply, place)
    assert survived == left
    assert all(place.low <= b.text and b.text + b.size <= place.high for b in place.blocks)


def test_a_template_that_repeats_the_reply_has_it_where_it_comes_first() -> None:
    text, place = found(TURNS + "Is {{ messages[-1]['content'] }} polite?", "polite")
    assert place == whole("polite", text.index("assistant\n") + len("assistant\n"))


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        ("polite", "polite"),
        ("<think>\nIs it polite?\n</think>\n\npolite", "<think>\nIs it polite?\n</think>\n\npolite"),
        ("<think>\n\n</think>\n\npolite", "polite"),
        ("<think>Is it polite?</think>polite", "<think>Is it polite?</think>polite"),
        ("\n\npolite", "polite"),
    ],
)
def test_thoughts_that_a_template_writes_its_own_way(reply: str, left: str) -> None:
    text, place = found(QWEN3, reply)
    assert kept(text, reply, place) == left
    end = text.rindex("polite")
    assert place.in_text(len(reply) - len("polite"), len(reply)) == (end, end + len("polite"))
    assert place.in_reply(end, end + 1) == (len(reply) - len("polite"), len(reply) - len("polite") + 1)


def test_a_template_that_takes_no_other_reply_gives_no_place() -> None:
    template = (
        "{% for m in messages %}{% if 'yes' not in m['content'] %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    _, place = found(template, "yes!", {"role": "user", "content": "yes?"})
    assert place.changed
    assert place.blocks == ()
    assert place.in_text(0, 4) == (place.low, place.low)


def test_spans_between_surviving_parts() -> None:
    place = Place(10, 20, (Block(2, 10, 3), Block(8, 13, 4)), changed=True)
    assert place.in_text(0, 2) == (10, 10)
    assert place.in_text(3, 5) == (11, 13)
    assert place.in_text(4, 9) == (12, 14)  # what was between them is gone
    assert place.in_text(5, 8) == (13, 13)
    assert place.in_text(11, 20) == (16, 17)
    assert place.in_text(15, 20) == (17, 17)
    assert place.in_reply(12, 14) == (4, 9)
    assert place.in_reply(0, 99) == (2, 12)


def test_a_long_reply_that_is_changed_in_its_midst_is_read_in_time() -> None:
    """Words are compared with words only up to a limit; the ends are found however long it is."""
    reply = "begin " + "ab " * 200_000 + "end"
    text, place = found(TURNS.replace("REPLY", "m['content'] | replace('ab ab', 'x')"), reply)
    survived = kept(text, reply, place)
    assert survived.startswith("begin ")
    assert survived.endswith("end")


PARTS = st.text(st.sampled_from("ab \n<|im_end|>"), max_size=6)


@given(before=PARTS, after=PARTS, reply=PARTS, trims=st.booleans())
def test_any_template_around_any_reply(before: str, after: str, reply: str, trims: bool) -> None:
    tok = tokenizer()
    how = "messages[-1]['content']" + (" | trim" if trims else "")
    tok.chat_template = "{{ before }}{{ " + how + " }}{{ after }}"
    messages: list[Any] = [{"role": "assistant", "content": reply}]
    shown = reply.strip() if trims else reply

    class Rendering:
        """The template's variables are given to it."""

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return tok.apply_chat_template(messages, before=before, after=after, **options)

    text = before + shown + after
    place = place_of_reply(messages, Rendering(), text)
    assert (place.low, place.high) == (len(before), len(before) + len(shown))
    assert place.changed == (shown != reply)
    assert kept(text, reply, place) == shown
