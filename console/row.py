"""What the list of runs shows of one: plain data, so that a list is drawn before what reads runs is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

UNREADABLE = "UNREADABLE"
"""The status of a directory that is no whole run: neither good nor bad, and worth a look."""
UNASKED = "UNASKED"
"""The status of a run on another host, which the list of runs does not ask."""
LIVE = ("STALLED", "RUNNING", "STARTING", UNASKED)
RUN = "run"
"""The kind of a run directory of ours, as `dispatch.evidence.Kind` calls it."""


@dataclass(frozen=True)
class Row:
    """What the list of runs shows of one; None is not known.

    `exact` says that the whole stream or log was folded and judged; before that `verdicts` are not known. Times are
    Unix seconds, 0 where nobody said one; losses are nats per token. Texts are clean.
    """

    path: Path
    id: str
    name: str = ""
    mode: str = ""
    host: str = ""
    device: str = ""
    created: float = 0.0
    status: str = UNREADABLE
    reason: str = ""
    step: int | None = None
    target: int | None = None
    loss: float | None = None
    heldout: float | None = None
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """How many there are of each word."""
    judged: Mapping[str, str] = field(default_factory=dict)
    """Every falsifier with its verdict."""
    failing: tuple[str, ...] = ()
    exact: bool = False
    last_t: float = 0.0
    problem: str = ""
    kind: str = RUN
    """What kind of evidence it is: `run`, `predecessor`, `log` or `manifest`."""
    teacher: str = ""
    student: str = ""
    phase: str = ""
    """Of the campaign, such as `3b`."""
    ticket: str = ""
    unit: str = "step"
    """What `step` counts: `step` or `epoch`."""
    done: int | None = None
    total: int | None = None
    counted: str = ""
    """How far work that makes no steps has come, and what `done` and `total` count: `windows`, say."""
    score: str = ""
    """Of an evaluation, in few characters; `UNKNOWN` where it cannot be believed, empty where there is none yet."""

    @property
    def live(self) -> bool:
        """It goes on, as far as is known."""
        return self.status in LIVE
