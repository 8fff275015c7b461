"""A host over a real sshd: arguments and bytes arrive as they are, all ends in time, and nothing is forwarded."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from dispatch_rig import until
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.hosts import Host
from dispatch.ssh import MAX_CHANNELS, SSHTransport, command
from dispatch.ssh_link import Unreachable
from dispatch.transport import HostRefusal, MissingFile, Transport, TransportError, TransportTimeout
from engine.errors import ExitCode
from tests.ssh_proxy import Proxy
from tests.ssh_rig import MISSING, Rig, make_key, running_sshd

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))

_T = TypeVar("_T")
FORGIVING = "LogLevel DEBUG1\nPasswordAuthentication yes\nKbdInteractiveAuthentication yes\nAcceptEnv *"
"""An sshd that would allow all that we do not want, and tells what it is asked for."""
NASTY = [
    "",
    " ",
    "a b",
    "'",
    '"',
    "\\",
    "\\\\n",
    "a\nb",
    "$HOME",
    "`id`",
    "$(id)",
    "*",
    "~",
    "-n",
    "!x",
    "ü✓",
    "\t",
    "#",
    ";",
]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10", "LogLevel VERBOSE") as rig:
        yield rig


@pytest.fixture(scope="module")
def forgiving_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10", FORGIVING) as rig:
        yield rig


@pytest.fixture
def rig(sshd: Rig, tmp_path: Path) -> Rig:
    return sshd.seen_from(tmp_path / "home").trusted()


@pytest.fixture
def forgiving(forgiving_sshd: Rig, tmp_path: Path) -> Rig:
    return forgiving_sshd.seen_from(tmp_path / "home").trusted()


def over(transport: SSHTransport, work: Callable[[SSHTransport], Awaitable[_T]]) -> _T:
    """Runs work over a transport that is made in the loop's thread, and closes it."""

    async def scenario() -> _T:
        try:
            return await work(transport)
        finally:
            await transport.close()

    return asyncio.run(scenario())


def on(rig: Rig, work: Callable[[SSHTransport], Awaitable[_T]]) -> _T:
    return over(SSHTransport(rig.host, rig.environ), work)


def refusal(rig: Rig, host: Host | None = None) -> HostRefusal:
    with pytest.raises(HostRefusal) as caught:
        over(SSHTransport(host or rig.host, rig.environ), lambda transport: transport.stat("/"))
    return caught.value


def through(rig: Rig, proxy: Proxy) -> Host:
    """The host by way of a proxy, under the name that its key is trusted for."""
    rig.configure(f"Host *\n  HostKeyAlias gx10\n  UserKnownHostsFile {rig.home}/proxied\n")
    (rig.home / "proxied").write_text(f"gx10 {(rig.directory / 'host_key.pub').read_text()}")
    return dataclasses.replace(rig.host, port=proxy.port)


