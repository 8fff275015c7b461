"""A host as text: how it is reached, whose key is trusted, what a pre-flight found, what is being done there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from textual.content import Content

from console.columns import columns, indented, stacked
from console.host_desk import where
from console.palette import Mark, verdict_mark
from console.report import duration
from console.widgets.layout import cut

if TYPE_CHECKING:
    from dispatch.preflight import Preflight

LINES_KEPT, LINES_SHOWN = 200, 12
_LABEL = 12
WARNING = Mark("⚠", "WARN", "$warning")


@dataclass(frozen=True)
class HostView:
    """What is known of a host now.

    Args:
        found: its document, see `host_desk.document`; empty where it cannot be told.
        problem: why it cannot be told, or why the last thing that was tried did not work.
        preflight: the last one, if there was one.
        doing: what is being done there.
        seconds: since that was begun.
        told: what was said while it was done, the newest last.
    """

    name: str
    found: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    preflight: Preflight | None = None
    doing: str = ""
    seconds: float = 0.0
    told: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """A key of it is known."""
        return bool(self.found.get("host_keys"))

    def says(self, text: str) -> HostView:
        """With one more line of what was said."""
        return replace(self, told=(*self.told, text)[-LINES_KEPT:])

    def state(self) -> tuple[Mark, str]:
        """The one thing that matters of it."""
        if self.doing:
            return Mark("◔", "BUSY", "$primary"), f"{self.doing}, {duration(self.seconds)}"
        if self.problem:
            return verdict_mark("FAIL"), self.problem
        if not self.trusted:
            return verdict_mark("UNKNOWN"), "its key is not trusted yet: t shows it and asks"
        if self.preflight is None:
            return verdict_mark("PENDING"), "not looked at: enter makes a pre-flight"
        bad = [line.name for line in self.preflight.lines if line.outcome == "FAIL"]
        if bad:
            lane = f"; the next lane is {self.preflight.next_lane}" if self.preflight.next_lane else ""
            return verdict_mark("FAIL"), f"not ready: {', '.join(bad)}{lane}"
        seen = f"looked at in {duration(self.preflight.seconds)}"
        odd = [line.name for line in self.preflight.lines if line.outcome != "PASS"]
        return (
            (WARNING, f"ready, but see {', '.join(odd)}; {seen}") if odd else (verdict_mark("PASS"), f"ready, {seen}")
        )


def host_text(view: HostView, width: int) -> Content:
    """Everything that is known of a host, for a width in cells."""
    mark, text = view.state()
    lines = columns([Content.styled(mark.glyph, mark.style), Content.styled(text, "bold")], [1, max(8, width - 3)])
    if view.told:
        lines += [Content(""), _title("What was done")]
        for told in view.told[-LINES_SHOWN:]:
            text = told.removeprefix(f"{view.name}: ").strip()
            lines.append(cut(Content.styled(f"  {text}", "$foreground-muted"), width))
    if view.preflight is not None:
        lines += [Content(""), _title("Pre-flight"), *_checks(view.preflight, width)]
    if view.found:
        lines += [Content(""), _title("How it is reached"), *_facts(view.found, width)]
    return stacked(lines)


def no_hosts(path: str, width: int) -> Content:
    """What an operator without hosts can do."""
    lines = [
        *columns([Content.styled("No hosts yet.", "bold")], [width]),
        Content(""),
        *columns(["A host is a machine with a GPU that you reach over SSH. One command writes it down:"], [width]),
        Content(""),
        *indented(Content.styled("kdconsole hosts add gx10 --address 192.168.1.40 --user kd", "bold"), 2, width),
        Content(""),
        *columns([f"Then ctrl+r reads {path} again, and t trusts its key."], [width]),
    ]
    return stacked(lines)


def _checks(preflight: Preflight, width: int) -> list[Content]:
    """What is wrong first, each with what to do; what is well in a line each."""
    order = {"FAIL": 0, "WARN": 1, "UNKNOWN": 2}
    lines: list[Content] = []
    for line in sorted(preflight.lines, key=lambda each: order.get(each.outcome, 3)):
        mark = WARNING if line.outcome == "WARN" else verdict_mark(line.outcome)
        text = f"{line.name}: {line.found}"
        if line.outcome != "PASS" and line.wanted:
            text += f"; wanted: {line.wanted}"
        lines += _shift(columns([Content.styled(mark.glyph, mark.style), text], [1, max(8, width - 5)]))
        if line.outcome != "PASS" and line.do:
            lines += indented(Content.styled(f"→ {line.do}", "bold"), 5, width)
    return lines


def _facts(found: Mapping[str, Any], width: int) -> list[Content]:
    keys: Sequence[Mapping[str, str]] = found["host_keys"]
    rows = (
        ("address", where(found)),
        ("over", found["over"] or ""),
        ("user", found["user"]),
        ("identity", found["identity"] or "agent and ssh_config"),
        ("python", found["python"]),
        ("run dir", found["run_dir"]),
        ("variables", ", ".join(found["env"])),
        ("gpu", "" if found["gpu"] is None else str(found["gpu"])),
        ("lane", str(found["lane"] or "")),
        ("host key", "; ".join(f"{key['fingerprint']} ({key['kind']})" for key in keys) or "not trusted"),
    )
    lines: list[Content] = []
    for name, value in rows:
        if value:
            label = Content.styled(name, "$foreground-muted")
            lines += _shift(columns([label, value], [_LABEL, max(8, width - _LABEL - 4)]))
    return lines


def _shift(lines: Iterable[Content]) -> list[Content]:
    return [Content("  ") + line for line in lines]


def _title(text: str) -> Content:
    return Content.styled(text, "bold $primary")
