"""What a screen shows of one run at one moment: its state, how it is reached, and the clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from console.replay import Replay
from console.run_state import RunState
from dispatch.liveness import Liveness
from dispatch.manifest import ExitRecord, Manifest
from dispatch.manifest import RunState as HostState

if TYPE_CHECKING:
    from console.run_reader import LoadedRun


@dataclass(frozen=True)
class Link:
    """How and when something was last heard of a run; times in Unix seconds of this machine's clock.

    `status` is what the host last said. `problem` says why it cannot be asked now; what runs there is then unknown,
    and not failed.
    """

    host: str = "localhost"
    status: HostState = "starting"
    heard: float = 0.0
    """When the last line arrived; 0 before the first."""
    answered: float = 0.0
    """When the host last answered anything; 0 before it did."""
    liveness: Liveness | None = None
    """The three clocks as they stood then; None of a run that is not followed."""
    latency_seconds: float | None = None
    problem: str = ""
    exit: ExitRecord | None = None
    rebooted: bool = False
    """It is lost because its host was started anew."""
    live: bool = True
    """Followed now; false for a run that is only looked at."""


@dataclass(frozen=True)
class View:
    """Everything that a pane may draw. Panes are functions of it: the same view gives the same picture.

    Args:
        state: the run, cut at `now` when the operator looks at its past.
        link: how it is reached.
        now: Unix seconds; for an ended run, the time of its last event. A line's number where the lines have no times.
        manifest: who, where and with what; None where a directory has none.
        smoke_seconds: p10, p50, p90 that a smoke of the same configuration promised for all steps.
        scrubbed: an earlier moment is shown than the latest known one.
        notes: anything that the operator should know of this view, such as checksums that differ.
        replay: the place of an earlier moment, and whether it is played from there on.
        last_t: `state.last_t` of all that is known, where an earlier moment is shown.
        review: past evidence as it was read, which is looked at and not followed; None of a run that is followed.
        reading: bytes of the evidence that were read, and that there are, as long as there are more to read.
    """

    state: RunState = field(default_factory=RunState)
    link: Link = field(default_factory=Link)
    now: float = 0.0
    manifest: Manifest | None = None
    smoke_seconds: tuple[float, float, float] | None = None
    scrubbed: bool = False
    notes: tuple[str, ...] = ()
    replay: Replay = field(default_factory=Replay)
    last_t: float = 0.0
    review: LoadedRun | None = None
    reading: tuple[int, int] | None = None

    @property
    def timed(self) -> bool:
        """Times are times, and not numbers of lines."""
        return self.state.source.timed
