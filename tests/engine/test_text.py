from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text import clean

ANYTHING = st.text(st.characters() | st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]))
FORBIDDEN = {
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
}


@given(ANYTHING)
def test_cleaned_text_holds_nothing_that_steers_a_terminal_and_can_be_written_as_utf_8(text: str) -> None:
    cleaned = clean(text)
    assert not FORBIDDEN & set(cleaned)
    cleaned.encode("utf-8")


@given(ANYTHING, st.integers(1, 40))
def test_cleaned_text_keeps_to_its_limit_and_is_not_changed_by_cleaning_again(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    assert clean(cleaned, limit) == cleaned


def test_harmless_text_comes_back_as_the_same_object() -> None:
    text = "Größe → 日本 ✓ 👩‍👩‍👧"
    assert clean("plain " * 10 + text) == "plain " * 10 + text
    plain = "model.layers.0.mlp.weight"
    assert clean(plain) is plain


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("a\x7fb\x00", r"a\x7fb\x00"),
        ("exe.\u202etxt", r"exe.\u202etxt"),
        ("one\u2028two\u2029", r"one\u2028two\u2029"),
        ("\udcff", r"\udcff"),
        ("a\tb\r\n", r"a\x09b\x0d\x0a"),
    ],
)
def test_each_dangerous_character_becomes_a_visible_escape(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_characters_to_keep_are_kept_and_only_they() -> None:
    assert clean("a\tb\r\n\x1b", keep="\t\n") == "a\tb\\x0d\n\\x1b"


def test_a_long_text_is_cut_with_an_ellipsis() -> None:
    assert clean("a" * 10, 5) == "aaaa…"
    assert clean("a" * 5, 5) == "aaaaa"
    assert clean("\x1b\x1b", 6) == "\\x1b\\…"
