"""Whether a host is ready for a run: facts held against needs, one line a check. Touches nothing and asks nobody."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from dispatch.facts import Facts, GpuProcess, HostFacts, Named
from dispatch.versions import release, satisfies, split_requirement
from engine.errors import ExitCode
from engine.estimate import Device, Estimate
from engine.micro_batch import UNIFIED_RESERVE
from engine.text import clean

Outcome = Literal["PASS", "FAIL", "WARN", "UNKNOWN"]
Wish = Literal["auto", "cpu", "cuda", "mps"]

PYTHON: Final = (3, 11)
CLOCK_SECONDS: Final = 5.0
"""A heartbeat's interval: a clock that is further off makes times of a run look late or early."""
LOOKED_AT: Final = ("python", "torch", "packages", "device", "memory", "disk", "access", "clock", "models")
"""Checks that are told as not looked at where a host does not answer."""
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
ROOM: Final = "room"
VERSIONS: Final = "versions"

_CAPABILITIES: Final = (("10.0", "12.8"), ("9.0", "11.8"), ("8.9", "11.8"))
"""The first CUDA that has code for a compute capability, and for those above it."""
_RUN_UUID: Final = re.compile(r" \([0-9a-f-]{36}\)")
_HOLDER: Final = re.compile(r"run ([A-Za-z0-9][A-Za-z0-9._-]*) \(")


@dataclass(frozen=True, slots=True)
class Line:
    """One check. A FAIL forbids a start; one with an `override` can be forced, and is named so in the manifest."""

    name: str
    outcome: Outcome
    found: str
    wanted: str = ""
    do: str = ""
    """What to do; empty where nothing has to be done."""
    override: str | None = None


@dataclass(frozen=True, slots=True)
class Preflight:
    """Everything that was looked at before a run is started somewhere."""

    host: str | None
    """Its name in hosts.yaml; None is this machine."""
    lines: tuple[Line, ...]
    seconds: float
    facts: HostFacts | None = None
    """None where the host could not be asked."""
    next_lane: str | None = None
    """The host to think of next, where this one is not ready; nothing switches by itself."""
    reached: bool = True

    @property
    def failed(self) -> tuple[Line, ...]:
        """What forbids a start."""
        return tuple(line for line in self.lines if line.outcome == "FAIL")

    @property
    def overrides(self) -> tuple[str, ...]:
        """What would have to be forced, by name, each once."""
        return tuple(dict.fromkeys(line.override for line in self.failed if line.override))

    @property
    def forbidden(self) -> bool:
        """Something forbids a start that cannot be forced."""
        return any(line.override is None for line in self.failed)

    @property
    def ready(self) -> bool:
        """Nothing forbids a start."""
        return not self.failed

    @property
    def exit_code(self) -> ExitCode:
        """0: ready; 3: not reached; 2: something forbids a start."""
        if not self.reached:
            return ExitCode.CONNECTION
        return ExitCode.OK if self.ready else ExitCode.USAGE


@dataclass(frozen=True, slots=True)
class Material:
    """Something that a run reads: a model, data, or the engine."""

    name: str
    """The key of the configuration that names it, or `engine`."""
    path: str
    size: int
    """In bytes; 0 for what is on the host already and is only named."""
    missing: int
    """Bytes of it that are to be sent."""
    named: Named | None = None
    """What was found there, of what is on the host already."""
    weights: bool = False
    """It has to be a model's directory with weights."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run wants of its host."""

    host: str | None
    """None is this machine."""
    device: Wish = "auto"
    requirements: tuple[str, ...] = ()
    """As pip takes them, such as `torch>=2.8,<2.14`."""
    python_problem: str | None = None
    """Why the Python of its settings could not be used; facts are those of another Python then, or there are none."""
    estimate: Estimate | None = None
    no_estimate: str | None = None
    """Why there is none."""
    relief: str = ""
    """What makes the run smaller, where it has too little memory."""
    materials: tuple[Material, ...] = ()
    material_problem: str | None = None
    """Why it is not known what is to be sent."""

    @property
    def bootstrap(self) -> str:
        """The command that makes what the engine needs."""
        return "install kdconsole again with pip" if self.host is None else f"kdconsole hosts bootstrap {self.host}"


def device_of(facts: Facts, wish: Wish) -> Device:
    """What a run would train on there, as the engine resolves `auto`."""
    if wish != "auto":
        return wish
    return "cuda" if facts.gpu is not None and facts.host.torch_cuda is not None else "cpu"


