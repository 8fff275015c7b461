"""What an evaluation asks and what contains its answers, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.problems import HUMANEVAL, read_problems
from engine.text import clean

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.sandbox import Containment


def asked_text(config: RunConfig, problems: bytes | None) -> str:
    """What is asked: `the first 20 of 164 problems of HumanEval, 1 answer each, greedy, …`, or the held-out windows.

    Args:
        config: of an evaluation.
        problems: those of its suite; None where it has none.
    """
    asked = config.evaluate
    if problems is None:
        beside = " beside its teacher" if config.teacher else ""
        return f"held-out losses on {config.data.heldout_windows:,} windows of {config.train.sequence:,} tokens{beside}"
    every = len(read_problems(problems, "problems.jsonl"))
    suite = "HumanEval" if asked.suite == HUMANEVAL else clean(asked.suite, 300)
    part = f"the first {asked.limit:,} of {every:,}" if asked.limit and asked.limit < every else f"all {every:,}"
    how = f"at temperature {asked.temperature:g} and top-p {asked.top_p:g}" if asked.temperature else "greedy"
    return (
        f"{part} problems of {suite}, {asked.samples:,} answer{'s' * (asked.samples > 1)} each, {how}, of at most "
        f"{asked.max_new_tokens:,} tokens, {asked.batch:,} at a time, seed {asked.seed}"
    )


def limits_text(config: RunConfig) -> str:
    """What one program may take: `15 s, 5 s of CPU, 512 MiB`."""
    asked = config.evaluate
    return f"{asked.wall_seconds:g} s, {asked.cpu_seconds} s of CPU, {asked.memory_mib:,} MiB"


def walls_here() -> Containment:
    """What this machine gives to contain generated code; found by trying."""
    from engine.sandbox import containment

    return containment()


def walls_text(host: str | None) -> str:
    """What contains generated code where it would run."""
    if host is not None:
        return f"contained by what {host} gives, which is tried before the first one"
    found = walls_here()
    if not found.sufficient:
        return f"and this machine cannot contain them: {clean(found.reason, 300)}"
    missing = "".join(f"; missing: {clean(each, 200)}" for each in found.missing)
    return f"behind {clean(', '.join(found.walls), 300)}{missing}"
