"""What a run was made from is told by hash: the real models, as a run loads them."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import load_config
from engine.device import place
from engine.formats import resolve_builtin
from engine.inputs import digests_of, tell_meanwhile
from engine.loading import Loaded, load
from engine.recorder import Recorder
from engine.stream import Event, Inputs, Log, decode_line
from tests.console_rig import write_corpus
from tests.streams import RUN, smoke_contract

STUDENT = "5" * 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    directory = tmp_path_factory.mktemp("loaded")
    shutil.copytree(resolve_builtin("builtin:teacher"), directory / "teacher")
    sets = (f"teacher={directory}/teacher", f"data.path={write_corpus(directory / 'corpus.txt')}")
    config = load_config(None, template="builtin", sets=(*sets, "data.tokenizer=builtin", "train.device=cpu"))
    recorder = Recorder(directory / "events.jsonl", RUN, smoke_contract())
    return load(config, place(config.train), recorder, lambda phase, detail: None, lambda: None)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "events.jsonl", RUN, smoke_contract())
    yield recorder
    recorder.machine.close()


def told(recorder: Recorder, loaded: Loaded, directory: Path) -> list[Event]:
    tell_meanwhile(loaded, STUDENT, recorder).join(30)
    events = map(decode_line, (directory / "events.jsonl").read_bytes().splitlines())
    return [event for event in events if event is not None]


def test_each_input_has_its_own_hash(loaded: Loaded, recorder: Recorder, tmp_path: Path) -> None:
    [event] = told(recorder, loaded, tmp_path)
    assert isinstance(event, Inputs)
    builtin = resolve_builtin("builtin:teacher")
    of_files = {
        name: hashlib.sha256(hashlib.sha256((builtin / file).read_bytes()).digest()).hexdigest()
        for name, file in {"teacher": "model.safetensors", "tokenizer": "tokenizer.json"}.items()
    }
    assert event.digests == {"student": STUDENT, "data": loaded.corpus.digest(), **of_files}


def test_another_teacher_has_another_hash(loaded: Loaded) -> None:
    before = digests_of(loaded)
    assert loaded.teacher is not None
    [weights] = loaded.teacher.files.weights
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        after = digests_of(loaded)
    finally:
        weights.write_bytes(content)
    assert {name for name in before if before[name] != after[name]} == {"teacher"}


def test_a_run_without_a_teacher_has_none(loaded: Loaded) -> None:
    assert set(digests_of(dataclasses.replace(loaded, teacher=None, tokenizer_dir=None))) == {"data"}


def test_a_file_that_is_gone_is_a_warning_and_ends_nothing(loaded: Loaded, recorder: Recorder, tmp_path: Path) -> None:
    gone = dataclasses.replace(loaded, tokenizer_dir=tmp_path / "nowhere")
    [event] = told(recorder, gone, tmp_path)
    assert isinstance(event, Log)
    assert event.level == "warning"
    assert "the inputs' hashes are not known" in event.message
