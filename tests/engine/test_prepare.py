"""A preparation from its first phase to the store that training finds: real models, in this process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dispatch.runs import create_run
from engine import teacher_output
from engine.contract import builtin_contract
from engine.device import place
from engine.distill import Pair
from engine.errors import ExitCode, KdError
from engine.inputs import STORE, digests_of
from engine.kd_loss import kd_loss_reference
from engine.measures import measures_of
from engine.models import CausalLM, load_teacher
from engine.store_format import MANIFEST, PARTIAL, StoreError, read_manifest
from engine.stream import Event, Measure, Phase, Progress, Verdict, decode_line
from engine.teacher_store import StoredTeacher, visited
from engine.topk_loss import top_k_of, topk_loss_reference
from tests.console_rig import until
from tests.engine.store_rig import Prepared, Rig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Rig.make(tmp_path_factory.mktemp("store")).root


@pytest.fixture
def rig(template: Path, tmp_path: Path) -> Rig:
    shutil.copytree(template, tmp_path / "rig", copy_function=os.link)
    return Rig(tmp_path / "rig")


def verdicts(prepared: Prepared) -> dict[str, str]:
    return {event.id: event.verdict for event in prepared.events if isinstance(event, Verdict)}


def pair_of(teacher: CausalLM | StoredTeacher, student: CausalLM, **changes: object) -> Pair:
    pair = Pair(
        student=student, teacher=teacher, temperature=4.0, alpha=0.3, autocast=None, chunk_bytes=4096, compile=False
    )
    return dataclasses.replace(pair, **changes)  # type: ignore[arg-type]


def losses(pair: Pair, windows: Tensor, indices: list[int]) -> tuple[list[float], list[Tensor]]:
    """Loss, ce and kd of windows, and the student's gradients."""
    pair.student.model.zero_grad(set_to_none=True)
    stored = pair.teacher.read(indices) if isinstance(pair.teacher, StoredTeacher) else None
    loss = pair.loss(windows[:, :-1], windows[:, 1:].reshape(-1), windows[:, 1:].numel(), stored)
    loss.total.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.clone() for p in pair.student.model.parameters() if p.grad is not None]
    return [float(part.detach()) for part in loss[:3]], gradients


