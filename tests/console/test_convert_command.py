"""`kdconsole convert`: an APR file to a Hugging Face directory and back, whole or not there; a smoke with two such."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from console.cli import cli
from engine import formats
from engine.apr import read_apr
from engine.errors import ExitCode, KdError
from engine.sniff import read_safetensors_header

TEACHER = Path(formats.__file__).parent / "assets" / "teacher"
WITH_IT = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
SOON = 60.0


def call(*given: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, given)])


def made(*given: str | Path) -> Result:
    result = call(*given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == ExitCode.OK
    return result


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


def test_a_directory_goes_to_apr_and_back_without_a_changed_byte(tmp_path: Path) -> None:
    result = made(TEACHER, tmp_path / "t" / "teacher.apr")
    assert "teacher.apr: whole, and every tensor read back" in result.stdout
    assert "38 (38 BF16), 2,592,000 parameters" in result.stdout
    assert names(tmp_path / "t") == {"teacher.apr"} | WITH_IT
    made(tmp_path / "t" / "teacher.apr", tmp_path / "back")
    assert names(tmp_path / "back") == {"model.safetensors", "config.json"} | WITH_IT
    for name in {"model.safetensors"} | WITH_IT:
        assert (tmp_path / "back" / name).read_bytes() == (TEACHER / name).read_bytes()
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", TEACHER))
    assert {key: value for key, value in theirs.items() if key != "transformers_version"} == ours


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_a_dtype_can_be_chosen_in_both_directions(tmp_path: Path, dtype: str, stored: str) -> None:
    made(TEACHER, tmp_path / "x.apr", "--dtype", dtype)
    assert {tensor.dtype for tensor in read_apr(tmp_path / "x.apr").tensors.values()} == {stored}
    made(tmp_path / "x.apr", tmp_path / "back", "--dtype", dtype)
    header = read_safetensors_header(tmp_path / "back" / "model.safetensors")
    assert {entry.dtype for entry in header.values()} == {stored}
    named = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == named


def test_json_and_quiet(tmp_path: Path) -> None:
    result = made(TEACHER, tmp_path / "x.apr", "--json", "--quiet")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["schema"] == "kdconsole.convert/1"
    assert (document["kind"], document["tensors"], document["dtypes"]) == ("apr", 38, {"BF16": 38})
    assert document["path"] == str(tmp_path / "x.apr")
    assert document["total_bytes"] == (tmp_path / "x.apr").stat().st_size
    assert "writing 38 tensors" in made(TEACHER, tmp_path / "y" / "y.apr").stderr


def refused(said: str, *given: str | Path) -> None:
    result = call(*given)
    assert isinstance(result.exception, KdError)
    assert result.exception.exit_code == ExitCode.USAGE
    assert said in str(result.exception)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for there in ("file", "link", "."):
        refused("is there already", TEACHER, tmp_path / there)
    made(TEACHER, tmp_path / "x.apr")
    before = (tmp_path / "x.apr").stat()
    refused("is there already", TEACHER, tmp_path / "x.apr")
    assert (tmp_path / "x.apr").stat() == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tokenizer_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("is there, and is not the one of this model", TEACHER, tmp_path / "x.apr")
    assert names(tmp_path) == {"tokenizer.json"}
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_what_is_no_model_or_has_no_place_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "gguf").write_bytes(b"GGUF" + bytes(60))
    refused("a GGUF file", tmp_path / "gguf", tmp_path / "out")
    (tmp_path / "bad.apr").write_bytes(b"APR\0\x02\0" + bytes(100))
    refused("the header says CRC-32", tmp_path / "bad.apr", tmp_path / "out")
    refused("no such directory", tmp_path / "none", tmp_path / "out")
    refused("is no directory", TEACHER, tmp_path / "a" / "b" / "x.apr")
    assert names(tmp_path) == {"gguf", "bad.apr"}


def test_the_built_in_teacher_is_a_source_and_the_student_has_no_weights(tmp_path: Path) -> None:
    made("builtin:teacher", tmp_path / "x.apr")
    made(TEACHER, tmp_path / "y.apr")
    assert (tmp_path / "x.apr").read_bytes() == (tmp_path / "y.apr").read_bytes()
    refused("builtin:student: has no weights to convert", "builtin:student", tmp_path / "z.apr")
    refused("builtin:other: no such built-in model", "builtin:other", tmp_path / "z.apr")
    assert not (tmp_path / "z.apr").exists()


@pytest.mark.parametrize(
    ("kind", "said"), [("gpt2", "model_type gpt2: not written"), ("qwen2", "has no tensor model.embed_tokens.weight")]
)
def test_a_model_without_the_embedding_that_we_know_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((TEACHER / "config.json").read_text()) | {"model_type": kind, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(said, model, tmp_path / "x.apr")
    assert names(tmp_path) == {"model"}


def test_an_error_is_a_json_document_too(tmp_path: Path) -> None:
    result = call(tmp_path / "none", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["exit_code"] == ExitCode.USAGE


def test_what_was_not_written_as_it_is_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import convert as module

    original = module.write_new  # type: ignore[attr-defined]

    def lossy(path: Path, chunks: object) -> str:
        told = original(path, chunks)  # type: ignore[arg-type]
        if path.suffix == ".safetensors":
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            path.write_bytes(raw)
        return told

    made(TEACHER, tmp_path / "x.apr")
    monkeypatch.setattr(module, "write_new", lossy)
    refused("1 of 38 tensors were not written as they are", tmp_path / "x.apr", tmp_path / "out")
    assert names(tmp_path) == {"x.apr"} | WITH_IT


@pytest.mark.parametrize("kind", ["apr", "directory"])
def test_a_source_that_is_cut_meanwhile_is_an_error_and_no_signal(tmp_path: Path, kind: str) -> None:
    made(TEACHER, tmp_path / "m" / "x.apr")
    made(tmp_path / "m" / "x.apr", tmp_path / "d")
    cut = tmp_path / "m" / "x.apr" if kind == "apr" else tmp_path / "d" / "model.safetensors"
    source = cut if kind == "apr" else cut.parent
    program = (
        "import os, pathlib, engine.convert as c\n"
        f"def tell(text): text.startswith('writing') and os.truncate({str(cut)!r}, 4096)\n"
        f"try: c.convert(pathlib.Path({str(source)!r}), pathlib.Path({str(tmp_path / 'o' / 'y')!r}), 'auto', tell)\n"
        "except c.ModelError as error: print(error)\n"
    )
    (tmp_path / "o").mkdir()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "its size was changed since it was looked at" in done.stdout
    assert not names(tmp_path / "o")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    hold = (
        "import engine.convert as c, pathlib, time\n"
        "def held(*a, **k):\n"
        f"    pathlib.Path({str(tmp_path / 'reached')!r}).write_text('')\n"
        "    time.sleep(600)\n"
        "c._require_same = held\n"
        f"import sys; sys.argv = ['kdconsole', 'convert', {str(TEACHER)!r}, {str(tmp_path / 'out' / 'x.apr')!r}]\n"
        "from console.cli import main; main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stderr=subprocess.PIPE) as child:
        until = time.monotonic() + SOON
        while not (tmp_path / "reached").exists():
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        assert (tmp_path / ".out.partial" / "x.apr").stat().st_size > 5_000_000
        child.send_signal(number)
        child.communicate(timeout=SOON)
    assert child.returncode == ExitCode.INTERRUPTED
    assert names(tmp_path) == {"reached"}


def test_a_smoke_takes_an_apr_file_as_its_teacher_and_another_as_its_student(tmp_path: Path) -> None:
    made(TEACHER, tmp_path / "t" / "teacher.apr")
    made(TEACHER, tmp_path / "s" / "student.apr", "--dtype", "fp32")
    small = ["data.limit_bytes=200000", "data.heldout_windows=4", "train.sequence=32", "train.batch=2"]
    small += ["student.path=s/student.apr", "student.init=random"]
    command = [str(Path(sys.executable).with_name("kdconsole")), "--headless", "smoke", "--json", "--quiet"]
    command += [
        "--teacher",
        "t/teacher.apr",
        "--max-steps",
        "12",
        *(word for each in small for word in ("--set", each)),
    ]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, timeout=300)
    document = json.loads(done.stdout)
    found = {each["id"]: each["verdict"] for each in document["verdicts"]}
    assert found["F-DISTILL-TEACHER-002"] == "PASS"
    assert found["FT-SMOKE-001"] == "PASS"
    assert found["F-DISTILL-V2-001-TEACHER-DIVERGENCE"] == "PASS"
    assert done.returncode in (ExitCode.OK, ExitCode.FAILED)  # a loss of so few tokens may rise


def test_the_home_of_nobody_is_no_such_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["convert", "~nobodyofthisname/x.apr", str(tmp_path / "x")])
    assert "~nobodyofthisname/x.apr: no such directory" in str(result.exception)
