"""A real sshd on a loopback port with keys of its own, standing for a GPU host."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dispatch.hosts import Host

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", ""))
MISSING = None if SSHD else "no sshd on this machine: install OpenSSH's server"


@dataclass
class Rig:
    """A running sshd, and what one needs to get in."""

    port: int
    identity: Path
    directory: Path
    environ: dict[str, str]
    """HOME, where hosts.yaml and the trusted keys are, and nothing else of this machine's."""
    process: subprocess.Popen[bytes]

    @property
    def host(self) -> Host:
        return Host(
            "gx10", address="127.0.0.1", port=self.port, identity=self.identity, run_dir=str(self.directory / "base")
        )

    def restart(self) -> None:
        """Starts it again, on the same port with the keys that are there now."""
        self.process = _start(self.directory, self.port)

    def end(self) -> None:
        """Ends sshd and every session of it."""
        _end(self.process)

    def sessions(self) -> list[int]:
        """The processes of open connections."""
        out = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        return [int(line) for line in out.split()]


@contextlib.contextmanager
def running_sshd(directory: Path) -> Iterator[Rig]:
    """An sshd in a directory of its own."""
    home = directory / "home"
    (home / ".ssh").mkdir(parents=True)
    for name in ("host_key", "user_key"):
        make_key(directory / name)
    shutil.copy(directory / "user_key.pub", directory / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "KDCONSOLE_HOSTS": str(home / "kd" / "hosts.yaml"),
    }
    rig = Rig(port, directory / "user_key", directory, environ, _start(directory, port))
    try:
        yield rig
    finally:
        rig.end()


def make_key(path: Path) -> None:
    """A new key pair in place of what is there."""
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _start(directory: Path, port: int) -> subprocess.Popen[bytes]:
    assert SSHD is not None, MISSING
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = directory / "sshd_config"
    config.write_text(
        f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
MaxStartups 100
"""
    )
    with (directory / "sshd.log").open("ab") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as probe:
            if probe.recv(4) == b"SSH-":
                return process
        assert process.poll() is None, (directory / "sshd.log").read_text()
        time.sleep(0.02)
    raise AssertionError("sshd did not answer")


def _end(process: subprocess.Popen[bytes]) -> None:
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (*map(int, children.split()), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    process.wait()
