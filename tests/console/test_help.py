"""Help, the question before something is done, and what both look like in the two themes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.color import Color
from textual.containers import VerticalScroll
from textual.content import Content
from textual.theme import BUILTIN_THEMES
from textual.widgets import Button

from console.actions import ACTIONS, SCREENS, Where, actions_of, keys_of
from console.columns import columns, indented
from console.keys import shown
from console.palette import CHECKPOINTS, RUNS, VERDICTS
from console.screens.confirm import ConfirmScreen
from console.screens.help import MEANINGS, HelpScreen, help_text
from console.screens.new_run import NewRunScreen
from console.settings import VARIABLE, Settings
from console.themes import DARK, HUES, LIGHT, THEMES
from tests.console.screen_rig import SIZES, Rig, told, until

FILE = Path("/home/me/.config/kdconsole/settings.yaml")
HOSTILE = "[bold red]no[/] [@click=app.exit]x[/] \\[ ] $primary"


def unwrapped(text: str) -> str:
    return " ".join(text.split())


# The text of the help


@pytest.mark.parametrize("where", SCREENS)
def test_help_tells_every_key_of_its_screen_and_of_the_app(where: Where) -> None:
    text = unwrapped(help_text(where, {}, FILE, 200).plain)
    for action in actions_of(where):
        assert f"{shown(keys_of(action, where, {}))} {action.help}" in text
    others = [a for a in ACTIONS if where not in a.where and "app" not in a.where]
    assert not [a.name for a in others if a.help in text and a.help not in {b.help for b in actions_of(where)}]


def test_help_tells_a_users_own_keys() -> None:
    text = unwrapped(help_text("home", {"home.sort": "f7,O", "app.leave": "ctrl+x"}, FILE, 100).plain)
    assert "f7 O Sort by the next column." in text
    assert "ctrl+x leaves the app" in text


def test_help_explains_every_word_and_glyph_and_where_the_settings_are() -> None:
    text = unwrapped(help_text("run", {}, FILE, 100).plain)
    for mark in (*VERDICTS.values(), *RUNS.values(), *CHECKPOINTS.values()):
        assert f"{mark.glyph} {mark.word} {MEANINGS[mark.word]}" in text
    assert f"{FILE}, or the file that {VARIABLE} names" in text
    assert "Neither stops a run" in text


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SCREENS)), st.integers(24, 150))
def test_no_line_of_the_help_is_wider_than_its_place(where: Where, width: int) -> None:
    for line in help_text(where, {}, FILE, width).split("\n"):
        assert line.cell_length <= width, line.plain


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("ab c字", max_size=30), st.integers(3, 20)), min_size=1, max_size=4))
def test_columns_keep_their_widths_and_lose_nothing_but_blanks(cells: list[tuple[str, int]]) -> None:
    lines = columns([text for text, _ in cells], [width for _, width in cells])
    wide = sum(width for _, width in cells) + 2 * (len(cells) - 1)
    assert all(line.cell_length <= wide for line in lines)
    kept = sorted("".join(line.plain for line in lines).replace(" ", ""))
    assert kept == sorted("".join(text for text, _ in cells).replace(" ", ""))


def test_markup_in_a_cell_is_text() -> None:
    assert columns([HOSTILE, "x"], [60, 4])[0].plain.startswith(HOSTILE)
    assert indented(Content(HOSTILE), 2, 80)[0].plain == f"  {HOSTILE}"


# The screen


@pytest.mark.parametrize("size", [SIZES[0], (30, 8)])
def test_help_scrolls_to_its_end(size: tuple[int, int], tmp_path: Path) -> None:
    async def check() -> None:
        app = Rig(tmp_path)
        async with app.run_test(size=size) as pilot:
            await pilot.press("f1")
            sheet = app.screen.query_one("#sheet", VerticalScroll)
            assert sheet.max_scroll_y > 0
            await pilot.press("end")
            await until(pilot, lambda: sheet.scroll_y == sheet.max_scroll_y, "the end")

    asyncio.run(check())


def test_help_closes_with_each_of_its_keys(tmp_path: Path) -> None:
    async def check() -> None:
        app = Rig(tmp_path)
        async with app.run_test() as pilot:
            for key in ("escape", "q", "question_mark", "f1"):
                await pilot.press("f1")
                assert isinstance(app.screen, HelpScreen)
                await pilot.press(key)
                assert not isinstance(app.screen, HelpScreen)

    asyncio.run(check())


def test_help_speaks_of_the_screen_beneath_it(tmp_path: Path) -> None:
    async def check() -> None:
        app = Rig(tmp_path, settings=Settings(keys={"new.mode": "f9"}))
        async with app.run_test() as pilot:
            app.push_screen(NewRunScreen())
            await pilot.pause()
            await pilot.press("question_mark")
            assert "Keys: New run" in told(app.screen)
            assert "f9" in told(app.screen)
            assert isinstance(HelpScreen("no such screen"), HelpScreen)

    asyncio.run(check())


# The question


def answer_of(*keys: str, click: str | None = None, size: tuple[int, int] = (80, 24)) -> list[bool | None]:
    answers: list[bool | None] = []

    async def ask() -> None:
        app = Rig(Path())
        async with app.run_test(size=size) as pilot:
            app.push_screen(ConfirmScreen("Stop the run?", "It commits a checkpoint.", "Stop it"), answers.append)
            await pilot.pause()
            await pilot.press(*keys)
            if click is not None:
                assert await pilot.click(click)
            await pilot.pause()

    asyncio.run(ask())
    return answers


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (("y",), True),
        (("n",), False),
        (("escape",), False),
        (("enter",), False),
        (("tab", "enter"), True),
        (("tab", "tab", "tab", "enter"), False),
        (("q",), None),
        (("question_mark",), None),
    ],
)
def test_a_question_is_answered_no_unless_yes_is_meant(keys: tuple[str, ...], answer: bool | None) -> None:
    assert answer_of(*keys) == ([] if answer is None else [answer])


@pytest.mark.parametrize("size", [(60, 20), (120, 40), (40, 9)])
def test_a_question_is_answered_with_the_mouse(size: tuple[int, int]) -> None:
    assert answer_of(click="#yes", size=size) == [True]
    assert answer_of(click="#no", size=size) == [False]


def test_a_question_shows_hostile_text_as_it_is() -> None:
    async def check() -> None:
        app = Rig(Path())
        async with app.run_test() as pilot:
            app.push_screen(ConfirmScreen(f"Stop {HOSTILE}?", HOSTILE, f"Stop {HOSTILE}"))
            await pilot.pause()
            assert f"Stop {HOSTILE}?" in told(app.screen)
            assert str(app.screen.query_one("#yes", Button).label) == f"Stop {HOSTILE}"

    asyncio.run(check())


def test_a_question_with_much_to_say_keeps_its_answers_in_sight() -> None:
    async def check() -> None:
        for size in ((60, 20), (40, 10)):
            app = Rig(Path())
            async with app.run_test(size=size) as pilot:
                app.push_screen(ConfirmScreen("Sure?", "a line that tells something\n" * 40, "Yes"))
                await pilot.pause()
                for button in ("#yes", "#no"):
                    assert app.screen.region.contains_region(app.screen.query_one(button).region)

    asyncio.run(check())


# The themes


def contrast(text: Color, ground: Color) -> float:
    """By WCAG 2.2."""

    def luminance(colour: Color) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour.normalized]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    lighter, darker = sorted((luminance(text), luminance(ground)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_black_on_white_has_the_contrast_that_the_standard_gives_it() -> None:
    assert contrast(Color.parse("#000000"), Color.parse("#FFFFFF")) == pytest.approx(21)
    assert contrast(Color.parse("#777777"), Color.parse("#FFFFFF")) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_text_can_be_read_on_every_ground(theme: object) -> None:
    colours = (DARK if theme is DARK else LIGHT).to_color_system().generate()
    words = ("foreground", "text", "text-muted", "text-disabled", "primary", "secondary", "accent")
    states = ("success", "warning", "error", "text-success", "text-warning", "text-error", "footer-key-foreground")
    for ground in ("background", "surface", "panel"):
        for word in (*words, *states):
            found = contrast(Color.parse(colours[word]), Color.parse(colours[ground]))
            assert found >= 4.5, f"{word} on {ground}: {found:.2f}"
    pairs = [
        ("block-cursor-foreground", "block-cursor-background"),
        ("block-cursor-blurred-foreground", "block-cursor-blurred-background"),
        ("input-cursor-foreground", "input-cursor-background"),
        *(("button-color-foreground", state) for state in ("primary", "success", "warning", "error")),
    ]
    for word, ground in pairs:
        found = contrast(Color.parse(colours[word]), Color.parse(colours[ground]))
        assert found >= 4.5, f"{word} on {ground}: {found:.2f}"


def test_a_lightened_or_darkened_colour_keeps_its_hue() -> None:
    for published, made in HUES.items():
        for colour in made:
            away = abs(Color.parse(published).hsl.h - Color.parse(colour).hsl.h) * 360
            assert min(away, 360 - away) <= 13, f"{published} {colour}"


@pytest.mark.parametrize("theme", ["kdconsole-dark", "kdconsole-light", "ansi-dark", "ansi-light", "nord"])
def test_the_screens_draw_in_every_kind_of_theme(theme: str, tmp_path: Path) -> None:
    assert theme in {*BUILTIN_THEMES, *(each.name for each in THEMES)}

    async def check() -> None:
        app = Rig(tmp_path, settings=Settings(theme=theme))
        async with app.run_test(size=(80, 24)) as pilot:
            app.push_screen(NewRunScreen())
            await until(pilot, lambda: "contract" in told(app.screen), "the checks")
            assert "✔" in app.export_screenshot()
            await pilot.press("f1")
            assert "falsifiers" not in app.export_screenshot()

    asyncio.run(check())


def test_no_color_leaves_no_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def picture() -> str:
        app = Rig(tmp_path)
        async with app.run_test(size=(80, 24)) as pilot:
            app.push_screen(NewRunScreen())
            await until(pilot, lambda: "contract" in told(app.screen), "the checks")
            return app.export_screenshot()

    def coloured(drawn: str) -> set[str]:
        found = set(re.findall(r"-r\d+ \{ fill: (#\w{6})", drawn)) - {"#c5c8c6"}  # the picture's own
        return {colour for colour in found if len({colour[1:3], colour[3:5], colour[5:7]}) > 1}

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(asyncio.run(picture()))
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = asyncio.run(picture())
    assert coloured(drawn) == set()
    assert "✔" in drawn
