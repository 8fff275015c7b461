"""The documents' tables of keys, made from the registry: `python -m console.keys_table` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from console.actions import ACTIONS, DIALOGS, SCREENS, Action, Where, keys_of
from console.keys import shown
from console.settings import DEFAULT_THEME, VARIABLE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "keys.md"
BEGIN, END = "<!-- keys -->", "<!-- /keys -->"
"""Around the table in README.md."""

_INTRODUCTION = """\
# Keys

Everything that can be done on the screen, and its key. `?` shows the same in the app, with your own keys; the command
palette (`ctrl+p`) finds an action by its name. In a line that is being typed, letters are text: `f1` is help there, and
`esc` leaves the line. The mouse does what keys do: lists, buttons and the footer can be clicked.

The app's own keys (Everywhere) wait while Help or a question lies over the screen. With `--readonly`, what changes
something does nothing; such actions are marked with an asterisk.
"""
_SETTINGS = f"""\
## Settings

One optional YAML file, `settings.yaml` in the platform's configuration directory (`~/.config/kdconsole/` on Linux), or
the file that `{VARIABLE}` names; Help says which. It is read once, at the start, and never written. With
anything wrong in it the app does not start and says all of it, each unknown name with the nearest right one.

```yaml
theme: {DEFAULT_THEME}      # or kdconsole-light, or one of Textual's, such as nord, ansi-dark, ansi-light
fps: 4                     # most redraws a second while a run is followed or replayed, 1 to 30
bell: on                   # ring the terminal's bell when a verdict fails or a run ends
notify: on                 # and ask the terminal for a desktop notification (OSC 9)
evidence:                  # more directories whose runs are listed; relative ones start from this file's directory
  - /mnt/archive/evidence
keys:                      # an action's id, and its keys separated by commas
  home.sort: "o"
  run.stop: "ctrl+x"
  app.help: "?, f1, h"
```

A key is a single character, or a name such as `space`, `f5` or `question_mark`, after `ctrl+`, `alt+` or `shift+` where
wanted. Two actions of one screen cannot share a key. No action can have `ctrl+q`, `ctrl+c` or what moves a cursor.
"""


def markdown_table(actions: Iterable[Action] = ACTIONS) -> str:
    """A table of keys, a row for each action."""
    lines = ["| key | where | does |", "|---|---|---|"]
    for action in actions:
        where = ", ".join(SCREENS[each] for each in action.where)
        lines.append(f"| {_keys(action, action.where[0])} | {where} | {_cell(action.help)} |")
    return "\n".join(lines) + "\n"


def readme_table() -> str:
    """The table of README.md: what the footers show."""
    return markdown_table(action for action in ACTIONS if action.footer and not DIALOGS & set(action.where))


def document() -> str:
    """The text of docs/keys.md: every action, with the id that a key map has for it."""
    parts = [_INTRODUCTION]
    for where, title in SCREENS.items():
        rows = [
            f"| {_keys(a, where)} | `{where}.{a.name}` | {_cell(a.help)}{_star(a)} |"
            for a in ACTIONS
            if where in a.where
        ]
        parts.append("\n".join([f"## {title}\n", "| key | id | does |", "|---|---|---|", *rows]) + "\n")
    return "\n".join([*parts, _SETTINGS])


def with_table(readme: str) -> str:
    """README.md with the table of now between its markers; as it is where it has none."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda found: f"{BEGIN}\n{readme_table()}{END}", readme)


def _keys(action: Action, where: Where) -> str:
    return " ".join(f"`{_cell(key)}`" for key in dict.fromkeys(shown([key]) for key in keys_of(action, where, {})))


def _star(action: Action) -> str:
    return " \\*" if action.changes else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Writes docs/keys.md and the table of README.md."""
    DOCUMENT.write_text(document(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
