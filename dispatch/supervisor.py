"""Owns one run on its host: starts the trainer, outlives whoever asked for it, watches it, and records how it ended.

Standard library only and one file, so that it can be copied to a host and run there (Python 3.11 or later):

    python -P supervisor.py run RUN_DIR [--gpu [--devices N]] [--environment] [-- ARGV...]
                                                         start the trainer, return once it is on record
    python -P supervisor.py status RUN_DIR               one JSON object on standard output
    python -P supervisor.py stop RUN_DIR [--grace S] [--kill]

A process is known by pid, start ticks, boot id and the run's uuid; a bare pid is never signalled. What is Linux only
degrades elsewhere: without /proc, `ps` tells processes apart to the second; without a pidfd a signal goes to the pid
right after the comparison; without a subreaper only orphans that stayed in the trainer's process group are found.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import resource
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypedDict

START_SECONDS = 60.0
SETTLE_SECONDS = 1.0
"""So long a helper of the trainer (a resource tracker, say) may take to notice its end and not count as an orphan."""
ORPHAN_GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL for orphans."""
UNKILLABLE_SECONDS = 30.0
"""After this long a process that not even SIGKILL ended (stuck in the kernel) is left, and said so."""
KILL_SECONDS = 30.0
STOP_GRACE_SECONDS = 300.0
RETRY_SECONDS = 600.0
"""How long a full disk may hold up the exit record."""
WATCH_SECONDS = 5.0
"""Between two looks at what the trainer does. Time beyond twice that was slept through, and counts for nothing."""
BEAT_SECONDS = 10.0
STALL_SECONDS, STALL_FACTOR = 600.0, 20.0
"""Without progress for this long, and for this many steps, the trainer is stalled; a phase may bring its own budget."""
STALL_GRACE_SECONDS = 30.0
"""From SIGTERM to SIGKILL for a trainer that is ended because of a stall."""
STACKS_SECONDS = 0.5
"""So long a trainer that is about to be killed has to say where it is."""
FREE_SECONDS = 10.0
"""So long the lock of a GPU and the driver may take to notice that a run is gone."""
LOCK_SECONDS = 0.2
"""So long a GPU's lock may be held by somebody who only looks whether it is free."""
SMI_SECONDS = 15.0
LOCK_DIRECTORIES = ("/run/lock", "/tmp")
"""Where the lock of a GPU is, the first that everybody on the host may write to."""
MAX_RECORD_BYTES = 1 << 20
MAX_JOURNAL_BYTES = 16 << 20
HEARTBEAT = "supervisor.heartbeat"
"""The supervisor's sign of life, there for as long as it is; always as long, so that a full disk takes it too."""
_HEARTBEAT_BYTES = 1024
_PIECE_BYTES = 1 << 20
_PROGRESS = re.compile(
    rb'^.*"event": ?"(run|phase|measure|step|eval|checkpoint|checkpoint_failed|progress|projection|end)".*$',
    re.MULTILINE,
)
"""Lines that the trainer's own work makes; heartbeats and vitals come from threads that may outlive it."""

