"""`kdconsole hosts`: what it lists, writes, asks and checks, against a real sshd and on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from console.hosts_command import hosts_group
from dispatch import host_keys
from dispatch.hosts import load_hosts
from dispatch.transport import HostRefusal, TransportError
from engine.errors import ConfigError, ExitCode, KdError
from tests.console_rig import ROOT
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd

needs_sshd = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))
KDCONSOLE = """
import fcntl, termios
from console import cli
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C means something
cli.COMMANDS["hosts"] = "console.hosts_command:hosts_group"
cli.main()
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """hosts.yaml of somebody who has none yet."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDCONSOLE_HOSTS", str(tmp_path / "kd" / "hosts.yaml"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "kd" / "hosts.yaml"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10", "LogLevel VERBOSE") as rig:
        yield rig


@pytest.fixture
def rig(sshd: Rig, tmp_path: Path) -> Rig:
    """The sshd as the host gx10 of hosts.yaml, whose key nobody trusts yet."""
    good(
        *("add", "gx10", "--address", "127.0.0.1", "--port", str(sshd.port), "--identity", str(sshd.identity)),
        *("--python", sys.executable, "--run-dir", str(tmp_path / "base")),
    )
    return sshd


def run(*arguments: str) -> Result:
    return CliRunner().invoke(hosts_group, arguments)


def good(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refusal(*arguments: str) -> KdError:
    error = run(*arguments).exception
    assert isinstance(error, KdError), error
    assert len(str(error).splitlines()) == 1
    return error


def document(*arguments: str) -> dict[str, Any]:
    found = json.loads(run(*arguments, "--json").stdout)
    assert isinstance(found, dict)
    return found


def fingerprint(rig: Rig) -> str:
    return host_keys.fingerprint(rig.key)


# add, list, show


def test_adding_writes_a_file_that_list_and_show_tell_of(file: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key")
    said = good(
        *("add", "gx10", "--address", "10.0.0.7", "--port", "2222", "--user", "kd", "--identity", "key"),
        *("--python", "/opt/py", "--run-dir", "/data/kd", "--env", "HF_HOME", "--env", "WANDB_MODE", "--gpu", "1"),
    )
    assert said == f"gx10 stands in {file} now; next: kdconsole hosts trust gx10\n"
    assert file.read_text() == (
        "hosts:\n  gx10:\n    address: 10.0.0.7\n    port: 2222\n    user: kd\n    python: /opt/py\n"
        f"    run_dir: /data/kd\n    gpu: 1\n    identity: {tmp_path}/key\n    env:\n    - HF_HOME\n    - WANDB_MODE\n"
    )
    heads, row = (line.split("  ") for line in good("list").splitlines())
    assert [head.strip() for head in heads if head] == [
        "lane",
        "name",
        "address",
        "user",
        "python",
        "run dir",
        "host key",
    ]
    assert [cell.strip() for cell in row if cell.strip()] == [
        *("gx10", "10.0.0.7:2222", "kd", "/opt/py", "/data/kd", "not trusted"),
    ]
    shown = good("show", "gx10")
    for line in ("identity", "variables   HF_HOME, WANDB_MODE", "gpu         1", "host key    not trusted"):
        assert line in shown


def test_an_identity_at_home_stays_there(file: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "id").write_text("a key")
    good("add", "a", "--identity", "~/.ssh/id")
    assert "identity: ~/.ssh/id" in file.read_text()
    assert load_hosts().known["a"].identity == tmp_path / "home" / ".ssh" / "id"


def test_what_cannot_be_added_is_refused_with_everything_that_is_wrong(file: Path) -> None:
    error = run("add", "gx10", "--port", "0", "--user", "-oProxyCommand=x").exception
    assert isinstance(error, ConfigError)
    assert [line.split(": ")[1] for line in str(error).splitlines()] == ["port", "user"]
    assert "no such file" in str(refusal("add", "gx10", "--identity", "missing"))
    assert "no host's name" in str(refusal("add", "--", "-oProxyCommand=x"))
    assert run("add", "-oProxyCommand=x").exit_code == ExitCode.USAGE
    assert not file.exists()


def test_without_hosts_list_says_how_to_get_one(file: Path) -> None:
    assert good("list") == f"no hosts in {file}; `kdconsole hosts add` writes one\n"
    assert document("list") == {"schema": "kdconsole.hosts/1", "file": str(file), "lanes": [], "hosts": []}


def test_list_tells_of_lanes_and_of_what_ssh_config_says(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    file.write_text("hosts: {b: , a: , c: }\nlanes: [a, b]\n")
    (tmp_path / "home" / ".ssh" / "config").write_text(
        "Host a\n  HostName fe80::1\n  Port 2022\n  User me\n  ProxyJump door\n"
    )
    found = document("list")
    assert found["lanes"] == ["a", "b"]
    assert [(each["name"], each["lane"]) for each in found["hosts"]] == [("b", 2), ("a", 1), ("c", None)]
    assert {key: found["hosts"][1][key] for key in ("address", "port", "user", "over", "host_keys")} == {
        "address": "fe80::1",
        "port": 2022,
        "user": "me",
        "over": "door",
        "host_keys": [],
    }
    assert "[fe80::1]:2022" in good("list")


def test_show_takes_a_name_that_only_ssh_config_knows(tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "config").write_text("Host lab\n  HostName 10.9.9.9\n")
    shown = good("show", "lab")
    assert "not in hosts.yaml" in shown
    assert "10.9.9.9:22" in shown
    found = document("show", "lab")
    assert (found["schema"], found["file"], found["python"]) == (
        *("kdconsole.host/1", None, "~/kdconsole/venv/bin/python"),
    )


def test_a_wrong_file_is_an_error_of_every_command(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("host: {}\n")
    for command in (["list"], ["show", "a"], ["trust", "a"], ["check", "a"], ["add", "a"]):
        assert "did you mean hosts?" in str(refusal(*command))


# trust


@needs_sshd
def test_trust_without_a_terminal_wants_the_fingerprint(rig: Rig) -> None:
    error = refusal("trust", "gx10")
    assert isinstance(error, ConfigError)
    assert "no terminal" in str(error)
    assert "--fingerprint" in str(error)
    assert fingerprint(rig) not in str(error)


@needs_sshd
@pytest.mark.parametrize("form", ["{}", "sha256:{bare}", "{bare}", "{}="])
def test_trust_takes_the_fingerprint_that_was_told(rig: Rig, form: str) -> None:
    given = form.format(fingerprint(rig), bare=fingerprint(rig).removeprefix("SHA256:"))
    assert f"gx10: {fingerprint(rig)} (ssh-ed25519) is trusted now" in good("trust", "gx10", "--fingerprint", given)
    assert good("trust", "gx10", "--fingerprint", given).endswith("was trusted already\n")
    assert good("list").splitlines()[1].endswith("  trusted")
    assert document("show", "gx10")["host_keys"] == [{"kind": "ssh-ed25519", "fingerprint": fingerprint(rig)}]


@needs_sshd
def test_another_fingerprint_than_was_told_is_a_refusal_with_both(rig: Rig, tmp_path: Path) -> None:
    wanted = "SHA256:" + "A" * 43
    error = refusal("trust", "gx10", "--fingerprint", wanted)
    assert isinstance(error, HostRefusal)
    assert error.exit_code == ExitCode.CONNECTION
    assert wanted in str(error)
    assert fingerprint(rig) in str(error)
    assert not (tmp_path / "kd" / "known_hosts").exists()


@pytest.mark.parametrize("text", ["", "yes", "MD5:ab:cd", "SHA256:short", "-oProxyCommand=x", "SHA256:" + "é" * 43])
def test_what_is_no_fingerprint_is_refused_before_anything_is_asked(text: str) -> None:
    assert "no SHA-256 fingerprint" in str(refusal("trust", "gx10", f"--fingerprint={text}"))


@needs_sshd
def test_a_changed_key_cannot_be_trusted_over(rig: Rig, tmp_path: Path) -> None:
    make_key(tmp_path / "old")
    public = (tmp_path / "old.pub").read_text()
    (tmp_path / "kd" / "known_hosts").write_text(f"[127.0.0.1]:{rig.port} {public}")
    for command in (["trust", "gx10", "--fingerprint", fingerprint(rig)], ["check", "gx10"]):
        error = refusal(*command)
        assert error.exit_code == ExitCode.CONNECTION
        assert "HAS CHANGED" in str(error)
        assert fingerprint(rig) in str(error)
    assert (tmp_path / "kd" / "known_hosts").read_text() == f"[127.0.0.1]:{rig.port} {public}"


class OnTerminal:
    """`kdconsole` with a terminal for everything."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", KDCONSOLE, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._read() or self._process.poll() is None, self.shown

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self, again: str = "") -> int:
        """Reads to the end, typing `again` where nothing comes for seconds; returns the exit code."""
        deadline, patience = time.monotonic() + 60, time.monotonic() + 3
        while (came := self._read()) or self._process.poll() is None:
            if came:
                patience = time.monotonic() + 3
            elif time.monotonic() > patience:
                self.type(again)
                patience = time.monotonic() + 3
            if time.monotonic() > deadline:
                self._process.kill()
        os.close(self._master)
        return self._process.returncode

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.1)[0]:
            return False
        try:
            data = os.read(self._master, 4096)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode()
        return bool(data)