def is_there(text: str) -> bool:
    """Whether a process has the text in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


# Commands


def test_a_command_gets_its_input_and_gives_output_errors_and_code(rig: Rig) -> None:
    script = "import sys; print(sys.stdin.read().upper()); print('e', file=sys.stderr); sys.exit(7)"
    done = on(rig, lambda t: t.run([sys.executable, "-I", "-c", script], stdin=b"abc"))
    assert (done.rc, done.stdout, done.stderr) == (7, b"ABC\n", b"e\n")


def test_arguments_arrive_exactly(rig: Rig) -> None:
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = on(rig, lambda t: t.run([sys.executable, "-I", "-c", script, *NASTY]))
    assert json.loads(done.stdout) == NASTY


@pytest.mark.parametrize("shell", [name for name in ("sh", "bash", "dash", "zsh", "fish", "ksh") if shutil.which(name)])
@settings(max_examples=25, deadline=None)
@given(arguments=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=8))
def test_every_shell_takes_a_command_apart_into_its_arguments(shell: str, arguments: list[str]) -> None:
    line = command(["printf", "%s\\0", "first", *arguments], "name")
    begin, _, out = subprocess.run([shell, "-c", line], capture_output=True, check=True).stdout.partition(b"\n")
    assert begin.startswith(b"name ")
    assert out.split(b"\0")[:-1] == [b"first", *(argument.encode() for argument in arguments)]


def test_no_input_is_the_end_of_input(rig: Rig) -> None:
    assert on(rig, lambda t: t.run(["cat"], timeout=20.0)).stdout == b""


def test_input_and_output_are_bytes_of_any_size(rig: Rig) -> None:
    data = bytes(range(256)) * 20_000
    assert on(rig, lambda t: t.run(["cat"], stdin=data)).stdout == data


def test_a_command_that_does_not_read_its_input_ends_all_the_same(rig: Rig) -> None:
    assert on(rig, lambda t: t.run(["true"], stdin=bytes(8 << 20))).rc == 0


def test_the_end_by_a_signal_is_a_negative_code(rig: Rig) -> None:
    assert on(rig, lambda t: t.run(["sh", "-c", "kill -TERM $$"])).rc == -signal.SIGTERM


def test_a_command_that_is_not_there_says_so(rig: Rig) -> None:
    done = on(rig, lambda t: t.run(["/no/such/python"]))
    assert done.rc in (126, 127)
    assert b"/no/such/python" in done.stderr


@pytest.mark.parametrize("greeting", ["echo welcome to gx10", "printf %s welcome"])
def test_what_the_login_shell_says_first_is_no_output_of_the_command(tmp_path: Path, greeting: str) -> None:
    with running_sshd(tmp_path / "host", f'ForceCommand {greeting}; eval "$SSH_ORIGINAL_COMMAND"') as rig:
        assert on(rig.trusted(), lambda t: t.run(["printf", "%s", "out"])).stdout == b"out"


def test_an_account_that_may_run_nothing_says_so(tmp_path: Path) -> None:
    said = pytest.raises(TransportError, match=r"runs no commands: This account is not available\.")
    with running_sshd(tmp_path / "host", "ForceCommand echo 'This account is not available.'; exit 1") as rig, said:
        on(rig.trusted(), lambda t: t.run(["true"]))


def test_more_output_than_memory_should_hold_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.ssh.MAX_OUTPUT", 1 << 20)
    with pytest.raises(TransportError, match="more than 1 MiB of output"):
        on(rig, lambda t: t.run(["cat", "/dev/zero"], timeout=30.0))


def test_a_time_out_kills_the_command_and_leaves_the_connection_usable(rig: Rig) -> None:
    name = f"sleep 6{os.getpid()}"

    async def work(t: SSHTransport) -> None:
        await t.stat("/")
        began = time.monotonic()
        with pytest.raises(TransportTimeout, match=r"no answer after 0\.5 s") as caught:
            await t.run(name.split(), timeout=0.5)
        assert caught.value.exit_code == ExitCode.TIMEOUT
        assert time.monotonic() - began < 30
        assert (await t.run(["echo", "on"])).stdout == b"on\n"

    before = rig.log.count("Accepted publickey")
    on(rig, work)
    until(lambda: not is_there(name.replace(" ", "\0")), "the command to be gone", 10.0)
    assert rig.log.count("Accepted publickey") == before + 1


def test_a_command_whose_caller_goes_away_is_killed(rig: Rig) -> None:
    name = f"sleep 7{os.getpid()}"

    async def work(t: SSHTransport) -> None:
        task = asyncio.create_task(t.run(name.split(), timeout=600))
        while not await asyncio.to_thread(is_there, name.replace(" ", "\0")):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while await asyncio.to_thread(is_there, name.replace(" ", "\0")):
            await asyncio.sleep(0.02)

    on(rig, work)


def test_waiting_for_a_channel_counts_as_time_too(rig: Rig) -> None:
    async def work(t: SSHTransport) -> None:
        long = [asyncio.create_task(t.run(["sleep", "60"], timeout=600)) for _ in range(MAX_CHANNELS)]
        await t.stat("/")
        await asyncio.sleep(0)
        with pytest.raises(TransportTimeout):
            await t.run(["true"], timeout=0.5)
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        assert (await t.run(["true"])).rc == 0

    on(rig, work)


# Files


def test_files_are_read_at_an_offset_and_what_is_missing_is_told_apart(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    data = os.urandom(3 << 20)
    file.write_bytes(data)

    async def work(t: SSHTransport) -> None:
        there: Transport = t
        assert await there.read(str(file), 3, 4) == data[3:7]
        assert await there.read(str(file), 1000, 2 << 20) == data[1000 : 1000 + (2 << 20)]
        assert await there.read(str(file), len(data) - 2, 100) == data[-2:]
        assert await there.read(str(file), len(data) + 50, 100) == b""
        found = await there.stat(str(file))
        assert found is not None
        assert (found.size, found.is_dir) == (len(data), False)
        assert abs(found.mtime - file.stat().st_mtime) < 1
        assert await there.stat(str(tmp_path / "none")) is None
        assert await there.stat(str(file / "below")) is None
        assert "file" in await there.list(str(tmp_path))
        with pytest.raises(MissingFile):
            await there.read(str(tmp_path / "none"), 0, 1)
        with pytest.raises(MissingFile):
            await there.list(str(tmp_path / "none"))
        with pytest.raises(TransportError, match="gx10: "):
            await there.read(str(tmp_path), 0, 1)
        assert await t.resolve("/x") == "/x"
        home = pwd.getpwuid(os.getuid()).pw_dir  # what sshd goes by, and not HOME
        assert await t.resolve("~/x y") == f"{home}/x y"

    on(rig, work)


def test_a_file_that_never_answers_holds_up_neither_the_connection_nor_the_next_file(rig: Rig, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def work(t: SSHTransport) -> None:
        slow = asyncio.create_task(t.run(["sh", "-c", "sleep 2; echo done"]))
        with pytest.raises(TransportTimeout):
            await t.read(str(pipe), 0, 1, timeout=0.5)
        assert await t.stat(str(pipe), timeout=10.0) is not None
        assert (await slow).stdout == b"done\n"
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets go of the server that waits there

    before = rig.log.count("Accepted publickey")
    on(rig, work)
    assert rig.log.count("Accepted publickey") == before + 1


# The connection


def test_one_connection_carries_all_operations(rig: Rig) -> None:
    async def work(t: SSHTransport) -> None:
        for _ in range(90):
            await t.stat("/")
        for _ in range(10):
            await t.run(["true"])

    before = rig.log.count("Accepted publickey")
    on(rig, work)
    assert rig.log.count("Accepted publickey") == before + 1


def test_many_at_once_share_the_connection_and_few_channels(rig: Rig, tmp_path: Path) -> None:
    """sshd refuses an eleventh session; a hundred commands and reads at once meet no refusal."""
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")

    async def work(t: SSHTransport) -> None:
        runs = [t.run(["echo", str(index)]) for index in range(100)]
        reads = [t.read(str(file), index % 10, 1) for index in range(100)]
        *done, last = await asyncio.gather(asyncio.gather(*runs), asyncio.gather(*reads))
        assert [each.stdout for each in done[0]] == [f"{index}\n".encode() for index in range(100)]
        assert b"".join(last) == b"0123456789" * 10

    before = rig.log.count("Accepted publickey")
    on(rig, work)
    assert rig.log.count("Accepted publickey") == before + 1


def test_no_more_commands_run_at_once_than_there_are_channels_for(rig: Rig, tmp_path: Path) -> None:
    line = f"echo + >> {tmp_path}/journal; sleep 0.1; echo - >> {tmp_path}/journal"

    async def work(t: SSHTransport) -> None:
        await asyncio.gather(*(t.run(["sh", "-c", line]) for _ in range(3 * MAX_CHANNELS)))

    on(rig, work)
    count, most = 0, 0
    for sign in (tmp_path / "journal").read_text().split():
        count += 1 if sign == "+" else -1
        most = max(most, count)
    assert count == 0
    assert 1 < most <= MAX_CHANNELS == 6


def test_the_quickest_cipher_comes_first_and_nothing_is_compressed(rig: Rig) -> None:
    async def work(t: SSHTransport) -> tuple[str, str]:
        connection = await t.connection()
        return str(connection.get_extra_info("send_cipher")), str(connection.get_extra_info("send_compression"))

    assert on(rig, work) == ("aes128-gcm@openssh.com", "none")


def test_a_connection_that_is_killed_is_an_error_once_and_then_made_again(tmp_path: Path) -> None:
    async def work(t: SSHTransport, rig: Rig) -> None:
        await t.stat("/")
        running = asyncio.create_task(t.run(["sleep", "4"], timeout=600))
        await asyncio.sleep(0.2)
        for pid in rig.sessions():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(TransportError, match="gx10: sleep 4: ") as caught:
            await running
        assert caught.value.exit_code == ExitCode.CONNECTION
        assert not isinstance(caught.value, HostRefusal)
        assert (await t.run(["echo", "again"])).stdout == b"again\n"
        assert await t.stat("/") is not None

    with running_sshd(tmp_path / "host") as rig:
        on(rig.trusted(), lambda t: work(t, rig))


def test_an_operation_that_is_over_before_the_connection_is_does_not_end_its_making(rig: Rig) -> None:
    """A slow host is reached by the second try of a hasty caller, not by none."""
    rig.configure('Match exec "sleep 0.7"\n')

    async def work(t: SSHTransport) -> int:
        tries = 1
        while True:
            try:
                await t.stat("/", timeout=0.4)
                return tries
            except TransportTimeout:
                tries += 1

    assert 1 < on(rig, work) < 10


def test_the_event_loop_goes_on_while_ssh_config_is_read(rig: Rig) -> None:
    rig.configure('Match exec "sleep 2"\n')

    async def work(t: SSHTransport) -> float:
        task, worst = asyncio.create_task(t.stat("/")), 0.0
        while not task.done():
            began = time.monotonic()
            await asyncio.sleep(0.01)
            worst = max(worst, time.monotonic() - began)
        await task
        return worst

    assert on(rig, work) < 1.9


def test_closing_ends_what_waits_for_the_connection(rig: Rig) -> None:
    rig.configure('Match exec "sleep 0.5"\n')

    async def work(t: SSHTransport) -> None:
        task = asyncio.create_task(t.stat("/"))
        await asyncio.sleep(0.1)
        await t.close()
        with pytest.raises(TransportError, match="closed"):
            await task

    on(rig, work)


def test_a_refused_connection_is_said_at_once(rig: Rig) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = dataclasses.replace(rig.host, port=free.getsockname()[1])
    with pytest.raises(
        TransportError, match=r"gx10: cannot connect to 127\.0\.0\.1:\d+: .*unknown, not failed"
    ) as caught:
        over(SSHTransport(host, rig.environ), lambda t: t.stat("/"))
    assert caught.value.exit_code == ExitCode.CONNECTION


def test_a_name_that_nobody_knows_is_an_unreachable_host(rig: Rig) -> None:
    with pytest.raises(TransportError, match=r"gx10: cannot connect to no-such-host\.invalid:22: "):
        over(SSHTransport(Host("gx10", address="no-such-host.invalid"), rig.environ), lambda t: t.stat("/"))


@pytest.mark.parametrize("answers", [True, False], ids=["accepts-and-is-silent", "takes-no-connection"])
def test_a_host_that_does_not_answer_is_given_up_in_time(rig: Rig, answers: bool) -> None:
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8 if answers else 0)
        if not answers:  # a full queue: the system drops the next connection attempt, as a firewall does
            for client in (first, second):
                client.setblocking(False)
                client.connect_ex(silent.getsockname())
        host = dataclasses.replace(rig.host, port=silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"gx10: no connection after 0\.5 s") as caught:
            over(SSHTransport(host, rig.environ, connect_seconds=0.5), lambda t: t.stat("/"))
        assert time.monotonic() - began < 30
    assert isinstance(caught.value, TransportTimeout)
    assert caught.value.exit_code == ExitCode.CONNECTION


def test_a_link_whose_other_end_fell_silent_is_noticed_and_made_again(rig: Rig) -> None:
    async def scenario() -> float:
        async with Proxy(rig.port) as proxy:
            t = SSHTransport(through(rig, proxy), rig.environ, keepalive_seconds=0.4)
            await t.stat("/")
            running = asyncio.create_task(t.run(["sleep", "30"], timeout=600))
            await asyncio.sleep(0.2)
            proxy.freeze()
            began = time.monotonic()
            with pytest.raises(TransportError, match=r"not responding to keepalive|connection lost"):
                await running
            seconds = time.monotonic() - began
            proxy.thaw()
            assert await t.stat("/") is not None
            assert proxy.connections == 2
            await t.close()
            return seconds

    assert asyncio.run(scenario()) < 25


def test_the_keepalives_are_five_seconds_apart_and_two(rig: Rig) -> None:
    async def work(t: SSHTransport) -> tuple[float, int]:
        connection = await t.connection()
        return connection._keepalive_interval, connection._keepalive_count_max

    assert on(rig, work) == (5.0, 2)


def test_a_quiet_link_that_answers_is_not_given_up(rig: Rig) -> None:
    async def work(t: SSHTransport) -> int:
        return (await t.run(["sleep", "1.5"])).rc

    assert over(SSHTransport(rig.host, rig.environ, keepalive_seconds=0.2), work) == 0


# Who we are


def test_a_key_that_the_host_does_not_know_is_a_refusal(rig: Rig, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    error = refusal(rig, dataclasses.replace(rig.host, identity=tmp_path / "stranger"))
    assert error.exit_code == ExitCode.CONNECTION
    assert str(error).startswith("gx10: the host lets ")
    assert f"{tmp_path}/stranger: Permission denied" in str(error)


@pytest.mark.parametrize("text", [None, "", "no key at all\n"])
def test_an_identity_that_is_no_key_is_said_before_anything_is_sent(
    forgiving: Rig, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)
    before = len(forgiving.log)
    error = refusal(forgiving, dataclasses.replace(forgiving.host, identity=tmp_path / "key"))
    assert ("no such file" if text is None else "cannot be read as a private key") in str(error)
    assert "userauth" not in forgiving.log[before:]
    assert "Connection from" not in forgiving.log[before:]


def test_no_password_is_asked_for_or_sent(forgiving: Rig, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    forgiving.configure(
        "Host *\n  PreferredAuthentications password,keyboard-interactive\n  PubkeyAuthentication yes\n"
    )
    before = len(forgiving.log)
    refusal(forgiving, dataclasses.replace(forgiving.host, identity=tmp_path / "stranger"))
    methods = {line.split("method ")[1].split()[0] for line in forgiving.log[before:].splitlines() if "method " in line}
    assert methods == {"none", "publickey"}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    until(path.exists, "the agent", 10.0)
    yield str(path)
    process.terminate()
    process.wait()


def _add(agent: str, key: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(key)], env={**os.environ, "SSH_AUTH_SOCK": agent}, check=True)


def test_the_agent_signs_for_a_key_with_a_passphrase(rig: Rig, tmp_path: Path, agent: str) -> None:
    key = tmp_path / "key"
    shutil.copy(rig.identity, key)
    for index in range(8):  # more than a host lets one try
        make_key(tmp_path / f"other{index}")
        _add(agent, tmp_path / f"other{index}")
    _add(agent, key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(key)], check=True, stdout=subprocess.DEVNULL)
    host = dataclasses.replace(rig.host, identity=key)
    assert "passphrase" in str(refusal(rig, host))
    rig.environ["SSH_AUTH_SOCK"] = agent
    assert over(SSHTransport(host, rig.environ), lambda t: t.stat("/")) is not None


def test_the_agent_alone_is_enough(rig: Rig, tmp_path: Path, agent: str) -> None:
    _add(agent, rig.identity)
    rig.environ["SSH_AUTH_SOCK"] = agent
    host = dataclasses.replace(rig.host, identity=None)
    assert over(SSHTransport(host, rig.environ), lambda t: t.stat("/")) is not None
    rig.configure("Host *\n  IdentityAgent none\n")
    refusal(rig, host)


def test_an_agent_that_is_gone_is_no_obstacle(rig: Rig, tmp_path: Path) -> None:
    rig.environ["SSH_AUTH_SOCK"] = str(tmp_path / "gone")
    assert on(rig, lambda t: t.stat("/")) is not None


# ssh_config


def test_ssh_config_says_address_port_user_and_key_of_a_name(rig: Rig) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    rig.configure(
        f"Host gpu\n  HostName 127.0.0.1\n  Port {rig.port}\n  User {user}\n"
        f"  IdentityFile {rig.home}/missing\n  IdentityFile {rig.identity}\n"
    )
    done = over(SSHTransport(Host("gpu"), rig.environ), lambda t: t.run(["id", "-un"]))
    assert done.stdout.decode().strip() == user


def test_hosts_yaml_goes_before_ssh_config(rig: Rig) -> None:
    rig.configure("Host *\n  Port 1\n  User nobody-at-all\n  IdentityFile /no/such/key\n")
    user = pwd.getpwuid(os.getuid()).pw_name
    assert over(SSHTransport(dataclasses.replace(rig.host, user=user), rig.environ), lambda t: t.stat("/")) is not None


def test_a_broken_ssh_config_is_named_with_its_line(rig: Rig) -> None:
    rig.configure("Host gx10\n  Port many\n")
    with pytest.raises(TransportError, match=r"ssh_config: .*/config line 2: Invalid Port integer value: many"):
        over(SSHTransport(Host("gx10"), rig.environ), lambda t: t.stat("/"))


def test_nothing_of_ssh_config_is_forwarded_or_run(
    forgiving: Rig, tmp_path: Path, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("KD_SECRET", "s3cret")
    forgiving.environ |= {"SSH_AUTH_SOCK": agent, "KD_SECRET": "s3cret", "DISPLAY": ":0"}
    forgiving.configure(
        f"Host *\n  ForwardAgent yes\n  ForwardX11 yes\n  ForwardX11Trusted yes\n  RequestTTY force\n"
        f"  RemoteCommand touch {tmp_path}/ran\n  SendEnv KD_SECRET\n  SetEnv KD_SET=yes\n"
        f"  LocalForward {port} 127.0.0.1:{forgiving.port}\n"
        f"  RemoteForward {port} 127.0.0.1:{forgiving.port}\n  DynamicForward {port}\n"
        f"  Compression yes\n  Ciphers aes256-ctr\n"
    )

    async def work(t: SSHTransport) -> None:
        await t.stat("/")
        said = (await t.run(["sh", "-c", "env; for f in 0 1 2; do test -t $f && echo TERMINAL; done; true"])).stdout
        names = {line.split(b"=")[0] for line in said.splitlines()}
        assert not names & {b"SSH_AUTH_SOCK", b"KD_SECRET", b"KD_SET", b"DISPLAY", b"SSH_TTY", b"TERMINAL"}, said
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    before = len(forgiving.log)
    on(forgiving, work)
    assert not (tmp_path / "ran").exists()
    for request in ("auth-agent-req", "x11-req", "pty-req", "env ", "tcpip-forward", "direct-tcpip"):
        assert f"request {request}" not in forgiving.log[before:]


def test_a_jump_of_ssh_config_is_taken_and_held_to_the_same_rules(rig: Rig, tmp_path: Path) -> None:
    with running_sshd(tmp_path / "jump", "LogLevel DEBUG1") as jump:
        rig.configure(
            f"Host bastion\n  HostName 127.0.0.1\n  Port {jump.port}\n  IdentityFile {jump.identity}\n"
            f"Host gx10\n  HostName 127.0.0.1\n  Port {rig.port}\n  IdentityFile {rig.identity}\n  ProxyJump bastion\n"
        )
        untrusted = str(refusal(rig, Host("gx10")))
        assert untrusted.startswith(f"gx10: over bastion: the host key of [127.0.0.1]:{jump.port} is not trusted yet")
        assert untrusted.endswith("kdconsole hosts trust bastion")
        dataclasses.replace(jump, environ=rig.environ).trusted()

        async def work(t: SSHTransport) -> None:
            assert (await t.run(["echo", "there"])).stdout == b"there\n"
            assert await t.stat("/") is not None

        before = len(rig.log)
        over(SSHTransport(Host("gx10"), rig.environ), work)
        assert "Accepted publickey" in rig.log[before:]
        assert "direct-tcpip" in jump.log
        jump.end()
        with pytest.raises(TransportError, match="gx10: over bastion: cannot connect"):
            over(SSHTransport(Host("gx10"), rig.environ), work)


def test_a_jump_that_is_the_host_itself_is_none(rig: Rig) -> None:
    rig.configure(f"Host *\n  ProxyJump gx10\n  HostName 127.0.0.1\n  Port {rig.port}\n  IdentityFile {rig.identity}\n")
    assert over(SSHTransport(Host("gx10"), rig.environ), lambda t: t.stat("/")) is not None


def test_jumps_that_go_round_in_circles_are_refused(rig: Rig) -> None:
    rig.configure("Host a\n  ProxyJump b\nHost b\n  ProxyJump c\nHost c\n  ProxyJump b\n")
    with pytest.raises(TransportError, match=r"ssh_config: ProxyJump of . goes round in circles"):
        over(SSHTransport(Host("a"), rig.environ), lambda t: t.stat("/"))
