"""The small files beside the stream: whatever lies there is read in bounded time, and told in words."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch import manifest, runs
from dispatch.manifest import FIRST_FILES, MANIFEST, SMALL_FILES, SUMS, Manifest, RunStatus, decode, verify_sums
from dispatch.runs import RunDir
from engine.config import load_config
from engine.errors import RunError
from engine.text import clean

EVIDENCE = sorted(path.parent for path in Path(__file__).parents[2].glob(f"evidence/*/{SUMS}"))
BIDI, ESCAPE = "\u202e", "\x1b[2J"


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    """A run directory with every small file, sealed."""
    config = load_config(None, template="builtin")
    made = runs.create_run(config, evidence=tmp_path / "evidence", contract_text="falsifiers: []\n")
    for name in SMALL_FILES:
        if name not in FIRST_FILES:
            (made.path / name).write_text(f"{name}\n")
    runs.seal(made.path)
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


# Checksums


def without(names: tuple[str, ...]) -> Callable[[Path], None]:
    """Takes names out of the list of checksums."""

    def shorten(directory: Path) -> None:
        lines = (directory / SUMS).read_text().splitlines(keepends=True)
        (directory / SUMS).write_text("".join(line for line in lines if line.split()[1] not in names))

    return shorten


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_file_that_was_taken_out_of_the_checksums_is_named(made: RunDir, name: str) -> None:
    assert verify_sums(made.path) == ()
    without((name,))(made.path)
    with (made.path / name).open("a") as file:
        file.write("changed\n")
    assert verify_sums(made.path) == (f"{name}: not listed in SHA256SUMS",)


def test_an_emptied_list_of_checksums_names_every_file(made: RunDir) -> None:
    (made.path / SUMS).write_bytes(b"")
    assert verify_sums(made.path) == tuple(f"{name}: not listed in SHA256SUMS" for name in SMALL_FILES)
    (made.path / "config.yaml").unlink()
    assert verify_sums(made.path)[0] == "config.yaml: missing, and not listed in SHA256SUMS"


def test_a_list_of_other_files_does_not_stand_for_those_of_the_run(made: RunDir) -> None:
    (made.path / "other").write_text("x")
    (made.path / SUMS).write_text(f"{manifest.sha256_file(made.path / 'other')}  other\n")
    assert len(verify_sums(made.path)) == len(SMALL_FILES)


def test_what_a_run_never_came_to_write_need_not_be_listed(made: RunDir) -> None:
    for name in ("events.jsonl", "exit.json"):  # lost before its trainer wrote a line
        (made.path / name).unlink()
    runs.seal(made.path)
    assert verify_sums(made.path) == ()
    (made.path / "exit.json").write_text("{}")
    assert verify_sums(made.path) == ("exit.json: not listed in SHA256SUMS",)


@pytest.mark.parametrize("prefix", ["./", ".//"])
def test_a_listed_name_may_begin_at_the_directory(made: RunDir, prefix: str) -> None:
    text = (made.path / SUMS).read_text()
    (made.path / SUMS).write_text(text.replace("  ", f"  {prefix}"))
    assert verify_sums(made.path) == ()


@pytest.mark.parametrize("name", ["nul\0", "x" * 5_000, "\x1b[2J"])
def test_a_name_that_no_file_can_have_is_told_in_words(made: RunDir, name: str) -> None:
    with (made.path / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    [problem] = verify_sums(made.path)
    assert problem.startswith(clean(name, 200))
    assert problem.isprintable()


@pytest.mark.parametrize("directory", EVIDENCE, ids=lambda path: path.name)
def test_the_evidence_that_is_kept_here_verifies(directory: Path) -> None:
    assert verify_sums(directory) == ()


def test_there_is_evidence_to_verify() -> None:
    assert EVIDENCE


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
@pytest.mark.parametrize("name", [MANIFEST, SUMS, "events.jsonl"])
def test_what_is_no_file_is_refused_and_not_waited_for(made: RunDir, name: str, make: Callable[[Path], None]) -> None:
    (made.path / name).unlink()
    make(made.path / name)
    if name == MANIFEST:
        with pytest.raises(RunError, match=r"dispatch\.json: .*expected a run directory"):
            manifest.read_manifest(made.path)
        assert runs.find_runs(made.path.parent) == []
    if name == SUMS:
        with pytest.raises(RunError, match=r"SHA256SUMS: .*expected the checksums of an ended run"):
            verify_sums(made.path)
    else:
        assert verify_sums(made.path) == (f"{name}: not a regular file of this directory",)


def test_an_endless_list_of_checksums_is_refused(made: RunDir) -> None:
    os.truncate(made.path / SUMS, 1 << 40)
    with pytest.raises(RunError, match="more than 1,048,576 bytes"):
        verify_sums(made.path)


def test_a_seal_over_what_is_no_file_leaves_it_out(made: RunDir) -> None:
    (made.path / "launch.log").unlink()
    os.mkfifo(made.path / "launch.log")
    runs.seal(made.path)
    assert verify_sums(made.path) == ("launch.log: not listed in SHA256SUMS",)
    shutil.rmtree(made.path)
    with pytest.raises(RunError, match="cannot write the checksums: No such file"):
        runs.seal(made.path)
