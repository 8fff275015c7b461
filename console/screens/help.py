"""What every key does here, what the glyphs mean, how to leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from console.actions import DIALOGS, SCREENS, Action, Where, actions_of, bindings, keys_of, named
from console.columns import columns, indented, stacked
from console.keys import shown
from console.palette import CHECKPOINTS, RUNS, VERDICTS, Mark
from console.settings import VARIABLE, Settings, settings_path
from console.widgets.flow import Flow
from engine.text import clean

MEANINGS = {
    "PASS": "the falsifier held",
    "FAIL": "it did not; what was expected and what was observed stand beside it",
    "PENDING": "not judged yet",
    "UNKNOWN": "too little data to judge by",
    "READING": "evidence is being read; what is shown is the part that was",
    "STARTING": "being launched",
    "RUNNING": "alive, and making steps",
    "STALLED": "alive, or it was; nothing new for too long",
    "UNREACHABLE": "its host does not answer, so what it does is not known",
    "UNASKED": "on another host, which was not asked since it was left; opening it asks",
    "COMPLETED": "came to its end",
    "FAILED": "ended by an error or a fatal verdict",
    "STOPPED": "stopped by an operator",
    "TIMEOUT": "ended by its budget or by a stall",
    "CRASHED": "ended without a word",
    "LOST": "no process and no record of an end",
    "CHANGED": "files are not as they were when the run ended",
    "DISPUTED": "engine and console judge the same stream differently",
    "periodic": "saved on schedule",
    "best": "lowest held-out loss so far",
    "interrupt": "saved because the run was stopped",
    "final": "saved after the last step",
    "failed": "could not be written or read back",
}
"""What the words of the palette say."""


class HelpScreen(ModalScreen[None]):
    """Help for one screen.

    Args:
        where: the screen that it was called on.
    """

    BINDINGS = bindings("help")
    AUTO_FOCUS = "#sheet"
    where: ClassVar[Where] = "help"

    DEFAULT_CSS = """
    HelpScreen {
        align: center middle;

        #dialog {
            width: 100;
            max-width: 100%;
            height: 100%;
            padding: 0 1;
            background: $panel;
            border: round $primary;
        }
        #sheet {
            height: 1fr;
        }
        #keys {
            height: 1;
            color: $foreground-muted;
        }
    }
    """

    def __init__(self, where: str = "app") -> None:
        super().__init__()
        self._of: Where = where if where in SCREENS else "app"

    def compose(self) -> ComposeResult:
        """See Textual."""
        settings: Settings = getattr(self.app, "settings", Settings())
        keymap, file = settings.keymap(), settings_path()
        with Vertical(id="dialog"):
            with VerticalScroll(id="sheet"):
                yield Flow(lambda width: help_text(self._of, keymap, file, width))
            close = shown(keys_of(named("close"), "help", keymap))
            yield Static(Content(f"{close} close · ↑ ↓ pgup pgdn scroll"), id="keys")

    def action_close(self) -> None:
        """Back to the screen beneath."""
        self.dismiss(None)


def help_text(where: Where, keymap: Mapping[str, str], settings_file: Path, width: int) -> Content:
    """The whole help.

    Args:
        where: the screen that it is for.
        keymap: the user's own keys.
        settings_file: where the settings are, or would be.
        width: to wrap at, in cells.
    """
    own = [action for action in actions_of(where) if "app" not in action.where]
    lines: list[Content] = []
    if own:
        lines += [_title(f"Keys: {SCREENS[where]}"), *_keys(own, where, keymap, width), Content("")]
    if where not in DIALOGS:
        lines += [_title("Keys: everywhere"), *_keys(actions_of("app"), "app", keymap, width), Content("")]
    leave = shown(keys_of(named("leave"), "app", keymap))
    back = shown(keys_of(named("back"), "run", keymap))
    how = (
        f"{back} goes back a screen, {leave} leaves the app. Neither stops a run: runs belong to their host and go on."
    )
    lines += [_title("Leaving"), *indented(how, 2, width), Content("")]
    lines += _legend("Verdicts", VERDICTS.values(), width)
    lines += _legend("Runs", RUNS.values(), width)
    lines += _legend("Checkpoints", CHECKPOINTS.values(), width)
    file = clean(str(settings_file), 300)
    there = f"{file}, or the file that {VARIABLE} names. theme, fps, bell, notify, evidence, and keys such as "
    lines += [_title("Settings"), *indented(f"{there}`home.sort: s` below `keys:`.", 2, width)]
    return stacked(lines)


def _title(text: str) -> Content:
    return Content.styled(text, "bold $primary")


def _keys(actions: Iterable[Action], where: Where, keymap: Mapping[str, str], width: int) -> list[Content]:
    actions = list(actions)
    longest = max((len(shown(keys_of(action, where, keymap))) for action in actions), default=0)
    left = max(6, min(longest, width // 4))
    return [
        Content("  ") + line
        for action in actions
        for line in columns(
            [Content.styled(shown(keys_of(action, where, keymap)), "bold $foreground"), action.help],
            [left, max(4, width - left - 4)],
        )
    ]


def _legend(title: str, marks: Iterable[Mark], width: int) -> list[Content]:
    marks = list(marks)
    left = 2 + max(len(mark.word) for mark in marks)
    rows = [
        Content("  ") + line
        for mark in marks
        for line in columns(
            [Content.styled(f"{mark.glyph} {mark.word}", mark.style), Content(MEANINGS.get(mark.word, ""))],
            [left, max(4, width - left - 4)],
        )
    ]
    return [_title(title), *rows, Content("")]
