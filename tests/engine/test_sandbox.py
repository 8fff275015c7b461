"""The sandbox: what hostile programs do is shown to be really done where no wall stands, and not where one does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.sandbox
from engine.errors import KdError
from engine.sandbox import Limits, Outcome, Program, Sandbox, containment
from engine.sandbox_containment import judge
from engine.sandbox_plain import RubbishError, decode, encode, pack
from engine.sandbox_process import hidden
from engine.sandbox_walls import (
    IPC_NAMESPACE,
    LANDLOCK,
    NETWORK_NAMESPACE,
    OTHER_USER,
    OWN_FILES,
    PID_NAMESPACE,
    SECCOMP,
    landlock_version,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")

ALL = "all walls"
NAMESPACES = "namespaces alone"
FILTER = "seccomp alone"
FILTER_AND_LANDLOCK = "seccomp and Landlock"
NONE = "no wall"
BRIEF = Limits(wall_seconds=30, cpu_seconds=4)
WAIT_SECONDS = 20.0


def walls_of(name: str) -> tuple[str, ...]:
    there = containment().walls
    wanted = {
        ALL: there,
        NAMESPACES: tuple(wall for wall in there if wall not in (LANDLOCK, SECCOMP)),
        FILTER: (SECCOMP,),
        FILTER_AND_LANDLOCK: (LANDLOCK, SECCOMP),
        NONE: (),
    }[name]
    needed = {NAMESPACES: {PID_NAMESPACE, NETWORK_NAMESPACE, OWN_FILES}}.get(name, set(wanted))
    if missing := needed - set(there):
        pytest.skip(f"this machine gives no {', '.join(sorted(missing))}")
    return wanted


@contextlib.contextmanager
def sandbox(walls: str = ALL, limits: Limits = BRIEF, workers: int = 2) -> Iterator[Sandbox]:
    """One behind these walls; at its end nothing of it may be left."""
    with Sandbox._behind(walls_of(walls), limits, workers) as made:
        directory = Path(made._scratch.empty).parent
        yield made
    assert not processes(str(directory))
    assert not directory.exists()


def program(body: str, test: str = "assert candidate() == 1", imports: str = "") -> Program:
    """A problem whose answer is this body; it is right where it returns 1."""
    check = "def check(candidate):\n" + indent(dedent(test), "    ") + "\n"
    return Program(f"{imports}\ndef solve(*given):\n", indent(dedent(body), "    ") + "\n", check, "solve")


def run(body: str, test: str = "assert candidate() == 1", walls: str = ALL, limits: Limits = BRIEF) -> Outcome:
    with sandbox(walls, limits) as made:
        return made.run(program(body, test))


def processes(mark: str) -> list[int]:
    """Living processes whose command line has this text."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_what_the_kernel_has_is_used() -> None:
    walls = containment().walls
    if os.path.exists("/proc/sys/kernel/seccomp") and os.uname().machine in ("x86_64", "aarch64"):
        assert SECCOMP in walls
    with contextlib.suppress(OSError):
        assert landlock_version() > 0
        assert LANDLOCK in walls
    root = os.geteuid() == 0
    for wall, option in ((PID_NAMESPACE, "-pf"), (NETWORK_NAMESPACE, "-n"), (IPC_NAMESPACE, "-i"), (OWN_FILES, "-m")):
        asked = ["unshare", option, *(() if root else ("-U", "-r")), "true"]
        if shutil.which("unshare") and subprocess.run(asked, check=False, capture_output=True).returncode == 0:
            assert wall in walls
    assert not root or OWN_FILES not in walls or OTHER_USER in walls


def test_a_private_umask_takes_no_wall_away() -> None:
    code = "import os; os.umask(0o077); from engine.sandbox import containment; print(containment().walls)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    told = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(containment().walls)


# What it says of ordinary programs.


