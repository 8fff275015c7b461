from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.app import App

from console.actions import ACTIONS, bindings
from console.keys import canonical, nearest_key, shown
from console.settings import VARIABLE, Settings, load_settings, parse_settings, settings_path
from engine.config import ConfigProblems
from engine.errors import ConfigError, ExitCode
from engine.text import clean

ROOT = Path(__file__).parents[2]


def parsed(text: str) -> Settings:
    return parse_settings(text, "settings.yaml", Path("/base"))


def refused(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value).splitlines()


def test_without_a_file_the_defaults_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert settings_path({}) == tmp_path / "kdconsole" / "settings.yaml"
    assert load_settings({}) == Settings(theme="kdconsole-dark", keys={}, bell=True, notify=True, fps=4, evidence=())
    assert list(tmp_path.iterdir()) == []


def test_the_platforms_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "kdconsole").mkdir()
    (tmp_path / "kdconsole" / "settings.yaml").write_text("fps: 10\n")
    assert load_settings({VARIABLE: ""}).fps == 10


def test_the_variable_names_another_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("evidence: [runs]\n")
    assert load_settings({VARIABLE: str(file)}).evidence == (tmp_path / "runs",)


def test_a_file_that_the_variable_names_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{VARIABLE}: .*none\.yaml: no such file"):
        load_settings({VARIABLE: str(tmp_path / "none.yaml")})


def test_a_file_that_cannot_be_read_is_an_error_and_not_the_defaults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load_settings({VARIABLE: str(tmp_path)})
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no such file"):
        load_settings({VARIABLE: str(tmp_path / "dangling")})


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_has_the_defaults(text: str) -> None:
    assert parsed(text) == Settings()


def test_every_setting_is_taken() -> None:
    text = (
        "theme: kdconsole-light\nfps: 30\nbell: off\nnotify: false\nevidence: [runs, /a, ~/b]\nkeys: {home.sort: o}\n"
    )
    assert parsed(text) == Settings(
        theme="kdconsole-light",
        fps=30,
        bell=False,
        notify=False,
        evidence=(Path("/base/runs"), Path("/a"), Path.home() / "b"),
        keys={"home.sort": "o"},
    )


def test_textuals_own_themes_are_known() -> None:
    assert parsed("theme: nord").theme == "nord"
    assert parsed("theme: ansi-dark").theme == "ansi-dark"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thme: nord", "thme: unknown key; did you mean theme?"),
        ("zzz: 1", "zzz: unknown key; expected theme, keys, bell, notify, fps or evidence"),
        ("fps: 31", "fps: 31: expected an integer from 1 to 30"),
        ("fps: 0", "fps: 0: expected an integer from 1 to 30"),
        ("fps: 2.5", "fps: 2.5: expected an integer from 1 to 30"),
        ("fps: true", "fps: true: expected an integer from 1 to 30"),
        ("bell: loud", 'bell: "loud": expected off or on'),
        ("evidence: runs", 'evidence: "runs": expected a list'),
        ("evidence: ['']", 'evidence[0]: "": expected a directory'),
        ("theme: 3", "theme: 3: expected text"),
        ("theme: kdconsole-drak", 'theme: "kdconsole-drak": unknown theme; did you mean kdconsole-dark?'),
        ("keys:", "keys: null: expected a mapping; leave it out, or give it keys"),
        ("keys: [a]", "keys: a list: expected a mapping"),
        ("keys: {home.sotr: o}", "keys.home.sotr: unknown action; did you mean home.sort?"),
        ("keys: {sort: o}", "keys.sort: unknown action; did you mean home.sort?"),
        ("keys: {run.help: o}", "keys.run.help: unknown action; did you mean app.help?"),
        ("keys: {qqqq: o}", "keys.qqqq: unknown action; expected one such as home.sort; docs/keys.md lists them"),
        ("keys: {home.sort: ctlr+s}", 'keys.home.sort: "ctlr+s": unknown key; did you mean ctrl+s?'),
        ("keys: {home.sort: questionmark}", 'keys.home.sort: "questionmark": unknown key; did you mean question_mark?'),
        ("keys: {home.sort: }", 'keys.home.sort: null: expected keys in quotes, such as "s" or "f5, ctrl+s"'),
        ("keys: {home.sort: ''}", 'keys.home.sort: "": expected keys in quotes, such as "s" or "f5, ctrl+s"'),
        ("keys: {home.sort: [o]}", 'keys.home.sort: a list: expected keys in quotes, such as "s" or "f5, ctrl+s"'),
        ("keys: {home.sort: ctrl+q}", "keys.home.sort: ctrl+q: always leaves the app at once; expected another key"),
        ("keys: {home.sort: up}", "keys.home.sort: up: always moves the cursor; expected another key"),
        (
            "keys: {home.sort: c}",
            "keys.home.sort: c: has home.compare already, on the screen Home; expected a key for each",
        ),
        (
            "keys: {app.leave: s}",
            "keys.app.leave: s: has home.sort already, on the screen Home; expected a key for each",
        ),
        (
            "keys: {home.sort: question_mark}",
            "keys.home.sort: question_mark: has app.help already, on the screen Home; expected a key for each",
        ),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(text: str, said: str) -> None:
    assert refused(text) == [f"settings.yaml: {said}"]


