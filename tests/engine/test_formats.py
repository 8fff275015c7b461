"""Model files and directories, told from bounded reads; every wrong one has its own message."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.formats import (
    CONFIG_CAP,
    HEADER_CAP,
    Format,
    identify,
    inspect_model_dir,
    read_safetensors_header,
    resolve_builtin,
    same_files,
)
from engine.text import clean

CONFIG = {"model_type": "qwen2", "vocab_size": 4, "hidden_size": 2, "num_hidden_layers": 1}
TENSORS = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pytorch_model/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("pytorch_model/data/0", bytes(64))
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("config.json", "{}")
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"

WRONG = [
    ("APR container", b"APR\0" + bytes(60), Format.APR, "APR container"),
    ("APRN container", b"APRN" + bytes(60), Format.APR, "APR container"),
    ("APR1 container", b"APR1" + bytes(60), Format.APR, "APR container"),
    ("APR2 container", b"APR2" + bytes(60), Format.APR, "APR container"),
    ("GGUF", b"GGUF\x03\0\0\0" + bytes(60), Format.GGUF, "GGUF"),
    ("pickle", pickle.dumps({"a": 1}, protocol=2), Format.PICKLE, "Python pickle"),
    ("pickle 5", pickle.dumps({"a": 1}, protocol=5), Format.PICKLE, "never loaded"),
    ("torch.save", torch_zip(), Format.TORCH, "torch.save"),
    ("zip", plain_zip(), Format.ZIP, "zip archive"),
    ("LFS pointer", LFS, Format.LFS, "git lfs pull"),
    ("web page", b"\n<!DOCTYPE html><html><head><title>Sign in</title>", Format.HTML, "web page"),
    ("XML error", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", Format.HTML, "web page"),
    ("JSON error", b'{"error":"Repository not found"}', Format.JSON, "JSON text"),
    ("plain text", b"Invalid username or password.", Format.TEXT, "plain text"),
    ("text with a brace at byte 8", b"import {x} from 'y'", Format.TEXT, "plain text"),
    ("empty", b"", Format.EMPTY, "an empty file"),
    ("zero bytes", bytes(4096), Format.ZEROS, "zero bytes"),
    ("five bytes", b"\x01\x02\x03\x04\xff", Format.SHORT, "too short"),
    ("unknown", b"\x93NUMPY\x01\x00v\x00", Format.UNKNOWN, "93 4e 55 4d 50 59 01 00"),
]


def model_dir(path: Path, weights: bytes | None = None, config: Any = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    (path / "model.safetensors").write_bytes(safetensors(TENSORS) if weights is None else weights)
    return path


def message(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        inspect_model_dir(path, "student", **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("content", "found", "says"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_each_wrong_format_is_identified_and_refused_in_its_own_words(
    tmp_path: Path, content: bytes, found: Format, says: str
) -> None:
    directory = model_dir(tmp_path / "model", content)
    file = directory / "model.safetensors"
    assert identify(file) is found
    text = message(directory)
    assert str(file) in text
    assert says in text
    assert "; expected " in text
    assert text.count("; ") >= 2, "what, expected, what to do"
    # The same file given in place of a directory is named too.
    assert says in message(file)


def test_no_two_wrong_formats_share_a_message() -> None:
    assert len({member.value for member in Format}) == len(Format)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (safetensors({}, b""), "names no tensor"),
        (safetensors(b"{}" + b" " * 190, b""), "200 bytes, a valid safetensors header that names no tensor"),
        (safetensors({"__metadata__": {"format": "pt"}}, b""), "names no tensor"),
        (safetensors(TENSORS, bytes(7)), "truncated: 7 bytes of tensor data, its header promises 16"),
        (safetensors(TENSORS, bytes(17)), "1 bytes after the last tensor"),
        (safetensors(TENSORS)[:40], "truncated: its header should take"),
        (safetensors(TENSORS, length=HEADER_CAP + 1), "16,777,217 bytes long; expected at most 16,777,216"),
        (safetensors(b"{nonsense"), "not JSON"),
        (safetensors(b"{" + b'"a":{' * 5000), "not JSON"),
        (safetensors(b'{"a":1,"a":2}'), "a stands twice"),
        (safetensors(json.dumps(TENSORS)[:-1].encode() + b"," + json.dumps(TENSORS)[1:].encode()), "a stands twice"),
        (safetensors({"a": 3}), "tensor a: its entry"),
        (safetensors({"a": {**TENSORS["a"], "dtype": "Q4_K"}}), "unknown dtype Q4_K"),
        (safetensors({"a": {**TENSORS["a"], "dtype": ["F32"]}}), "unknown dtype"),
        (safetensors({"a": {**TENSORS["a"], "shape": [2, -2]}}), "bad shape"),
        (safetensors({"a": {**TENSORS["a"], "shape": [2, True]}}), "bad shape"),
        (safetensors({"a": {**TENSORS["a"], "shape": [2**62] * 64}}), "16 bytes stored"),
        (safetensors({"a": {**TENSORS["a"], "shape": [3, 2]}}), "16 bytes stored, F32 of shape [3, 2] takes 24"),
        (safetensors({"a": {**TENSORS["a"], "data_offsets": [16, 0]}}), "bytes stored"),
        (safetensors({"a": {**TENSORS["a"], "data_offsets": [4, 20]}}, bytes(20)), "a gap before it"),
        (safetensors({"a": TENSORS["a"], "b": TENSORS["a"]}), "an overlap"),
    ],
)
def test_a_broken_safetensors_file_is_told_from_its_header(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_safetensors_header(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_header_is_read_with_dtype_shape_and_offsets(tmp_path: Path) -> None:
    file = tmp_path / "x"
    header = {
        **TENSORS,
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
        "__metadata__": {"format": "pt"},
    }
    file.write_bytes(safetensors(header, bytes(18)))
    assert read_safetensors_header(file) == {"a": ("F32", (2, 2), 0, 16), "b": ("BF16", (), 16, 18)}


def test_a_tensor_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(safetensors({"\x1b[2Jevil\u202e\n": 3}))
    with pytest.raises(ModelError) as caught:
        read_safetensors_header(file)
    assert str(caught.value).isprintable()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.builds(safetensors, st.binary(max_size=100).map(lambda raw: b"{" + raw), st.binary(max_size=20)),
        st.builds(
            safetensors,
            st.dictionaries(
                st.text(max_size=5),
                st.one_of(
                    st.none(),
                    st.fixed_dictionaries(
                        {
                            "dtype": st.sampled_from(["F32", "F4", "BOOL", "nope", 3]),
                            "shape": st.lists(st.integers(-1, 2**70) | st.floats(), max_size=70),
                            "data_offsets": st.lists(st.integers(-5, 2**65), min_size=1, max_size=3),
                        }
                    ),
                ),
            ),
            st.binary(max_size=20),
        ),
    )
)
def test_no_bytes_make_the_header_reader_raise_anything_but_a_model_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "fuzz"
    file.write_bytes(content)
    said = ""
    try:
        assert read_safetensors_header(file)
    except ModelError as error:
        said = str(error)
    assert clean(said) == said


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), change=st.binary(min_size=1, max_size=4), cut=st.integers(0, 200))
def test_no_change_of_a_good_file_makes_the_header_reader_raise_anything_but_a_model_error(
    tmp_path: Path, at: int, change: bytes, cut: int
) -> None:
    good = safetensors({**TENSORS, "b": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}}, bytes(22))
    at %= len(good)
    file = tmp_path / "fuzz"
    file.write_bytes((good[:at] + change + good[at + len(change) :])[: len(good) - cut % 40])
    try:
        entries = read_safetensors_header(file)
    except ModelError:
        return
    assert sum(entry.end - entry.begin for entry in entries.values()) <= file.stat().st_size


def test_a_sound_directory_is_described_from_its_config_and_headers(tmp_path: Path) -> None:
    config = {**CONFIG, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    directory = model_dir(tmp_path / "model", config=config)
    (directory / "tokenizer.json").write_text("{}")
    files = inspect_model_dir(directory, "teacher")
    assert files.config == config
    assert (files.model_type, files.architecture, files.tied) == ("qwen2", "Qwen2ForCausalLM", True)
    assert (files.vocab_size, files.hidden_size, files.layers, files.parameters) == (4, 2, 1, 4)
    assert files.weights == [directory / "model.safetensors"]
    assert files.total_bytes == (directory / "model.safetensors").stat().st_size
    assert files.tokenizer_dir == directory


def test_a_random_start_needs_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = inspect_model_dir(tmp_path, "student", need_weights=False)
    assert (files.weights, files.parameters, files.tokenizer_dir) == ([], 0, None)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{not json", "config.json: not JSON"),
        ("[1, 2]", "config.json: JSON, but not an object"),
        ("", "config.json: an empty file"),
        ("<html><body>404</body></html>", "config.json: a web page"),
        ("{" + " " * CONFIG_CAP + "}", "config.json: 4,194,306 bytes; expected at most 4,194,304"),
        ({"vocab_size": 4}, "config.json: no model_type"),
        ({**CONFIG, "vocab_size": "many"}, "config.json: vocab_size: many; expected a positive integer"),
        ({**CONFIG, "hidden_size": 0}, "config.json: hidden_size: 0"),
        ({"model_type": "qwen2", "vocab_size": 4, "hidden_size": 2}, "config.json: no num_hidden_layers"),
        ({**CONFIG, "quantization_config": {"quant_method": "gptq"}}, "quantised weights (quantization_config: gptq)"),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, config: Any, says: str) -> None:
    assert says in message(model_dir(tmp_path / "model", config=config))


def test_a_missing_directory_a_missing_config_and_missing_weights_are_told_apart(tmp_path: Path) -> None:
    assert "no such directory" in message(tmp_path / "nothing")
    assert "has no config.json" in message(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "has no config.json (model.gguf in it is a GGUF file)" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "has no weights (model.gguf in it is a GGUF file)" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(torch_zip())
    text = message(tmp_path)
    assert "pytorch_model.bin: a PyTorch pickle archive" in text
    assert "save_pretrained" in text


def test_a_safetensors_file_given_for_its_directory_says_which_directory_to_give(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "model")
    assert message(directory / "model.safetensors").endswith(f"give {directory}")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "model")
    (directory / "adapter_config.json").write_text("{}")
    assert "LoRA" in message(directory)


def sharded(path: Path, weight_map: Any, **shards: bytes) -> Path:
    directory = model_dir(path)
    (directory / "model.safetensors").unlink()
    for name, content in shards.items():
        (directory / f"{name}.safetensors").write_bytes(content)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_shards_are_read_in_order_and_counted_together(tmp_path: Path) -> None:
    other = safetensors({"b": TENSORS["a"]})
    directory = sharded(
        tmp_path / "m", {"b": "two.safetensors", "a": "one.safetensors"}, one=safetensors(TENSORS), two=other
    )
    files = inspect_model_dir(directory, "teacher")
    assert [file.name for file in files.weights] == ["one.safetensors", "two.safetensors"]
    assert files.index == directory / "model.safetensors.index.json"
    assert files.parameters == 8


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../b", "sub/x.safetensors", "..", "", "C:x", "..\\x", "a\0b"],
)
def test_an_index_that_names_a_path_outside_of_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.safetensors").write_bytes(safetensors(TENSORS))
    assert "outside of its directory" in message(sharded(tmp_path / "m", {"a": name}))


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({}, "no weight_map"),
        (["one.safetensors"], "no weight_map"),
        ({"a": 3}, "no weight_map"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "1 of 2 shards are missing, the first is two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "1 of 2 tensors are not where it says, the first is b"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, weight_map: Any, says: str) -> None:
    assert says in message(sharded(tmp_path / "m", weight_map, one=safetensors(TENSORS)))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a": "one.safetensors", "b": "two.safetensors"}
    content = safetensors(TENSORS)
    assert "stands in one.safetensors too" in message(sharded(tmp_path / "m", both, one=content, two=content))


def test_a_fifo_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    assert "not a regular file" in message(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    directory = model_dir(tmp_path / "model")
    (directory / "model.safetensors").chmod(0)
    assert "cannot be read: Permission denied" in message(directory)


def weighing(path: Path, *weights: bytes) -> Path:
    """A model directory with these tensors' bytes, each in a file of its own where there are several."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    if len(weights) == 1:
        (path / "model.safetensors").write_bytes(safetensors(TENSORS, weights[0]))
        return path
    for number, data in enumerate(weights):
        entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
        (path / f"part{number}.safetensors").write_bytes(safetensors({f"t{number}": entry}, data))
    places = {f"t{number}": f"part{number}.safetensors" for number in range(len(weights))}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def test_the_same_weight_files_are_told_from_others(tmp_path: Path) -> None:
    ones, twos = bytes([1] * 16), bytes([2] * 16)
    made = {
        "one": weighing(tmp_path / "one", ones),
        "copy": weighing(tmp_path / "copy", ones),
        "other": weighing(tmp_path / "other", ones[:-1] + twos[-1:]),
        "parts": weighing(tmp_path / "parts", ones, twos),
        "same parts": weighing(tmp_path / "same parts", ones, twos),
        "other parts": weighing(tmp_path / "other parts", ones, ones),
    }
    (tmp_path / "link").symlink_to(tmp_path / "one")
    made["link"] = tmp_path / "link"
    found = {name: inspect_model_dir(path, "student") for name, path in made.items()}
    equal = {("one", "copy"), ("one", "link"), ("copy", "link"), ("parts", "same parts")}
    for first in found:
        for second in found:
            wanted = first == second or bool({(first, second), (second, first)} & equal)
            assert same_files(found[first], found[second]) == wanted, (first, second)


def test_weights_that_were_not_looked_at_are_nobodys(tmp_path: Path) -> None:
    random = inspect_model_dir(weighing(tmp_path / "one", bytes(16)), "student", need_weights=False)
    assert not same_files(random, random)


def test_builtin_names_resolve_into_the_package_and_others_are_refused() -> None:
    assert resolve_builtin("builtin:student").parts[-2:] == ("assets", "student")
    assert resolve_builtin("some/dir") == Path("some/dir")
    with pytest.raises(ModelError, match="builtin:teachr: no such built-in model"):
        resolve_builtin("builtin:teachr")


def test_formats_and_vocabulary_import_neither_torch_nor_transformers() -> None:
    code = "import sys, engine.formats, engine.vocabulary; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "safetensors", "numpy"} & set(done.stdout.split())
