"""The hosts that runs are sent to: one optional YAML file over the user's own ssh_config.

What ssh_config says of a name (HostName, Port, User, IdentityFile, ProxyJump) holds here too; the file adds what SSH
does not know: where runs live on the host, which Python runs them, which variables they may be given, and in which
order hosts are thought of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final

import msgspec
import msgspec.inspect
from msgspec import UNSET, Meta, UnsetType

from dispatch.supervisor import write_atomic
from engine.config import ConfigProblems
from engine.errors import ConfigError
from engine.schema import Source, Walker, key_paths, show
from engine.text import clean
from engine.yaml_io import dump_yaml, join, parse_document, read_text

VARIABLE: Final = "KDCONSOLE_HOSTS"
"""Names the file; without it, it is where the platform keeps such files."""
DEFAULT_RUN_DIR: Final = "~/kdconsole"
BOOTSTRAPPED_PYTHON: Final = "venv/bin/python"
"""Below the run directory: the Python that `kdconsole hosts bootstrap` makes there, used where none is named."""
NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

# No address, user or path begins with a dash: some program, some day, would take it for an option.
_Address = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9\[:_][A-Za-z0-9._:%\]-]*$", max_length=255, description="an address")
]
_User = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._@\\-]*$", max_length=128, description="a user name")]
_Port = Annotated[int, Meta(ge=1, le=65535)]
_Local = Annotated[str, Meta(pattern=r"^[^-]", max_length=4096, description="a file on this machine")]
_Remote = Annotated[
    str, Meta(pattern=r"^(/|~/).*[^/]$", max_length=4096, description="a path on the host that begins with / or ~/")
]
_Program = Annotated[
    str,
    Meta(
        pattern=r"^((/|~/).*[^/]|[A-Za-z0-9._][A-Za-z0-9._+-]*)$",
        max_length=4096,
        description="a program's name or whole path",
    ),
]
_Variable = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128, description="a variable's name")]
_Gpu = Annotated[int, Meta(ge=0, le=1023)]


class _Entry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the file says of a host; nothing of it is needed."""

    address: _Address | UnsetType = UNSET
    port: _Port | UnsetType = UNSET
    user: _User | UnsetType = UNSET
    identity: _Local | UnsetType = UNSET
    python: _Program | UnsetType = UNSET
    run_dir: _Remote = DEFAULT_RUN_DIR
    env: list[_Variable] = []
    gpu: _Gpu | UnsetType = UNSET


class _File(msgspec.Struct, kw_only=True):
    """The file's schema; `hosts` is checked entry by entry, for names are no fields."""

    hosts: dict[str, object] = {}
    lanes: list[str] = []


@dataclass(frozen=True, slots=True)
class Host:
    """How a host is reached and what is used there; None where ssh_config decides."""

    name: str
    address: str | None = None
    port: int | None = None
    user: str | None = None
    identity: Path | None = None
    python: str = ""
    """A path that begins with / or ~/, or a program's name; empty: the one below the run directory."""
    run_dir: str = DEFAULT_RUN_DIR
    """Where runs, engines and models are kept there; begins with / or ~/."""
    env: tuple[str, ...] = ()
    """Variables of this machine that a run there is given, by name."""
    gpu: int | None = None
    """The index of the device to use; None takes what the engine takes."""

    def __post_init__(self) -> None:
        if not self.python:
            object.__setattr__(self, "python", f"{self.run_dir}/{BOOTSTRAPPED_PYTHON}")

    @property
    def endpoint(self) -> str:
        """What the name or address is that SSH is asked for."""
        return self.address or self.name


@dataclass(frozen=True, slots=True)
class Hosts:
    """All hosts of the file, and the order in which they are thought of."""

    path: Path
    known: Mapping[str, Host]
    lanes: tuple[str, ...] = ()

    def named(self, name: str) -> Host:
        """The host of this name; one that only ssh_config may know gets the defaults.

        Raises:
            ConfigError: it can be no host's name.
        """
        if name in self.known:
            return self.known[name]
        check_name(name)
        return Host(name)

    def next_lane(self, name: str) -> str | None:
        """The host after this one in the lanes, None at their end."""
        after = self.lanes[self.lanes.index(name) + 1 :] if name in self.lanes else self.lanes
        return next((each for each in after if each != name), None)