@pytest.mark.parametrize(
    ("body", "outcome", "detail"),
    [
        ("return 1", "passed", ""),
        ("return 2", "wrong", "AssertionError (line 2 of the test: assert candidate() == 1)"),
        ("return None", "wrong", "AssertionError"),
        ("raise ValueError('no')", "error", "ValueError: no (line 3 of prompt and answer)"),
        ("return 1 +", "error", "SyntaxError"),
        ("return 1\nraise_at_import()", "error", "NameError"),
        ("return bytes(1 << 30)", "memory", "out of memory"),
        ("import os; os._exit(0)", "gone", "it ended by itself, with status 0"),
        ("import ctypes; ctypes.string_at(8)", "gone", "it ended by SIGSEGV"),
        ("while True: pass", "time", "more than 1 s of processor time"),
    ],
)
def test_each_outcome_is_told_with_its_cause(body: str, outcome: str, detail: str) -> None:
    source = program(body)
    if "raise_at_import" in body:
        source = program("return 1")
        source = Program(source.prompt, source.completion + "raise_at_import()\n", source.test, source.entry_point)
    with sandbox(limits=Limits(wall_seconds=15, cpu_seconds=1)) as made:
        found = made.run(source)
    assert (found.passed, found.outcome) == (outcome == "passed", outcome)
    assert found.detail.startswith(detail)
    assert found.seconds > 0


def test_a_limit_is_what_ends_a_program_and_not_the_program_itself() -> None:
    slow, large = "import time; time.sleep(1); return 1", "return len(bytes(1 << 30)) >> 30"
    ended = run(slow, limits=Limits(wall_seconds=0.8))
    assert (ended.passed, ended.outcome, ended.detail) == (False, "time", "more than 0.8 s")
    assert run(slow).passed
    assert run(large).outcome == "memory"
    assert run(large, limits=Limits(memory_bytes=3 << 30)).passed


def test_names_of_the_prompt_and_its_imports_are_there_for_the_test() -> None:
    prompt = 'import math\ndef twice(x):\n    return 2 * x\n\n\ndef solve(x):\n    """Half of x."""\n'
    test = "def check(candidate):\n    assert candidate(twice(3)) == math.floor(3.5) and solve(8) == 4\n"
    with sandbox() as made:
        assert made.run(Program(prompt, "    return x / 2\n", test, "solve")).passed
        # what the answer makes of the prompt's names stays with the answer
        forged = "    return 0\n\n\ndef twice(x):\n    return 0\n"
        assert made.run(Program(prompt, forged, test, "solve")).outcome == "wrong"
        assert (
            made.run(Program("def other():\n", "    pass\n", test, "solve")).detail == "it does not define the function"
        )


def test_plain_data_arrives_as_it_is_and_nothing_else_does() -> None:
    plain = "[None, True, 0, -1, 2**53 + 1, -10**5000, 0.1, -0.0, 1e-310, float('inf'), 1+2j, 'a\\ud800\\n', b'\\xff',"
    plain += " (1,), [], {1: 'a', (2, 3): {4}}, frozenset({5})]"
    same = f"expected = {plain}\nfound = candidate(*expected)\nassert list(found) == expected\n"
    same += "assert list(map(type, found)) == list(map(type, expected)) and str(found[7]) == '-0.0'\n"
    assert run("return given", same).passed
    assert run("return float('nan')", "x = candidate()\nassert x != x").passed
    assert run("import collections; return collections.Counter('aab')", "assert type(candidate()) is dict").passed
    assert run("return 1", "candidate(lambda: 1)").detail.startswith("the test's arguments cannot be carried")


HASHABLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    HASHABLE | st.complex_numbers(allow_nan=False) | st.frozensets(HASHABLE) | st.sets(HASHABLE),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(HASHABLE, inner),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ibocdtsz") | st.text(), inner, max_size=2),
)


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_plain_data_reads_back_from_what_was_written(value: object) -> None:
    back = decode(json.loads(pack({"x": encode(value)})[4:])["x"])
    assert back == value
    assert repr(type(back)) == repr(type(value))


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_what_is_no_value_is_refused_and_nothing_else_happens(data: object) -> None:
    with contextlib.suppress(RubbishError):
        encode(decode(data))


