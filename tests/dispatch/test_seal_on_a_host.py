"""A run of another host is sealed from here: its weights are hashed there, and the id is the same wherever they are."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetch_rig import Afar, trained

from dispatch.fetch import Choice
from dispatch.manifest import EXIT, MANIFEST, SUMS, read_manifest
from dispatch.mirror import MirroredTransport
from dispatch.places import Reach
from dispatch.runs import RunDir, open_run
from dispatch.seal import Sealed, reopen, seal
from dispatch.sums import check_sums, read_sums
from dispatch.transport import TransportError
from tests.ssh_rig import MISSING, Rig, running_sshd

pytestmark = pytest.mark.skipif(MISSING is not None and "CI" not in os.environ, reason=str(MISSING))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_sshd(tmp_path_factory.mktemp("host")) as rig:
        yield rig.trusted()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("weights") / "run")


@pytest.fixture
def afar(rig: Rig, tmp_path: Path) -> Afar:
    return Afar.make(rig, tmp_path)


def sealed(afar: Afar, run_dir: RunDir, said: list[str] | None = None) -> Sealed:
    heard: list[str] = [] if said is None else said

    async def scenario(reach: Reach) -> Sealed:
        place = reach.place(run_dir, keep=True)
        try:
            return await seal(run_dir, place, heard.append)
        finally:
            place.close()

    return afar.use(scenario)


def test_the_id_is_the_same_before_and_after_the_weights_are_fetched(afar: Afar, weights: Path) -> None:
    made = afar.run(weights)
    found = sealed(afar, made)
    assert (found.new, found.problems) == (True, ())
    listed = read_sums(made.path).files
    there = {str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file()}
    assert there == {name for name in listed if name.startswith(("checkpoints/", "model/"))} == set(found.absent)
    assert check_sums(made.path).problems == ()
    lenient = ["sha256sum", "--check", "--strict", "--ignore-missing", SUMS]
    subprocess.run(lenient, cwd=made.path, check=True, capture_output=True)
    assert json.loads((made.path / MANIFEST).read_text())["outcome"]["exit_code"] == 0
    assert read_manifest(made.path).ran_as == read_manifest(made.path).operator  # it is one machine after all
    # What was made here is there as well.
    for name in (MANIFEST, SUMS, "events.jsonl", "launch.log", "supervisor.jsonl", EXIT):
        assert (made.path / name).read_bytes() == (afar.there(made) / name).read_bytes(), name

    fetched = afar.fetch(made, Choice(checkpoints="all", model=True))
    assert fetched.refused == ()
    after = check_sums(made.path)
    assert (after.evidence_id, after.problems) == (found.evidence_id, ())
    assert [name for name in after.absent if "ckpt-step" in name or name.startswith("model/")] == []


def test_weights_that_were_changed_on_the_way_are_found(afar: Afar, weights: Path) -> None:
    made = afar.run(weights)
    sealed(afar, made)
    shutil.copytree(weights, made.path, dirs_exist_ok=True)
    assert check_sums(made.path).problems == ()
    with (made.path / "model/model.safetensors").open("r+b") as file:
        file.write(b"X")
    assert check_sums(made.path).problems == ("model/model.safetensors: changed",)


def test_another_console_finds_the_same_evidence(afar: Afar, weights: Path, tmp_path: Path) -> None:
    made = afar.run(weights)
    other = open_run(shutil.copytree(made.path, tmp_path / "elsewhere" / made.path.name))
    one = sealed(afar, made)
    two = sealed(afar, other)
    assert (two.evidence_id, two.problems, two.new) == (one.evidence_id, (), False)
    assert (other.path / MANIFEST).read_bytes() == (made.path / MANIFEST).read_bytes()


def test_a_seal_on_the_host_that_does_not_fit_is_not_believed(afar: Afar, tmp_path: Path) -> None:
    made = afar.run()
    other = open_run(shutil.copytree(made.path, tmp_path / "elsewhere" / made.path.name))
    one = sealed(afar, made)
    with (afar.there(made) / "launch.log").open("a") as log:
        log.write("written to afterwards\n")
    two = sealed(afar, other)
    assert (two.new, two.problems) == (True, ())
    assert two.evidence_id != one.evidence_id
    assert (afar.there(made) / SUMS).read_bytes() == (made.path / SUMS).read_bytes(), "that of another was written over"


def test_all_small_files_come_here_but_links_and_a_torn_line(afar: Afar, weights: Path) -> None:
    made = afar.run(weights)
    there = afar.there(made)
    whole = (there / "events.jsonl").read_bytes()
    with (there / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"step"')
    for name in ("exit-1.json", "resume.json"):
        (there / name).write_text("{}")
    for name in ("model/link", "launch.link"):
        (there / name).symlink_to("/etc/passwd")
    [problem] = sealed(afar, made).problems
    assert problem == f"{afar.name}: model/link: symbolic link"
    listed = read_sums(made.path).files
    assert {"exit-1.json", "resume.json"} < set(listed)
    assert not any("link" in name for name in listed)
    assert not (made.path / "launch.link").exists()
    assert (made.path / "events.jsonl").read_bytes() == whole
    assert check_sums(made.path).problems == ()


def test_a_host_that_is_gone_leaves_it_to_the_next_time(afar: Afar, weights: Path) -> None:
    made = afar.run(weights)
    afar.rig.end()
    try:
        with pytest.raises(TransportError):
            sealed(afar, made)
    finally:
        afar.rig.restart()
    assert not (made.path / SUMS).exists()
    assert sealed(afar, made).new
    # Sealed it is here: nobody is asked any more.
    afar.rig.end()
    try:
        assert not sealed(afar, made).new
    finally:
        afar.rig.restart()


def test_a_console_that_was_killed_before_the_checksums_leaves_them_to_the_next(afar: Afar, weights: Path) -> None:
    made = afar.run(weights)
    found = sealed(afar, made)
    for directory in (made.path, afar.there(made)):
        (directory / SUMS).unlink()
    assert (made.path / EXIT).exists()  # everything is here, and still the host is needed
    again = sealed(afar, made)
    assert (again.new, again.evidence_id, again.absent) == (True, found.evidence_id, found.absent)


def test_a_run_that_was_resumed_is_sealed_anew(afar: Afar) -> None:
    made = afar.run()
    sealed(afar, made)
    reopen(made)
    assert not (made.path / SUMS).exists()
    assert not (made.path / EXIT).exists()
    assert read_manifest(made.path).outcome is None
    (afar.there(made) / SUMS).unlink()  # as its supervisor does when it begins another attempt
    os.rename(afar.there(made) / EXIT, afar.there(made) / "exit-1.json")
    afar.end(made)
    assert sealed(afar, made).new
    assert "exit-1.json" in read_sums(made.path).files


def test_one_console_waits_for_another_that_keeps_the_stream(afar: Afar) -> None:
    made = afar.run()

    async def scenario(reach: Reach) -> Sealed:
        transport = reach.transport(afar.name)
        held = MirroredTransport(transport, str(afar.there(made)), made.path)
        waiting = asyncio.create_task(seal(made, reach.place(made)))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        held.close()
        return await waiting

    assert afar.use(scenario).new
    assert (made.path / "events.jsonl").read_bytes() == (afar.there(made) / "events.jsonl").read_bytes()