@pytest.mark.parametrize("plain", [False, True])
def test_training_from_hidden_states_is_training_with_the_online_teacher(rig: Rig, plain: bool) -> None:
    """At T = 4, within the rounding of bfloat16 in which they are stored."""
    assert rig.prepare("distill.temperature=2").end.status == "COMPLETED"
    loaded, _ = rig.load("distill.temperature=4")
    store, student = loaded.teacher, loaded.student
    assert isinstance(store, StoredTeacher)
    if plain:
        student = dataclasses.replace(student, head=None, head_reason="a test says so")
    online = load_teacher(rig.config().teacher, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    indices = list(visited(rig.config(), loaded.corpus))[3:9]
    windows = torch.from_numpy(loaded.corpus.train.stack(indices))
    wanted, wanted_gradients = losses(pair_of(online, student), windows, indices)
    got, gradients = losses(pair_of(store, student), windows, indices)
    assert got[1] == pytest.approx(wanted[1], rel=1e-6)
    assert got[2] == pytest.approx(wanted[2], rel=2e-4)
    for left, right in zip(gradients, wanted_gradients, strict=True):
        assert float((left - right).norm()) <= 5e-3 * float(right.norm())


@pytest.mark.parametrize("plain", [False, True])
def test_training_from_stored_logits_has_the_coarse_loss_of_the_online_teacher(rig: Rig, plain: bool) -> None:
    rig.prepare("distill.temperature=2", source="topk")
    loaded, _ = rig.load("distill.temperature=2", source="topk")
    store, student = loaded.teacher, loaded.student
    assert isinstance(store, StoredTeacher)
    indices = list(visited(rig.config(), loaded.corpus))[3:9]
    windows = torch.from_numpy(loaded.corpus.train.stack(indices))
    online = load_teacher(rig.config().teacher, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = online.logits(windows[:, :-1]).flatten(0, 1)[:, : student.vocab].double()
    said = student.logits(windows[:, :-1]).flatten(0, 1).double()
    labels = windows[:, 1:].reshape(-1)
    wanted = topk_loss_reference(said, top_k_of(logits, 20, 2.0), labels, temperature=2.0, alpha=0.3)
    full = kd_loss_reference(said, logits, labels, temperature=2.0, alpha=0.3)
    if plain:
        student = dataclasses.replace(student, head=None, head_reason="a test says so")
    got, gradients = losses(pair_of(store, student, temperature=2.0), windows, indices)
    assert got == pytest.approx([part.item() for part in wanted[:3]], rel=1e-3)
    assert got[2] < 0.95 * full.kd.item()
    exact = torch.autograd.grad(wanted.total, list(student.model.parameters()))
    for left, right in zip(gradients, exact, strict=True):
        assert float((left - right).norm()) <= 1e-2 * float(right.norm())


@pytest.mark.parametrize("source", ["hidden", "topk"])
def test_evaluation_is_exact_with_either_kind(rig: Rig, source: str) -> None:
    rig.prepare(source=source)
    loaded, _ = rig.load(source=source)
    online = load_teacher(rig.config().teacher, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    heldout = torch.from_numpy(loaded.corpus.heldout_batch(5))
    wanted = pair_of(online, loaded.student).evaluate(heldout, 2, lambda: None)
    assert isinstance(loaded.teacher, StoredTeacher)
    told = pair_of(loaded.teacher, loaded.student).evaluate(heldout, 2, lambda: None)
    for name, value in dataclasses.asdict(wanted).items():
        assert getattr(told, name) == pytest.approx(value, rel=1e-6), name
    with pytest.raises(ValueError, match="4 windows: expected the 5 that are stored"):
        pair_of(loaded.teacher, loaded.student).evaluate(heldout[:4], 2, lambda: None)


def test_phases_measures_and_verdicts_are_those_of_the_contract(rig: Rig) -> None:
    done = rig.prepare(source="topk")
    phases = [event.name for event in done.events if isinstance(event, Phase)]
    assert phases == ["load-student", "load-data", "load-teacher", "fidelity", "store", "check", "judge"]
    assert (done.end.status, done.end.exit_code, done.end.steps) == ("COMPLETED", ExitCode.OK, 0)
    assert set(verdicts(done).values()) == {"PASS"}
    assert {"F-DISTILL-PREP-001", "F-DISTILL-PREP-002", "F-DISTILL-TEACHER-002"} == set(verdicts(done))
    assert done.measures["store_cosine"] > 0.9999
    hidden = rig.prepare()
    assert set(hidden.measures) == measures_of(rig.config())
    assert set(done.measures) == {name for name in measures_of(rig.config(source="topk")) if "_k" not in name}
    assert done.progress[0].unit == "windows"
    assert done.progress[-1].done == done.progress[-1].total


def test_the_size_is_said_before_anything_is_stored_and_is_what_is_stored(rig: Rig) -> None:
    for source, per_token in (("hidden", 96), ("topk", 84)):
        done = rig.prepare(source=source)
        assert f"{per_token} bytes a token" in done.logs
    for store in rig.stores:
        manifest = read_manifest(store / MANIFEST)
        assert manifest is not None
        assert sum((store / row.name).stat().st_size for row in manifest.files) == manifest.bytes
        told = sum(row.bytes for row in manifest.files if row.part == "train")
        expected = 32 * (16 * (96 if manifest.key.kind == "hidden" else 84) + 8)
        assert expected <= told <= expected + 1_000 * len(manifest.files)


def test_a_store_that_is_whole_is_said_to_be_and_not_made_again(rig: Rig) -> None:
    first = rig.prepare()
    [store] = rig.stores
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    again = rig.prepare("train.steps=4")
    assert (again.end.status, again.end.exit_code) == ("COMPLETED", ExitCode.OK)
    assert "whole already" in again.logs
    assert "load-teacher" not in [event.name for event in again.events if isinstance(event, Phase)]
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before
    assert again.measures["store_cosine"] == first.measures["store_cosine"]
    assert verdicts(again) == verdicts(first)


def test_a_longer_run_adds_what_is_missing(rig: Rig) -> None:
    rig.prepare("train.steps=4")
    with pytest.raises(StoreError, match=r"16 of the 32 windows that 8 steps take are stored"):
        rig.load()
    rig.prepare()
    [store] = rig.stores
    manifest = read_manifest(store / MANIFEST)
    assert manifest is not None
    assert manifest.windows == 32
    rig.load()


def stored(event: Event, windows: int) -> bool:
    """Whether the event tells of so many windows, the five that are held out among them."""
    return isinstance(event, Progress) and (event.unit, event.done) == ("windows", windows)


def test_a_stop_keeps_what_is_whole_and_the_next_one_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.stepless.PROGRESS_SECONDS", 0.0)
    computed: list[int] = []
    plain = teacher_output.TeacherOutput.train

    def counted(self: teacher_output.TeacherOutput, windows: object) -> dict[str, Tensor]:
        computed.append(len(windows))  # type: ignore[arg-type]
        return plain(self, windows)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_output.TeacherOutput, "train", counted)
    stopped = rig.prepare(stop_when=lambda event: stored(event, 5 + 12))
    assert (stopped.end.status, stopped.end.exit_code) == ("STOPPED", ExitCode.INTERRUPTED)
    assert "SIGTERM in phase store; 12 of 32 windows are stored" in stopped.end.reason
    with pytest.raises(StoreError, match=r"not whole: 12 of 32 windows; run kdconsole prepare CONFIG again"):
        rig.load()
    done = rig.prepare()
    assert "12 of 32 windows are there already" in done.logs
    assert sum(computed) == 32
    assert done.progress[0].done == 5 + 12 + 4
    [store] = rig.stores
    assert not (store / PARTIAL).exists()
    rig.load()


def test_sigterm_to_the_engine_ends_it_with_130_and_what_is_whole_kept(rig: Rig, tmp_path: Path) -> None:
    """The real process, stopped while it stores."""
    config = rig.config("train.steps=400", "prepare.shard_mib=1", "train.batch=1")
    run = create_run(config, evidence=tmp_path / "evidence", contract_text=builtin_contract("prepare"))
    process = subprocess.Popen([sys.executable, "-P", "-m", "engine", str(run.path)], stdout=subprocess.DEVNULL)
    try:
        stream = run.path / "events.jsonl"
        until(
            lambda: process.poll() is not None or (stream.is_file() and b'"event":"progress"' in stream.read_bytes()),
            "progress",
            120,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (ExitCode.INTERRUPTED, ExitCode.OK)
    finally:
        process.kill()
        process.wait()
    end = json.loads(stream.read_bytes().splitlines()[-1])
    [store] = rig.stores
    if end["status"] == "STOPPED":
        manifest = read_manifest(store / PARTIAL)
        assert manifest is not None
        assert f"{manifest.windows} of {manifest.wanted} windows are stored" in end["reason"]
    else:  # it was done before the signal came
        assert end["status"] == "COMPLETED"


def test_too_little_mass_is_refused_before_anything_is_stored(rig: Rig) -> None:
    with pytest.raises(StoreError) as refused:
        rig.prepare("prepare.min_mass=0.99", "distill.temperature=50", source="topk")
    text = str(refused.value)
    assert "teacher.top_k 20 at distill.temperature 50: the stored logits would hold 0.3" in text
    assert "expected at least prepare.min_mass, 0.99" in text
    assert "teacher.source: hidden" in text
    assert "--force" in text
    assert refused.value.exit_code == ExitCode.USAGE
    assert rig.stores == []
    assert rig.prepare("prepare.min_mass=0", "distill.temperature=50", source="topk").end.status == "COMPLETED"
    with pytest.raises(StoreError, match=r"would hold 0\.3"):
        rig.prepare("prepare.min_mass=0.99", "distill.temperature=50", source="topk")


def test_a_disk_without_room_is_refused_with_both_figures(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1_234))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"[\d,]+ bytes are to be stored and 1,234 are free"):
        rig.prepare()
    assert rig.stores == [] or list(rig.stores[0].iterdir()) == []


def test_what_reads_back_otherwise_than_the_teacher_says_fails_and_is_not_named_whole(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = teacher_output.TeacherOutput.train

    def wrong(self: teacher_output.TeacherOutput, windows: object) -> dict[str, Tensor]:
        made = plain(self, windows)  # type: ignore[arg-type]
        return {name: tensor.roll(1, 1) for name, tensor in made.items()}

    monkeypatch.setattr(teacher_output.TeacherOutput, "train", wrong)
    for source in ("hidden", "topk"):
        done = rig.prepare(source=source)
        assert (done.end.status, done.end.exit_code) == ("FAILED", ExitCode.FAILED)
        assert "F-DISTILL-PREP-001" in done.end.reason
        assert verdicts(done)["F-DISTILL-PREP-002"] == "FAIL"
    assert all(not (store / MANIFEST).exists() for store in rig.stores)


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (("train.sequence=8",), "train.sequence (16 there, 8 here)"),
        (("data.heldout_windows=4",), "held-out windows (5 there, 4 here)"),
        (("train.precision=bf16",), "train.precision (fp32 there, bf16 here)"),
        (("data.heldout_fraction=0.2",), "the corpus ("),
    ],
)
def test_a_store_of_something_else_is_refused_by_what_differs(rig: Rig, sets: tuple[str, ...], named: str) -> None:
    rig.prepare()
    with pytest.raises(StoreError) as refused:
        rig.load(*sets)
    assert named in str(refused.value)
    assert "kdconsole prepare CONFIG" in str(refused.value)