@needs_sshd
def test_on_a_terminal_a_typed_yes_trusts_the_key_that_was_shown(rig: Rig, tmp_path: Path) -> None:
    terminal = OnTerminal("hosts", "trust", "gx10")
    terminal.until("Type yes: ")
    assert f"gx10 at [127.0.0.1]:{rig.port} presents this host key:" in terminal.shown
    assert f"{fingerprint(rig)} (ssh-ed25519)" in terminal.shown
    assert not (tmp_path / "kd" / "known_hosts").exists()
    terminal.type("yes\n")
    assert terminal.end() == 0
    assert "is trusted now" in terminal.shown
    assert (tmp_path / "kd" / "known_hosts").read_text().startswith(f"[127.0.0.1]:{rig.port} ssh-ed25519 ")
    again = OnTerminal("hosts", "trust", "gx10")
    assert again.end() == 0
    assert "was trusted already" in again.shown


@needs_sshd
@pytest.mark.parametrize(("answer", "code"), [("y\n", 3), ("\n", 3), ("no\n", 3), ("\x03", 130), ("\x04", 130)])
def test_anything_but_yes_trusts_nothing(rig: Rig, tmp_path: Path, answer: str, code: int) -> None:
    terminal = OnTerminal("hosts", "trust", "gx10")
    terminal.until("Type yes: ")
    terminal.type(answer)
    # Python misses a Ctrl-C in the very moment in which it begins to wait for a line; who is ignored presses it again.
    assert terminal.end(again=answer if answer == "\x03" else "") == code
    assert ("nothing was written" if code == ExitCode.CONNECTION else "interrupted") in terminal.shown
    assert "Traceback" not in terminal.shown
    assert not (tmp_path / "kd" / "known_hosts").exists()