def reserved(facts: Facts, wish: Wish) -> int:
    """Bytes of the host's memory that a run has to leave free: some, where it is a GPU's memory too."""
    shared = facts.host.unified_memory and wish in ("auto", "cuda")
    return (facts.host.memory_total or 0) // UNIFIED_RESERVE if shared else 0


def not_looked_at(why: str, names: Iterable[str] = LOOKED_AT) -> list[Line]:
    """Lines of what a host that does not answer could not be asked."""
    return [Line(name, "UNKNOWN", f"not looked at: {why}") for name in names]


def judge(facts: Facts | None, needs: Needs) -> list[Line]:
    """All checks of a host that was reached.

    Args:
        facts: as the host told them; None where it has no Python that could tell.
        needs: of the run.
    """
    lines = [_python(facts, needs)]
    if facts is None:
        return [*lines, *not_looked_at("no Python there that could", LOOKED_AT[1:])]
    if needs.python_problem is None:
        lines += [_torch(facts, needs), _packages(facts, needs)]
    else:
        lines += not_looked_at("belongs to the Python above", ("torch", "packages"))
    lines.append(_device(facts, needs))
    if facts.gpu is not None and needs.device in ("auto", "cuda"):
        lines += [_processes(facts), _lock(facts)]
    lines += [*_memory(facts, needs), _disk(facts, needs), _access(facts, needs)]
    if needs.host is not None:
        lines.append(_clock(facts))
    if needs.material_problem is not None:
        lines.append(Line("models", "FAIL", needs.material_problem, "to be found", "correct the configuration"))
    return [*lines, *(_material(each, needs) for each in needs.materials)]


# Python and what is installed


def _python(facts: Facts | None, needs: Needs) -> Line:
    wanted = f"{PYTHON[0]}.{PYTHON[1]} or newer"
    if needs.python_problem is not None:
        return Line("python", "FAIL", needs.python_problem, wanted, needs.bootstrap)
    assert facts is not None
    found = f"{facts.host.python}, {facts.host.executable}"
    if release(facts.host.python) < PYTHON:
        return Line("python", "FAIL", found, wanted, needs.bootstrap)
    return Line("python", "PASS", found, wanted)


def _torch(facts: Facts, needs: Needs) -> Line:
    host, wants_gpu = facts.host, needs.device in ("auto", "cuda")
    specifier = next((shown for name, shown in map(split_requirement, needs.requirements) if name == "torch"), "")
    if host.torch is None:
        return Line("torch", "FAIL", "not installed", specifier, needs.bootstrap)
    built = "for the CPU" if host.torch_cuda is None else f"for CUDA {host.torch_cuda}"
    found, driver = f"{host.torch}, built {built}, {host.arch}", host.driver_cuda
    if facts.gpu is None or not wants_gpu:
        return _in_range("torch", host.torch, found, specifier, needs)
    wanted = f"{specifier}; CUDA {driver or 'of the driver'} at most" if specifier else f"CUDA {driver} at most"
    if host.torch_cuda is None:
        at = f" (for {host.arch}: https://download.pytorch.org/whl/cu{(driver or '13.0').replace('.', '')} or older)"
        do = f"install a torch for CUDA{at} or name a Python that has one in hosts.yaml, then {needs.bootstrap}"
        return Line("torch", "FAIL", found, f"built for CUDA: the host has {facts.gpu.name}", do)
    if driver is not None and release(host.torch_cuda)[0] > release(driver)[0]:
        do = f"a newer driver, or a torch built for CUDA {release(driver)[0]}.x; then {needs.bootstrap}"
        return Line("torch", "FAIL", found, wanted, do)
    capability = facts.gpu.capability
    least = next((cuda for at, cuda in _CAPABILITIES if release(capability) >= release(at)), "0")
    if release(host.torch_cuda) < release(least):
        return Line(
            "torch", "FAIL", found, f"CUDA {least} or newer: compute capability {capability}", "install a newer torch"
        )
    line = _in_range("torch", host.torch, found, wanted, needs)
    if line.outcome != "PASS" or (driver is not None and release(host.torch_cuda) <= release(driver)):
        return line
    if driver is None:
        return Line("torch", "UNKNOWN", f"{found}; nvidia-smi does not tell the driver's CUDA", wanted)
    do = "a smoke tells whether it works; a newer driver makes it sure"
    return Line("torch", "WARN", f"{found}; the driver's is {driver}", wanted, do)


def _in_range(name: str, version: str, found: str, wanted: str, needs: Needs) -> Line:
    if satisfies(version, wanted.partition(";")[0]):
        return Line(name, "PASS", found, wanted)
    return Line(name, "FAIL", found, wanted, needs.bootstrap, VERSIONS)


