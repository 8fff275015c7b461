"""One of several ways to do something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from console.actions import Where, bindings, keys_of, named
from console.keys import shown
from console.settings import Settings


class ChooseScreen(ModalScreen[int | None]):
    """Asks which; the answer is its index, or None.

    Args:
        question: one sentence, shown as plain text.
        options: what can be taken, each with what it means; plain texts. The cursor stands on the first.
    """

    BINDINGS = bindings("choose")
    where: ClassVar[Where] = "choose"
    DEFAULT_CSS = """
    ChooseScreen {
        align: center middle;

        #dialog {
            width: 76;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 2;
            background: $panel;
            border: round $primary;
        }
        #question {
            height: auto;
            margin: 0 0 1 0;
            text-style: bold;
        }
        OptionList {
            height: auto;
            max-height: 60vh;
            margin: 0 0 1 0;
            border: none;
            background: $panel;
        }
        #keys {
            height: auto;
            text-align: center;
            color: $foreground-muted;
        }
    }
    """

    def __init__(self, question: str, options: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._question, self._options = question, options

    def compose(self) -> ComposeResult:
        """See Textual."""
        prompts = (
            Content.assemble((name, "bold"), *((f"\n  {what}", "$foreground-muted") for what in [meaning] if what))
            for name, meaning in self._options
        )
        with Vertical(id="dialog"):
            yield Static(Content(self._question), id="question")
            yield OptionList(*(Option(prompt) for prompt in prompts), markup=False)
            yield Static(Content(self._keys()), id="keys")

    def _keys(self) -> str:
        settings: Settings = getattr(self.app, "settings", Settings())
        take, cancel = (shown(keys_of(named(name), "choose", settings.keymap())) for name in ("take", "cancel"))
        return f"{take} takes · {cancel} cancels"

    @on(OptionList.OptionSelected)
    def _taken(self, message: OptionList.OptionSelected) -> None:
        self.dismiss(message.option_index)

    def action_take(self) -> None:
        """What the cursor stands on."""
        self.dismiss(self.query_one(OptionList).highlighted)

    def action_cancel(self) -> None:
        """None of it."""
        self.dismiss(None)