# check


@needs_sshd
def test_check_says_what_it_found_and_writes_nothing_there(rig: Rig, tmp_path: Path) -> None:
    assert "not trusted yet" in str(refusal("check", "gx10"))
    good("trust", "gx10", "--fingerprint", fingerprint(rig))
    said = good("check", "gx10")
    version = ".".join(map(str, sys.version_info[:3]))
    assert f"address     127.0.0.1:{rig.port}\n" in said
    assert f"host key    {fingerprint(rig)} (ssh-ed25519)\n" in said
    assert f"python      {sys.executable}: {version}\n" in said
    assert f"run dir     {tmp_path}/base: not there yet, can be made\n" in said
    assert not (tmp_path / "base").exists()
    (tmp_path / "base").mkdir()
    found = document("check", "gx10")
    assert (found["schema"], found["ok"], found["problem"]) == ("kdconsole.host-check/1", True, None)
    assert found["host_key"] == {"kind": "ssh-ed25519", "fingerprint": fingerprint(rig)}
    assert 0 < found["round_trip_ms"] < 5000
    assert found["python"] == {"path": sys.executable, "version": version, "problem": None}
    assert found["run_dir"] == {"path": f"{tmp_path}/base", "state": "writable", "problem": None}


@needs_sshd
def test_a_host_that_is_not_ready_is_told_in_full(rig: Rig, file: Path, tmp_path: Path) -> None:
    good("trust", "gx10", "--fingerprint", fingerprint(rig))
    (tmp_path / "a file").write_text("")
    text = file.read_text().replace(sys.executable, "/no/such/python")
    file.write_text(text.replace(f"{tmp_path}/base", f"{tmp_path}/a file/base"))
    result = run("check", "gx10")
    assert isinstance(result.exception, TransportError)
    assert result.exception.exit_code == ExitCode.CONNECTION
    assert "no Python /no/such/python; kdconsole hosts bootstrap gx10 makes one" in str(result.exception)
    assert f"run directory {tmp_path}/a file/base: {tmp_path}/a file is no directory" in str(result.exception)
    assert "round trip" in result.stdout
    found = document("check", "gx10")
    assert found["ok"] is False
    assert found["python"]["version"] is None
    assert found["run_dir"]["state"] is None


@needs_sshd
@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("echo 3.9.1", "is 3.9.1; expected 3.11 or later"),
        ("echo boo >&2; exit 1", "does not work: boo"),
        ("printf '\\033[2J'", "does not work"),
    ],
)
def test_a_python_that_will_not_do_is_said(rig: Rig, file: Path, tmp_path: Path, program: str, problem: str) -> None:
    good("trust", "gx10", "--fingerprint", fingerprint(rig))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    file.write_text(file.read_text().replace(sys.executable, str(python)))
    result = run("check", "gx10")
    assert problem in str(result.exception)
    assert "\x1b" not in str(result.exception) + result.stdout


def test_a_host_that_cannot_be_reached_is_code_3_in_both_forms() -> None:
    good("add", "gone", "--address", "127.0.0.1", "--port", "1")
    error = refusal("check", "gone")
    assert error.exit_code == ExitCode.CONNECTION
    result = run("check", "gone", "--json")
    assert isinstance(result.exception, TransportError)
    found = json.loads(result.stdout)
    assert (found["ok"], found["port"], found["problem"]) == (False, 1, str(error))


# The rest


@pytest.mark.parametrize("command", ["list", "show", "add", "trust", "check"])
def test_help_of_each_command_has_examples_and_fits_80_columns(command: str) -> None:
    text = good(command, "--help")
    assert f"kdconsole hosts {command}" in text
    assert max(map(len, (text + good("--help")).splitlines())) <= 80


def test_the_group_imports_neither_torch_nor_asyncssh_before_a_command_needs_it() -> None:
    code = "import sys, console.hosts_command; sys.exit('torch' in sys.modules or 'asyncssh' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