def _packages(facts: Facts, needs: Needs) -> Line:
    missing, wrong, right, wanted = list[str](), list[str](), list[str](), list[str]()
    for each in needs.requirements:
        name, specifier = split_requirement(each)
        if name == "torch":
            continue
        version = facts.host.packages.get(name)
        if version is not None and satisfies(version, specifier):
            right.append(f"{name} {version}")
            continue
        wanted.append(f"{name}{specifier}")
        (missing if version is None else wrong).append(f"{name} {version or 'missing'}")
    if missing or wrong:
        override = None if missing else VERSIONS
        return Line("packages", "FAIL", ", ".join(missing + wrong), ", ".join(wanted), needs.bootstrap, override)
    if not right:
        return Line("packages", "UNKNOWN", "kdconsole's own metadata does not tell what is needed")
    return Line("packages", "PASS", ", ".join(right), "what the engine needs")


# The device


def _device(facts: Facts, needs: Needs) -> Line:
    gpu, wish = facts.gpu, needs.device
    if wish == "cpu":
        return Line("device", "PASS", f"CPU, {facts.host.cores or '?'} cores", "train.device: cpu")
    if wish == "mps":
        is_apple = facts.host.system.lower().startswith(("darwin", "macos"))
        return Line("device", "PASS" if is_apple else "FAIL", clean(facts.host.system, 80), "Apple's GPU")
    if gpu is not None:
        memory = "memory shared with the host" if facts.host.unified_memory else _gib(gpu.memory_total)
        return Line("device", "PASS", f"{gpu.name}, {memory}, driver {gpu.driver}", "a GPU")
    problem = facts.gpu_problem or "tells of none"
    if problem.startswith(VISIBLE):
        do = "name a device that is there, by `gpu` in hosts.yaml or by that variable"
        return Line("device", "FAIL", problem, "a GPU that is there", do)
    why = f"{VISIBLE} hides it" if facts.hidden else f"nvidia-smi: {problem}"
    broken = facts.gpu_problem not in (None, "not found") or (facts.gpu_nodes and not facts.hidden)
    if wish == "cuda" or broken:
        do = "see why nvidia-smi fails there; after a driver's update a reboot helps" if broken else "set train.device"
        return Line("device", "FAIL", f"no GPU; {why}", "a GPU that works", do)
    found = f"no GPU; {why}: a run trains on {facts.host.cores or '?'} CPU cores"
    if needs.host is None:
        return Line("device", "PASS", found, "CPU or GPU")
    return Line("device", "WARN", found, "a GPU", "set train.device: cpu where that is meant")


def _processes(facts: Facts) -> Line:
    if not facts.processes:
        return Line("processes", "PASS", "none on the GPU", "nobody else's")
    told = [_process(each) for each in facts.processes[:3]]
    more = len(facts.processes) - len(told)
    do = "end them or wait: they slow a run, and falsify what a smoke projects"
    return Line("processes", "WARN", "; ".join([*told, *([f"and {more} more"] if more else [])]), "nobody else's", do)


def _process(each: GpuProcess) -> str:
    owner = each.user or (f"uid {each.uid}" if each.uid is not None else "unknown owner")
    return f"pid {each.pid} of {owner}: {clean(each.command, 60)}, {_gib(each.memory)}"


def _lock(facts: Facts) -> Line:
    lock = facts.lock
    if lock is None or lock.held is None:
        return Line("lock", "UNKNOWN", "cannot be seen there; the supervisor tries it", "free")
    if not lock.held:
        return Line("lock", "PASS", "free", "free")
    holder = _HOLDER.match(lock.by or "")
    do = f"wait for its end, or kdconsole stop {holder[1]}" if holder else "wait for its end"
    by = _RUN_UUID.sub("", lock.by or "a run that is just starting")
    return Line("lock", "FAIL", f"held by {by}", "free", do)


# Room