def check_name(name: str) -> None:
    """Refuses what can be no host's name.

    Raises:
        ConfigError: it begins with a dash, or has characters that no host's name has.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"host {show(name)}: no host's name",
            expected="letters, digits, dots, dashes and underscores, beginning with a letter or digit",
        )


def home_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's home directory on this machine."""
    return Path(environ.get("HOME") or Path.home())


def config_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of the hosts' file and of the host keys that were trusted."""
    if environ.get(VARIABLE):
        return Path(os.path.abspath(environ[VARIABLE])).parent
    from platformdirs import user_config_path

    return user_config_path("kdconsole")


def hosts_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the file is, whether or not there is one."""
    return Path(os.path.abspath(environ[VARIABLE])) if environ.get(VARIABLE) else config_dir(environ) / "hosts.yaml"


def load_hosts(environ: Mapping[str, str] = os.environ) -> Hosts:
    """The hosts of the user's file; none where there is no file.

    Raises:
        ConfigError: it cannot be read; `ConfigProblems` names all that is wrong in it.
    """
    path = hosts_path(environ)
    text = _read(path)
    return Hosts(path, {}) if text is None else parse_hosts(text, path, environ)


def _read(path: Path) -> str | None:
    """The file's text, None without a file."""
    name = clean(str(path), 300)
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{name}: a link to a file that is not there") from None
        return None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{name}: no regular file", expected="a YAML file")
    return read_text(path)


def parse_hosts(text: str, path: Path, environ: Mapping[str, str] = os.environ) -> Hosts:
    """The hosts of a YAML text.

    Raises:
        ConfigError: it is no YAML mapping; `ConfigProblems`: everything else that is wrong.
    """
    document = parse_document(text, str(path))
    name = clean(str(path), 300)
    if document.value is None:
        return Hosts(path, {})
    if not isinstance(document.value, dict):
        raise ConfigError(f"{name}: {show(document.value)} at the top", expected="a mapping with `hosts:`")
    source = _Lined(name, path.parent, lines=document.lines)
    entry, file = msgspec.inspect.type_info(_Entry), msgspec.inspect.type_info(_File)
    walker = Walker(lambda _: source, (*key_paths(file), *key_paths(entry)))
    tree: dict[str, object] = dict(document.value)
    given = tree.pop("hosts", None)
    walker.check(tree, file)
    if given is not None and not isinstance(given, dict):
        walker.add("hosts", f"{show(given)}: expected a mapping of names, such as `gx10:`")
    hosts: dict[str, object] = given if isinstance(given, dict) else {}
    for host, value in hosts.items():
        place = join("hosts", host)
        if not re.fullmatch(NAME, host):
            walker.add(place, "no host's name; expected letters, digits, dots, dashes and underscores")
        walker.check({} if value is None else value, entry, place)
        identity = value.get("identity") if isinstance(value, dict) else None
        if isinstance(identity, str) and identity.startswith("~") and not identity.startswith("~/"):
            walker.add(join(place, "identity"), f"{show(identity)}: expected an absolute path, or one that begins ~/")
    _check_lanes(tree.get("lanes"), list(hosts), walker)
    if walker.problems:
        raise ConfigProblems(walker.problems)
    lanes = msgspec.convert(tree, _File).lanes
    entries = {host: msgspec.convert({} if value is None else value, _Entry) for host, value in hosts.items()}
    home = home_dir(environ)
    return Hosts(path, {host: _host(host, entry, path.parent, home) for host, entry in entries.items()}, tuple(lanes))


class _Lined(Source):
    """Says the line as well: this file is written by hand."""

    def name(self, path: str) -> str:
        """See `Source.name`."""
        line = self.lines.get(path)
        return f"{self.label}: {'' if line is None else f'line {line}: '}{clean(path, 200)}"


def _check_lanes(lanes: object, names: list[str], walker: Walker) -> None:
    seen: list[str] = []
    for index, lane in enumerate(lanes if isinstance(lanes, list) else ()):
        place = f"lanes[{index}]"
        if not isinstance(lane, str):
            continue  # which the walker said
        if lane not in names:
            near = get_close_matches(lane[:64], names, n=1)
            hint = f"did you mean {near[0]}?" if near else "expected one that stands below `hosts:`"
            walker.add(place, f"{show(lane)}: no such host; {hint}")
        elif lane in seen:
            walker.add(place, f"{show(lane)}: given twice")
        seen.append(lane)


