"""The question before something that cannot be taken back."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from console.actions import Where, bindings, keys_of, named
from console.keys import shown
from console.settings import Settings


class ConfirmScreen(ModalScreen[bool]):
    """Asks; the answer is No unless the operator says otherwise.

    Args:
        question: one sentence, shown as plain text.
        consequences: what follows from Yes, in as many lines as it takes; plain text.
        yes: the label of Yes, such as `Stop the run`.
        typed: a word that has to be typed before Yes counts; for what a slip of the finger must not do.
        reason: what is asked for in a line that must not stay empty; it is in `said` then.
    """

    BINDINGS = bindings("confirm")
    AUTO_FOCUS = "#word, #no"
    VERTICAL_BREAKPOINTS = [(0, "-low"), (18, "-tall")]
    where: ClassVar[Where] = "confirm"

    DEFAULT_CSS = """
    ConfirmScreen {
        align: center middle;

        #dialog {
            width: 76;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 2;
            background: $panel;
            border: round $warning;
        }
        #question {
            height: auto;
            margin: 0 0 1 0;
            text-style: bold;
        }
        #consequences {
            height: auto;
            max-height: 40vh;
            width: 100%;
            margin: 0 0 1 0;
        }
        #word {
            margin: 0 0 1 0;
        }
        #answers {
            height: auto;
            align-horizontal: center;
        }
        #answers Button {
            margin: 0 1;
        }
        #keys {
            height: auto;
            text-align: center;
            color: $foreground-muted;
        }
        &.-low Button {
            height: 1;
            border: none !important;
        }
        &.-low #question {
            margin: 0;
        }
    }
    """

    def __init__(
        self, question: str, consequences: str = "", yes: str = "Yes", typed: str = "", reason: str = ""
    ) -> None:
        super().__init__()
        self._question, self._consequences, self._yes, self._word = question, consequences, yes, typed
        self._line = f"type {typed}" if typed else reason
        self.said = ""

    def compose(self) -> ComposeResult:
        """See Textual."""
        with Vertical(id="dialog"):
            yield Static(Content(self._question), id="question")
            if self._consequences:
                with VerticalScroll(id="consequences"):
                    yield Static(Content(self._consequences))
            if self._line:
                yield Input(placeholder=self._line, id="word", compact=True)
            with Horizontal(id="answers"):
                yield Button(Content("No"), id="no")
                yield Button(Content(self._yes), id="yes", variant="warning", disabled=bool(self._line))
            yield Static(Content(self._keys()), id="keys")

    def _keys(self) -> str:
        settings: Settings = getattr(self.app, "settings", Settings())
        if self._line:
            return f"{self._line}, then enter · esc no"
        yes, no = (shown(keys_of(named(name), "confirm", settings.keymap())) for name in ("yes", "no"))
        return f"{yes} yes · {no} no · tab changes, enter takes"

    @on(Button.Pressed)
    def _answer(self, pressed: Button.Pressed) -> None:
        self.dismiss(pressed.button.id == "yes")

    @property
    def _may(self) -> bool:
        return not self._line or (self.said == self._word if self._word else bool(self.said))

    @on(Input.Changed)
    def _typed(self, message: Input.Changed) -> None:
        self.said = message.value.strip()
        self.query_one("#yes", Button).disabled = not self._may

    @on(Input.Submitted)
    def action_yes(self) -> None:
        """Yes; where a word has to be typed, only once it stands there."""
        if self._may:
            self.dismiss(True)

    def action_no(self) -> None:
        """No."""
        self.dismiss(False)
