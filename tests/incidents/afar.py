"""A host behind a real sshd on a loopback port, for the incidents and good runs that want one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scene import Scene

from dispatch.hosts import add_host
from tests.console_rig import Desk, Outcome, RunFiles, processes_of
from tests.ssh_rig import running_sshd


@dataclass
class Afar:
    """A desk, and a host named gx10 that it reaches and trusts."""

    desk: Desk
    base: Path
    """The host's run directory."""
    variables: dict[str, str]

    def call(self, *arguments: str) -> Outcome:
        return self.desk.call(*arguments, variables=self.variables)

    def there(self, run: RunFiles) -> RunFiles:
        """The same run's directory on the host."""
        return RunFiles(self.base / "runs" / run.path.name)


@contextlib.contextmanager
def afar(scene: Scene) -> Iterator[Afar]:
    """A host while inside; no process of it is left."""
    desk, base = scene.desk(), scene.root / "base"
    with running_sshd(scene.root / "host") as rig:
        given = {"address": "127.0.0.1", "port": rig.port, "identity": str(rig.identity)}
        add_host("gx10", {**given, "python": sys.executable, "run_dir": str(base)}, rig.environ)
        far = Afar(desk, base, {name: rig.environ[name] for name in ("HOME", "KDCONSOLE_HOSTS")})
        trusted = far.call("hosts", "trust", "gx10", "--fingerprint", rig.key.get_fingerprint("sha256"))
        assert trusted.rc == 0, trusted.said
        try:
            yield far
        finally:
            for pid in processes_of(base):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
