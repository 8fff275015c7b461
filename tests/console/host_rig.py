"""A host of a real sshd that is known and trusted, for the code that starts runs, called in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from dispatch.hosts import add_host
from tests import ssh_rig
from tests.console_rig import processes_of, write_corpus
from tests.nursery import Nursery

needs_sshd = pytest.mark.skipif(ssh_rig.MISSING is not None and "CI" not in os.environ, reason=str(ssh_rig.MISSING))
CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 6000, batch: 2, sequence: 32, threads: 1, warmup_steps: 5, learning_rate: 1.0e-3}
"""


@dataclass(frozen=True)
class Lab:
    """The host gx10, and a directory of its own on this side."""

    rig: ssh_rig.Rig
    base: Path
    """The host's run directory."""
    config: Path

    @property
    def environ(self) -> dict[str, str]:
        """Where this side finds its hosts; nothing else of this machine's."""
        return dict(self.rig.environ)

    def add(self, name: str, **more: object) -> None:
        """Another name for the same host, with other settings."""
        given = {"address": "127.0.0.1", "port": self.rig.port, "identity": str(self.rig.identity)}
        add_host(name, {**given, "python": sys.executable, "run_dir": str(self.base), **more}, self.environ)


@contextlib.contextmanager
def running_lab(root: Path, nursery: Nursery | None = None) -> Iterator[Lab]:
    """The host, its key trusted, and a configuration of 6,000 steps; nothing is on the host yet.

    With a nursery, that forks the host's engines.
    """
    with ssh_rig.running_sshd(root / "host") as rig:
        rig.trusted()
        (root / "here").mkdir()
        write_corpus(root / "here" / "corpus.txt")
        lab = Lab(rig, root / "base", root / "here" / "config.yaml")
        lab.config.write_text(CONFIG)
        lab.add("gx10", **({"python": str(nursery.python(root / "python"))} if nursery else {}))
        try:
            yield lab
        finally:
            for pid in processes_of(lab.base):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def listing(*roots: Path) -> Mapping[str, tuple[int, int, int]]:
    """Everything below some directories: kind and mode, size, and when it was last changed."""
    found = {}
    for root in roots:
        for each in (root, *root.rglob("*")):
            if each.exists():
                stat = each.lstat()
                found[str(each)] = (stat.st_mode, stat.st_size, stat.st_ctime_ns)
    return found
