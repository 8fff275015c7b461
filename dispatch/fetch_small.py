"""The small files of a run of another host: its stream as an exact prefix, its logs, and at its end all the rest."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Final

from dispatch.getting import get_tree
from dispatch.manifest import EXIT, FIRST_FILES, SUMS, ExitRecord, decode
from dispatch.mirror import MirroredTransport
from dispatch.places import Place, Reach, catch_up
from dispatch.runs import RunDir
from dispatch.seal import reopen, seal
from dispatch.supervisor import read_regular
from dispatch.survey import HostRun
from dispatch.tool_client import Say
from dispatch.transfer import resuming
from dispatch.transport import Transport
from engine.problems import COMPLETIONS, PROBLEMS, RESULTS

LOGS: Final = ("launch.log", "supervisor.jsonl", PROBLEMS, COMPLETIONS, RESULTS)
"""What grows while a run goes on, besides its stream; and what an evaluation asks, for another console's copy."""


@dataclass
class Small:
    """What became of the small files."""

    moved: int = 0
    """Bytes."""
    notes: list[str] = field(default_factory=list)


async def bring_small(reach: Reach, run_dir: RunDir, there: HostRun, say: Say) -> Small:
    """Brings the small files as far as they go; those of a run that is over are sealed with SHA256SUMS.

    Raises:
        TransportError: the host cannot be reached.
        RunError: what is here is not of this run, or cannot be written.
    """
    small, over = Small(), there.state in ("ended", "lost")
    known = any((run_dir.path / name).exists() for name in (EXIT, SUMS))
    if known and _exit(run_dir) != there.exit:  # it was resumed, by another console
        small.notes.append("the run went on there after it was brought here")
        reopen(run_dir)
    place = reach.place(run_dir, keep=True)
    if place.direct is None:
        return small  # sealed, and as it ended there
    try:
        before = await asyncio.to_thread(_bytes, run_dir)
        mirror = place.transport
        if over or (isinstance(mirror, MirroredTransport) and mirror.keeping):
            await resuming(lambda: catch_up(place, run_dir), say=say)
        else:
            small.notes.append("its stream is kept here by another console, which is following it")
        if over:
            sealed = await resuming(lambda: seal(run_dir, place, say), say=say)
            small.notes.extend(sealed.problems)
        else:
            await resuming(lambda: _logs(place, place.direct or place.transport, run_dir), say=say)
        small.moved = max(0, await asyncio.to_thread(_bytes, run_dir) - before)
    finally:
        place.close()
    return small


def _exit(run_dir: RunDir) -> ExitRecord | None:
    path = run_dir.path / EXIT
    try:
        return decode(ExitRecord, read_regular(path, 1 << 20), str(path))
    except OSError:
        return None


def _bytes(run_dir: RunDir) -> int:
    """Of the small files that come from the host."""
    ours = (*FIRST_FILES, SUMS)
    with os.scandir(run_dir.path) as entries:
        return sum(e.stat().st_size for e in entries if e.is_file(follow_symlinks=False) and e.name not in ours)


async def _logs(place: Place, transport: Transport, run_dir: RunDir) -> None:
    await get_tree(transport, place.run_dir, run_dir.path, want=LOGS.__contains__, python=place.python)