def test_a_test_may_expect_an_exception_of_the_answer() -> None:
    test = "try:\n    candidate(1)\nexcept KeyError as e:\n    assert 'x' in str(e)\nelse:\n    assert False"
    assert run("raise KeyError('x')", test).passed
    assert run("return 1", test).outcome == "wrong"


def test_an_answer_that_says_it_is_at_the_end_does_not_end_the_test() -> None:
    test = "for found in map(candidate, [1, 2]):\n    assert found == 1"
    assert run("raise StopIteration", test).outcome == "error"
    assert run("raise StopAsyncIteration", test).outcome == "error"
    assert run("return 1", test).passed


def test_a_value_too_long_to_be_told_is_wrong_all_the_same() -> None:
    found = run("return 1 << 100000", "x = candidate()\nassert x == 1, x")
    assert (found.outcome, found.detail) == ("wrong", "AssertionError (line 3 of the test: assert x == 1, x)")


# What a program may not do to others. Each is seen from outside, and shown to happen without walls.


@dataclass
class Outside:
    """Things outside that a program can do harm to, and whether it did."""

    directory: Path
    victim: subprocess.Popen[bytes]
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    state: list[object] = field(default_factory=list)

    def names(self) -> dict[str, object]:
        return {
            "DIRECTORY": str(self.directory),
            "VICTIM": self.victim.pid,
            "TCP": self.tcp.getsockname(),
            "UDP": self.udp.getsockname(),
            "UNIX": self.unix.getsockname(),
            "ABSTRACT": self.abstract.getsockname(),
        }

    def look(self) -> list[object]:
        held = self.directory / "held"
        there = held.stat() if held.exists() else None
        facts = there and (there.st_mode, there.st_mtime_ns, held.read_text())
        return [sorted(os.listdir(self.directory)), facts, self.directory.stat().st_mode]

    def changed(self) -> bool:
        return self.look() != self.state

    def signalled(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(0.05)
        return self.victim.returncode is not None

    def called(self) -> bool:
        for one in (self.tcp, self.unix, self.abstract):
            with contextlib.suppress(BlockingIOError):
                one.accept()[0].close()
                return True
        with contextlib.suppress(BlockingIOError):
            return bool(self.udp.recv(10))
        return False


@pytest.fixture
def outside() -> Iterator[Outside]:
    # Everybody may write here: what is left alone is so by the walls, and not by the rights of files.
    with tempfile.TemporaryDirectory(prefix="kd-outside-", dir="/tmp") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o777)
        held = directory / "held"
        held.write_text("kept")
        held.chmod(0o666)
        answer = "import os, signal, time; signal.signal(signal.SIGURG, lambda *_: os._exit(3))"
        answer += "; print(flush=True); time.sleep(600)"
        victim = stack.enter_context(
            subprocess.Popen([sys.executable, "-I", "-S", "-c", answer], stdout=subprocess.PIPE, start_new_session=True)
        )
        stack.callback(victim.kill)
        assert victim.stdout is not None
        victim.stdout.readline()
        tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for one in (tcp, udp, unix, abstract):
            stack.enter_context(one)
            one.setblocking(False)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix.bind(f"{directory}/socket")
        os.chmod(f"{directory}/socket", 0o777)
        abstract.bind(f"\0{directory}")
        for one in (tcp, unix, abstract):
            one.listen()
        made = Outside(directory, victim, tcp, udp, unix, abstract)
        made.state = made.look()
        yield made