def test_another_temperature_is_refused_for_topk_and_taken_for_hidden(rig: Rig) -> None:
    rig.prepare("distill.temperature=2")
    rig.load("distill.temperature=3")
    shutil.rmtree(rig.cache)
    rig.prepare("distill.temperature=2", source="topk")
    with pytest.raises(StoreError, match=r"distill.temperature \(2 there, 3 here\)"):
        rig.load("distill.temperature=3", source="topk")
    with pytest.raises(StoreError, match=r"teacher.top_k \(20 there, 30 here\)"):
        rig.load("distill.temperature=2", "teacher.top_k=30", source="topk")


def test_other_weights_or_settings_of_the_teacher_are_another_teacher(rig: Rig) -> None:
    rig.prepare()
    config = rig.root / "teacher" / "config.json"
    text = config.read_text()
    config.unlink()  # it is a hard link into the template
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    with pytest.raises(StoreError, match=r"the teacher's config.json \("):
        rig.load()


def test_nothing_stored_says_what_to_run(rig: Rig) -> None:
    with pytest.raises(StoreError, match="no stored teacher; expected one of source hidden; run kdconsole prepare"):
        rig.load()


def test_a_damaged_store_is_refused_by_training_and_by_a_preparation(rig: Rig) -> None:
    rig.prepare()
    [store] = rig.stores
    shard = store / "train-00000.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    for work in (rig.load, rig.prepare):
        with pytest.raises(KdError, match=r"train-00000.safetensors: damaged: [\d,]+ bytes, not [\d,]+ bytes; remove"):
            work()


