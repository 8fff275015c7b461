"""Checkpoints: what stands on disk, what is refused, what is kept, and that training goes on bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import checkpoint_rig
import pytest
import torch
from checkpoint_rig import RUN, Rig
from safetensors.torch import load_file

from engine import checkpoint_writer, durable
from engine.checkpoint import (
    CheckpointError,
    Kind,
    Manifest,
    State,
    committed,
    encode_manifest,
    find_latest,
    read_manifest,
    verify,
)
from engine.human import human_lines
from engine.retention import retained
from engine.snapshot import Snapshot, load
from engine.stream import Checkpoint, CheckpointFailed, Event, decode_line, encode

FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def forge(path: Path, **changes: Any) -> None:
    """Rewrites a manifest with a correct digest: what a wrong writer, not a wrong bit, would leave."""
    manifest = read_manifest(path)
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__} | changes
    (path / "manifest.json").write_bytes(encode_manifest(Manifest(**fields)))


@pytest.mark.slow
def test_training_resumed_in_a_fresh_process_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = Rig(tmp_path / "whole")
    whole.train(10)
    expected = whole.digest()
    first = Rig(tmp_path / "split")
    first.run_dir.mkdir()
    first.saved(5)
    done = subprocess.run(
        [sys.executable, checkpoint_rig.__file__, str(first.run_dir), "5"], capture_output=True, text=True, check=True
    )
    second = json.loads(done.stdout)
    assert second["step"] == 10
    assert first.losses + second["losses"] == whole.losses
    assert second["digest"] == expected


def test_a_checkpoint_from_before_the_first_step_resumes_as_a_fresh_start(tmp_path: Path) -> None:
    whole = Rig(tmp_path)
    whole.train(3)
    expected = whole.digest()
    Rig(tmp_path).saved(0, "interrupt")
    resumed = Rig(tmp_path, seed=5)
    resumed.resume()
    resumed.train(3)
    assert resumed.digest() == expected


def test_what_is_stored_is_what_is_in_memory_and_safetensors_reads_it(rig: Rig) -> None:
    path = rig.saved(2)
    weights, rest = load_file(path / FILES[0]), load_file(path / FILES[1])
    parameters = dict(rig.model.named_parameters())
    assert weights.keys() == parameters.keys()
    assert "head.weight" not in weights, "a tied head is stored once"
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in weights.items())
    assert torch.equal(rest["exp_avg/mid.weight"], rig.optimizer.state[rig.model.mid.weight]["exp_avg"])
    assert {"buffer/drift", "buffer/norm.num_batches_tracked", "step/mid.bias", "exp_avg_sq/norm.bias"} <= rest.keys()
    manifest = verify(path, RUN)
    assert manifest.tensors == len(weights) + len(rest)
    assert manifest.bytes == sum((path / name).stat().st_size for name in FILES[:2])
    assert {(path / name).stat().st_mode & 0o777 for name in FILES} == {0o600}


def test_the_model_alone_is_restored_without_touching_random_state(rig: Rig) -> None:
    path = rig.saved(2)
    other = Rig(rig.run_dir, seed=7)
    before = torch.get_rng_state()
    load(path, other.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(other.model.mid.weight, rig.model.mid.weight)
    assert not other.optimizer.state


def test_a_checkpoint_of_another_model_is_refused_by_tensor_before_anything_changes(rig: Rig, tmp_path: Path) -> None:
    path = rig.saved(1)
    other = Rig(tmp_path, width=24)
    before = other.digest()
    with pytest.raises(
        CheckpointError, match=r"embed\.weight: F32 of shape \[31, 16\]; expected F32 of shape \[31, 24"
    ):
        load(path, other.model, other.optimizer)
    assert other.digest() == before


def test_the_event_tells_what_was_written_and_survives_the_stream(rig: Rig) -> None:
    rig.train(3)
    event = rig.save("periodic", "best", heldout=2.0)
    assert isinstance(event, Checkpoint)
    manifest = verify(rig.run_dir / event.path)
    assert (event.step, event.kind, event.path) == (3, "periodic+best", "checkpoints/ckpt-step-000003")
    assert (event.bytes, event.sha256) == (manifest.bytes, manifest.files[FILES[0]].sha256)
    assert 0 < event.waited_seconds <= event.seconds
    line = encode(Checkpoint(**{f: getattr(event, f) for f in event.__struct_fields__} | {"run": "r", "seq": 0}))
    assert decode_line(line) is not None
    assert human_lines(event, None) == ["[PMAT-699] checkpoint saved at step 3: checkpoints/ckpt-step-000003"]


@pytest.mark.parametrize(("kind", "ending"), [("periodic", " (training continues)"), ("final", "")])
def test_a_failure_is_an_event_with_the_words_of_old_logs(kind: str, ending: str) -> None:
    event = CheckpointFailed(step=5, kind=kind, error="disk full", seconds=1.0, run="r", seq=0)
    assert decode_line(encode(event)) == event
    assert b'"event":"checkpoint_failed"' in encode(event)
    assert human_lines(event, None) == [f"[PMAT-699] checkpoint save at step 5 failed: disk full{ending}"]


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.train(1)
    copied = rig.digest()
    gate = threading.Event()
    monkeypatch.setattr(rig.checkpoints, "_sync", gate.wait)
    waited = rig.checkpoints.save("periodic", rig.state())
    rig.train(3)  # would hang here if saving held training up
    assert not rig.events
    gate.set()
    rig.checkpoints.drain()
    event = rig.events[0]
    assert isinstance(event, Checkpoint)
    assert waited <= event.seconds
    resumed = Rig(rig.run_dir, seed=9)
    resumed.resume()
    assert resumed.digest() == copied


def test_a_second_save_waits_for_the_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(rig.checkpoints, "_sync", gate.wait)
    rig.train(1)
    rig.checkpoints.save("periodic", rig.state())
    rig.train(1)
    threading.Timer(0.2, gate.set).start()
    assert rig.checkpoints.save("periodic", rig.state()) >= 0.1
    rig.checkpoints.drain()
    assert [e.step for e in rig.events if isinstance(e, Checkpoint)] == [1, 2]
    assert [verify(path).step for path in committed(rig.run_dir)] == [2, 1]


def test_everything_is_on_disk_in_the_order_that_a_power_cut_respects(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def named(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(f"fsync {named(fd)}"), real["fsync"](fd))[1])
    for name in ("rename", "replace"):

        def moved(source: Path, target: Path, name: str = name) -> None:
            seen.append(f"{name} {target.name}")
            real[name](source, target)

        monkeypatch.setattr(os, name, moved)
    monkeypatch.setattr(checkpoint_writer, "verify", lambda *a: (seen.append("read back"), verify(*a))[1])
    monkeypatch.setattr(rig.checkpoints, "_sync", lambda: seen.append("stream"))
    monkeypatch.setattr(rig.checkpoints, "_emit", lambda event: seen.append("event"))
    rig.train(1)
    rig.checkpoints.save("periodic", rig.state(), wait=True)
    assert seen[1:] == [  # the first looks whether this step stands there already
        *(f"fsync {name}" for name in FILES),
        "fsync .ckpt-step-000001.partial",
        "read back",
        "stream",
        "rename ckpt-step-000001",
        "fsync checkpoints",
        "fsync .LATEST.partial",
        "replace LATEST",
        "fsync checkpoints",
        "event",
    ]


def test_weights_that_training_never_changed_are_not_accepted(rig: Rig) -> None:
    good = rig.saved(1)
    load_initial = Rig(rig.run_dir).model
    rig.train(1)
    rig.model.load_state_dict(load_initial.state_dict())
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "after 2 steps the weights are still the initial ones" in event.error
    assert rig.names() == {"LATEST", good.name}


def test_a_failure_is_told_loudly_although_the_directory_cannot_be_read(rig: Rig) -> None:
    rig.train(1)
    (rig.run_dir / "checkpoints").write_text("in their place")
    assert isinstance(rig.save("periodic"), CheckpointFailed)
    [(level, told)] = rig.logs
    assert level == "error"
    assert told.startswith("checkpoint of step 1 not saved: ")
    assert told.endswith("; whether there is one cannot be told")


def test_a_snapshot_that_is_not_the_model_is_not_accepted(rig: Rig) -> None:
    rig.train(1)
    rig.model.mid.bias = torch.nn.Parameter(torch.zeros(1))  # copying would broadcast it without a word
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "mid.bias" in event.error


def test_a_model_without_parameters_or_another_models_optimizer_is_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="not the model's"):
        Snapshot(torch.nn.Linear(1, 1), optimizer)
    rig_model = torch.nn.Linear(1, 1)
    amsgrad = torch.optim.AdamW(rig_model.parameters(), amsgrad=True)
    rig_model(torch.zeros(1)).backward()
    amsgrad.step()
    with pytest.raises(ValueError, match="not AdamW's"):
        Snapshot(rig_model, amsgrad)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_anywhere_is_found_and_the_one_before_is_taken(rig: Rig, name: str, place: str) -> None:
    good, bad = rig.saved(1), rig.saved(1)
    size = (bad / name).stat().st_size
    flip(bad / name, {"first": 0, "middle": size // 2, "last": size - 2}[place])
    with pytest.raises(CheckpointError, match=name):
        verify(bad)
    passed_over: list[tuple[str, str]] = []
    assert find_latest(rig.run_dir, RUN, lambda *line: passed_over.append(line)) == good
    assert name in passed_over[0][0]
    assert passed_over[0][1] == "warning"


def test_every_bit_of_a_manifest_counts(rig: Rig) -> None:
    path = rig.saved(1)
    whole = (path / "manifest.json").read_bytes()
    for at in range(0, len(whole), 97):
        flip(path / "manifest.json", at)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(path)
        (path / "manifest.json").write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["truncated", "missing", "empty", "link", "directory"])
def test_a_file_that_is_not_whole_is_refused_by_name(rig: Rig, name: str, fault: str) -> None:
    path = rig.saved(1) / name
    raw = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(raw[:-100])
    elif fault == "empty":
        path.touch()
    elif fault == "link":
        (rig.run_dir / "elsewhere").write_bytes(raw)
        path.symlink_to(rig.run_dir / "elsewhere")
    elif fault == "directory":
        path.mkdir()
    with pytest.raises(CheckpointError, match=name):
        verify(path.parent)


def test_names_that_lead_out_of_the_directory_are_refused(rig: Rig) -> None:
    path = rig.saved(1)
    rows = dict(read_manifest(path).files)
    forge(path, files={"../model.safetensors": rows["model.safetensors"], FILES[1]: rows[FILES[1]]})
    with pytest.raises(CheckpointError, match=r"names the files \['\.\./model"):
        verify(path)


def test_a_table_that_is_not_the_files_is_refused_by_tensor(rig: Rig) -> None:
    path = rig.saved(1)
    rows = dict(read_manifest(path).files)
    tensors = dict(rows[FILES[0]].tensors)
    tensors["lost.weight"] = tensors.pop("mid.weight")
    row = type(rows[FILES[0]])(bytes=rows[FILES[0]].bytes, sha256=rows[FILES[0]].sha256, tensors=tensors)
    forge(path, files={FILES[0]: row, FILES[1]: rows[FILES[1]]})
    with pytest.raises(CheckpointError, match=r"tensor lost\.weight: missing; expected F32 of shape \[16, 16\]"):
        verify(path)


def test_another_version_run_or_step_is_refused(rig: Rig) -> None:
    path = rig.saved(1)
    with pytest.raises(CheckpointError, match=f"of run {RUN}; expected run other"):
        verify(path, "other")
    moved = path.rename(path.with_name("ckpt-step-000002"))
    with pytest.raises(CheckpointError, match="of step 1"):
        verify(moved)
    path = moved.rename(path)
    forge(path, v=2)
    with pytest.raises(CheckpointError, match="format version 2; expected 1"):
        verify(path)


def test_a_linked_checkpoint_directory_is_refused(rig: Rig) -> None:
    path = rig.saved(1)
    path.rename(rig.run_dir / "elsewhere")
    path.symlink_to(rig.run_dir / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(path)
    assert committed(rig.run_dir) == []


@pytest.mark.parametrize("content", ["ckpt-step-000777\n", "../../etc", "", "\x1b[2J"])
def test_a_latest_that_points_nowhere_is_told_and_passed_over(rig: Rig, content: str) -> None:
    path = rig.saved(1)
    (rig.run_dir / "checkpoints" / "LATEST").write_text(content)
    lines: list[tuple[str, str]] = []
    assert find_latest(rig.run_dir, RUN, lambda *line: lines.append(line)) == path
    assert "LATEST: points to" in lines[0][0]
    assert "\x1b" not in lines[0][0]


def test_nothing_is_found_where_nothing_was_saved_but_broken_ones_are_no_nothing(rig: Rig) -> None:
    assert find_latest(rig.run_dir) is None
    path = rig.saved(1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        find_latest(rig.run_dir)


def manifest_of(step: int, kinds: tuple[Kind, ...], best: float | None, template: State) -> Manifest:
    fields = {name: getattr(template, name) for name in template.__struct_fields__}
    fields |= {"step": step, "best": None if best is None else checkpoint_rig.Best(step=step, loss=best)}
    return Manifest(run=RUN, step=step, kinds=kinds, created=0.0, files={}, state=State(**fields))


def test_retention_keeps_the_last_the_best_and_the_newest_of_each_other_kind(rig: Rig) -> None:
    made: list[tuple[int, tuple[Kind, ...], float | None]] = [
        (10, ("periodic", "best"), 3.0),
        (20, ("periodic", "best"), 2.0),
        (25, ("interrupt",), None),
        (30, ("periodic",), None),
        (35, ("interrupt",), None),
        (40, ("periodic", "best"), 2.5),  # an earlier line of training knew no better
        (50, ("periodic",), None),
        (60, ("final",), None),
    ]
    template = rig.state()
    manifests = [manifest_of(*row, template) for row in reversed(made)]
    assert [m.step for m in retained(manifests, keep_last=1)] == [60, 50, 35, 20]
    assert [m.step for m in retained(manifests, keep_last=3)] == [60, 50, 40, 35, 30, 20]
    assert [m.step for m in retained(manifests[1:], keep_last=0)] == [50, 35, 20]
    assert retained([], keep_last=2) == []


def test_the_best_of_two_stays_when_the_latest_is_not_the_best(tmp_path: Path) -> None:
    rig = Rig(tmp_path, keep_last=1)
    best = rig.saved(1, "periodic", "best", heldout=1.0)
    rig.saved(1)
    last = rig.saved(1)
    assert rig.names() == {"LATEST", best.name, last.name}
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == f"{last.name}\n"


def test_a_checkpoint_is_written_once_for_all_its_kinds(rig: Rig) -> None:
    path = rig.saved(2)
    inode = (path / "model.safetensors").stat().st_ino
    assert rig.save("best", heldout=1.5).kind == "best"  # type: ignore[attr-defined]
    rig.save("final")
    manifest = verify(path, RUN)
    assert manifest.kinds == ("periodic", "best", "final")
    assert manifest.state.best == checkpoint_rig.Best(step=2, loss=1.5)
    assert (path / "model.safetensors").stat().st_ino == inode
    assert rig.names() == {"LATEST", path.name}


def test_a_damaged_one_of_the_same_step_is_replaced(rig: Rig) -> None:
    rig.saved(1)
    bad = rig.saved(1)
    flip(bad / "model.safetensors", 500)
    resumed = Rig(rig.run_dir)
    assert resumed.resume().step == 1
    assert resumed.saved(1) == bad
    verify(bad)


def test_a_damaged_one_ahead_of_training_costs_none_that_is_whole(tmp_path: Path) -> None:
    rig = Rig(tmp_path, keep_last=2)
    rig.saved(2)
    bad = rig.saved(8)
    flip(bad / "model.safetensors", 500)
    resumed = Rig(tmp_path, keep_last=1)
    assert resumed.resume().step == 2
    path = resumed.saved(3)
    assert find_latest(tmp_path) == path
    last = resumed.saved(1)
    assert resumed.names() == {"LATEST", bad.name, last.name}


def test_what_a_killed_process_left_is_removed_and_nothing_else(rig: Rig) -> None:
    path = rig.saved(1)
    root = path.parent
    for name in (".ckpt-step-000002.partial", ".ckpt-step-000001.removed", ".mine.partial", "notes"):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes(b"half")
    for partial in (root / ".LATEST.partial", path / ".manifest.json.partial"):
        partial.write_bytes(b"half")
    assert find_latest(rig.run_dir) == path
    again = Rig(rig.run_dir)
    assert again.names() == {"LATEST", path.name, ".mine.partial", "notes"}
    assert {p.name for p in path.iterdir()} == set(FILES)
    assert again.logs == [("info", "removed 2 unfinished checkpoints of a killed process")]


def test_a_loss_that_is_not_finite_does_not_make_the_state_unreadable(rig: Rig) -> None:
    rig.train(1)
    fields = {name: getattr(rig.state(), name) for name in State.__struct_fields__}
    rig.checkpoints.save("interrupt", State(**fields | {"final_loss": float("nan"), "initial_loss": 3.5}), wait=True)
    path = find_latest(rig.run_dir)
    assert path is not None
    assert (verify(path).state.final_loss, verify(path).state.initial_loss) == (None, 3.5)


def test_a_stream_that_cannot_be_synced_holds_the_checkpoint_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("3 events of the stream could not be written")

    rig.train(1)
    monkeypatch.setattr(rig.checkpoints, "_sync", refuse)
    event: Event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "3 events" in event.error
    assert rig.checkpoints.last_error == event.error
    assert rig.names() == set()
    monkeypatch.undo()
    assert isinstance(rig.save("periodic"), Checkpoint)
    assert rig.checkpoints.last_error is None


def test_a_clock_that_jumps_back_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.saved(1)
    monkeypatch.setattr("time.time", lambda: 0.0)
    newest = rig.saved(1)
    assert find_latest(rig.run_dir) == newest
    assert verify(newest).created == 0.0


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    durable.write_new(tmp_path / "file", [b"0123456789", b"abc"])
    assert (tmp_path / "file").read_bytes() == b"0123456789abc"


def test_reading_checkpoints_needs_no_torch() -> None:
    code = "import sys, engine.checkpoint, engine.checkpoint_writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
