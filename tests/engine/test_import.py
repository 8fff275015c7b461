from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import Teacher
from engine.errors import KdError, ModelError
from engine.formats import inspect_model_dir
from engine.gguf_file import read_facts
from engine.import_card import licence_of, model_card
from engine.import_model import RECORD, Imported, Request, import_model
from engine.import_stage import STAGES
from engine.language_check import Language, check_language
from engine.models import load_teacher
from tests.gguf_rig import EOS, Tiny, make_tiny, need_gguf, write_gguf
from tests.nursery import Nursery

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    pytest.importorskip("gguf", reason="the packages of kdconsole[import] are not installed")
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def forked(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that need torch are forked."""
    monkeypatch.setenv("PYTHONPATH", nursery.python_path)


@pytest.fixture(scope="session")
def imported(tiny: Tiny, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """A GGUF file's import, made in place of another, where a third one was killed."""
    root = tmp_path_factory.mktemp("imports")
    left, target = root / ".made.partial", root / "made"
    left.mkdir()
    (left / "half.safetensors").write_text("half")
    target.mkdir()
    old = {"schema": "kdconsole.import/1", "files": {"old.safetensors": "0"}, "source": {"sha256": "0"}}
    (target / RECORD).write_text(json.dumps(old))
    (target / "old.safetensors").write_text("old")
    assert "--force" in refusal(Request(source=tiny.gguf, target=target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", nursery.python_path)
        return import_model(Request(source=tiny.gguf, target=target, force=True))


def stage(name: str, partial: Path, source: Path, **asked: Any) -> dict[str, Any]:
    """One stage in this process, which has torch already."""
    partial.mkdir(exist_ok=True)
    given = {"source": str(source), "partial": str(partial), "dtype": "fp32", "gguf": True, "untrained": False, **asked}
    return STAGES[name](given, lambda text: None)


def facts_of(gguf: Path) -> dict[str, Any]:
    # Not by the stage `look`, whose memory limit would stay with this process.
    told: dict[str, Any] = msgspec.to_builtins(read_facts(gguf))
    return told


def refusal(request: Request) -> str:
    """Why an import is refused, with nothing left of it."""
    before = sorted(os.listdir(request.target.parent))
    with pytest.raises(KdError) as caught:
        import_model(request)
    assert caught.value.exit_code == 2
    assert sorted(os.listdir(request.target.parent)) == before
    return str(caught.value)


# What an import makes


@need_gguf
def test_a_gguf_file_becomes_a_directory_that_a_run_takes(tiny: Tiny, imported: Imported) -> None:
    assert not imported.already
    assert imported.path.name == "made"
    assert os.listdir(imported.path.parent) == ["made"]  # what a killed import left is gone
    assert not (imported.path / "old.safetensors").exists()
    files = inspect_model_dir(imported.path, "teacher")
    assert (files.model_type, files.vocab_size, files.layers) == ("llama", 320, 2)
    assert files.tokenizer_dir == imported.path
    stored = load_file(imported.path / "model.safetensors")
    assert set(stored) == set(tiny.state)
    for name, tensor in stored.items():
        wanted = torch.from_numpy(tiny.state[name])
        assert tensor.dtype == torch.bfloat16
        assert float((tensor.float() - wanted).norm() / wanted.norm()) < 0.02, name  # 8 bits, then bfloat16
    assert load_teacher(Teacher(path=str(imported.path)), "cpu", torch.float32).vocab == 320


@need_gguf
def test_the_tokenizer_is_the_files_own_and_nothing_more(tiny: Tiny, imported: Imported) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(imported.path, local_files_only=True)
    theirs = AutoTokenizer.from_pretrained(tiny.directory, local_files_only=True)
    text = "def add(a, b):\n    return a + b  # 12,345 × 日本\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert (len(ours), ours.eos_token, ours.eos_token_id) == (320, EOS, 0)


@need_gguf
def test_the_record_and_the_card_say_where_it_comes_from(tiny: Tiny, imported: Imported) -> None:
    record = json.loads((imported.path / RECORD).read_text())
    assert record == imported.record
    source = record["source"]
    assert source["sha256"] == hashlib.sha256(tiny.gguf.read_bytes()).hexdigest()
    assert source["path"] == str(tiny.gguf)
    assert source["states"]["licence"] == "mit"
    assert source["states"]["tensors"] == {"Q8_0": 16, "F32": 5}
    assert source["states"]["values"] == record["parameters"] == sum(array.size for array in tiny.state.values())
    assert all(
        hashlib.sha256((imported.path / name).read_bytes()).hexdigest() == told
        for name, told in record["files"].items()
    )
    assert {*record["files"], RECORD} == set(os.listdir(imported.path))
    card = (imported.path / "README.md").read_text()
    assert "\nlicense: mit\n" in card
    assert source["sha256"] in card
    assert "\x1b" not in card
    assert "name_or_path" not in (imported.path / "config.json").read_text()


@need_gguf
def test_what_it_says_of_plain_text_is_measured_beside_known_bad_models(imported: Imported) -> None:
    nats = imported.record["nats_per_token"]
    assert nats["chance"] == pytest.approx(math.log(320))
    mean = (nats["english"] + nats["python"]) / 2
    assert mean < 1
    assert [name for name in nats if name.startswith("control")]
    assert all(mean < value for name, value in nats.items() if name.startswith("control"))


@need_gguf
def test_a_directory_keeps_every_bit(tiny: Tiny, tmp_path: Path) -> None:
    made = tmp_path / "made"
    stage("write", made, tiny.directory, gguf=False)
    assert stage("check", made, tiny.directory, facts=None)["remarks"] == []
    stored = load_file(made / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in stored.items()} == {
        name: array.tobytes() for name, array in tiny.state.items()
    }
    assert (made / "tokenizer.json").read_bytes() == (tiny.directory / "tokenizer.json").read_bytes()
    inspect_model_dir(made, "teacher")


# A second time


@need_gguf
def test_the_same_import_again_writes_nothing(tiny: Tiny, imported: Imported) -> None:
    before = imported.path.stat()
    again = import_model(Request(source=tiny.gguf, target=imported.path))
    assert again.already
    assert again.record == imported.record
    assert imported.path.stat().st_ino == before.st_ino


@need_gguf
def test_what_is_another_import_or_none_stays(tiny: Tiny, imported: Imported, tmp_path: Path) -> None:
    assert "with other options" in refusal(Request(source=tiny.gguf, target=imported.path, dtype="fp32"))
    changed = imported.path / "config.json"
    config = changed.read_bytes()
    try:
        changed.write_bytes(config + b"\n")
        assert "config.json is not what the import wrote" in refusal(Request(source=tiny.gguf, target=imported.path))
    finally:
        changed.write_bytes(config)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "no import" in refusal(Request(source=tiny.gguf, target=mine, force=True))
    (mine / RECORD).write_text(json.dumps({"schema": "kdconsole.import/1", "files": {}}))
    assert "thesis.tex" in refusal(Request(source=tiny.gguf, target=mine, force=True))
    assert (mine / "thesis.tex").read_text() == "years of work"


@need_gguf
def test_two_imports_into_one_place_do_not_meet(tiny: Tiny, tmp_path: Path) -> None:
    partial = tmp_path / ".made.partial"
    partial.mkdir()
    other = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another import" in refusal(Request(source=tiny.gguf, target=tmp_path / "made"))
    finally:
        os.close(other)


# A model that was read wrongly


@need_gguf
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_in_the_wrong_order_are_caught_by_what_the_model_says(
    tiny: Tiny, tmp_path: Path, architecture: str
) -> None:
    model = tiny if architecture == "llama" else make_tiny(tmp_path, model_type="qwen2")
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    write_gguf(good, model.directory, model.state, architecture=architecture)
    write_gguf(bad, model.directory, model.state, architecture=architecture, rows="twice")
    stage("write", tmp_path / "a", good)
    assert stage("check", tmp_path / "a", good, facts=facts_of(good))["remarks"] == []
    stage("write", tmp_path / "b", bad)
    with pytest.raises(ModelError, match=r"rows stand in the wrong order: .* with rows out of llama\.cpp's order"):
        stage("check", tmp_path / "b", bad, facts=facts_of(bad))
    told = stage("check", tmp_path / "b", bad, facts=facts_of(bad), untrained=True)
    assert "wrong order" in told["remarks"][0]


@need_gguf
@pytest.mark.usefixtures("forked")
def test_a_model_that_knows_nothing_is_refused_and_nothing_of_it_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    state = {
        name: (0.1 * generator.standard_normal(array.shape)).astype(np.float32) if array.ndim > 1 else array
        for name, array in tiny.state.items()
    }
    gguf = write_gguf(tmp_path / "noise.gguf", tiny.directory, state)
    told = refusal(Request(source=gguf, target=tmp_path / "made"))
    assert "does not predict text" in told
    assert "chance is 5.77" in told
    assert "--untrained" in told


def test_the_language_of_a_model_is_judged_against_chance_and_controls() -> None:
    texts = {"english": 6.5, "python": 5.0}
    assert Language(chance=10.0, texts=texts, controls={"turned": 6.0}).problem == ""
    assert "turned" in Language(chance=10.0, texts=texts, controls={"turned": 5.7, "other": 6.0}).problem
    assert "does not predict" in Language(chance=10.0, texts={"english": 6.5, "python": 6.1}).problem
    assert "does not predict" in Language(chance=10.0, texts={"english": math.inf, "python": math.inf}).problem


@need_gguf
def test_the_controls_leave_the_model_as_it_was(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    teacher = load_teacher(Teacher(path=str(tiny.directory)), "cpu", torch.float32)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny.directory, local_files_only=True)
    found = check_language(teacher.model, lambda text: list(tokenizer(text)["input_ids"]), teacher.vocab)
    assert len(found.controls) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())


# Bad input


@need_gguf
@pytest.mark.parametrize("kept", [6, 100, 4_000, 30_000, -1])
def test_a_file_that_was_cut_short_is_told(tiny: Tiny, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.gguf.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf: begins as a GGUF file and is cut short or damaged"):
        read_facts(cut)


@need_gguf
def test_a_header_that_lies_about_its_lengths_ends_early(tmp_path: Path) -> None:
    liar = tmp_path / "liar.gguf"
    key = b"general.architecture"
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**40).to_bytes(8, "little")
    start = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    liar.write_bytes(start + len(key).to_bytes(8, "little") + key + array + bytes(1_000))
    with pytest.raises(ModelError, match="promises more"):
        read_facts(liar)


@need_gguf
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokenizer": False}, "has no tokenizer in it"),
        ({"extra": {"general.type": "mmproj"}}, "of another kind: mmproj"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "stretches its positions"),
    ],
)
def test_a_gguf_file_that_cannot_be_a_teacher_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    gguf = write_gguf(tmp_path / "no.gguf", tiny.directory, tiny.state, **options)
    assert why in refusal(Request(source=gguf, target=tmp_path / "made"))


