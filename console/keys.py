"""Names of keys: which there are, how an operator may write them, how they are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache

from textual.keys import KEY_NAME_REPLACEMENTS, KEY_TO_UNICODE_NAME, Keys

MODIFIERS = ("alt", "ctrl", "hyper", "meta", "shift", "super")
"""In the order in which a key's name has them."""
SAME = {"ctrl+m": "enter", "ctrl+i": "tab", "return": "enter", "esc": "escape", "pgup": "pageup", "pgdn": "pagedown"}
"""Other names of a key: what a terminal sends for both, or what people write."""

_ORIGINAL = {short: name for name, short in KEY_NAME_REPLACEMENTS.items()}
_SHOWN = {
    "up": "↑",
    "down": "↓",
    "left": "←",
    "right": "→",
    "escape": "esc",
    "pageup": "pgup",
    "pagedown": "pgdn",
    "delete": "del",
    "space": "space",
}


def canonical(name: str) -> str | None:
    """A key as Textual names it, such as `question_mark` for `?` and `ctrl+s` for `Ctrl+S`; None where there is none.

    Args:
        name: a single character, or a name with or without modifiers.
    """
    if len(name) == 1:
        return _name_of(name)
    *modifiers, key = name.split("+")
    modifiers = [each.strip().lower() for each in modifiers]
    key = key.strip()
    if not set(modifiers) <= set(MODIFIERS) or len(set(modifiers)) < len(modifiers):
        return None
    plain = _plain(key.lower() if modifiers or len(key) > 1 else key)
    if plain is None:
        return None
    if modifiers == ["shift"] and len(plain) == 1:  # terminals send the capital
        return plain.upper()
    whole = "+".join([*sorted(modifiers), plain])
    return SAME.get(whole, whole)


def nearest_key(name: str) -> str:
    """The key name most like an unknown one; empty where none is near."""
    return next(iter(get_close_matches(name[:40].lower(), _names(), n=1, cutoff=0.6)), "")


def shown(keys: Iterable[str]) -> str:
    """Keys as the screen and the documents show them, such as `? f1` for `question_mark` and `f1`."""
    return " ".join(dict.fromkeys(_shown(key) for key in keys))


def _shown(key: str) -> str:
    *modifiers, plain = key.split("+")
    character = _character(plain)
    if modifiers == ["shift"] and character is not None and character.isalpha():
        return character.upper()
    return "+".join([*modifiers, _SHOWN.get(plain, character or plain)])


def _plain(key: str) -> str | None:
    if len(key) == 1:
        return _name_of(key)
    key = SAME.get(key, key)
    if key in _named():
        return key
    character = _character(key)
    return None if character is None else _name_of(character)


def _character(key: str) -> str | None:
    """What is typed with a key that has a character's name; None for the others."""
    if len(key) == 1:
        return key
    key = _ORIGINAL.get(key, key)
    try:
        character = unicodedata.lookup(KEY_TO_UNICODE_NAME.get(key, key.replace("_", " ").upper()))
    except KeyError:
        return None
    return character if character.isprintable() else None  # `tab` and `escape` are names of control characters too


def _name_of(character: str) -> str | None:
    if not character.isprintable():
        return None
    if character.isalnum():
        return character
    try:
        name = unicodedata.name(character).lower().replace("-", "_").replace(" ", "_")
    except ValueError:
        return None
    return KEY_NAME_REPLACEMENTS.get(name, name)


@cache
def _named() -> frozenset[str]:
    """The keys that stand for no character, without modifiers."""
    return frozenset(key.value for key in Keys if "+" not in key.value and key.value[0] != "<") - {"ctrl-at", "return"}


@cache
def _names() -> tuple[str, ...]:
    """What may be offered in place of a misspelt name."""
    signs = {KEY_NAME_REPLACEMENTS.get(name, name) for name in KEY_TO_UNICODE_NAME} | {"comma", "colon", "slash"}
    plain = (*_named(), *signs, *"abcdefghijklmnopqrstuvwxyz0123456789")
    return (*plain, *(f"{modifier}+{key}" for modifier in ("ctrl", "shift", "alt") for key in plain))
