"""Draws the report of a run as an SVG, for the README.

    python bench/picture.py evidence/RUN docs/smoke.svg

The picture is what `kdconsole --headless attach RUN` prints, judged again from the run's stream.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from console.headless import attach
from console.narration import Narrator
from console.report import table
from dispatch.runs import resolve_run

WIDTH = 132
# Rich's own template, without its web fonts: a picture in a repository should fetch nothing.
TEMPLATE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#1a1a1a"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def main() -> None:
    """Reads a run directory, writes a picture."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = attach(resolve_run(Path("evidence"), sys.argv[1]), Narrator(Console(file=io.StringIO()), quiet=True))
    if result is None:
        sys.exit("the run still goes on")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print("$ make smoke", style="bold")
    console.print(table(result))
    svg = console.export_svg(title="", theme=DIMMED_MONOKAI, code_format=TEMPLATE, unique_id="kd")
    Path(sys.argv[2]).write_text(svg, encoding="utf-8")
    print(f"{sys.argv[2]}: {len(svg):,} bytes")


if __name__ == "__main__":
    main()