def test_a_key_is_refused_on_the_screen_where_two_actions_have_it_and_on_no_other() -> None:
    assert parsed("keys: {home.sort: x}").keys == {"home.sort": "x"}  # x is an axis on another screen
    assert refused("keys: {run.stop: x}")
    assert refused("keys: {home.sort: o, home.reverse: o}")


def test_two_actions_may_change_their_keys() -> None:
    assert parsed("keys: {home.sort: r, home.reverse: s}").keys == {"home.sort": "r", "home.reverse": "s"}


def test_everything_wrong_is_said_at_once_in_the_files_order() -> None:
    text = "fps: 99\nkeys:\n  home.sotr: o\n  run.stop: ctlr+x\ntheme: none-such-thing\nbel: on\n"
    lines = refused(text)
    assert [line.split(": ")[1] for line in lines] == ["fps", "keys.home.sotr", "keys.run.stop", "theme", "bel"]
    with pytest.raises(ConfigProblems):
        parsed(text)


def test_a_list_at_the_top_is_no_settings_file() -> None:
    assert refused("- a\n") == ["settings.yaml: a list at the top; expected a mapping such as `fps: 4`"]


def test_a_broken_file_is_said_with_its_line() -> None:
    assert "line 2" in refused("fps: 4\nfps: 5\n")[0]


def test_text_of_the_file_cannot_steer_the_terminal() -> None:
    [line] = refused('keys: {"\\e[31mhome": "\\e]0;x\\a"}')
    assert line.isprintable()
    assert "\\x1b[31mhome" in line


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("?", "question_mark"),
        ("/", "slash"),
        ("slash", "slash"),
        ("solidus", "slash"),
        ("+", "plus"),
        ("Ctrl+S", "ctrl+s"),
        ("shift+ctrl+left", "ctrl+shift+left"),
        ("Esc", "escape"),
        ("shift+g", "G"),
        ("G", "G"),
        ("ctrl+m", "enter"),
        ("F5", "f5"),
        ("é", "é"),
        ("hyper", None),
        ("ctrl+ctrl+s", None),
        ("ctrl+", None),
        ("f99", None),
        ("\x1b", None),
    ],
)
def test_keys_have_one_name_however_they_are_written(written: str, key: str | None) -> None:
    assert canonical(written) == key
    if key is not None:
        assert canonical(key) == key


def test_every_key_of_the_registry_has_its_canonical_name() -> None:
    for action in ACTIONS:
        for key in action.keys.split(","):
            assert canonical(key) in (key, key.rpartition("+")[2].upper()), f"{action.name}: {key}"


def test_keys_are_shown_as_they_are_on_the_keyboard() -> None:
    keys = ("question_mark", "f1", "left_square_bracket", "shift+n", "N", "escape", "tab", "ctrl+p", "plus", "up")
    assert shown(keys) == "? f1 [ N esc tab ctrl+p + ↑"
    assert nearest_key("zzzzzzzzzzzz") == ""


def test_digits_need_no_quotes() -> None:
    assert parsed("keys: {run.pane_1: 9}").keys == {"run.pane_1": "9"}


def test_a_users_key_does_what_the_old_one_did() -> None:
    class Rig(App[None]):
        BINDINGS = bindings("home")

        def __init__(self, mine: Settings) -> None:
            super().__init__()
            self.done: list[str] = []
            self.set_keymap(mine.keymap())

        def action_sort(self) -> None:
            self.done.append("sort")

        def action_reverse(self) -> None:
            self.done.append("reverse")

    async def check() -> None:
        app = Rig(parsed('keys: {home.sort: "r, ctrl+o, !", home.reverse: s}'))
        async with app.run_test() as pilot:
            await pilot.press("r", "ctrl+o", "exclamation_mark", "s")
        assert app.done == ["sort", "sort", "sort", "reverse"]

    asyncio.run(check())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["theme", "keys", "bell", "notify", "fps", "evidence", "kyes"])
IDS = st.sampled_from(["home.sort", "app.leave", "run.stop", "new.start", "confirm.yes", "run.sort"])
KEYS = st.dictionaries(IDS, st.text("abqxs?,+ctrl 15", max_size=10), max_size=4)


def outcome(text: str) -> Settings | str:
    """The settings, or the message of the refusal."""
    try:
        return parsed(text)
    except ConfigError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, PLAIN | KEYS, max_size=4))
def test_any_mapping_is_settings_or_one_message(tree: dict[str, object]) -> None:
    found = outcome(yaml.safe_dump(tree, allow_unicode=False))
    if isinstance(found, str):
        assert all(clean(line, 10_000) == line for line in found.splitlines())
    else:
        assert 1 <= found.fps <= 30
        for keys in found.keys.values():
            assert all(canonical(key) == key for key in keys.split(","))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_settings_or_one_message(text: str) -> None:
    found = outcome(text)
    assert isinstance(found, Settings) or found.startswith("settings.yaml: ")


def test_importing_the_settings_does_not_import_the_app() -> None:
    program = "import console.settings, sys; print([m for m in ('textual.app', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