def test_loading_never_loads_the_teachers_body(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.prepare()

    def never(*_: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("engine.loading.load_teacher", never)
    loaded, events = rig.load()
    assert isinstance(loaded.teacher, StoredTeacher)
    measured = {event.name: event.value for event in events if isinstance(event, Measure)}
    assert measured["teacher_student_distance"] == float("inf")
    assert measured["teacher_logit_error"] <= 1e-5


def test_a_long_run_whose_stored_teacher_is_its_student_is_refused(rig: Rig) -> None:
    same = (f"teacher.path={rig.root}/student", "train.steps=6000", "data.heldout_windows=2")
    rig.prepare(*same)
    with pytest.raises(KdError, match="teacher and student have the same weights, and 6,000 steps"):
        rig.load(*same)
    _, events = rig.load(*same, "train.max_steps=10")
    assert [e.value for e in events if isinstance(e, Measure) and e.name == "teacher_student_distance"] == [0.0]


def test_the_inputs_name_the_store_and_another_one_is_another_input(rig: Rig) -> None:
    rig.prepare()
    rig.prepare("distill.temperature=2", source="topk")
    rig.prepare("distill.temperature=3", source="topk")
    cold, warm = (digests_of(rig.load(f"distill.temperature={t}", source="topk")[0]) for t in (2, 3))
    hidden = digests_of(rig.load()[0])
    assert {name for name in cold if cold[name] != warm[name]} == {STORE}
    assert {name for name in cold if cold[name] != hidden[name]} == {STORE}
    assert place(rig.config().train).precision == "fp32"


def test_a_teacher_whose_head_is_more_than_a_product_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(*arguments: object) -> CausalLM:
        return dataclasses.replace(load_teacher(*arguments), head=None, head_reason="its head has a bias")  # type: ignore[arg-type]

    monkeypatch.setattr("engine.prepare.load_teacher", scaled)
    with pytest.raises(KdError, match=r"its head has a bias.*set teacher.source: online"):
        rig.prepare()


def test_topk_of_a_vocabulary_that_needs_four_bytes_an_id(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.teacher_output.id_bytes", lambda vocabulary: 4)
    assert rig.prepare(source="topk").end.status == "COMPLETED"
    store = rig.load(source="topk")[0].teacher
    assert isinstance(store, StoredTeacher)
    [row] = [row for row in store.manifest.files if row.part == "train"]
    assert row.bytes > 32 * 16 * (20 * 6 + 4)


def test_the_stream_of_a_preparation_can_be_read(rig: Rig) -> None:
    done = rig.prepare()
    assert all(
        decode_line(line) is not None for line in (rig.root / "run-1" / "events.jsonl").read_bytes().splitlines()
    )
    assert done.end.reason == "every window is stored"
