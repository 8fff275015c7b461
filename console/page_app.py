"""The app behind one page of `kdconsole serve`: packets on standard input and output instead of a terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from textual.drivers.web_driver import WebDriver

from console.app import KdConsoleApp
from console.interactive import open_app
from engine.errors import KdError


class PageDriver(WebDriver):
    """The packets of textual-serve. A page that is closed leaves the app as its operator would."""

    def run_input_thread(self) -> None:
        """See Textual. The end of the input is the end of the page, and of the server when it was killed."""
        super().run_input_thread()
        if not self.exit_event.is_set():
            self._leave()

    def on_meta(self, packet_type: str, payload: dict[str, object]) -> None:
        """See Textual."""
        if packet_type == "quit":
            self._leave()
        else:
            super().on_meta(packet_type, payload)

    def _leave(self) -> None:
        # Not a plain exit: a run that is just being started is started first.
        app: Any = self._app
        if isinstance(app, KdConsoleApp):
            app.call_later(app.action_leave)


def main(arguments: list[str]) -> int:
    """Runs the app of one page; what there is to tell at its end goes to standard error."""
    parser = argparse.ArgumentParser(prog="kdconsole serve: page")
    parser.add_argument("evidence", type=Path)
    parser.add_argument("--readonly", action="store_true")
    options = parser.parse_args(arguments)
    try:
        left = open_app(options.evidence, readonly=options.readonly)
    except KdError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    if left:
        print(left, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