PASSED_NAMES = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HF_HOME", "CC", "CXX"),
)
PASSED_PREFIXES = (
    *("LC_", "XDG_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "NVIDIA_"),
    *("OMP_", "MKL_", "OPENBLAS_"),
)
"""Of the caller's environment only these reach the trainer: no token and no secret by accident."""
ALWAYS_SET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


class Identity(TypedDict):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat; without /proc the start time in Unix seconds."""
    boot_id: str
    run: str


class Process(NamedTuple):
    """One row of the process table."""

    pid: int
    parent: int
    group: int
    session: int
    state: str
    start_ticks: int
    name: str

    @property
    def gone(self) -> bool:
        """Dead, and at most waiting for its parent to notice."""
        return self.state in ("Z", "X")


class Start(NamedTuple):
    """The last start on record; all of it empty when there is none.

    `gpu`: UUID of the one that the run was given, of several all of them with commas; `asked`: it was asked to stop
    since.
    """

    supervisor: Identity | None = None
    trainer: Identity | None = None
    session: int = 0
    gpu: str | None = None
    asked: bool = False


class Order(NamedTuple):
    """What is to be started and how it is to be watched. `kill_after`: seconds of a stall; None: never."""

    run_dir: Path
    run: str
    command: list[str]
    environment: Mapping[str, str]
    locks: tuple[int, ...]
    gpu: str | None
    stall_seconds: float
    kill_after: float | None


class Refused(Exception):
    """The command cannot be carried out; the text is one line for the operator."""


# Processes


def read_process(pid: int) -> Process | None:
    """The process table's row of a pid, None when there is none."""
    if not os.path.exists("/proc/self/stat"):
        return next(iter(_ps("-p", str(pid))), None)
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may itself contain spaces and parentheses.
    name, _, rest = raw.partition(b"(")[2].rpartition(b")")
    field = rest.split()
    parent, group, session, start_ticks = (int(field[index]) for index in (1, 2, 3, 19))
    return Process(pid, parent, group, session, field[0].decode(), start_ticks, name.decode(errors="replace"))


def scan() -> list[Process]:
    """Every process that can be seen."""
    if not os.path.exists("/proc/self/stat"):
        return _ps("-A")
    rows = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return [row for row in rows if row is not None]


def _ps(*selection: str) -> list[Process]:
    """The process table where there is no /proc (macOS); the session is not told and stands as 0."""
    command = ["ps", *selection, "-o", "pid=,ppid=,pgid=,stat=,lstart=,ucomm="]
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C", "TZ": "UTC"}
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as lister:
        for line in lister.communicate()[0].splitlines():
            pid, parent, group, state, *start, name = line.split(maxsplit=9)
            seconds = calendar.timegm(time.strptime(" ".join(start), "%a %b %d %H:%M:%S %Y"))
            rows.append(Process(int(pid), int(parent), int(group), 0, state[0], seconds, name.strip()))
    return [row for row in rows if row.pid != lister.pid]


def boot_id() -> str:
    """Tells one boot of the host from the next; empty where the platform does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        pass
    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def identify(pid: int, run: str) -> Identity:
    """The identity of a process that is known to exist: this one or a child that was not reaped."""
    row = read_process(pid)
    if row is None:
        raise Refused(f"process {pid} vanished from the process table")
    return Identity(pid=pid, start_ticks=row.start_ticks, boot_id=boot_id(), run=run)


def alive(process: Identity | None) -> bool:
    """Whether exactly this process still runs; a zombie, another boot or a reused pid does not count."""
    if process is None or process["boot_id"] != boot_id():
        return False
    row = read_process(process["pid"])
    return row is not None and not row.gone and row.start_ticks == process["start_ticks"]


def send_signal(process: Identity, number: int) -> bool:
    """Signals exactly this process; False when it is gone.

    The pidfd is opened first and the identity compared after: from then on the pid cannot come to mean another process.
    """
    try:
        descriptor = os.pidfd_open(process["pid"]) if hasattr(os, "pidfd_open") else None
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
        descriptor = None
    try:
        if not alive(process):
            return False
        if descriptor is None:
            os.kill(process["pid"], number)
        else:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return True


def dump_stacks(process: Identity) -> bool:
    """Asks a trainer for the stacks of all its threads, which go to launch.log; False where it would not survive that.

    The engine registers a handler for SIGUSR1; a process that has none yet would end by it.
    """
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process['pid']}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    handled = caught is not None and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1
    return bool(handled) and send_signal(process, signal.SIGUSR1)


def usage(pid: int) -> dict[str, object]:
    """Processor time and memory of a process; empty where nothing tells."""
    try:
        field = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return {}
    seconds = (int(field[11]) + int(field[12])) / os.sysconf("SC_CLK_TCK")
    return {"cpu_seconds": seconds, "rss_bytes": int(field[21]) * resource.getpagesize()}


def _become_subreaper() -> bool:
    """Orphans of the trainer are handed to us rather than to init (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes
    except ImportError:
        return False
    set_child_subreaper = 36
    return bool(ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0) == 0)


# Files of the run directory


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file; one that is made gets mode 0600. Never waits for a pipe's other end.

    Raises:
        OSError: it cannot be opened, or it is a pipe, a device, a directory.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    os.set_blocking(descriptor, True)  # The trainer gets its log from here, and must not meet a surprise in it.
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: see `open_regular`; or it has more than `limit` bytes.
    """
    descriptor = open_regular(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        data = bytearray()
        while chunk := file.read(limit + 1 - len(data)):
            data += chunk
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return bytes(data)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file at once and for good: temporary file, fsync, rename, fsync of the directory. Mode 0600."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_json(path: Path) -> dict[str, object] | None:
    """A JSON object from a regular file of at most MAX_RECORD_BYTES; None when it is missing or is not one."""
    try:
        value = json.loads(read_regular(path, MAX_RECORD_BYTES))
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        # No device or address: a socket. Whatever is no record tells as much as none at all.
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EFBIG, errno.ENXIO):
            return None
        raise
    return value if isinstance(value, dict) else None


def note(run_dir: Path, event: str, **fields: object) -> None:
    """Appends one line to supervisor.jsonl in one write, and fsyncs it."""
    line = json.dumps({"v": 1, "t": time.time(), "event": event, **fields}).encode() + b"\n"
    descriptor = open_regular(run_dir / "supervisor.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # A full disk tore the last line; it must not take this one with it.
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "supervisor.jsonl")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_note(run_dir: Path, event: str, **fields: object) -> None:
    # A full disk must not end the supervision of a run that trains on.
    try:
        note(run_dir, event, **fields)
    except OSError as error:
        print(f"supervisor: cannot record {event}: {error}", file=sys.stderr, flush=True)


def read_start(run_dir: Path) -> Start:
    """The last start from supervisor.jsonl; a torn or foreign line is passed over.

    Raises:
        Refused: a start is on record, but not of which process.
        OSError: it is no file that a supervisor can have written.
    """
    path = run_dir / "supervisor.jsonl"
    found = Start()
    try:
        lines = read_regular(path, MAX_JOURNAL_BYTES).splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("event") in ("starting", "started"):
            found = Start(
                _identity(path, entry.get("supervisor")),
                _identity(path, entry.get("trainer")),
                _number(path, entry.get("session", 0), 0, 1 << 31),
                str(entry["gpu"]) if entry.get("gpu") else None,
            )
        elif isinstance(entry, dict) and entry.get("event") == "signal" and entry.get("by") == "stop":
            found = found._replace(asked=True)
    return found


def _identity(path: Path, value: object) -> Identity | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Refused(f"{path}: names no process where it records a start")
    # A pid of 0 or less would mean a group, or everyone.
    return Identity(
        pid=_number(path, value.get("pid"), 1, 1 << 31),
        start_ticks=_number(path, value.get("start_ticks"), 0, 1 << 63),
        boot_id=str(value.get("boot_id", "")),
        run=str(value.get("run", "")),
    )


def _number(path: Path, value: object, first: int, end: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not first <= value < end:
        raise Refused(f"{path}: names no process where it records a start")
    return value


def status(run_dir: Path) -> dict[str, object]:
    """What is known of a run: running, ended, lost or starting (which includes: not launched yet).

    Lost: there is no exit record and neither process is alive, so how the run ended will never be known. `rebooted`:
    it was lost because the host was started anew. `heartbeat`: the supervisor's last one, and how old it is.
    """
    run = str(_manifest(run_dir)["run"])
    record = read_json(run_dir / "exit.json")
    start = read_start(run_dir)
    supervised, training = alive(start.supervisor), alive(start.trainer)
    if record is None and not (supervised or training):
        record = read_json(run_dir / "exit.json")  # It may have ended while we looked.
    if record is not None:
        state = "ended"
    elif training or (supervised and start.trainer is not None):
        state = "running"
    elif supervised or start.supervisor is None:
        state = "starting"
    else:
        state = "lost"
    return {
        "v": 1,
        "state": state,
        "run": run,
        "trainer": start.trainer,
        "supervisor": start.supervisor,
        "unsupervised": state == "running" and not supervised,
        "rebooted": state == "lost" and start.supervisor is not None and start.supervisor["boot_id"] != boot_id(),
        "heartbeat": None if record else _heartbeat(run_dir),
        "exit": record,
    }


def _heartbeat(run_dir: Path) -> dict[str, object] | None:
    """The last heartbeat, with `seconds` since then; None for those where it was before the host was started."""
    beat = read_json(run_dir / HEARTBEAT)
    if beat is None:
        return None
    moment = beat.get("monotonic")
    known = beat.get("boot_id") == boot_id() and isinstance(moment, int | float)
    return {**beat, "seconds": max(0.0, time.monotonic() - moment) if known else None}  # type: ignore[operator]


def _manifest(run_dir: Path) -> dict[str, object]:
    manifest = read_json(run_dir / "dispatch.json") or {}
    if not isinstance(manifest.get("run"), str) or not manifest["run"]:
        raise Refused(f"{run_dir}: not a run directory; expected a dispatch.json with the run's id")
    return manifest


def _rule(manifest: Mapping[str, object], name: str) -> float | None:
    """Seconds that a manifest's `supervise` gives."""
    rules = manifest.get("supervise")
    value = rules.get(name) if isinstance(rules, dict) else None
    return float(value) if isinstance(value, int | float) and value > 0 else None


# run


def run(
    run_dir: Path,
    command: Sequence[str],
    again: bool = False,
    gpu: bool = False,
    environment: Mapping[str, str] | None = None,
    devices: int = 1,
) -> dict[str, object]:
    """Starts the trainer detached, and returns once the line `started` is on disk.

    With `again` a run that has ended, or was lost, gets another attempt; its exit record is kept as `exit-N.json`. With
    `gpu` the trainer has so many `devices` of the host to itself, the first that CUDA_VISIBLE_DEVICES names; where
    there is none, there is nothing to have. `environment` is added to what the trainer is given of ours.

    Doing it twice, or at once from two places, starts one trainer: the second answers already_running or already_ended.
    """
    manifest = _manifest(run_dir)
    run_id = str(manifest["run"])
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # The caller closed a standard descriptor; what is opened below must not get its number.
    os.close(spare)
    deadline = time.monotonic() + START_SECONDS
    while (lock := _try_lock(run_dir)) is None:
        now = status(run_dir)
        if now["state"] in ("running", "ended"):
            return {**now, "result": f"already_{now['state']}"}
        if time.monotonic() > deadline:
            raise Refused(f"{run_dir}: another process holds its .lock, and no trainer was started")
        time.sleep(0.02)
    now = status(run_dir)
    if again and now["state"] in ("ended", "lost"):
        _begin_again(run_dir)
        now = {"state": "starting"}
    if now["state"] in ("running", "ended"):
        return {**now, "result": f"already_{now['state']}"}
    if now["state"] == "lost":
        raise Refused(f"{run_dir}: was started before and ended without an exit record; start a new run")
    given = {**trainer_environment(os.environ), **(environment or {})}
    locks: tuple[int, ...] = (lock,)
    device = None
    if gpu and (uuids := gpu_uuids(given, devices)):
        locks = (lock, *lock_gpus(uuids, run_dir, run_id))
        device = given["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    stall, kill_after = _rule(manifest, "stall_seconds"), _rule(manifest, "kill_after_stall_seconds")
    order = Order(run_dir, run_id, list(command), given, locks, device, stall or STALL_SECONDS, kill_after)

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _detach(order, sender)
    os.close(sender)
    os.waitpid(child, 0)
    if not select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise Refused(f"{run_dir}: the supervisor has not answered for {START_SECONDS:.0f} s; see its status")
    report = os.read(receiver, 65536)  # Shorter than PIPE_BUF, so it comes whole; empty when the writer died.
    if not report:
        raise Refused(f"{run_dir}: the supervisor ended before it started the trainer; see launch.log there")
    answer: dict[str, object] = json.loads(report)
    if "error" in answer:
        raise Refused(f"{run_dir}: {answer['error']}")
    return {**status(run_dir), "result": "started"}


def _begin_again(run_dir: Path) -> None:
    """Puts the last attempt's end aside; the caller holds the lock, so nobody else is doing it."""
    for name in ("SHA256SUMS", HEARTBEAT):
        (run_dir / name).unlink(missing_ok=True)
    if (run_dir / "exit.json").exists():
        number = 1 + sum(1 for _ in run_dir.glob("exit-*.json"))
        os.rename(run_dir / "exit.json", run_dir / f"exit-{number}.json")
    note(run_dir, "again", run=_manifest(run_dir)["run"])


def _try_lock(run_dir: Path) -> int | None:
    """The run's lock, None when another process holds it. It is passed on to the trainer and freed by the last one."""
    descriptor = open_regular(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


# GPUs: one run has each of them at a time


def gpu_uuids(environ: Mapping[str, str], count: int = 1) -> list[str]:
    """The GPUs that a trainer of this environment would take: nvidia-smi's UUIDs, none where there is no GPU.

    Raises:
        Refused: nvidia-smi does not answer, knows nothing of a device that is asked for, or there are fewer.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    # As CUDA reads it: what stands after one that is none is hidden.
    asked = (name.strip() for name in (visible or "").split(","))
    wanted = list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), asked))
    if visible is not None and not wanted:
        return []
    rows = smi("--query-gpu=index,uuid", environ.get("PATH", os.defpath))
    if not rows:
        return []
    if visible is None:
        wanted = [str(index) for index in range(min(count, len(rows)))]
    found = list(dict.fromkeys(_uuid(name, rows) for name in wanted[:count]))  # Named twice it is still one.
    if len(found) < count:
        source = "nvidia-smi knows" if visible is None else f"CUDA_VISIBLE_DEVICES={visible[:80]} gives"
        raise Refused(f"train.devices: {count}: {source} {len(found)} {'GPU' if len(found) == 1 else 'GPUs'}")
    return found


def _uuid(wanted: str, rows: Sequence[tuple[str, ...]]) -> str:
    for row in rows:
        if len(row) == 2 and (row[0] == wanted or row[1].startswith(wanted)):
            return row[1]
    if wanted.startswith("MIG-"):
        return wanted
    raise Refused(f"CUDA_VISIBLE_DEVICES={wanted[:80]}: nvidia-smi knows {', '.join(row[0] for row in rows)[:200]}")


def smi(query: str, path: str) -> list[tuple[str, ...]] | None:
    """The rows of nvidia-smi's answer; None where there is none, or it fails.

    Raises:
        Refused: it does not answer.
    """
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    nothing = subprocess.DEVNULL
    try:
        asked = subprocess.Popen(
            command, env={"PATH": path}, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, text=True
        )
    except OSError:
        return None
    try:
        told, _ = asked.communicate(timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()  # And not waited for: inside a driver that hangs not even this ends it.
        raise Refused(f"nvidia-smi has not answered for {SMI_SECONDS:.0f} s: the GPU's driver hangs") from None
    rows = [tuple(field.strip() for field in line.split(",")) for line in told.splitlines() if line.strip()]
    return rows if asked.returncode == 0 else None


def _lock_path(device: str) -> Path:
    name = "kdconsole-" + "".join(c if c.isalnum() or c == "-" else "_" for c in device)[:80] + ".lock"
    return Path(next(d for d in LOCK_DIRECTORIES if os.access(d, os.W_OK)), name)


def lock_gpus(devices: Sequence[str], run_dir: Path, run_id: str) -> list[int]:
    """The locks of several GPUs, or none of them; see `lock_gpu`.

    They are taken in the order of the UUIDs, so that of two runs that want the same ones the first gets all of them.
    """
    locks: list[int] = []
    try:
        for device in sorted(devices):
            locks.append(lock_gpu(device, run_dir, run_id))
    except BaseException:
        for lock in locks:
            os.close(lock)
        raise
    return locks


def lock_gpu(device: str, run_dir: Path, run_id: str) -> int:
    """The lock of a GPU, shared by everybody on the host. It is passed on to the trainer and freed by the last one.

    Raises:
        Refused: another run has it; the message names that run.
        OSError: the lock's file cannot be opened.
    """
    path = _lock_path(device)
    try:
        # Another user's file in a sticky directory may be opened but not with O_CREAT (fs.protected_regular).
        descriptor = open_regular(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        os.fchmod(descriptor, 0o666)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "a run that is just starting"
            os.close(descriptor)
            raise Refused(f"GPU {device} is busy: {holder} has it; wait for its end, or stop it") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"run {run_dir.name} ({run_id}) of uid {os.getuid()}\n".encode(), 0)
    return descriptor


def gpu_let_go(device: str, run: str, pids: Mapping[int, int]) -> tuple[bool | None, str]:
    """Whether a run has let go of its GPU, None where nobody can tell; and what speaks against it.

    Args:
        device: the GPU's UUID, of several all of them with commas.
        run: uuid of the run.
        pids: its processes, dead or alive, each with its start ticks.
    """
    deadline = time.monotonic() + FREE_SECONDS
    while True:
        free, problem = _gpu_let_go(device, run, pids)
        if free or time.monotonic() > deadline:
            return free, problem
        time.sleep(0.05)


def _holder(device: str) -> str:
    """What stands in the lock of a GPU that somebody holds; empty when nobody does."""
    try:
        descriptor = open_regular(_lock_path(device), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 4096, 0).decode(errors="replace")
    finally:
        os.close(descriptor)
    return ""


def _gpu_let_go(device: str, run: str, pids: Mapping[int, int]) -> tuple[bool | None, str]:
    try:
        several = "," in device
        for each in device.split(","):
            if run in _holder(each):  # Another name is that of a later run, which has it already.
                return False, "a process of the run still holds the lock" + (f" of {each}" if several else "")
        rows = smi("--query-compute-apps=pid", os.environ.get("PATH", os.defpath))
    except (Refused, OSError) as error:
        return None, str(error)
    if rows is None or not all(row[0].isdigit() for row in rows):
        return None, "nvidia-smi does not tell which processes use it"
    for pid in {int(row[0]) for row in rows} & pids.keys():
        now = read_process(pid)
        if now is None or now.start_ticks == pids[pid]:
            return False, f"nvidia-smi still lists process {pid} of the run on {'one of them' if several else 'it'}"
    return True, ""


def _detach(order: Order, sender: int) -> NoReturn:
    """In the first child: leaves the caller's session for good and supervises from a second one."""
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.setsid()
        session = os.getpid()
        if os.fork() == 0:
            os.umask(0o077)
            os.chdir(order.run_dir)
            log = open_regular(Path("launch.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            # Nothing of the caller may stay open: it would wait for us on its pipes.
            kept = [2, *sorted((*order.locks, sender)), 65536]
            for before, after in itertools.pairwise(kept):
                os.closerange(before + 1, after)
            _supervise(order, sender, session)
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - a forked child must not return into its parent's frames
        problem = f"the supervisor failed: {type(error).__name__}: {error}"[:2000]
        _report(sender, {"error": problem})
        print(problem, file=sys.stderr, flush=True)
        os._exit(1)


def _report(sender: int, answer: Mapping[str, object]) -> None:
    try:
        os.write(sender, json.dumps(answer).encode())
        os.close(sender)
    except OSError:
        pass  # It was reported before, or the caller is gone and nobody listens.


def trainer_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The allowlisted part of an environment, offline and unbuffered; PYTHONPATH absolute and without empty entries."""
    passed = {
        name: value for name, value in environ.items() if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
    }
    entries = [os.path.abspath(entry) for entry in passed.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**passed, **({"PYTHONPATH": os.pathsep.join(entries)} if entries else {}), **ALWAYS_SET}


def _supervise(order: Order, sender: int, session: int) -> None:
    run_dir, run_id = order.run_dir, order.run
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # Seen through the wake-up descriptor.
    supervisor, subreaper = identify(os.getpid(), run_id), _become_subreaper()
    recorded = {"run": run_id, "supervisor": supervisor, "session": session, "gpu": order.gpu}
    note(run_dir, "starting", **recorded, subreaper=subreaper)
    started, clock = time.time(), time.monotonic()
    for lock in order.locks:
        os.set_inheritable(lock, True)
    # An ignored SIGHUP is inherited on purpose; the rest starts from the defaults whatever the caller had.
    defaults = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD)
    written = _size(run_dir / "events.jsonl")
    try:
        pid = os.posix_spawnp(
            order.command[0], order.command, order.environment, setpgroup=0, setsigmask=(), setsigdef=defaults
        )
    except OSError as error:
        problem = f"cannot start {order.command[0]}: {error.strerror}"
        failed = {"run": run_id, "exit_code": None, "signal": None, "error": problem, "wrote": False}
        _end(run_dir, failed, started, 0.0)
        _report(sender, {"error": problem})
        return
    child = _Child(pid)
    trainer = identify(pid, run_id)
    watch = Watch(order, trainer, written)
    try:
        note(run_dir, "started", **recorded, trainer=trainer)
    except OSError:
        os.killpg(pid, signal.SIGKILL)  # Not reaped yet, so the pid is still its own.
        raise
    _report(sender, {"ok": True})

    passed_on = False
    while not child.ended():
        watch.look()
        select.select([wake], [], [], WATCH_SECONDS)
        for arrived in _drain(wake):
            if arrived in (signal.SIGTERM, signal.SIGINT) and not passed_on:
                passed_on = True
                _try_note(run_dir, "signal", signal=arrived, by="supervisor", sent=send_signal(trainer, arrived))
    seconds = time.monotonic() - clock
    orphans = _sweep(run_dir, pid, run_id)
    code, usage = child.reap()
    unit = 1 if sys.platform == "darwin" else 1024
    record: dict[str, object] = {
        "run": run_id,
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "stall": watch.ended,
        "wrote": _size(run_dir / "events.jsonl") > written,
        "orphans": orphans,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "max_rss_bytes": usage.ru_maxrss * unit,
    }
    _end(run_dir, record, started, seconds)


class Watch:
    """Whether the trainer makes progress, by the lines that it appends to its stream.

    The clock counts only what was watched: neither a clock that is set nor a machine or a supervisor that slept makes a
    stall. `ended`: the stall for which the trainer was asked to end; None while it was not. `written`: so many bytes of
    the stream are those of earlier attempts.
    """

    def __init__(self, order: Order, trainer: Identity, written: int) -> None:
        self.ended: dict[str, object] | None = None
        self._order, self._trainer = order, trainer
        self._phase = "start"
        self._budget: float | None = None
        self._steps, self._step_seconds = 0, 0.0
        self._waited, self._looked, self._due, self._beats = 0.0, time.monotonic(), 0.0, 0
        self._stall: dict[str, object] | None = None
        self._kill_at = math.inf
        self._offset = written

    def look(self) -> None:
        """Reads what is new, judges it, and says that we live."""
        now = time.monotonic()
        self._waited += min(now - self._looked, 2 * WATCH_SECONDS)
        self._looked = now
        with contextlib.suppress(OSError):  # Not there yet, or a disk in trouble.
            self._read()
        self._judge()
        if now >= self._due:
            self._due = now + BEAT_SECONDS
            with contextlib.suppress(OSError):
                self._beat(now)

    def _read(self) -> None:
        descriptor = open_regular(self._order.run_dir / "events.jsonl", os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self._offset = min(self._offset, os.fstat(descriptor).st_size)  # A torn line was cut off.
            while data := os.pread(descriptor, _PIECE_BYTES, self._offset):
                end = data.rfind(b"\n") + 1
                if not end and len(data) < _PIECE_BYTES:
                    return
                self._offset += end or len(data)
                for line in _PROGRESS.finditer(data, 0, end):
                    self._progress(line[0], line[1])
        finally:
            os.close(descriptor)

    def _progress(self, line: bytes, kind: bytes) -> None:
        self._waited = 0.0
        if kind not in (b"phase", b"step"):
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        if kind == b"phase":
            self._phase, self._steps = str(event.get("name"))[:80], 0
            budget = event.get("budget_seconds")
            self._budget = budget if isinstance(budget, int | float) else None
        elif isinstance(event.get("seconds"), int | float):
            self._steps, self._step_seconds = self._steps + 1, event["seconds"]

    def _allowed(self) -> float:
        """Seconds that may pass without progress. The first step may compile, and tells nothing of those after it."""
        if self._budget is not None:
            return self._budget
        mean = STALL_FACTOR * self._step_seconds if self._steps > 1 else 0.0
        return max(self._order.stall_seconds, mean)

    def _judge(self) -> None:
        run_dir, seconds, allowed = self._order.run_dir, round(self._waited, 1), self._allowed()
        if self._waited <= allowed:
            if self._stall is not None:
                _try_note(run_dir, "recovered", phase=self._phase, stall=self._stall)
                self._stall, self._due = None, 0.0
        elif self._stall is None:
            row = read_process(self._trainer["pid"])
            self._stall = {
                "phase": self._phase,
                "since": time.time() - self._waited,
                "allowed_seconds": allowed,
                "process": row.state if row else "",
                "stacks": dump_stacks(self._trainer),
            }
            _try_note(run_dir, "stall", seconds=seconds, **self._stall)
            self._due = 0.0
        elif self._order.kill_after is not None and self._waited > allowed + self._order.kill_after:
            if self.ended is None:
                self.ended = {"phase": self._phase, "seconds": seconds}
                self._kill_at = self._waited + STALL_GRACE_SECONDS
                _try_note(run_dir, "signal", signal=int(signal.SIGTERM), by="stall")
                send_signal(self._trainer, signal.SIGTERM)
            elif self._waited > self._kill_at:
                self._kill_at = math.inf
                _try_note(run_dir, "signal", signal=int(signal.SIGKILL), by="stall")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._trainer["pid"], signal.SIGKILL)  # Not reaped yet, so the pid is still its own.

    def _beat(self, now: float) -> None:
        self._beats += 1
        beat = {"v": 1, "run": self._order.run, "beat": self._beats, "t": time.time(), "monotonic": now}
        seen = {"boot_id": boot_id(), "phase": self._phase, "waited_seconds": round(self._waited, 1)}
        line = json.dumps({**beat, **seen, "stall": self._stall, **usage(self._trainer["pid"])}).encode()
        descriptor = open_regular(self._order.run_dir / HEARTBEAT, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, line.ljust(_HEARTBEAT_BYTES - 1) + b"\n", 0)
        finally:
            os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _drain(wake: int) -> bytes:
    try:
        return os.read(wake, 4096)
    except BlockingIOError:
        return b""


class _Child:
    """The trainer as our child. Where the platform allows it stays a zombie until `reap`, and its pid its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._reaped: tuple[int, resource.struct_rusage] | None = None

    def ended(self) -> bool:
        if not hasattr(os, "waitid"):
            pid, wait_status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._reaped = os.waitstatus_to_exitcode(wait_status), usage
            return bool(pid)
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid == self.pid:
                return True
            os.waitpid(found.si_pid, 0)
        return False

    def reap(self) -> tuple[int, resource.struct_rusage]:
        """Exit code (minus the signal's number when one ended it) and resource use."""
        if self._reaped is None:
            _, wait_status, usage = os.wait4(self.pid, 0)
            self._reaped = os.waitstatus_to_exitcode(wait_status), usage
        return self._reaped


def _leftovers(trainer_pid: int) -> list[Process]:
    """What the ended trainer left behind: its group, and whatever descends from us. Dead children are reaped."""
    table = scan()
    found, heirs = [], _heirs(table, os.getpid())
    for row in table:
        if row.pid in (trainer_pid, os.getpid()) or not (row.pid in heirs or row.group == trainer_pid):
            continue
        if not row.gone:
            found.append(row)
        elif row.parent == os.getpid():
            os.waitpid(row.pid, os.WNOHANG)
    return found


def _heirs(table: list[Process], pid: int) -> set[int]:
    """A process and whatever descends from it."""
    heirs = {pid}
    grew = True
    while grew:
        size = len(heirs)
        heirs.update(row.pid for row in table if row.parent in heirs)
        grew = len(heirs) > size
    return heirs


def _sweep(run_dir: Path, trainer_pid: int, run_id: str) -> list[dict[str, object]]:
    """Names what the trainer left behind and ends it: SIGTERM, and SIGKILL after the grace."""
    begin = time.monotonic()
    named: dict[tuple[int, int], dict[str, object]] = {}
    while left := _leftovers(trainer_pid):
        elapsed = time.monotonic() - begin
        if elapsed > UNKILLABLE_SECONDS:
            _try_note(run_dir, "unkillable", pids=[row.pid for row in left])
            break
        for row in left if elapsed > SETTLE_SECONDS else ():
            process = Identity(pid=row.pid, start_ticks=row.start_ticks, boot_id=boot_id(), run=run_id)
            entry = named.get((row.pid, row.start_ticks))
            if entry is None:
                entry = {"pid": row.pid, "start_ticks": row.start_ticks, "name": row.name, "signal": signal.SIGTERM}
                named[row.pid, row.start_ticks] = entry
                _try_note(run_dir, "orphans", orphans=[entry])
                send_signal(process, signal.SIGTERM)
            elif elapsed > SETTLE_SECONDS + ORPHAN_GRACE_SECONDS:
                entry["signal"] = signal.SIGKILL
                send_signal(process, signal.SIGKILL)
        time.sleep(0.02)
    return list(named.values())


def _end(run_dir: Path, record: Mapping[str, object], started: float, seconds: float) -> None:
    """Writes exit.json, the very last thing that is written to a run directory; a full disk is waited out."""
    with contextlib.suppress(OSError):
        (run_dir / HEARTBEAT).unlink()
    whole = {"v": 1, **record, "started": started, "ended": started + seconds, "seconds": seconds}
    _try_note(run_dir, "exited", **{name: value for name, value in whole.items() if name != "v"})
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return write_atomic(run_dir / "exit.json", json.dumps(whole).encode() + b"\n")
        except FileNotFoundError:
            return None  # The directory was deleted.
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


# stop


def stop(run_dir: Path, grace: float, kill: bool) -> dict[str, object]:
    """SIGTERM to the trainer's leader, then waits for the end; with `kill` SIGKILL to its group after the grace.

    The trainer takes a second SIGTERM for "at once, without a checkpoint". So one that was asked before is only waited
    for: whoever lost the connection may ask again. Without a grace it gets the second one.

    Returns:
        The status, with `result` stopped, already_ended or still_running, and `killed`; of a run that had a GPU also
        `gpu`, `gpu_free` (None: nobody can tell) and, in words, `gpu_problem`.
    """
    deadline = time.monotonic() + grace
    now = status(run_dir)
    while now["state"] == "starting":
        if now["supervisor"] is None:
            raise Refused(f"{run_dir}: was never started")
        if time.monotonic() > deadline:
            raise Refused(f"{run_dir}: is still being started")
        time.sleep(0.02)
        now = status(run_dir)
    _, trainer, session, gpu, asked = read_start(run_dir)
    if now["state"] != "running":
        return {**now, "result": "already_ended", "killed": False, **_gpu_after(now, gpu, trainer, [])}
    assert trainer is not None
    processes = [*_group(trainer, session), *_descendants(trainer)]
    if alive(trainer) and not (asked and grace):
        _try_note(run_dir, "signal", signal=int(signal.SIGTERM), by="stop")
        send_signal(trainer, signal.SIGTERM)
    now = _await_end(run_dir, deadline)
    killed = kill and now["state"] == "running"
    if killed:
        if dump_stacks(trainer):
            time.sleep(STACKS_SECONDS)
        _try_note(run_dir, "signal", signal=int(signal.SIGKILL), by="stop")
        deadline = time.monotonic() + KILL_SECONDS
        # A group is killed one verified process after another, again until none is left: a fork may slip through once.
        while time.monotonic() < deadline and (group := _group(trainer, session)):
            for row in group:
                same = Identity(pid=row.pid, start_ticks=row.start_ticks, boot_id=boot_id(), run=trainer["run"])
                send_signal(same, signal.SIGKILL)
            time.sleep(0.02)
        now = _await_end(run_dir, deadline)
    result = "still_running" if now["state"] == "running" else "stopped"
    return {**now, "result": result, "killed": killed, **_gpu_after(now, gpu, trainer, processes)}


def _gpu_after(
    now: Mapping[str, object], gpu: str | None, trainer: Identity | None, processes: list[Process]
) -> dict[str, object]:
    """What a stop says of the run's GPU."""
    if gpu is None or trainer is None:
        return {"gpu": gpu, "gpu_free": None}
    if now["state"] == "running":
        return {"gpu": gpu, "gpu_free": False, "gpu_problem": "the run goes on"}
    pids = {trainer["pid"]: trainer["start_ticks"], **{row.pid: row.start_ticks for row in processes}}
    record = now["exit"]
    for orphan in record.get("orphans", []) if isinstance(record, dict) else []:
        pids[orphan["pid"]] = orphan["start_ticks"]
    free, problem = gpu_let_go(gpu, trainer["run"], pids)
    return {"gpu": gpu, "gpu_free": free, "gpu_problem": problem}


def _group(trainer: Identity, session: int) -> list[Process]:
    rows = (row for row in scan() if row.group == trainer["pid"] and not row.gone)
    return [row for row in rows if row.session in (0, session)] if trainer["boot_id"] == boot_id() else []


def _descendants(trainer: Identity) -> list[Process]:
    """What a trainer that lives has started; with several devices each trains in a session of its own."""
    table = scan()
    heirs = _heirs(table, trainer["pid"])
    return [row for row in table if row.pid in heirs] if alive(trainer) else []


def _await_end(run_dir: Path, deadline: float) -> dict[str, object]:
    while (now := status(run_dir))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def _variables(raw: bytes) -> dict[str, str]:
    """Variables from standard input, where no other user of the host can read them.

    Raises:
        Refused: they are no JSON object of texts.
    """
    try:
        value = json.loads(raw[: MAX_RECORD_BYTES + 1])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(each, str) and "\0" not in each for each in value.values()):
        raise Refused("--environment: expected a JSON object of texts on standard input")
    return value


def main(arguments: Sequence[str]) -> int:
    """The command line. Exit codes: 0, 1 (cannot be done, one line on standard error), 4 (still running)."""
    given = list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="supervisor")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "status", "stop"):
        commands.add_parser(name).add_argument("run_dir", type=Path)
    runner = commands.choices["run"]
    runner.add_argument("--again", action="store_true", help="another attempt of a run that ended")
    runner.add_argument("--gpu", action="store_true", help="refuse while another run has the GPU")
    runner.add_argument("--devices", type=int, default=1, metavar="N", help="with --gpu: so many GPUs, all or none")
    runner.add_argument(
        "--environment", action="store_true", help="a JSON object of variables for the trainer is on standard input"
    )
    stopper = commands.choices["stop"]
    stopper.add_argument("--grace", type=float, default=STOP_GRACE_SECONDS, metavar="SECONDS")
    stopper.add_argument("--kill", action="store_true", help="SIGKILL after the grace")
    options = parser.parse_args(given[:cut])
    if options.command == "run" and options.devices < 1:
        parser.error("--devices: expected 1 or more")
    run_dir = Path(os.path.abspath(options.run_dir))
    try:
        if options.command == "run":
            command = given[cut + 1 :] or [sys.executable, "-P", "-m", "engine", str(run_dir)]
            variables = _variables(sys.stdin.buffer.read(MAX_RECORD_BYTES + 1)) if options.environment else {}
            answer = run(run_dir, command, options.again, options.gpu, variables, options.devices)
        elif options.command == "status":
            answer = status(run_dir)
        else:
            answer = stop(run_dir, options.grace, options.kill)
    except (Refused, OSError) as error:
        print(f"supervisor: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer), flush=True)
    return 4 if answer.get("result") == "still_running" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
