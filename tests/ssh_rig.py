"""A real sshd on a loopback port with keys of its own, standing for a GPU host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

from dispatch.hosts import VARIABLE, Host
from dispatch.supervisor import read_process

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
    more: str = ""
    """Lines of sshd_config that go before the others."""
    address: str = "127.0.0.1"
    inside: tuple[str, ...] = ()
    """What a command is begun with to be run where sshd is, in another network, say."""
    strays: list[tuple[int, int]] = field(default_factory=list)
    """Pid and start of sessions that outlived their listener."""

    @property
    def home(self) -> Path:
        return Path(self.environ["HOME"])

    @property
    def hosts_file(self) -> Path:
        return Path(self.environ[VARIABLE])

    @property
    def key(self) -> asyncssh.SSHKey:
        """The host key, as a file of the host has it."""
        return asyncssh.read_public_key(str(self.directory / "host_key.pub"))

    @property
    def log(self) -> str:
        """What sshd said until now."""
        return (self.directory / "sshd.log").read_text(errors="replace")

    @property
    def host(self) -> Host:
        return Host(
            "gx10", address=self.address, port=self.port, identity=self.identity, run_dir=str(self.directory / "base")
        )

    def seen_from(self, home: Path) -> Rig:
        """The same host for somebody else, who knows nobody yet."""
        return dataclasses.replace(self, environ=_environ(home))

    def trusted(self, port: int | None = None) -> Rig:
        """The same host, whose key is trusted; at another port than its own where a proxy stands before it."""
        self.hosts_file.parent.mkdir(parents=True, exist_ok=True)
        public = (self.directory / "host_key.pub").read_text()
        with (self.hosts_file.parent / "known_hosts").open("a") as file:
            file.write(f"[{self.address}]:{port or self.port} {public}")
        return self

    def configure(self, text: str) -> None:
        """Writes the ssh_config of whoever uses it."""
        (self.home / ".ssh" / "config").write_text(text)

    def restart(self) -> None:
        """Starts it again, on the same port with the keys that are there now."""
        self.process = _start(self.directory, self.port, self.more, self.address, self.inside)

    def end(self) -> None:
        """Ends sshd and every session of it."""
        for pid in (*self.sessions(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end_listener(self) -> None:
        """Ends sshd with SIGKILL; open connections go on."""
        self.strays += [(row.pid, row.start_ticks) for row in map(read_process, self.sessions()) if row is not None]
        self.process.kill()
        self.process.wait()

    def sessions(self) -> list[int]:
        """The processes of open connections."""
        alive = [row for row in (read_process(pid) for pid, _ in self.strays) if row is not None and not row.gone]
        self.strays = [(row.pid, row.start_ticks) for row in alive if (row.pid, row.start_ticks) in self.strays]
        return [*_children(self.process.pid), *(pid for pid, _ in self.strays)]


@contextlib.contextmanager
def running_sshd(
    directory: Path, more: str = "", address: str = "127.0.0.1", inside: tuple[str, ...] = ()
) -> Iterator[Rig]:
    """An sshd in a directory of its own.

    Args:
        directory: is made.
        more: lines for sshd_config; what they say goes before what stands there.
        address: where it listens.
        inside: what its command begins with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        make_key(directory / name)
    shutil.copy(directory / "user_key.pub", directory / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rig = Rig(
        port,
        directory / "user_key",
        directory,
        _environ(directory / "home"),
        _start(directory, port, more, address, inside),
        more,
        address,
        inside,
    )
    try:
        yield rig
    finally:
        rig.end()


def _environ(home: Path) -> dict[str, str]:
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    return {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        VARIABLE: str(home / "kd" / "hosts.yaml"),
    }


def make_key(path: Path, kind: str = "ed25519") -> None:
    """A new key pair in place of what is there."""
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)


def _start(directory: Path, port: int, more: str, address: str, inside: tuple[str, ...]) -> subprocess.Popen[bytes]:
    assert SSHD is not None, MISSING
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = directory / "sshd_config"
    # With that SHLVL bash does not read this machine's .bashrc, which may take its time.
    config.write_text(
        f"""{more}
Port {port}
ListenAddress {address}
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
{_no_penalties()}
SetEnv SHLVL=1
"""
    )
    with (directory / "sshd.log").open("ab") as log:
        process = subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1) as probe:
            if probe.recv(4) == b"SSH-":
                return process
        assert process.poll() is None, (directory / "sshd.log").read_text()
        time.sleep(0.02)
    raise AssertionError("sshd did not answer")


@functools.cache
def _no_penalties() -> str:
    """From 9.8 on sshd shuts out for a while whose sessions crash, and we kill them."""
    told = subprocess.run([str(SSHD), "-V"], capture_output=True, text=True, check=False)
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", told.stderr + told.stdout)
    return "PerSourcePenalties no" if version and tuple(map(int, version.groups())) >= (9, 8) else ""


def _children(pid: int) -> list[int]:
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in out.split()]