def _memory(facts: Facts, needs: Needs) -> Iterator[Line]:
    free, total, need = facts.memory_available, facts.host.memory_total, needs.estimate
    shared, reserve = facts.host.unified_memory and needs.device in ("auto", "cuda"), reserved(facts, needs.device)
    if need is None:
        why = f"; {needs.no_estimate}" if needs.no_estimate else ""
        outcome: Outcome = "UNKNOWN" if needs.no_estimate else "PASS"
        if facts.gpu is not None and not shared and needs.device in ("auto", "cuda"):
            yield Line("GPU memory", outcome, f"{_gib(facts.gpu_free)} free{why}")
        yield Line("memory", outcome, f"{_gib(free)} free of {_gib(total)}{why}")
        return
    lower = ", or ".join(filter(None, (needs.relief, "end what uses it")))
    run = "for the run" + "".join(f" ({each})" for each in need.settled)
    if need.device_bytes:
        yield _room("GPU memory", facts.gpu_free, need.device_bytes, f"{_gib(need.device_bytes)} {run}", lower)
    wanted = f"{_gib(need.host_bytes)} {run}"
    if shared:
        wanted += f", {_gib(reserve)} kept free: shared memory that is full hangs the host"
    held = sum(each.memory or 0 for each in facts.processes) if shared else 0
    taken = f" of {_gib(total)}" + (f", {_gib(held)} held on the GPU" if held else "") if shared else ""
    yield _room("memory", free, need.host_bytes + reserve, wanted, lower, taken)


def _disk(facts: Facts, needs: Needs) -> Line:
    free = facts.base.disk.free if facts.base.disk else None
    sent = sum(each.missing for each in needs.materials)
    if needs.estimate is None and not sent:
        return Line("disk", "UNKNOWN" if needs.no_estimate else "PASS", f"{_gib(free)} free at {facts.base.path}")
    run = needs.estimate.disk_bytes if needs.estimate else 0
    wanted = f"{_gib(run)} for the run" + (f", {_gib(sent)} to be sent" if sent else "")
    where = "--evidence" if needs.host is None else "run_dir in hosts.yaml"
    do = f"make room, or choose another with {where}"
    return _room("disk", free, run + sent, wanted, do, f" at {facts.base.path}")


def _room(name: str, free: int | None, needed: int, wanted: str, do: str, more: str = "") -> Line:
    if free is None:
        return Line(name, "UNKNOWN", "the host does not tell", wanted)
    found = f"{_gib(free)} free{more}"
    return Line(name, "PASS", found, wanted) if needed <= free else Line(name, "FAIL", found, wanted, do, ROOM)


def _access(facts: Facts, needs: Needs) -> Line:
    base = facts.base
    if base.writable:
        return Line("access", "PASS", f"{base.path}: {'can be written' if base.exists else 'can be made'}", "writable")
    where = "--evidence" if needs.host is None else "run_dir in hosts.yaml"
    do = f"make it writable for uid {facts.host.uid}, or choose another with {where}"
    return Line("access", "FAIL", base.problem or f"{base.path} cannot be written", "writable", do)


def _clock(facts: Facts) -> Line:
    ahead, bound = facts.host.clock_ahead_seconds, facts.host.clock_bound_seconds
    wanted = f"within {CLOCK_SECONDS:g} s"
    if ahead is None or bound is None:
        return Line("clock", "UNKNOWN", "was not compared", wanted)
    found = f"{abs(ahead):.2f} s {'ahead' if ahead >= 0 else 'behind'}, give or take {max(bound, 0.005):.2f} s"
    if abs(ahead) + bound <= CLOCK_SECONDS:
        return Line("clock", "PASS", found, wanted)
    if abs(ahead) - bound <= CLOCK_SECONDS:
        return Line("clock", "UNKNOWN", found, wanted)
    return Line("clock", "WARN", found, wanted, "set it (timedatectl set-ntp true): a run's times are off by as much")


# Models and data


def _material(each: Material, needs: Needs) -> Line:
    if each.named is None:
        if needs.host is None:
            return Line(each.name, "PASS", f"{each.path}, {_size(each.size)}", "here")
        if not each.missing:
            return Line(each.name, "PASS", f"there already, {_size(each.size)}", "there, or sent")
        part = f" of {_size(each.size)}" if each.missing < each.size else ""
        return Line(each.name, "PASS", f"{_size(each.missing)}{part} to be sent", "there, or sent")
    found, told = each.named, f"{needs.host}:{each.named.path}"
    wanted = "a model's directory there" if each.weights else "there"
    if found.problem is not None:
        return Line(each.name, "FAIL", f"{told}: {found.problem}", wanted, "make it readable there")
    if found.kind not in ("directory", "file"):
        what = "not there" if found.kind is None else "neither file nor directory"
        return Line(each.name, "FAIL", f"{told}: {what}", wanted, "correct the path, or give one of this machine")
    lacks = [name for name, has in (("config.json", found.config), ("safetensors weights", found.weights)) if not has]
    if each.weights and lacks:
        return Line(each.name, "FAIL", f"{told}: has no {' and no '.join(lacks)}", wanted, "give a model's directory")
    size = f"{'more than ' if found.more else ''}{_size(found.bytes)}"
    return Line(each.name, "PASS", f"{told}: there, {size}", wanted)


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown memory"
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
