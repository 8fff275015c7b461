"""Host keys are believed where known_hosts has them and nowhere else; a change stops everything and shows both keys."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest

from dispatch import host_keys
from dispatch.host_keys import fingerprint
from dispatch.hosts import Host
from dispatch.ssh import SSHTransport
from dispatch.transport import HostRefusal, TransportError
from engine.errors import ConfigError, ExitCode
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("sshd") / "gx10"
    directory.mkdir()
    make_key(directory / "rsa_key", "rsa")
    with running_sshd(directory, f"LogLevel DEBUG1\nHostKey {directory}/rsa_key") as rig:
        yield rig


@pytest.fixture
def rig(sshd: Rig, tmp_path: Path) -> Rig:
    return sshd.seen_from(tmp_path / "home")


def connect(rig: Rig, host: Host | None = None) -> bytes:
    async def work() -> bytes:
        transport = SSHTransport(host or rig.host, rig.environ)
        try:
            return (await transport.run(["echo", "in"])).stdout
        finally:
            await transport.close()

    return asyncio.run(work())


def refused(rig: Rig, host: Host | None = None) -> str:
    """The refusal; checks that the host was told nothing, not even who wanted in."""
    before = len(rig.log)
    with pytest.raises(HostRefusal) as caught:
        connect(rig, host)
    assert "userauth-request" not in rig.log[before:]
    assert caught.value.exit_code == ExitCode.CONNECTION
    return str(caught.value)


def presented(rig: Rig, host: Host | None = None) -> asyncssh.SSHKey:
    return asyncio.run(host_keys.presented_key(host or rig.host, rig.environ))


def users_known_hosts(rig: Rig, *lines: str) -> Path:
    path = rig.home / ".ssh" / "known_hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def public(rig: Rig, name: str = "host_key") -> str:
    return " ".join((rig.directory / f"{name}.pub").read_text().split()[:2])


def other_key(tmp_path: Path, kind: str = "ed25519") -> asyncssh.SSHKey:
    make_key(tmp_path / f"other_{kind}", kind)
    return asyncssh.read_public_key(str(tmp_path / f"other_{kind}.pub"))


def text(key: asyncssh.SSHKey) -> str:
    return " ".join(key.export_public_key().decode().split()[:2])


def test_a_fingerprint_is_that_of_ssh_keygen(rig: Rig) -> None:
    out = subprocess.run(
        ["ssh-keygen", "-lf", str(rig.directory / "host_key.pub")], capture_output=True, text=True, check=True
    ).stdout
    assert fingerprint(rig.key) == out.split()[1]


def test_a_host_that_nobody_trusts_yet_is_told_nothing(rig: Rig) -> None:
    message = refused(rig)
    assert message.startswith(
        f"gx10: the host key of [127.0.0.1]:{rig.port} is not trusted yet: {fingerprint(rig.key)}"
    )
    assert message.endswith("kdconsole hosts trust gx10")


def test_trust_writes_the_key_that_was_shown_and_then_the_host_is_talked_to(rig: Rig) -> None:
    before = len(rig.log)
    key = presented(rig)
    assert "userauth-request" not in rig.log[before:]
    assert key == rig.key
    path = host_keys.trust(rig.host, key, rig.environ)
    assert path == rig.hosts_file.parent / "known_hosts"
    assert path.read_text().split()[:3] == [f"[127.0.0.1]:{rig.port}", *public(rig).split()]
    assert path.stat().st_mode & 0o777 == 0o600
    assert connect(rig) == b"in\n"
    assert host_keys.trusted_keys(rig.host, rig.environ) == (key,)


def test_trusting_twice_writes_once(rig: Rig) -> None:
    for _ in range(2):
        path = host_keys.trust(rig.host, rig.key, rig.environ)
    assert len(path.read_text().splitlines()) == 1


def test_a_last_line_without_its_end_is_not_run_together_with_the_new_one(rig: Rig, tmp_path: Path) -> None:
    path = host_keys.own_file(rig.environ)
    path.parent.mkdir(parents=True)
    path.write_text(f"elsewhere {text(other_key(tmp_path))}")
    host_keys.trust(rig.host, rig.key, rig.environ)
    assert len(path.read_text().splitlines()) == 2
    assert connect(rig) == b"in\n"


def test_a_key_file_that_is_a_pipe_is_refused_and_not_waited_for(rig: Rig) -> None:
    path = host_keys.own_file(rig.environ)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        host_keys.trust(rig.host, rig.key, rig.environ)


def test_a_changed_key_is_a_hard_stop_with_both_fingerprints(rig: Rig, tmp_path: Path) -> None:
    old = other_key(tmp_path)
    host_keys.trust(rig.host, old, rig.environ)
    message = refused(rig)
    assert "HAS CHANGED" in message
    assert f"presents {fingerprint(rig.key)} (ssh-ed25519), trusted is {fingerprint(old)} (ssh-ed25519)" in message
    with pytest.raises(HostRefusal, match="HAS CHANGED"):
        host_keys.trust(rig.host, rig.key, rig.environ)
    assert fingerprint(rig.key) not in host_keys.own_file(rig.environ).read_text()
    assert len(host_keys.own_file(rig.environ).read_text().splitlines()) == 1


def test_a_key_of_another_kind_is_a_change_too(rig: Rig, tmp_path: Path) -> None:
    """Nobody gets around the stop by having no key of the kind that is trusted."""
    old = other_key(tmp_path, "ecdsa")
    host_keys.trust(rig.host, old, rig.environ)
    message = refused(rig)
    assert "HAS CHANGED" in message
    assert fingerprint(rig.key) in message
    assert fingerprint(old) in message


def test_a_host_with_several_keys_is_believed_by_any_of_them(rig: Rig) -> None:
    rsa = asyncssh.read_public_key(str(rig.directory / "rsa_key.pub"))
    host_keys.trust(rig.host, rsa, rig.environ)
    assert presented(rig) == rsa
    assert connect(rig) == b"in\n"


def test_a_revoked_key_is_refused_whatever_else_stands_there(rig: Rig) -> None:
    users_known_hosts(rig, f"[127.0.0.1]:{rig.port} {public(rig)}", f"@revoked * {public(rig)}")
    message = refused(rig)
    assert f"IS REVOKED in a known_hosts file: {fingerprint(rig.key)}" in message
    assert host_keys.trusted_keys(rig.host, rig.environ) == ()
    with pytest.raises(HostRefusal, match="IS REVOKED"):
        host_keys.trust(rig.host, rig.key, rig.environ)


def test_the_users_own_known_hosts_is_believed_in_every_form(rig: Rig) -> None:
    path = users_known_hosts(rig, f"[127.0.0.1]:{rig.port} {public(rig)}")
    assert connect(rig) == b"in\n"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    assert path.read_text().startswith("|1|")
    assert connect(rig) == b"in\n"
    users_known_hosts(rig, f"elsewhere,[127.0.0.?]:{rig.port}\t{public(rig)} a comment")
    assert connect(rig) == b"in\n"
    users_known_hosts(rig, f"127.0.0.1 {public(rig)}")  # as ssh has it: the name without a port will do
    assert connect(rig) == b"in\n"
    users_known_hosts(rig, f"[127.0.0.*]:{rig.port},![127.0.0.1]:{rig.port} {public(rig)}")
    refused(rig)


def test_a_key_for_another_port_is_no_change(rig: Rig, tmp_path: Path) -> None:
    """Two hosts behind one address, one of them on the port that SSH has by default."""
    users_known_hosts(rig, f"127.0.0.1 {text(other_key(tmp_path))}")
    assert "not trusted yet" in refused(rig)
    host_keys.trust(rig.host, rig.key, rig.environ)
    assert connect(rig) == b"in\n"


def test_a_key_that_is_known_for_the_address_says_nothing_about_the_name(rig: Rig) -> None:
    users_known_hosts(rig, f"127.0.0.1 {public(rig)}", f"[127.0.0.1]:{rig.port} {public(rig)}")
    assert "[localhost]" in refused(rig, dataclasses.replace(rig.host, address="localhost"))


def test_lines_that_say_nothing_to_us_are_passed_over(rig: Rig) -> None:
    path = users_known_hosts(
        rig,
        "# a comment",
        "",
        "one-word",
        "@unknown-marker * ssh-ed25519 AAAA",
        "|9|bad|hash ssh-ed25519 AAAA",
        f"gx10, {public(rig)}",
        "gx10 ssh-quantum AAAA",
    )
    with path.open("ab") as file:
        file.write(b"\xff\xfe not UTF-8\n")
    assert "not trusted yet" in refused(rig)
    with path.open("a") as file:
        file.write(f"[127.0.0.1]:{rig.port} {public(rig)}\n")
    assert connect(rig) == b"in\n"


def test_a_name_is_known_whatever_its_case(rig: Rig) -> None:
    rig.configure(f"Host GX10\n  HostName 127.0.0.1\n  HostKeyAlias GX10.Lab\n  Port {rig.port}\n")
    users_known_hosts(rig, f"gx10.LAB {public(rig)}")
    assert connect(rig, Host("GX10", identity=rig.identity)) == b"in\n"


def test_a_host_certificate_is_believed_for_its_authority(rig: Rig, tmp_path: Path) -> None:
    make_key(tmp_path / "authority")
    with running_sshd(tmp_path / "host", f"LogLevel DEBUG1\nHostCertificate {tmp_path}/host/host_key-cert.pub") as own:
        subprocess.run(
            f"ssh-keygen -q -s {tmp_path}/authority -I gx10 -h -n gx10.lab {own.directory}/host_key.pub".split(),
            check=True,
        )
        own.end()
        own.restart()
        own.configure(f"Host gx10\n  HostName 127.0.0.1\n  HostKeyAlias gx10.lab\n  Port {own.port}\n")
        host = Host("gx10", identity=own.identity)
        assert presented(own, host) == own.key
        authority = (tmp_path / "authority.pub").read_text()
        users_known_hosts(own, f"@cert-authority *.lab {authority}")
        assert connect(own, host) == b"in\n"
        users_known_hosts(own, f"@cert-authority *.elsewhere {authority}")
        assert "not trusted yet" in refused(own, host)
        users_known_hosts(own, f"@cert-authority *.lab {text(other_key(tmp_path))}")
        assert "not trusted" in refused(own, host)
        users_known_hosts(own, f"@cert-authority *.lab {authority}", f"@revoked * {public(own)}")
        assert "revoked" in refused(own, host).lower()


def test_ssh_config_cannot_switch_the_check_off(rig: Rig) -> None:
    rig.configure("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  CheckHostIP no\n")
    assert "not trusted yet" in refused(rig)


def test_the_known_hosts_files_of_ssh_config_are_read_in_place_of_the_users(rig: Rig) -> None:
    users_known_hosts(rig, f"[127.0.0.1]:{rig.port} {public(rig)}")
    rig.configure("Host *\n  UserKnownHostsFile ~/.ssh/gpus\n")
    refused(rig)
    (rig.home / ".ssh" / "gpus").write_text(f"[127.0.0.1]:{rig.port} {public(rig)}\n")
    assert connect(rig) == b"in\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_known_hosts_that_cannot_be_read_is_an_error_and_not_an_unknown_host(rig: Rig) -> None:
    users_known_hosts(rig, "").chmod(0)
    with pytest.raises(ConfigError, match="known_hosts: cannot be read: Permission denied"):
        connect(rig)


def test_a_known_hosts_without_end_is_refused(rig: Rig) -> None:
    with users_known_hosts(rig).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="known_hosts: larger than 16 MiB"):
        connect(rig)


def test_a_host_that_is_no_ssh_server_presents_no_key(rig: Rig) -> None:
    async def scenario() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n\x1b[2J")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        host = dataclasses.replace(rig.host, port=server.sockets[0].getsockname()[1])
        with pytest.raises(TransportError, match="gx10: cannot connect to 127") as caught:
            await host_keys.presented_key(host, rig.environ)
        assert "\x1b" not in str(caught.value)
        server.close()

    asyncio.run(scenario())
