"""A user's settings: one optional YAML file, read once when the app starts and never written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import msgspec.inspect
from msgspec import Meta, field

from engine.config import ConfigProblems
from engine.errors import ConfigError
from engine.schema import BUILTIN, Source, Walker, alternatives, key_paths, show
from engine.text import clean
from engine.yaml_io import join, parse_document, read_text

VARIABLE: Final = "KDCONSOLE_SETTINGS"
"""Names the settings file; without it, the file is where the platform keeps such files."""
DEFAULT_THEME: Final = "kdconsole-dark"

TAKEN: Final = {
    "ctrl+q": "leaves the app at once",
    "ctrl+c": "copies what is selected",
    **dict.fromkeys(("up", "down", "left", "right", "pageup", "pagedown", "home", "end"), "moves the cursor"),
}
"""Keys that no action can have, for something else takes them first."""

Switch = Literal["on", "off"]
Directory = Annotated[str, Meta(min_length=1, description="a directory", extra={BUILTIN: ()})]
Frames = Annotated[int, Meta(ge=1, le=30)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a user may choose; the defaults are those of a user who has no file."""

    theme: str = DEFAULT_THEME
    keys: dict[str, str] = {}
    """Of an action such as `home.sort`, its keys separated by commas, named as Textual names them."""
    bell: bool = True
    """Ring the terminal's bell when a verdict fails or a run ends."""
    notify: bool = True
    """Ask the terminal for a desktop notification when a run ends or fails."""
    fps: int = 4
    """Most redraws a second while a run is followed, 1 to 30."""
    evidence: tuple[Path, ...] = ()
    """More directories whose runs are listed; absolute."""

    def keymap(self) -> dict[str, str]:
        """The keys, for `App.set_keymap`."""
        return dict(self.keys)


class _Keys(msgspec.Struct):
    """Any action's id to its keys; checked by `_keys`, for the ids are no fields."""


class _File(msgspec.Struct, kw_only=True):
    """The file's schema."""

    theme: str = DEFAULT_THEME
    keys: _Keys = field(default_factory=_Keys)
    bell: Switch = "on"
    notify: Switch = "on"
    fps: Frames = 4
    evidence: list[Directory] = []


def settings_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the settings file is, whether or not there is one."""
    if environ.get(VARIABLE):
        return Path(environ[VARIABLE])
    from platformdirs import user_config_path

    return user_config_path("kdconsole") / "settings.yaml"


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of the user's file; the defaults where there is none.

    Raises:
        ConfigError: the file is named by a variable and missing, it cannot be read, or something in it is wrong;
            `ConfigProblems` names all of it.
    """
    path = settings_path(environ)
    if not os.path.lexists(path):
        if environ.get(VARIABLE):
            raise ConfigError(f"{VARIABLE}: {clean(str(path), 300)}: no such file", expected="a YAML file of settings")
        return Settings()
    return parse_settings(read_text(path), str(path), Path(os.path.abspath(path)).parent)


def parse_settings(text: str, name: str, base: Path) -> Settings:
    """The settings of a YAML text; an empty one has the defaults.

    Args:
        text: YAML.
        name: how error messages call it.
        base: absolute directory that relative paths start from.

    Raises:
        ConfigError: it is no YAML mapping; `ConfigProblems`: everything else that is wrong.
    """
    document = parse_document(text, name)
    name = clean(name, 300)
    if document.value is None:
        return Settings()
    if not isinstance(document.value, dict):
        raise ConfigError(f"{name}: {show(document.value)} at the top", expected="a mapping such as `fps: 4`")
    source = Source(name, base, lines=document.lines)
    schema = msgspec.inspect.type_info(_File)
    walker = Walker(lambda path: source, tuple(key_paths(schema)))
    tree: dict[str, object] = dict(document.value)
    for key in ("bell", "notify"):
        if isinstance(tree.get(key), bool):
            tree[key] = "on" if tree[key] else "off"
    keys = tree.get("keys")
    given = _keys(keys, walker) if isinstance(keys, dict) else {}
    if isinstance(keys, dict):
        tree["keys"] = {}
    checked = walker.check(tree, schema)
    theme = tree.get("theme")
    if isinstance(theme, str):
        _known_theme(theme, walker)
    if walker.problems:
        raise ConfigProblems(walker.problems)
    file = msgspec.convert(checked, _File)
    return Settings(
        theme=file.theme,
        keys=given,
        bell=file.bell == "on",
        notify=file.notify == "on",
        fps=file.fps,
        evidence=tuple(map(Path, file.evidence)),
    )