@need_gguf
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"architecture": "wavenet"}, "transformers cannot make a model of it"),
        ({"leave_out": "model.layers.1.mlp.up_proj.weight"}, "missing: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_tensors_that_are_not_the_architectures_are_refused(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    gguf = write_gguf(tmp_path / "no.gguf", tiny.directory, tiny.state, **options)
    with pytest.raises(ModelError, match=why):
        stage("write", tmp_path / "a", gguf)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<!DOCTYPE html><p>log in", "a web page"),
        (b"\x80\x04\x95 pickle", "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
        (b"", "an empty file"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "a safetensors file"),
    ],
)
def test_another_format_is_told_from_its_first_bytes(tmp_path: Path, content: bytes, why: str) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    assert why in refusal(Request(source=source, target=tmp_path / "made"))


def test_a_place_that_cannot_be_used_is_told_first(tmp_path: Path) -> None:
    source = tmp_path / "none.gguf"
    assert "no such file" in refusal(Request(source=source, target=tmp_path / "made")).lower()
    with pytest.raises(ModelError, match="is no directory"):
        import_model(Request(source=source, target=tmp_path / "a" / "b"))
    source.write_bytes(b"GGUF")
    assert "is there and no directory" in refusal(Request(source=source, target=source))
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "not writable" in refusal(Request(source=source, target=tmp_path / "locked" / "made"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@need_gguf
def test_a_disk_without_room_is_told_with_both_figures(tiny: Tiny, small_disk: Path) -> None:
    told = refusal(Request(source=tiny.gguf, target=small_disk / "made"))
    needed = 2 * sum(array.size for array in tiny.state.values()) + (64 << 20)
    assert f"{needed:,} bytes are needed on that disk and 2,097,152 are free" in told


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    program = "import sys; sys.modules['gguf'] = None; from engine.import_stage import main; main(['look'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({"source": str(source)}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "pip install 'kdconsole[import]'" in json.loads(done.stdout)["error"]


def test_nothing_of_an_import_loads_torch_where_a_screen_is() -> None:
    program = "import sys, engine.import_model, engine.import_stage; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


# The card


@pytest.mark.parametrize(
    ("stated", "front"),
    [("apache-2.0", "apache-2.0"), ("", "unknown"), ("mit\nevil: true", "other"), ("[a](http://b)", "other")],
)
def test_a_licence_stays_one_word_of_the_card(stated: str, front: str) -> None:
    record = {"source": {"format": "GGUF", "states": {"licence": stated, "name": "```\n<script>"}}, "dtype": "bf16"}
    card = model_card(record)
    assert f"\nlicense: {front}\n---" in card
    assert "\nevil" not in card
    assert "\n```\n<script>" not in card


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\nText", "mit"),
        ("# No front matter", ""),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\n: : {\n---\n", ""),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", ""),
    ],
)
def test_a_licence_is_read_from_a_models_readme(tmp_path: Path, text: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path / "README.md") == licence
    assert licence_of(tmp_path / "NONE.md") == ""
