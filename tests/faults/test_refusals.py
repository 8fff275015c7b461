"""What a user can get wrong: each gives its one clear message, its exit code, and nothing else."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.sniff import read_safetensors_header
from tests.console_rig import ROOT, Desk, Outcome, asked_for, of, side_by_side, write_corpus
from tests.nursery import Nursery

TEACHER = ROOT / "engine" / "assets" / "teacher"
DIVERGENCE = "F-DISTILL-V2-001-TEACHER-DIVERGENCE"
NAN = {"BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\xc0\x7f"}
BROKEN_TENSOR = "model.layers.0.mlp.gate_proj.weight"
HOPELESS = """\
version: 1
name: mine
falsifiers:
  - {id: F-MINE-001, claim: the loss is below zero, kind: threshold, metric: METRIC, below: 0.0, severity: SEVERITY}
  - {id: F-MINE-002, claim: every step is finite, kind: finite, metric: step.loss}
"""


def torch_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    return buffer.getvalue()


def empty_safetensors(size: int = 200) -> bytes:
    """A whole file that names no tensor: what 25 hours of training once left."""
    header = b'{"__metadata__":{"format":"pt"}}'.ljust(size - 8)
    return struct.pack("<Q", len(header)) + header


HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
APR, GGUF = b"APR\0" + bytes(60), b"GGUF\x03\0\0\0" + bytes(56)
PICKLE = pickle.dumps({"weight": 1.0}, protocol=2)
WRONG_WEIGHTS = {
    "an APR container": ("model.safetensors", APR, "APR container"),
    "a GGUF file": ("model.safetensors", GGUF, "GGUF file"),
    "a pickle": ("pytorch_model.bin", PICKLE, "pickle"),
    "a torch.save archive": ("model.pt", torch_archive(), "pickle"),
    "a git-LFS pointer": ("model.safetensors", LFS, "git lfs pull"),
    "a web page": ("model.safetensors", HTML, "web page"),
    "a file cut short": ("model.safetensors", (TEACHER / "model.safetensors").read_bytes()[:100_000], "truncated"),
    "a 200-byte file without tensors": ("model.safetensors", empty_safetensors(), "no weights"),
    "an empty file": ("model.safetensors", b"", "an empty file"),
}
WRONG_FILES = {
    "an APR container": ("model.apr", APR, "APR container"),
    "a GGUF file": ("model-q4_k.gguf", GGUF, "GGUF file"),
    "a pickle": ("pytorch_model.bin", PICKLE, "pickle"),
    "a torch.save archive": ("model.pt", torch_archive(), "pickle"),
    "a safetensors file": (
        "model.safetensors",
        (TEACHER / "model.safetensors").read_bytes(),
        "directory that holds it",
    ),
}


def teacher_with(path: Path, name: str, content: bytes) -> Path:
    """The built-in teacher with its weights replaced by one file."""
    shutil.copytree(TEACHER, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_weights_of_another_format_are_named(desk: Desk, wrong: str) -> None:
    name, content, words = WRONG_WEIGHTS[wrong]
    directory = teacher_with(desk.cwd / "teacher", name, content)
    desk.call("--headless", "smoke", "--teacher", str(directory)).refused(str(directory / name), words)


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_file_in_place_of_a_model_directory_is_named(desk: Desk, wrong: str) -> None:
    name, content, words = WRONG_FILES[wrong]
    (desk.cwd / name).write_bytes(content)
    desk.call("--headless", "smoke", "--teacher", name).refused(str(desk.cwd / name), words)


def test_a_directory_without_config_json_is_named(desk: Desk) -> None:
    directory = teacher_with(desk.cwd / "teacher", "model.apr", APR)
    (directory / "config.json").unlink()
    desk.call("--headless", "smoke", "--teacher", "teacher").refused("no config.json", "model.apr", "APR container")


def test_a_wrong_student_is_refused_as_such(desk: Desk) -> None:
    teacher_with(desk.cwd / "small", "model.safetensors", LFS)
    desk.call("--headless", "smoke", "--student", "small").refused("small/model.safetensors", "git-LFS pointer")


def test_a_smaller_teacher_is_refused_with_both_numbers(desk: Desk) -> None:
    student = shutil.copytree(TEACHER, desk.cwd / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "vocab_size": 4_096}))
    outcome = desk.call("--headless", "smoke", "--set", "student={path: student, init: random}")
    outcome.refused("2,048", "4,096")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("falsifiers: [", "line 1"),
        ("version: 1\nname: mine\nfalsifiers: []\n", "falsifiers"),
        (HOPELESS.replace("kind: threshold", "kind: thresold").replace("METRIC", "eval.loss"), "thresold"),
        (HOPELESS.replace("below: 0.0", "below: 0.0, above: 1.0").replace("METRIC", "eval.loss"), "F-MINE-001"),
        (HOPELESS.replace("METRIC", "weather").replace("SEVERITY", "gate"), "weather"),
        (HOPELESS.replace("METRIC", "eval.loss").replace("SEVERITY", "deadly"), "deadly"),
    ],
    ids=["no YAML", "no falsifier", "unknown kind", "two limits", "unknown metric", "unknown severity"],
)
def test_a_broken_contract_is_refused(desk: Desk, text: str, words: str) -> None:
    text = text.replace("SEVERITY", "gate")
    desk.write("mine.yaml", text)
    desk.call("--headless", "smoke", "--contract", "mine.yaml").refused("mine.yaml", words)


def test_an_unreadable_corpus_is_named(desk: Desk) -> None:
    # Reading it fails for everyone, root included, whom permissions would not stop.
    outcome = desk.call("--headless", "smoke", "--data", "/proc/self/mem")
    outcome.refused("/proc/self/mem: cannot be read: Input/output error")


def test_an_empty_corpus_is_named(desk: Desk) -> None:
    desk.write("empty.txt", "")
    desk.call("--headless", "smoke", "--data", "empty.txt").refused("empty.txt is empty")


def test_a_missing_corpus_is_named(desk: Desk) -> None:
    outcome = desk.call("--headless", "smoke", "--data", "missing.txt")
    outcome.refused("missing.txt: no such file or directory")


# What needs the models in memory, or the corpus tokenised, is refused by the engine. These are forked.


def equal_teacher(desk: Desk, corpus: Path) -> Outcome:
    return desk.smoke("--max-steps", "12", "--student", "builtin:teacher", corpus=corpus)


def copied_teacher(desk: Desk, corpus: Path) -> Outcome:
    shutil.copytree(TEACHER, desk.cwd / "copy")
    return desk.smoke("--max-steps", "12", "--student", "copy", corpus=corpus)


def nan_weights(desk: Desk, corpus: Path) -> Outcome:
    copy = shutil.copytree(TEACHER, desk.cwd / "copy")
    entry = read_safetensors_header(copy / "model.safetensors")[BROKEN_TENSOR]
    with (copy / "model.safetensors").open("r+b") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        file.seek(data + entry.begin)
        file.write(NAN[entry.dtype])
    return desk.smoke("--max-steps", "12", "--student", "copy", corpus=corpus)


def blank_corpus(desk: Desk, corpus: Path) -> Outcome:
    (desk.cwd / "texts").mkdir()
    desk.write("texts/one.txt", "")
    return desk.smoke("--max-steps", "12", corpus=desk.cwd / "texts")


def monotonous_corpus(desk: Desk, corpus: Path) -> Outcome:
    return desk.smoke("--max-steps", "12", corpus=desk.write("same.txt", "a " * 20_000))


def diverging(desk: Desk, corpus: Path) -> Outcome:
    wild = ("--set", "train.learning_rate=1e30", "--set", "train.clip=0")
    return desk.smoke("--max-steps", "12", *wild, corpus=corpus)


def failed_gate(desk: Desk, corpus: Path) -> Outcome:
    desk.write("mine.yaml", HOPELESS.replace("METRIC", "eval.loss").replace("SEVERITY", "gate"))
    return desk.smoke("--max-steps", "12", "--contract", "mine.yaml", corpus=corpus)


def fatal_step(desk: Desk, corpus: Path) -> Outcome:
    desk.write("mine.yaml", HOPELESS.replace("METRIC", "step.loss").replace("SEVERITY", "fatal"))
    return desk.smoke("--max-steps", "12", "--contract", "mine.yaml", corpus=corpus)


JOBS: dict[str, Callable[[Desk, Path], Outcome]] = {
    each.__name__: each
    for each in (
        *(equal_teacher, copied_teacher, nan_weights, diverging, failed_gate, fatal_step),
        *(blank_corpus, monotonous_corpus),
    )
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> dict[str, Future[Outcome]]:
    """Every run that a selected test asks for with `of`, started at once and made two at a time."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")

    def job(name: str) -> Callable[[], Outcome]:
        return lambda: JOBS[name](Desk(tmp_path_factory.mktemp(name), nursery), corpus)

    wanted = asked_for(request)
    return side_by_side({name: job(name) for name in JOBS if name in wanted})


