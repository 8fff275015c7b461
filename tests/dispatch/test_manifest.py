"""The small files beside the stream: whatever lies there is read in bounded time, and told in words."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch import manifest, runs
from dispatch.local_facts import local_facts
from dispatch.manifest import FIRST_FILES, MANIFEST, SMALL_FILES, Manifest, RunStatus, decode
from dispatch.runs import RunDir
from engine.config import load_config
from engine.errors import RunError
from engine.text import clean

BIDI, ESCAPE = "\u202e", "\x1b[2J"


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    """A run directory with every small file."""
    config = load_config(None, template="builtin")
    made = runs.create_run(config, evidence=tmp_path / "evidence", contract_text="falsifiers: []\n")
    for name in SMALL_FILES:
        if name not in FIRST_FILES:
            (made.path / name).write_text(f"{name}\n")
    return made


def rewritten(made: RunDir, **changes: object) -> Path:
    raw = json.loads((made.path / MANIFEST).read_text())
    (made.path / MANIFEST).write_text(json.dumps({**raw, **changes}))
    return made.path


# Decoding


@pytest.mark.parametrize("letter", ["x", "é"])
@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_deep_nesting_is_a_bad_manifest(made: RunDir, letter: str, depth: int) -> None:
    (made.path / MANIFEST).write_text(f'{{"{letter}": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(RunError, match=r"dispatch\.json: .*expected a Manifest"):
        manifest.read_manifest(made.path)
    assert runs.find_runs(made.path.parent) == []


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["v", "run", "state", "trainer", "exit", "é"]), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
)
def test_whatever_a_file_holds_it_is_a_record_or_a_run_error(raw: bytes) -> None:
    for kind in (Manifest, RunStatus):
        found: object
        try:
            found = decode(kind, raw, "file.json")
        except RunError as error:
            found = error
        assert isinstance(found, kind) or str(found).startswith("file.json: ")


@pytest.mark.parametrize("raw", [b"9" * 6_000, b'{"run": ' + b"9" * 6_000 + b', "\xc3\xa9": 1}', b'{"run": "\\ud800"}'])
def test_a_number_or_a_text_that_cannot_be_is_a_run_error(raw: bytes) -> None:
    with pytest.raises(RunError, match="file: "):
        decode(RunStatus, raw, "file")


def test_every_text_of_a_manifest_is_cleaned_when_it_is_read(made: RunDir) -> None:
    host = json.loads((made.path / MANIFEST).read_text())["host"]
    dirty = f"a{ESCAPE}b{BIDI}c"
    path = rewritten(
        made,
        name=dirty,
        mode=dirty,
        overrides=[dirty],
        created=dirty,
        versions={dirty: dirty, "torch": None},
        host={**host, "hostname": dirty, "platform": dirty},
    )
    read, shown = manifest.read_manifest(path), "a\\x1b[2Jb\\u202ec"
    assert (read.name, read.mode, read.overrides, read.created) == (shown, shown, [shown], shown)
    assert (read.host.hostname, read.host.platform, read.host.cpus) == (shown, shown, made.manifest.host.cpus)
    assert read.versions == {shown: shown, "torch": None}


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), st.booleans())
def test_a_text_is_clean_however_json_spells_it(text: str, ascii_only: bool) -> None:
    raw = json.dumps({"state": "lost", "run": text}, ensure_ascii=ascii_only).encode()
    assert decode(RunStatus, raw, "x").run == clean(text)


def test_a_name_is_cleaned_and_cut_before_it_is_written(tmp_path: Path) -> None:
    config = load_config(None, template="builtin")
    made = runs.create_run(config, evidence=tmp_path, contract_text="", name=ESCAPE + "x" * 3_000_000)
    assert made.manifest.name is not None
    assert made.manifest.name.startswith("\\x1b[2Jxxx")
    assert len(made.manifest.name) == manifest.MAX_NAME
    assert runs.find_runs(tmp_path) == [made]


# What is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may be 107 characters long
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [fifo, unix_socket, Path.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(made: RunDir, make: Callable[[Path], None]) -> None:
    (made.path / MANIFEST).unlink()
    make(made.path / MANIFEST)
    with pytest.raises(RunError, match=r"dispatch\.json: .*expected a run directory"):
        manifest.read_manifest(made.path)
    assert runs.find_runs(made.path.parent) == []


# The machine


def test_what_is_known_of_this_machine_is_what_it_says_itself() -> None:
    found = local_facts()
    assert (found.hostname, found.arch, found.uid) == (socket.gethostname(), platform.machine(), os.getuid())
    assert found.memory_total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.torch == metadata.version("torch")


@pytest.mark.parametrize(
    "module", ["NVIDIA UNIX x86_64 Kernel Module  580.95.05", "NVIDIA UNIX Open Kernel Module for aarch64  580.95.05"]
)
def test_gpus_are_read_from_the_files_of_their_driver(tmp_path: Path, module: str) -> None:
    (tmp_path / "version").write_text(f"NVRM version: {module}  Tue Sep 23 10:11:16 UTC 2025\nGCC version:  gcc 13\n")
    for number in (0, 1):
        (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
        (tmp_path / "gpus" / f"0000:0{number}:00.0" / "information").write_text(
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18\nGPU UUID: \t GPU-0000-{number}\nBus Type: \t PCIe\n"
        )
    devices = local_facts(tmp_path).devices
    assert [(each.index, each.uuid) for each in devices] == [(0, "GPU-0000-0"), (1, "GPU-0000-1")]
    assert {(each.name, each.driver) for each in devices} == {("NVIDIA H100 80GB HBM3", "580.95.05")}
    assert local_facts(tmp_path / "nowhere").devices == ()
