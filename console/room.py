"""Whether a run has room: the estimate of memory and disk as a table, held against what is free here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from console.command import evidence_option, mode_option
from engine.config import RunConfig, load_config
from engine.data_files import about_tokens
from engine.errors import ConfigError
from engine.estimate import Device, Estimate, Pool, Row, Shortage
from engine.formats import inspect_model_dir, resolve_builtin
from engine.micro_batch import foresee, free_host_bytes, relief
from engine.store_format import cache_directory
from engine.text import clean
from engine.vitals import Smi, proc_bytes

SCHEMA = "kdconsole.room/1"
OVERRIDE = "room"
"""How the manifest's `overrides` names a run that was started against the estimate."""

POOLS: dict[Pool, str] = {"device": "GPU memory", "host": "memory", "disk": "disk"}
"""How every front end calls them."""

_STEP = "set train.accumulation: auto or train.activation_checkpointing: true, or lower train.batch or train.sequence"
_SMI_SECONDS = 2.0
_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use; `free` is None where it shares the host's memory or does not tell."""

    name: str
    free: int | None

    @property
    def shared(self) -> bool:
        """Whether it has no memory of its own to speak of: it tells none."""
        return self.free is None


@dataclass(frozen=True)
class Free:
    """What is free on this machine, in bytes; None is not known."""

    device: int | None
    host: int | None
    disk: int | None


@dataclass(frozen=True)
class Room:
    """An estimate beside what is free."""

    estimate: Estimate
    free: Free
    evidence: Path

    @property
    def shortages(self) -> list[Shortage]:
        """The pools that have too little."""
        return self.estimate.fits(self.free.device, self.free.host, self.free.disk)


def look(config: RunConfig, evidence: Path) -> Room:
    """Estimates what a run needs and looks at what is free here; loads no weight and imports no torch.

    Args:
        config: of the run.
        evidence: where run directories live; need not be there yet.

    Raises:
        ModelError: a model directory cannot be used.
        DataError: of a preparation: there is no corpus where the configuration says.
    """
    wanted = config.student
    student = inspect_model_dir(resolve_builtin(wanted.source), "student", need_weights=not wanted.starts_random)
    teacher = None if config.teacher is None else inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
    gpu = find_gpu() if config.train.device in ("auto", "cuda") else None
    device: Device = config.train.device if config.train.device != "auto" else "cuda" if gpu else "cpu"
    shared = device == "cuda" and gpu is not None and gpu.shared
    free_device: int | None = None
    if device == "cuda" and gpu is not None:
        free_device = gpu.free
    elif device == "cuda" and not any(map(os.path.exists, _GPU_NODES)):
        free_device = 0  # asked for by name, and there is none
    needed = foresee(
        config,
        teacher,
        student,
        device=device,
        shared=shared,
        free_device=free_device,
        free_host=free_host_bytes(shared=shared),
        corpus_tokens=about_tokens(config.data) if config.mode == "prepare" else None,
    )
    return Room(needed, Free(free_device, free_memory(), free_disk(written_to(config, evidence))), evidence)


def require_room(
    config: RunConfig,
    evidence: Path,
    *,
    force: bool = False,
    show: Callable[[RenderableType], None] = lambda table: None,
) -> list[str]:
    """Refuses a run that has too little room on this machine.

    Args:
        config: of the run.
        evidence: where its directory will be.
        force: go on all the same.
        show: given the table where there is too little, forced or not.

    Returns:
        The overrides that belong in the manifest: `["room"]` where `force` made the difference, else nothing.

    Raises:
        ConfigError: there is too little room.
        ModelError: a model directory cannot be used.
        DataError: of a preparation: there is no corpus where the configuration says.
    """
    room = look(config, evidence)
    if not room.shortages:
        return []
    show(table(room))
    if force:
        return [OVERRIDE]
    raise ConfigError(
        "not enough room: " + ", ".join(map(shortage, room.shortages)),
        expected="as much as the table's rows add up to",
        do=advice(room.shortages, config) + "; --force starts it all the same",
    )