@pytest.fixture
def outcome(request: pytest.FixtureRequest, runs: dict[str, Future[Outcome]]) -> Outcome:
    """The run that `of` names."""
    return runs[request.param].result()


def ended(outcome: Outcome, rc: int, status: str) -> str:
    """Checks exit code and status on every way that they are told; returns the reason."""
    assert outcome.rc == rc, outcome.said
    assert "NO-GO" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err + (outcome.run.path / "launch.log").read_text()
    end = outcome.run.end
    assert (end["status"], end["exit_code"]) == (status, rc)
    assert " ".join(end["reason"].split()) in outcome.text
    return str(end["reason"])


def names_failed(outcome: Outcome, identifier: str) -> bool:
    """Whether the report says FAIL of a falsifier."""
    return re.search(rf"\bFAIL:? +{re.escape(identifier)}\b", outcome.out) is not None


@of("equal_teacher", "copied_teacher")
def test_a_teacher_equal_to_its_student_fails_and_is_named(outcome: Outcome) -> None:
    assert DIVERGENCE in ended(outcome, 1, "FAILED")
    assert names_failed(outcome, DIVERGENCE)
    assert not outcome.run.has("step")


@of("nan_weights")
def test_nan_in_the_students_weights_names_the_tensor(outcome: Outcome) -> None:
    reason = ended(outcome, 2, "FAILED")
    assert f"NaN in {BROKEN_TENSOR}: 1 of " in reason
    assert "student" in reason
    assert not outcome.run.has("step")


