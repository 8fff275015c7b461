"""The registry of actions: one key for one thing, a method behind each, and documents that say the same."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from pathlib import Path

import pytest
from textual.app import App
from textual.command import CommandPalette
from textual.screen import Screen

from console import keys_table
from console.actions import (
    ACTIONS,
    DIALOGS,
    SCREENS,
    Action,
    Where,
    actions_of,
    binding_id,
    bindings,
    keys_of,
    named,
)
from console.keys import canonical
from console.palette_commands import ActionCommands
from console.settings import Settings

CLASSES: dict[Where, str] = {
    "app": "console.app:KdConsoleApp",
    "home": "console.screens.home:HomeScreen",
    "run": "console.screens.run:RunScreen",
    "review": "console.screens.review:ReviewScreen",
    "compare": "console.screens.compare:CompareScreen",
    "new": "console.screens.new_run:NewRunScreen",
    "hosts": "console.screens.hosts:HostsScreen",
    "help": "console.screens.help:HelpScreen",
    "confirm": "console.screens.confirm:ConfirmScreen",
    "choose": "console.screens.choose:ChooseScreen",
}


@pytest.mark.parametrize("where", SCREENS)
def test_every_action_has_a_method_on_its_screen(where: Where) -> None:
    module, _, name = CLASSES[where].partition(":")
    screen = getattr(importlib.import_module(module), name)
    missing = [a.name for a in ACTIONS if where in a.where and not callable(getattr(screen, f"action_{a.name}", None))]
    assert not missing, f"{name} has no action_… for {missing}"
    if where != "app":
        assert screen.where == where


@pytest.mark.parametrize("where", SCREENS)
def test_no_key_does_two_things_on_a_screen(where: Where) -> None:
    keys = Counter(canonical(key) for action in actions_of(where) for key in keys_of(action, where, {}))
    # The same key twice for one action is one of its spellings.
    spelt = Counter(canonical(k) for a in actions_of(where) for k in {canonical(k) for k in keys_of(a, where, {})})
    assert {key for key, count in spelt.items() if count > 1} == set()
    assert None not in keys


def test_names_are_unique_and_labels_short() -> None:
    assert len({a.name for a in ACTIONS}) == len(ACTIONS)
    for action in ACTIONS:
        assert len(action.label) <= 14, action
        assert action.help.endswith("."), action
        assert action.help.isprintable()
        assert set(action.where) <= set(SCREENS)


def test_bindings_carry_the_id_of_the_key_map() -> None:
    for where in SCREENS:
        made = {binding.id: binding for binding in bindings(where) if not isinstance(binding, tuple)}
        assert set(made) == {binding_id(a, where) for a in ACTIONS if where in a.where}
    assert binding_id(named("help"), "run") == "app.help"
    assert keys_of(named("sort"), "home", {"home.sort": "o,p"}) == ("o", "p")


def test_dialogs_have_none_of_the_apps_actions() -> None:
    for where in SCREENS:
        assert ("help" in {a.name for a in actions_of(where)}) == (where not in DIALOGS)


# Documents


def test_the_document_of_keys_says_what_the_registry_says() -> None:
    assert keys_table.DOCUMENT.read_text(encoding="utf-8") == keys_table.document(), (
        "docs/keys.md is old; `python -m console.keys_table` writes it"
    )


def test_the_table_in_the_readme_says_what_the_registry_says() -> None:
    readme = keys_table.README.read_text(encoding="utf-8")
    assert keys_table.BEGIN in readme
    assert keys_table.END in readme
    assert readme == keys_table.with_table(readme), (
        "the table in README.md is old; `python -m console.keys_table` writes it"
    )


def test_a_table_is_put_between_its_markers_and_nothing_else_is_touched() -> None:
    text = f"before\n{keys_table.BEGIN}\nold\n{keys_table.END}\nafter"
    written = keys_table.with_table(text)
    assert written == f"before\n{keys_table.BEGIN}\n{keys_table.readme_table()}{keys_table.END}\nafter"
    assert keys_table.with_table(written) == written
    assert keys_table.with_table("no markers") == "no markers"


def test_a_bar_does_not_end_a_cell_of_the_table() -> None:
    row = keys_table.markdown_table([Action("x", "vertical_line", "x", "a | b", ("home",))]).splitlines()[-1]
    assert row == r"| `\|` | Home | a \| b |"


def test_the_table_has_every_action() -> None:
    assert len(keys_table.markdown_table().splitlines()) == len(ACTIONS) + 2


# The command palette


class Desk(Screen[None]):
    BINDINGS = bindings("home")
    where = "home"

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def action_sort(self) -> None:
        self.done.append("sort")


class Rig(App[None]):
    BINDINGS = bindings("app")
    COMMANDS = {ActionCommands}

    def __init__(self, readonly: bool = False) -> None:
        super().__init__()
        self.readonly, self.settings = readonly, Settings(keys={"home.sort": "f7"})
        self.helped = 0

    def on_mount(self) -> None:
        self.push_screen(Desk())

    def action_help(self) -> None:
        self.helped += 1


async def offered(app: Rig, query: str = "") -> dict[str, str | None]:
    """The texts that the palette offers, and their help."""
    provider = ActionCommands(app.screen)
    hits = provider.search(query) if query else provider.discover()
    return {str(hit.text): hit.help async for hit in hits}


def test_the_palette_offers_every_action_of_the_screen_and_the_app_with_its_keys() -> None:
    async def check() -> None:
        app = Rig()
        async with app.run_test():
            found = await offered(app)
            expected = {a.label: a.help for a in actions_of("home") if a.name != "command_palette"}
            assert {text.partition("  ")[0]: told for text, told in found.items()} == expected
            assert "sort  (f7)" in found
            assert "help  (? f1)" in found
            assert list(await offered(app, "markd")) == ["compare  (c)"]  # by its help: the marked runs

    asyncio.run(check())


def test_the_palette_leaves_out_what_readonly_forbids() -> None:
    async def check() -> None:
        app = Rig(readonly=True)
        async with app.run_test():
            found = await offered(app)
            assert not [text for text in found if text.startswith("new run")]
            assert [text for text in found if text.startswith("sort")]

    asyncio.run(check())


def test_the_palette_runs_an_action_on_the_screen_or_the_app_that_has_it() -> None:
    async def check() -> None:
        app = Rig()
        async with app.run_test() as pilot:
            desk = app.screen
            assert isinstance(desk, Desk)
            for typed in ("sort", "help"):
                await pilot.press("ctrl+p")
                await pilot.press(*typed)
                palette = app.screen
                assert isinstance(palette, CommandPalette)
                async with asyncio.timeout(10):
                    while palette.query_one("CommandList").option_count == 0:  # type: ignore[attr-defined]
                        await pilot.pause()
                await pilot.press("enter")
                async with asyncio.timeout(10):
                    while app.screen is not desk:
                        await pilot.pause()
                await pilot.pause()
            assert desk.done == ["sort"]
            assert app.helped == 1

    asyncio.run(check())


def test_the_document_stands_where_the_readme_links_to() -> None:
    assert Path("docs/keys.md") == keys_table.DOCUMENT.relative_to(keys_table.ROOT)