def find_gpu() -> Gpu | None:
    """What nvidia-smi says of the first visible GPU; None where there is none, or no answer within two seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return None
    which = visible.split(",")[0].strip() if visible else None
    line = Smi(_SMI_SECONDS).ask(("name", "memory.free"), which)
    name, _, free = (line or "").rpartition(",")
    if not name.strip():
        return None
    # A GPU that shares the host's memory answers "[N/A]".
    return Gpu(name.strip(), int(free) << 20 if free.strip().isdecimal() else None)


def free_memory() -> int | None:
    """Memory that new processes can have without swapping, by /proc/meminfo; None where there is no such figure."""
    return proc_bytes("/proc/meminfo", "MemAvailable")


def written_to(config: RunConfig, evidence: Path) -> Path:
    """The directory that most of what a run writes goes to: a stored teacher has its own."""
    if config.mode != "prepare" or config.teacher is None:
        return evidence
    return cache_directory(config.teacher)


def free_disk(directory: Path) -> int | None:
    """Bytes that this user can still write below a directory, which need not be there yet."""
    path = Path(os.path.abspath(directory))
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def table(room: Room) -> RenderableType:
    """The rows with how they were computed, the totals, what is free, and what is missing."""
    needed = room.estimate
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("what", style="bold")
    grid.add_column("where", no_wrap=True)
    grid.add_column("GiB", justify="right", no_wrap=True)
    grid.add_column("computed from", overflow="fold")
    for row in (*needed.memory, *needed.disk):
        grid.add_row(row.name, pool_of(needed, row), gib(row.bytes), Text(row.how))
    totals = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    totals.add_column("in all", style="bold")
    for name in ("needed GiB", "free GiB"):
        totals.add_column(name, justify="right", no_wrap=True)
    totals.add_column("")
    short = {each.where for each in room.shortages}
    for where, bytes_, free in pools(room):
        word = Text("✘ too little", style="bold red") if where in short else Text("✔" if free is not None else "")
        totals.add_row(POOLS[where], gib(bytes_), "unknown" if free is None else gib(free), word)
    notes = [Text(f"note: {note}", style="yellow") for note in needed.notes]
    title = Text(f"room for a run on {needed.device} in {needed.precision}, by {clean(str(room.evidence), 300)}")
    settled = [Text(each) for each in needed.settled]
    return Group(title, *settled, Text(""), grid, Text(""), totals, *notes)


def document(room: Room) -> dict[str, object]:
    """Everything that the table has, for programs."""
    needed = room.estimate

    def rows(each: Iterable[Row]) -> list[dict[str, object]]:
        return [{"name": r.name, "bytes": r.bytes, "where": r.where, "how": r.how} for r in each]

    return {
        "schema": SCHEMA,
        "ok": not room.shortages,
        "device": needed.device,
        "precision": needed.precision,
        "shared_memory": needed.shared,
        "memory": rows(needed.memory),
        "disk": rows(needed.disk),
        "needed_bytes": {where: bytes_ for where, bytes_, _ in pools(room)},
        "free_bytes": {where: free for where, _, free in pools(room)},
        "shortages": [{"where": s.where, "needed": s.needed, "free": s.free} for s in room.shortages],
        "notes": list(needed.notes),
        "settled": list(needed.settled),
        "evidence": str(room.evidence),
    }


def shortage(short: Shortage) -> str:
    """One pool that has too little, and by how much."""
    return f"{POOLS[short.where]}: {gib(short.needed)} GiB needed, {gib(short.free)} GiB free"


def advice(shortages: Iterable[Shortage], config: RunConfig | None = None) -> str:
    """What the operator can do about pools that have too little; empty where none has.

    Args:
        shortages: of the run.
        config: of the run, as it was given; with it nothing is advised that it has already.
    """
    short = {each.where for each in shortages}
    told = []
    if short & {"device", "host"}:
        told.append(_STEP if config is None else relief(config))
    if "disk" in short:
        told.append("make room on the disk or choose another with --evidence")
    return "; ".join(told)


def pools(room: Room) -> list[tuple[Pool, int, int | None]]:
    """Each pool that counts for this run, the bytes needed of it and those free; None is not known."""
    needed, free = room.estimate, room.free
    rest: list[tuple[Pool, int, int | None]] = [
        ("host", needed.host_bytes, free.host),
        ("disk", needed.disk_bytes, free.disk),
    ]
    return rest if needed.shared else [("device", needed.device_bytes, free.device), *rest]


def pool_of(needed: Estimate, row: Row) -> str:
    """Which pool a row takes its bytes from, in words: the host's memory where the device has none of its own."""
    return POOLS["host" if needed.shared and row.where == "device" else row.where]


def gib(size: int) -> str:
    """Bytes in GiB, small ones with enough places to be seen."""
    value = size / 2**30
    return f"{value:,.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.005 else f"{value:.4f}"


@click.command("room", short_help="Say what memory and disk a run needs, and whether they are there.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set any key, such as train.batch=8.")
@mode_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@evidence_option
def room_command(config: Path | None, sets: tuple[str, ...], mode: str | None, as_json: bool, evidence: Path) -> None:
    """Say what memory and disk a run of CONFIG needs, row by row, and whether this machine has them (exit 2 if not).

    Nothing is loaded: the figures come from config.json and the headers of the weight files. Without CONFIG the
    built-in smoke is taken.

    \b
    Examples:
      kdconsole room config.yaml
      kdconsole room config.yaml --set train.accumulation=auto
    """
    resolved = load_config(
        config, sets=sets, environ=os.environ, template=None if config else "builtin", overrides={"mode": mode}
    )
    room = look(resolved, evidence)
    if as_json:
        click.echo(json.dumps(document(room), indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        console.print(table(room))
    if room.shortages:
        raise ConfigError(
            "not enough room: " + ", ".join(map(shortage, room.shortages)), do=advice(room.shortages, resolved)
        )