@of("diverging")
def test_a_loss_that_is_no_number_names_its_step_and_fails(outcome: Outcome) -> None:
    last = outcome.run.events("step")[-1]
    assert last["loss"] in ("NaN", "Infinity")
    assert last["step"] < 12
    assert f"the loss of step {last['step']} is" in ended(outcome, 1, "FAILED")
    assert names_failed(outcome, "F-FINITE-001")


@of("failed_gate")
def test_a_gate_that_fails_is_named_and_exits_1_after_the_last_step(outcome: Outcome) -> None:
    ended(outcome, 1, "FAILED")
    assert names_failed(outcome, "F-MINE-001")
    assert len(outcome.run.events("step")) == 12


@of("fatal_step")
def test_a_fatal_falsifier_stops_the_run_at_once(outcome: Outcome) -> None:
    assert "F-MINE-001" in ended(outcome, 1, "FAILED")
    assert len(outcome.run.events("step")) == 1


@of("blank_corpus")
def test_a_directory_of_empty_texts_is_named(outcome: Outcome) -> None:
    assert "texts is empty" in ended(outcome, 2, "FAILED")


@of("monotonous_corpus")
def test_a_corpus_of_one_repeated_token_is_named(outcome: Outcome) -> None:
    reason = ended(outcome, 2, "FAILED")
    assert "degenerate" in reason
    assert "one token repeated" in reason