def _host(name: str, entry: _Entry, base: Path, home: Path) -> Host:
    identity = None
    if entry.identity is not UNSET:
        identity = home / entry.identity[2:] if entry.identity.startswith("~/") else base / entry.identity
        identity = Path(os.path.abspath(identity))
    return Host(
        name,
        address=None if entry.address is UNSET else entry.address,
        port=None if entry.port is UNSET else entry.port,
        user=None if entry.user is UNSET else entry.user,
        identity=identity,
        python="" if entry.python is UNSET else entry.python,
        run_dir=entry.run_dir,
        env=tuple(entry.env),
        gpu=None if entry.gpu is UNSET else entry.gpu,
    )


def add_host(name: str, given: Mapping[str, object], environ: Mapping[str, str] = os.environ) -> Hosts:
    """Writes a new host into the file, whose other lines and comments stay as they are. Returns what it says now.

    Args:
        name: of a host that the file does not have yet.
        given: keys of the file and their values; those that are None are left out.
        environ: says where the file is.

    Raises:
        ConfigError: the name is taken, something given is wrong, or the file cannot be written.
    """
    check_name(name)
    path = hosts_path(environ)
    shown = clean(str(path), 300)
    block = {key: value for key, value in given.items() if value is not None}
    _check_entry(name, block)
    try:
        with _only_one(path.parent):
            before = load_hosts(environ)
            if name in before.known:
                raise ConfigError(f"{shown}: has a host {name} already", do="change it there")
            text = _with_entry(_read(path) or "", name, block)
            after = _parsed(text, path, environ)
            if (
                after is None
                or {**after.known} != {**before.known, name: after.known.get(name)}
                or after.lanes != before.lanes
            ):
                raise ConfigError(
                    f"{shown}: written in a way that cannot be added to",
                    do=f"put this below its `hosts:` by hand:\n{dump_yaml({name: block})}",
                )
            # Where the file is a link, what it leads to is written.
            write_atomic(Path(os.path.realpath(path)), text.encode())
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be written: {error.strerror}") from None
    return after


def _check_entry(name: str, block: Mapping[str, object]) -> None:
    source = Source(f"host {name}", Path("/"))
    entry = msgspec.inspect.type_info(_Entry)
    walker = Walker(lambda _: source, tuple(key_paths(entry)))
    walker.check(dict(block), entry)
    if walker.problems:
        raise ConfigProblems(walker.problems)


def _parsed(text: str, path: Path, environ: Mapping[str, str]) -> Hosts | None:
    try:
        return parse_hosts(text, path, environ)
    except ConfigError:
        return None


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Keeps others from adding at the same time."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _with_entry(text: str, name: str, block: Mapping[str, object]) -> str:
    """The file's text with one more host, the last of them; its indentation is that of the others."""
    ending = "\r\n" if "\r\n" in text else "\n"
    if text and not text.endswith("\n"):
        text += ending
    lines = text.split("\n")[:-1]  # not splitlines: a quoted text may hold what that would take for an end of line
    at = next((index for index, line in enumerate(lines) if re.match(r"hosts:\s*({\s*}\s*)?(#.*)?$", line)), None)
    if at is None:
        return text + "".join(line + ending for line in ("hosts:", *_indented({name: block}, 2)))
    lines[at] = re.sub(r"^hosts:\s*{\s*}", "hosts:", lines[at])
    end = at + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith((" ", "#"))):
        end += 1
    while end > at + 1 and not lines[end - 1].startswith(" "):
        end -= 1  # comments and empty lines before the next key belong to it
    first = next((line for line in lines[at + 1 : end] if line.strip() and not line.lstrip().startswith("#")), "  ")
    new = _indented({name: block}, len(first) - len(first.lstrip(" ")))
    return "".join(f"{line}\n" for line in (*lines[:end], *(line + ending[:-1] for line in new), *lines[end:]))


def _indented(data: object, spaces: int) -> list[str]:
    return [" " * spaces + line for line in dump_yaml(data).splitlines()]
