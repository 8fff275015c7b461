"""Smokes on model directories as transformers itself saves them, through the real command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.console_rig import ROOT, Desk, Outcome, asked_for, of, side_by_side, write_corpus
from tests.engine.model_fixtures import save_gpt2, save_llama, save_qwen2, save_tokenizer
from tests.nursery import Nursery

TOKENIZER = ROOT / "engine" / "assets" / "teacher"
ROWS = 2_048
WORDS = [f"w{number}" for number in range(300)]
TEACHER_ROWS, STUDENT_ROWS = 152_064, 151_936


def with_tokenizer(path: Path) -> Path:
    """Gives a model directory the tokenizer of the built-in models."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    return path


def models(desk: Desk, save: Callable[..., Path], **teacher_options: object) -> list[str]:
    """Saves a teacher and a smaller student of one architecture; the options that name them."""
    teacher = save(desk.cwd / "teacher", vocab=ROWS, hidden=64, layers=4, seed=1, **teacher_options)
    student = save(desk.cwd / "student", vocab=ROWS, hidden=32, layers=2, seed=2)
    return ["--teacher", str(with_tokenizer(teacher)), "--student", str(with_tokenizer(student))]


def qwen2_sharded(desk: Desk) -> list[str]:
    return models(desk, save_qwen2, shard="300KB")


def llama(desk: Desk) -> list[str]:
    return models(desk, save_llama)


def gpt2(desk: Desk) -> list[str]:
    return models(desk, save_gpt2)


def llama_to_gpt2(desk: Desk) -> list[str]:
    teacher = with_tokenizer(save_llama(desk.cwd / "teacher", vocab=ROWS, hidden=64, seed=1))
    student = with_tokenizer(save_gpt2(desk.cwd / "student", vocab=ROWS, layers=2, seed=2))
    return ["--teacher", str(teacher), "--student", str(student)]


def some_layers(desk: Desk) -> list[str]:
    return ["--set", "student={from: builtin:teacher, layers: [0]}"]


def random_student(desk: Desk) -> list[str]:
    """The architecture alone: a directory without weights."""
    directory = with_tokenizer(save_qwen2(desk.cwd / "student", vocab=ROWS, layers=1))
    (directory / "model.safetensors").unlink()
    return ["--set", f"student={{path: {directory}, init: random}}"]


def padded_vocabulary(desk: Desk) -> list[str]:
    """The two row counts of the Qwen2 family, which differ by padding alone; token shards."""
    narrow = {"hidden": 8, "layers": 1, "tie_word_embeddings": True}
    teacher = save_qwen2(desk.cwd / "teacher", vocab=TEACHER_ROWS, seed=1, **narrow)
    student = save_qwen2(desk.cwd / "student", vocab=STUDENT_ROWS, seed=2, **narrow)
    for directory in (teacher, student):
        save_tokenizer(directory, WORDS)
    tokens = np.random.default_rng(0).integers(0, 30, 20_000)
    tokens.astype("<u4").tofile(desk.cwd / "tokens.bin")
    options = ["--teacher", str(teacher), "--student", str(student), "--set", "train.sequence=16"]
    return [*options, "--data", str(desk.cwd / "tokens.bin")]


PAIRS: dict[str, Callable[[Desk], list[str]]] = {
    each.__name__: each
    for each in (
        *(padded_vocabulary, qwen2_sharded, llama, gpt2),
        *(llama_to_gpt2, some_layers, random_student),
    )
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> dict[str, Future[Outcome]]:
    """Every run that a selected test asks for with `of`, started at once and made two at a time."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")

    def job(name: str) -> Callable[[], Outcome]:
        desk = Desk(tmp_path_factory.mktemp(name), nursery)
        arguments = PAIRS[name](desk)  # Here and not in the job: neither torch's seed nor an import likes company.
        corpus_or_not = None if "--data" in arguments else corpus
        return lambda: desk.smoke("--max-steps", "12", *arguments, corpus=corpus_or_not)

    wanted = asked_for(request)
    return side_by_side({name: job(name) for name in PAIRS if name in wanted})


@pytest.fixture
def outcome(request: pytest.FixtureRequest, runs: dict[str, Future[Outcome]]) -> Outcome:
    """The run that `of` names."""
    return runs[request.param].result()


@of(*PAIRS)
def test_a_smoke_of_a_real_directory_is_a_go(outcome: Outcome) -> None:
    assert outcome.rc == 0, outcome.said
    assert "✔ GO" in outcome.out
    assert len(outcome.run.events("step")) == 12


@of(*PAIRS)
def test_ce_and_kd_each_fall(outcome: Outcome) -> None:
    first, last = outcome.run.events("eval")[0], outcome.run.events("eval")[-1]
    assert last["ce"] < first["ce"]
    assert last["kd"] < first["kd"]


@of("qwen2_sharded")
def test_the_sharded_teacher_really_was_in_shards(outcome: Outcome) -> None:
    teacher = outcome.evidence.parent / "here" / "teacher"
    assert (teacher / "model.safetensors.index.json").exists()
    assert len(list(teacher.glob("*.safetensors"))) > 1


@of("padded_vocabulary")
def test_a_teacher_with_more_rows_is_cut_to_the_students(outcome: Outcome) -> None:
    [line] = [event["message"] for event in outcome.run.events("log") if "vocabulary" in event["message"]]
    for words in ("152,064", "151,936", "PASS", "300 ids agree", "cut to 151,936"):
        assert words in line


@of("some_layers")
def test_a_student_of_some_layers_starts_from_the_teachers_weights(outcome: Outcome) -> None:
    # One trained layer of several knows something already; random weights would cost log(2048) = 7.6.
    run = outcome.run
    assert json.loads((run.path / "exit.json").read_text())["exit_code"] == 0
    assert "layers:" in (run.path / "config.yaml").read_text()
    assert run.events("eval")[0]["agreement"] > 0