def _known_theme(name: str, walker: Walker) -> None:
    from textual.theme import BUILTIN_THEMES

    from console.themes import THEMES

    known = [*(theme.name for theme in THEMES), *BUILTIN_THEMES]
    if name not in known:
        near = get_close_matches(name[:64].lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        walker.add("theme", f"{show(name)}: unknown theme; {hint}")


def _keys(given: Mapping[str, object], walker: Walker) -> dict[str, str]:
    """The key map, every key by its one name; what is wrong goes to the walker."""
    defaults = _default_keys()
    found: dict[str, tuple[str, ...]] = {}
    for action, value in given.items():
        path = join("keys", action)
        if action not in defaults:
            near = _nearest_action(action, tuple(defaults))
            walker.add(path, f"unknown action; {near}")
            continue
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9:
            value = str(value)  # YAML takes a digit without quotes for a number
        if not isinstance(value, str) or not value.strip():
            walker.add(path, f'{show(value)}: expected keys in quotes, such as "s" or "f5, ctrl+s"')
            continue
        keys = tuple(_canonical_keys(value, path, frozenset(defaults[action]), walker))
        if keys:
            found[action] = keys
    for action, text in _clashes(defaults, found):
        walker.add(join("keys", action), text)
    return {action: ",".join(keys) for action, keys in found.items()}


def _canonical_keys(value: str, path: str, allowed: frozenset[str], walker: Walker) -> Iterator[str]:
    from console.keys import canonical, nearest_key

    for written in value.split(","):
        key = canonical(written.strip())
        if key is None:
            near = nearest_key(written.strip())
            hint = f"did you mean {near}?" if near else "expected a character, or a name such as f5, space or ctrl+s"
            walker.add(path, f"{show(written.strip())}: unknown key; {hint}")
        elif key in TAKEN and key not in allowed:
            walker.add(path, f"{key}: always {TAKEN[key]}; expected another key")
        else:
            yield key


def _default_keys() -> dict[str, tuple[str, ...]]:
    """Every action's id in a key map, and its keys."""
    from console.actions import ACTIONS, binding_id, keys_of

    return {binding_id(a, where): keys_of(a, where, {}) for a in ACTIONS for where in a.where}


def _clashes(
    defaults: Mapping[str, tuple[str, ...]], found: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    """The user's actions that share a key with another one on a screen, and what to say of it; each pair once."""
    from console.actions import SCREENS, actions_of, binding_id
    from console.keys import canonical

    said = set[tuple[str, str]]()
    for where, title in SCREENS.items():
        owners: dict[str, str] = {}
        for identifier in (binding_id(action, where) for action in actions_of(where)):
            keys = found.get(identifier, defaults[identifier])
            for key in dict.fromkeys(canonical(each) or each for each in keys):
                other = owners.setdefault(key, identifier)
                ours = identifier if identifier in found else other
                if other == identifier or ours not in found or (ours, key) in said:
                    continue
                said.add((ours, key))
                theirs = other if ours == identifier else identifier
                yield ours, f"{key}: has {theirs} already, on the screen {title}; expected a key for each"


def _nearest_action(name: str, known: tuple[str, ...]) -> str:
    leaf = name[:64].lower().rpartition(".")[2]
    near = [each for each in known if each.partition(".")[2] == leaf]  # the right name on the wrong screen, or without
    near = near or get_close_matches(name[:64].lower(), known, n=1)
    return f"did you mean {alternatives(near)}?" if near else "expected one such as home.sort; docs/keys.md lists them"
