"""SHA256SUMS: what is listed, what is found wrong, and what may be somewhere else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatch import runs
from dispatch.manifest import FIRST_FILES, MANIFEST, SMALL_FILES, SUMS, read_manifest, sha256_file
from dispatch.runs import RunDir
from dispatch.sums import (
    check_sums,
    files_of,
    form_problem,
    is_passing,
    is_weight,
    read_sums,
    recompute,
    verify_sums,
    write_sums,
)
from engine.config import load_config
from engine.errors import RunError
from engine.text import clean

EVIDENCE = sorted(path.parent for path in Path(__file__).parents[2].glob(f"evidence/*/{SUMS}"))
WEIGHTS = ("checkpoints/LATEST", "checkpoints/ckpt-step-000010/model.safetensors", "model/model.safetensors")
NO_FILE = "not a regular file of this directory"


def listed(directory: Path) -> str:
    """Writes the checksums of what is here; returns the evidence id."""
    return write_sums(directory, {name: sha256_file(directory / name) for name in files_of(directory)[0]})


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    """A run directory with every small file, weights, and its checksums."""
    config = load_config(None, template="builtin")
    made = runs.create_run(config, evidence=tmp_path / "evidence", contract_text="falsifiers: []\n")
    for name in (*SMALL_FILES, *WEIGHTS):
        if name not in FIRST_FILES:
            (made.path / name).parent.mkdir(parents=True, exist_ok=True)
            (made.path / name).write_text(f"{name}\n")
    listed(made.path)
    return made


def without(names: tuple[str, ...]) -> Callable[[Path], None]:
    """Takes names out of the list of checksums."""

    def shorten(directory: Path) -> None:
        lines = (directory / SUMS).read_text().splitlines(keepends=True)
        (directory / SUMS).write_text("".join(line for line in lines if line.split()[1] not in names))

    return shorten


def as_version_1(directory: Path) -> None:
    """As an earlier version left a run: small files listed, weights not."""
    raw = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**raw, "v": 1}))
    write_sums(directory, {name: sha256_file(directory / name) for name in SMALL_FILES})


# What agrees


def test_every_file_is_listed_in_an_order_that_is_always_the_same(made: RunDir) -> None:
    names = [line.split("  ")[1] for line in (made.path / SUMS).read_text().splitlines()]
    assert names == [*SMALL_FILES, *sorted(WEIGHTS)]
    found = check_sums(made.path)
    assert (found.problems, found.absent) == ((), ())
    assert found.evidence_id == hashlib.sha256((made.path / SUMS).read_bytes()).hexdigest() == listed(made.path)


def test_sha256sum_reads_it_with_and_without_the_weights(made: RunDir) -> None:
    for options in ([], ["--ignore-missing"]):
        command = ["sha256sum", "--check", "--strict", *options, SUMS]
        subprocess.run(command, cwd=made.path, check=True, capture_output=True)
        shutil.rmtree(made.path / "checkpoints", ignore_errors=True)


def test_weights_that_are_not_here_are_told_apart_and_are_no_problem(made: RunDir) -> None:
    shutil.rmtree(made.path / "checkpoints")
    (made.path / "model/model.safetensors").unlink()
    found = check_sums(made.path)
    assert found.problems == ()
    assert sorted(found.absent) == sorted(WEIGHTS)


@pytest.mark.parametrize("name", ["checkpoints/ckpt-step-000010/model.safetensors", "model/model.safetensors"])
def test_weights_are_read_only_where_that_is_asked_for(made: RunDir, name: str) -> None:
    (made.path / name).write_text("others\n")
    assert check_sums(made.path, weights=False).problems == ()
    assert verify_sums(made.path) == (f"{name}: changed",)


def test_progress_is_told_of_every_byte(made: RunDir) -> None:
    told: dict[str, int] = {}
    check_sums(made.path, progress=lambda name, count: told.update({name: told.get(name, 0) + count}))
    assert told == {name: (made.path / name).stat().st_size for name in (*SMALL_FILES, *WEIGHTS)}


@pytest.mark.parametrize(
    "name",
    [
        *(".lock", ".dispatch.json.tmp", ".model.partial/model.safetensors", ".model.reference.safetensors"),
        *("checkpoints/.ckpt-step-000020.partial/model.safetensors", "model/model.safetensors.part"),
    ],
)
def test_what_is_temporary_need_not_be_listed_and_is_not(made: RunDir, name: str) -> None:
    (made.path / name).parent.mkdir(parents=True, exist_ok=True)
    (made.path / name).write_text("half")
    assert is_passing(name)
    before = (made.path / SUMS).read_text()
    assert verify_sums(made.path) == ()
    listed(made.path)
    assert (made.path / SUMS).read_text() == before


def test_what_belongs_to_the_weights() -> None:
    assert all(map(is_weight, (*WEIGHTS, "model.rejected/model.safetensors")))
    assert not any(map(is_weight, (*SMALL_FILES, "modelled", "a/model/x", "checkpoints.json")))


# What an earlier version made


@pytest.mark.parametrize("directory", EVIDENCE, ids=lambda path: path.name)
def test_the_evidence_that_is_kept_here_verifies(directory: Path) -> None:
    assert verify_sums(directory) == ()


def test_there_is_evidence_of_the_first_version_to_verify() -> None:
    assert any(read_manifest(directory).v == 1 for directory in EVIDENCE)


def test_of_a_run_of_version_1_the_weights_need_not_be_listed(made: RunDir) -> None:
    as_version_1(made.path)
    assert verify_sums(made.path) == ()
    without(("exit.json",))(made.path)
    assert verify_sums(made.path) == (f"exit.json: not listed in {SUMS}",)


def test_a_manifest_cannot_be_made_older_to_hide_a_file(made: RunDir) -> None:
    raw = json.loads((made.path / MANIFEST).read_text())
    (made.path / MANIFEST).write_text(json.dumps({**raw, "v": 1}))
    (made.path / "added").write_text("x")
    assert verify_sums(made.path) == ("dispatch.json: changed",)


# What does not agree


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_file_that_was_taken_out_of_the_checksums_is_named(made: RunDir, name: str) -> None:
    without((name,))(made.path)
    with (made.path / name).open("a") as file:
        file.write(" \n")
    assert verify_sums(made.path) == (f"{name}: not listed in {SUMS}",)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model/extra.bin", "checkpoints/ckpt-step-000010/x"])
def test_a_file_that_was_added_is_named(made: RunDir, name: str) -> None:
    (made.path / name).write_text("x")
    assert verify_sums(made.path) == (f"{name}: not listed in {SUMS}",)
    assert check_sums(made.path, weights=False).problems == (f"{name}: not listed in {SUMS}",)


def test_an_emptied_list_of_checksums_names_every_file(made: RunDir) -> None:
    (made.path / SUMS).write_bytes(b"")
    assert set(verify_sums(made.path)) == {f"{name}: not listed in {SUMS}" for name in (*SMALL_FILES, *WEIGHTS)}
    (made.path / "config.yaml").unlink()
    assert verify_sums(made.path)[0] == f"config.yaml: missing, and not listed in {SUMS}"


def test_what_a_run_never_came_to_write_need_not_be_listed(made: RunDir) -> None:
    for name in ("events.jsonl", "exit.json"):  # lost before its trainer wrote a line
        (made.path / name).unlink()
    listed(made.path)
    assert verify_sums(made.path) == ()
    (made.path / "exit.json").write_text("{}")
    assert verify_sums(made.path) == (f"exit.json: not listed in {SUMS}",)


def test_every_change_is_named(made: RunDir, tmp_path: Path) -> None:
    (made.path / "contract.yaml").write_text("falsifiers: [changed]\n")
    (made.path / "config.yaml").unlink()
    outside = tmp_path / "outside"
    outside.write_text("x")
    (made.path / "link").symlink_to(outside)
    digest = sha256_file(outside)
    with (made.path / SUMS).open("a") as file:
        file.write(f"{digest}  ../../outside\n{digest}  {outside}\n{digest}  link\nnonsense\n{digest}  contract.yaml\n")
    assert verify_sums(made.path) == (
        f"{SUMS}: line 14 is not a checksum",
        "contract.yaml: listed twice, with two hashes",
        "config.yaml: missing",
        "contract.yaml: changed",
        f"../../outside: {NO_FILE}",
        f"{outside}: {NO_FILE}",
        f"link: {NO_FILE}",
    )


def test_weights_behind_a_link_are_not_read(made: RunDir, tmp_path: Path) -> None:
    (made.path / "model").rename(tmp_path / "elsewhere")
    (made.path / "model").symlink_to(tmp_path / "elsewhere")
    assert f"model: {NO_FILE}" in verify_sums(made.path)
    assert f"model/model.safetensors: {NO_FILE}" in verify_sums(made.path)


@pytest.mark.parametrize("prefix", ["./", ".//"])
def test_a_listed_name_may_begin_at_the_directory(made: RunDir, prefix: str) -> None:
    text = (made.path / SUMS).read_text()
    (made.path / SUMS).write_text(text.replace("  ", f"  {prefix}"))
    assert verify_sums(made.path) == ()


@pytest.mark.parametrize("name", ["nul\0", "x" * 5_000, "\x1b[2J", "two\u2028lines"])
def test_a_name_that_no_file_can_have_is_told_in_words(made: RunDir, name: str) -> None:
    with (made.path / SUMS).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    [problem] = verify_sums(made.path)
    assert problem.startswith(clean(name, 200))
    assert problem.isprintable()


def test_a_file_with_a_name_that_nobody_can_print_is_a_problem_and_not_listed(made: RunDir) -> None:
    (made.path / "a\nb").write_text("x")
    Path(os.fsdecode(os.fsencode(made.path) + b"/caf\xe9")).write_text("x")
    names, odd = files_of(made.path)
    assert names == sorted([*SMALL_FILES, *WEIGHTS])
    assert odd == sorted(f"{name}: control or unreadable characters in its name" for name in ("a\\x0ab", "caf\\udce9"))
    assert set(verify_sums(made.path)) == set(odd)


def test_a_directory_without_a_list_or_with_one_that_is_none_is_refused(made: RunDir) -> None:
    (made.path / SUMS).write_bytes(b"\xff\n")
    with pytest.raises(RunError, match=r"SHA256SUMS: not UTF-8.*expected the checksums of an ended run"):
        verify_sums(made.path)
    os.truncate(made.path / SUMS, 1 << 40)
    with pytest.raises(RunError, match="more than 16,777,216 bytes"):
        verify_sums(made.path)
    (made.path / SUMS).unlink()
    with pytest.raises(RunError, match=r"SHA256SUMS: No such file.*expected the checksums of an ended run"):
        verify_sums(made.path)


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
    if name == SUMS:
        with pytest.raises(RunError, match=r"SHA256SUMS: .*expected the checksums of an ended run"):
            verify_sums(made.path)
    else:
        assert verify_sums(made.path) == (f"{name}: {NO_FILE}",)


def test_every_hash_is_computed_anew_and_what_is_not_as_listed_says_why(made: RunDir) -> None:
    assert all(
        check.stated == check.found and check.problem is None for check in recompute(made.path, read_sums(made.path))
    )
    (made.path / "launch.log").write_text("other\n")
    (made.path / "model/model.safetensors").unlink()
    (made.path / "more").write_text("")
    told = {check.name: check for check in recompute(made.path, read_sums(made.path)) if check.problem}
    assert {name: check.problem for name, check in told.items()} == {
        "launch.log": "changed",
        "model/model.safetensors": "missing",
        "more": f"not listed in {SUMS}",
    }
    assert told["launch.log"].found == hashlib.sha256(b"other\n").hexdigest()
    assert (told["more"].stated, told["more"].found) == (None, None)


def test_a_list_in_another_form_than_it_is_written_is_told(made: RunDir) -> None:
    raw = (made.path / SUMS).read_bytes()
    lines = raw.splitlines(keepends=True)
    assert form_problem(raw) is None
    for changed in (
        [*lines[1:2], lines[0], *lines[2:]],
        [*lines[:3], lines[2], *lines[3:]],
        [*lines[:-1], lines[-1].removesuffix(b"\n")],
        [lines[0].replace(b"  ", b" *"), *lines[1:]],
        [lines[0].replace(b"  ", b"  ./"), *lines[1:]],
    ):
        assert "is not as it was written" in (form_problem(b"".join(changed)) or "")
    assert "is not a checksum" in (form_problem(raw + b"?\n") or "")
