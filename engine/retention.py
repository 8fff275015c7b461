"""Which of a run's checkpoints stay, and which a full disk may cost."""

from __future__ import annotations

from collections.abc import Sequence

from engine.checkpoint import Manifest


def retained(manifests: Sequence[Manifest], keep_last: int) -> list[Manifest]:
    """Which of a run's checkpoints stay.

    Args:
        manifests: newest first.
        keep_last: periodic ones to keep.

    Returns:
        The newest, the last periodic ones, the best, and the newest interrupt and final ones; newest first.
    """
    best = _best(manifests)
    keep = {manifest.step for manifest in [*manifests[:1], *([best] if best else [])]}
    for kind, count in (("periodic", keep_last), ("interrupt", 1), ("final", 1)):
        keep.update([manifest.step for manifest in manifests if kind in manifest.kinds][:count])
    return [manifest for manifest in manifests if manifest.step in keep]


def droppable(manifests: Sequence[Manifest]) -> list[Manifest]:
    """What a full disk may cost, oldest first: periodic ones that are neither the newest nor the best.

    Args:
        manifests: newest first.
    """
    best = _best(manifests)
    return [m for m in reversed(manifests[1:]) if set(m.kinds) <= {"periodic", "best"} and m is not best]


def _best(manifests: Sequence[Manifest]) -> Manifest | None:
    """The one saved as best with the lowest held-out loss, of equal ones the newest."""
    bests = [m for m in manifests if "best" in m.kinds and m.state.best is not None]
    return min(bests, key=lambda m: m.state.best.loss if m.state.best else 0.0, default=None)