HARM: dict[str, tuple[str, Callable[[Outside], bool]]] = {
    "signals": (
        """
        import os, signal
        for target in (VICTIM, -VICTIM, -1):
            attempt(os.kill, target, signal.SIGURG)
        attempt(os.killpg, VICTIM, signal.SIGURG)
        """,
        Outside.signalled,
    ),
    "signals through a pipe that it owns": (
        """
        import fcntl, os, signal
        inlet, outlet = os.pipe()
        attempt(fcntl.fcntl, inlet, fcntl.F_SETOWN, VICTIM)
        attempt(fcntl.fcntl, inlet, 10, signal.SIGURG)  # F_SETSIG
        attempt(fcntl.fcntl, inlet, fcntl.F_SETFL, os.O_ASYNC)
        os.write(outlet, b"x")
        """,
        Outside.signalled,
    ),
    "writes": ('attempt(lambda: open(DIRECTORY + "/held", "w").write("x"))', Outside.changed),
    "appends": ('attempt(lambda: open(DIRECTORY + "/held", "a").write("x"))', Outside.changed),
    "makes": ('attempt(lambda: open(DIRECTORY + "/new", "x").close())', Outside.changed),
    "deletes": ('import os; attempt(os.unlink, DIRECTORY + "/held")', Outside.changed),
    "truncates": ('import os; attempt(os.truncate, DIRECTORY + "/held", 0)', Outside.changed),
    "renames": ('import os; attempt(os.rename, DIRECTORY + "/held", DIRECTORY + "/other")', Outside.changed),
    "links": ('import os; attempt(os.symlink, "/", DIRECTORY + "/link")', Outside.changed),
    "makes a directory": ('import os; attempt(os.mkdir, DIRECTORY + "/new")', Outside.changed),
    "changes rights": ('import os; attempt(os.chmod, DIRECTORY + "/held", 0o600)', Outside.changed),
    "changes times": ('import os; attempt(os.utime, DIRECTORY + "/held", (0, 0))', Outside.changed),
    "connects": ("import socket; attempt(lambda: socket.create_connection(TCP, 1))", Outside.called),
    "sends": (
        "import socket; attempt(lambda: socket.socket(2, socket.SOCK_DGRAM).sendto(b'x', UDP))",
        Outside.called,
    ),
    "connects to a file": ("import socket; attempt(lambda: socket.socket(1).connect(UNIX))", Outside.called),
    "connects to a name": ("import socket; attempt(lambda: socket.socket(1).connect(ABSTRACT))", Outside.called),
}


def harmful(what: str, outside: Outside) -> Program:
    """A program that tries this, and then answers as it should."""
    names = "".join(f"{name} = {value!r}\n" for name, value in outside.names().items())
    attempt = "def attempt(what, *given):\n    try:\n        what(*given)\n    except OSError:\n        pass\n"
    return program(dedent(HARM[what][0]) + "\nreturn 1", imports=names + attempt)


@pytest.mark.parametrize("what", HARM)
def test_without_walls_the_harm_is_done_and_seen(what: str, outside: Outside) -> None:
    with sandbox(NONE) as made:
        assert made.run(harmful(what, outside)).passed
    assert until(lambda: HARM[what][1](outside))


@pytest.mark.parametrize("walls", [ALL, NAMESPACES, FILTER])
def test_no_harm_is_done_behind_walls(walls: str, outside: Outside) -> None:
    with sandbox(walls) as made:
        for name, found in made.run_all((what, harmful(what, outside)) for what in HARM):
            assert found.passed, (name, found)  # it was tried to the end, and the program answered after it
            assert not HARM[name][1](outside), name


@pytest.mark.parametrize(
    ("walls", "seen"), [(NONE, True), (FILTER, True), (NAMESPACES, False), (FILTER_AND_LANDLOCK, False), (ALL, False)]
)
def test_files_outside_cannot_be_read_where_landlock_or_an_own_file_system_stands(
    walls: str, seen: bool, outside: Outside
) -> None:
    body = f"return open({str(outside.directory / 'held')!r}).read()"
    assert run(body, "assert candidate() == 'kept'", walls).passed == seen
    body = f"import os; return os.path.basename(os.readlink('/proc/{os.getpid()}/exe'))"
    if OWN_FILES in walls_of(walls):
        assert "FileNotFoundError" in run(body, walls=walls).detail


