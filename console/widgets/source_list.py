"""Where a configuration comes from: a template, a file of the working directory, a file by its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from engine.config import TEMPLATES
from engine.text import clean

ABOUT = {"builtin": "no download needed", "gx10": "Qwen 1.5B to 0.5B"}


@dataclass(frozen=True)
class Source:
    """One place to take a configuration from; neither: the path that is typed."""

    template: str | None = None
    file: Path | None = None


TYPED = Source()


class SourceList(OptionList, inherit_bindings=False):
    """The places; the one under the cursor is the chosen one, so that Enter is left for the start."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "cursor_down", show=False),
        Binding("up", "cursor_up", show=False),
        Binding("end", "last", show=False),
        Binding("home", "first", show=False),
        Binding("pagedown", "page_down", show=False),
        Binding("pageup", "page_up", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        self._sources: list[Source] = []
        super().__init__(id=id, markup=False, compact=True)
        self.offer(())

    @property
    def source(self) -> Source:
        """The chosen one."""
        return TYPED if self.highlighted is None else self._sources[self.highlighted]

    def offer(self, files: Sequence[Path]) -> None:
        """Offers these files between the templates and the typed path; what is chosen stays chosen where it can."""
        before = self.source if self._sources else Source(template=TEMPLATES[0])
        self._sources = [*(Source(template=name) for name in TEMPLATES), *(Source(file=f) for f in files), TYPED]
        with self.prevent(OptionList.OptionHighlighted):
            self.set_options([Option(_prompt(source)) for source in self._sources])
            self.choose(before if before in self._sources else TYPED)

    def choose(self, source: Source) -> None:
        """Puts the cursor on a source that is offered."""
        self.highlighted = self._sources.index(source)


def _prompt(source: Source) -> Content:
    if source.template is not None:
        about = ABOUT.get(source.template, "template")
        return Content(f"{source.template}: {about}")
    if source.file is not None:
        return Content(clean(source.file.name, 200))
    return Content("a file by its path…")
