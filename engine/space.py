"""Whether the disk still has room for the next checkpoint, looked at between two of them."""

from __future__ import annotations

from collections.abc import Callable

from engine.checkpoint import CheckpointError
from engine.checkpoint_writer import Checkpoints


class SpaceWatch:
    """Warns where the next checkpoint would not fit: once, and again only after there was room in between.

    Args:
        checkpoints: of the run.
        log: takes message and level.
    """

    def __init__(self, checkpoints: Checkpoints, log: Callable[[str, str], None]) -> None:
        self._checkpoints, self._log, self._told = checkpoints, log, False

    def look(self, free: int, step: int) -> None:
        """Takes what is free now.

        Args:
            free: bytes that the run can still write.
            step: the last one made; checkpoints of later steps are not this training's.
        """
        if self._checkpoints.writing:  # takes room that the one which it replaces gives back
            return
        needed = self._checkpoints.needed_bytes
        if self._told:
            self._told = free < needed + needed // 10  # a disk that hovers at the limit is one piece of news
        elif free < needed:
            self._told = True
            self._log(
                f"{self._checkpoints.root}: {free:,} bytes are free and the next checkpoint needs {needed:,}: "
                f"{self._fate(free, step)}; free space on that disk",
                "warning",
            )

    def _fate(self, free: int, step: int) -> str:
        try:
            return self._checkpoints.fate(free, step)
        except CheckpointError:
            return "it will not be saved"