LASTING = {
    "daemon": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
        return 1
    """,
    "fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "deaf": """
        import signal, time
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        time.sleep(600)
    """,
    "thread": """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        return 2
    """,
    "exec": "import os; os.execv('/usr/bin/sleep', ['sleep', '600'])",
    "command": "import subprocess; subprocess.run(['/usr/bin/sleep', '600'])",
}


@pytest.mark.parametrize("walls", [ALL, NAMESPACES, FILTER])
@pytest.mark.parametrize("what", LASTING)
def test_nothing_outlives_its_program(what: str, walls: str) -> None:
    before = set(processes("sleep\0600"))
    for processes_allowed in (1, 20) if what in ("daemon", "thread") else (1,):
        limits = Limits(wall_seconds=0.7, cpu_seconds=1, processes=processes_allowed)
        found = run(LASTING[what], walls=walls, limits=limits)
        assert not found.passed or (what, walls, processes_allowed) == ("daemon", NAMESPACES, 20)
    assert set(processes("sleep\0600")) <= before


def test_without_walls_a_daemon_outlives_its_program() -> None:
    body = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nreturn 1"
    made = Sandbox._behind((), Limits(processes=1000), 1)
    with made:
        assert made.run(program(body)).passed
        left = processes(made._scratch.start)
    assert left
    for pid in left:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("walls", [ALL, FILTER, NAMESPACES])
def test_programs_die_with_the_evaluator(walls: str) -> None:
    code = f"""
        import sys
        from engine.sandbox import *
        from tests.engine.test_sandbox import program
        made = Sandbox._behind({walls_of(walls)!r}, Limits(wall_seconds=300), 1)
        print(made._scratch.start, flush=True)
        made.run(program("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"))
    """
    root = Path(__file__).parents[2]
    evaluator = subprocess.Popen([sys.executable, "-c", dedent(code)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert evaluator.stdout is not None
    start = evaluator.stdout.readline().strip()
    assert until(lambda: len(processes(start)) >= 4)  # two programs, each with its keeper
    evaluator.kill()
    evaluator.wait()
    evaluator.stdout.close()
    assert until(lambda: not processes(start))
    shutil.rmtree(Path(start).parents[1])


def test_system_calls_that_no_program_needs_are_refused() -> None:
    walls_of(FILTER)
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers below are those of x86_64")
    calls = {"fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "process_vm_writev": 311, "socket": 41}
    calls |= {"mount": 165, "unshare": 272, "setns": 308, "bpf": 321, "keyctl": 250, "perf_event_open": 298}
    calls |= {"io_uring_setup": 425, "pidfd_open": 434, "tgkill": 234, "userfaultfd": 323, "memfd_create": 319}
    calls |= {"prlimit64": 302, "shmget": 29, "setsid": 112, "prctl": 157, "clone3": 435, "seccomp": 317, "chmod": 90}
    body = f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        went = []
        for name, number in {calls!r}.items():
            ctypes.set_errno(0)
            first = 1 if name == "prctl" else 0
            result = libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(first)] * 6)
            if result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
                went.append((name, result, ctypes.get_errno()))
        return went
    """.replace("[ctypes.c_ulong(first)] * 6", "[ctypes.c_ulong(first)] + [ctypes.c_ulong(1)] * 5")
    for walls in (ALL, FILTER):
        assert run(body, "assert candidate() == [], candidate()", walls).detail == ""
    x32 = "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39)); return 1"
    assert run(x32, walls=FILTER).detail == "it ended by SIGSYS"
    i386 = """
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, getpid; int 0x80; ret
        return 1 if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() else 0
    """
    assert run(i386, walls=FILTER).detail in ("it ended by SIGSYS", "it ended by SIGSEGV")


def test_a_program_is_nobody_without_rights_environment_files_or_descriptors() -> None:
    body = """
        import os
        there = []
        for number in range(1024):
            try:
                os.fstat(number)
                there.append(number)
            except OSError:
                pass
        return sorted(os.environ), there, os.listdir("."), os.read(0, 9), os.getresuid()
    """
    test = """
        environment, there, files, read, users = candidate()
        assert environment == ['LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR'], environment
        assert there == [0, 1, 2, 3, 4] and files == [] and read == b'', (there, files, read)
        assert 0 not in users or NOT_ALL, users
    """
    other = OTHER_USER in containment().walls or os.geteuid() != 0
    assert run(body, test.replace("NOT_ALL", str(not other))).detail == ""
    test = "assert [each for each in candidate() if each[:6] in ('CapEff', 'CapPrm') and int(each[7:], 16)] == []"
    assert run("return open('/proc/self/status').readlines()", test, NONE).detail == ""


def test_a_full_disk_is_its_own() -> None:
    body = """
        import os
        written = 0
        try:
            for number in range(20):
                with open(f"{number}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError:
            pass
        return written >> 20
    """
    assert run(body, "assert candidate() == 20", NONE).passed
    for walls in (ALL, NAMESPACES, FILTER):
        least = 0 if OWN_FILES not in walls_of(walls) else 8
        assert run(body, f"assert {least} <= candidate() <= 16", walls).detail == ""
    body = "open('large', 'wb', 0).write(bytes(9)); return open('large', 'ab', 0).write(bytes(2 << 20))"
    if OWN_FILES in walls_of(ALL):
        assert run(body, "assert candidate() == (1 << 20) - 9").passed
        assert run("import tempfile; tempfile.TemporaryFile().write(b'x'); return 1").passed


def test_the_own_files_are_a_library_that_cannot_be_written() -> None:
    body = """
        import os
        found = []
        for directory in ("/", os.path.dirname(os.__file__)):
            try:
                os.mkdir(os.path.join(directory, "made"))
            except OSError as error:
                found.append(error.strerror)
        return found
    """
    walls_of(NAMESPACES)
    assert run(body, "assert candidate() == ['Read-only file system'] * 2, candidate()", NAMESPACES).detail == ""
    listed = "import os; return sorted(os.listdir('/'))"
    assert run(listed, "assert not {'proc', 'home', 'tmp', 'sys'} & set(candidate())", NAMESPACES).detail == ""


@pytest.mark.parametrize("walls", [ALL, NAMESPACES])
def test_installed_packages_are_not_there_with_their_answers(walls: str) -> None:
    places = hidden()
    if not any(map(os.listdir, places)):
        pytest.skip("this Python has no packages of its own")
    body = f"import os; return [os.path.isdir(each) and os.listdir(each) for each in {places!r}]"
    assert run(body, f"assert candidate() == {[[] for _ in places]}, candidate()", walls).detail == ""
    assert run(body, f"assert candidate() != {[[] for _ in places]}", NONE).passed


def test_what_limits_open_files_limits_the_programs_at_a_time() -> None:
    code = """
        import resource
        from engine.sandbox import *
        from tests.engine.test_sandbox import program
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        with Sandbox(Limits(), 30) as made:
            assert 1 <= made.workers < 10
            assert all(found.passed for _, found in made.run_all((n, program("return 1")) for n in range(12)))
        print("ran")
        with Sandbox(Limits(), 1) as made:
            held = []
            try:
                while True:
                    held.append(open("/dev/null"))
            except OSError:
                held.pop()
            try:
                made.run(program("return 1"))
            except SandboxError as error:
                print(error)
    """
    told = subprocess.run(
        [sys.executable, "-c", dedent(code)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    ran, refused = told.stdout.splitlines()
    assert ran == "ran"
    assert refused.startswith("a program cannot be started: Too many open files")


def test_output_goes_nowhere() -> None:
    assert run(
        "import os\nfor _ in range(1000):\n    os.write(1, bytes(1 << 20))\n    os.write(2, b'x')\nreturn 1"
    ).passed


# What a program may not say of itself.

FORGED: dict[str, tuple[str, str]] = {
    "prints success": ("""print('passed', '{"passed": true}', flush=True); return 2""", "wrong"),
    "sys.exit": ("import sys; sys.exit(0)", "error"),
    "SystemExit": ("raise SystemExit", "error"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "error"),
    "GeneratorExit": ("raise GeneratorExit", "error"),
    "an exception that cannot be told": (
        """
        class E(Exception):
            def __str__(self): raise self
        raise E
        """,
        "error",
    ),
    "os._exit": ("import os; os._exit(0)", "gone"),
    "patches built-ins": (
        """
        import builtins
        builtins.AssertionError = builtins.bool
        builtins.all = builtins.sum = lambda *_: True
        return 2
        """,
        "wrong",
    ),
    "equals all": (
        """
        class L:
            def __eq__(self, other): return True
        return L()
        """,
        "wrong",
    ),
    "an int that equals all": (
        """
        class L(int):
            def __eq__(self, other): return True
            def __index__(self): return 1
            def __int__(self): return 1
        return L(2)
        """,
        "wrong",
    ),
    "a list that equals all": (
        """
        class L(list):
            def __eq__(self, other): return True
            def __iter__(self): return iter([1])
        return L([2])
        """,
        "wrong",
    ),
    "a class called int": ("return type('int', (), {'__eq__': lambda *_: True})()", "wrong"),
    "a verdict on every descriptor": (
        """
        import json, os
        verdict = json.dumps({"outcome": "passed", "detail": ""}).encode()
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, len(verdict).to_bytes(4, "big") + verdict)
            except OSError:
                pass
        return 2
        """,
        "error",
    ),
    "looks for the checker in memory": (
        """
        import gc
        for each in gc.get_objects():
            if isinstance(each, dict) and "check" in each:
                each["check"] = lambda *_: {"outcome": "passed", "detail": ""}
        return 2
        """,
        "wrong",
    ),
    "looks for the checker in frames": (
        """
        import sys
        frame = sys._getframe()
        while frame:
            for name in ("check", "tell", "answer", "receive"):
                frame.f_globals[name] = lambda *_: {"arguments": {"t": []}, "named": {"d": []}}
            frame = frame.f_back
        return 2
        """,
        "wrong",
    ),
    "closes all": ("import os; os.closerange(0, 64); return 1", "gone"),
    "closes all and stays": ("import os, time; os.closerange(0, 64); time.sleep(600)", "gone"),
    "rubbish": ("import os; os.write(4, b'rubbish' * 9); return 1", "error"),
    "a frame too long": ("import os; os.write(4, b'\\xff' * 9); return 1", "error"),
    "a flood": ("import os\nwhile True: os.write(4, bytes(1 << 16))", "error"),
    "deep JSON": ("import os; os.write(4, (30000).to_bytes(4, 'big') + b'[' * 30000); return 1", "error"),
    "no reply": ("import os; os.write(4, (10).to_bytes(4, 'big') + b'{\"x\":null}'); return 1", "error"),
    "a result too large": ("return 'x' * (5 << 20)", "error"),
    "a result in itself": ("x = []; x.append(x); return x", "error"),
    "atexit": ("import atexit, os; atexit.register(os._exit, 0); raise ValueError", "error"),
    "fills memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
}


@pytest.mark.parametrize("what", FORGED)
def test_no_program_forges_its_result(what: str, everywhere: Sandbox) -> None:
    body, outcome = FORGED[what]
    found = everywhere.run(program(body))
    assert (found.passed, found.outcome) == (False, outcome), found
    assert everywhere.run(program("return 1")).passed  # nothing of it stays


@pytest.fixture(scope="module")
def everywhere() -> Iterator[Sandbox]:
    with sandbox(limits=Limits(wall_seconds=30, cpu_seconds=4, memory_bytes=128 << 20)) as made:
        yield made


def test_a_lying_answer_says_nothing_that_steers_a_terminal(everywhere: Sandbox) -> None:
    found = everywhere.run(program("raise ValueError('\\x1b[2J' + 'x' * 10000)"))
    assert "\x1b" not in found.detail
    assert len(found.detail) <= 500


# How it runs them, and when it does not.


def test_all_are_run_and_each_is_told_by_its_key(everywhere: Sandbox) -> None:
    asked = []
    programs = ((number, program(f"return {number % 3}")) for number in range(9))
    found = dict(everywhere.run_all(programs, lambda: asked.append(time.monotonic())))
    assert {number for number, each in found.items() if each.passed} == {1, 4, 7}
    assert asked


def test_what_poll_raises_ends_all_of_them_at_once() -> None:
    with sandbox(limits=Limits(wall_seconds=300), workers=2) as made:
        started = time.monotonic()

        def poll() -> None:
            if len(processes(made._scratch.start)) >= 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(made.run_all(((n, program("import time; time.sleep(300)")) for n in range(5)), poll))
        assert time.monotonic() - started < WAIT_SECONDS
        assert not processes(made._scratch.start)
        waiting = made.run_all([(1, program("return 1")), (2, program("import time; time.sleep(300)"))])
        assert next(waiting)[0] == 1
        waiting.close()  # type: ignore[attr-defined]
        assert not processes(made._scratch.start)


def test_closing_ends_what_runs_in_another_thread() -> None:
    with sandbox(limits=Limits(wall_seconds=300)) as made:
        ended: list[KdError] = []

        def wait() -> None:
            try:
                made.run(program("import time; time.sleep(300)"))
            except KdError as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert until(lambda: len(processes(made._scratch.start)) >= 2)
        made.close()
        thread.join(WAIT_SECONDS)
    assert [str(each) for each in ended] == ["the sandbox is closed"]


def test_where_the_walls_are_not_enough_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = judge((LANDLOCK, OTHER_USER), root=True)
    assert not bare.sufficient
    monkeypatch.setattr(engine.sandbox, "containment", lambda: bare)
    with pytest.raises(KdError, match=r"cannot be contained.*signal other processes.*Linux host"):
        Sandbox(Limits())


@pytest.mark.parametrize(
    ("walls", "enough", "missing"),
    [
        ((SECCOMP,), True, "no Landlock either: a program can read every file"),
        ((PID_NAMESPACE, OWN_FILES), True, "no network namespace and no seccomp: a program can reach the network"),
        ((PID_NAMESPACE, OWN_FILES, NETWORK_NAMESPACE), True, "no seccomp: a program can make every system call"),
        ((PID_NAMESPACE,), False, "a program can change files of this user"),
        ((OWN_FILES, LANDLOCK), False, "a program can signal other processes"),
        ((), False, "a program can reach the network"),
    ],
)
def test_what_is_missing_is_said_with_what_it_means(walls: tuple[str, ...], enough: bool, missing: str) -> None:
    found = judge(walls, root=False)
    assert found.sufficient == enough
    assert any(missing in text for text in found.missing)
    assert bool(found.reason and found.do) != enough


def test_a_wall_that_does_not_stand_is_never_passed_over() -> None:
    walls_of(FILTER)
    wrong = Sandbox._behind((PID_NAMESPACE, "user namespace"), BRIEF, 1)
    wrong._scratch.empty = "/nowhere"  # where a program would start
    with wrong, pytest.raises(KdError, match="a wall of the sandbox does not stand"):
        wrong.run(program("return 1"))
