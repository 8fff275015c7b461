"""The files of a stored teacher: written, found again, read by window, and refused where they are not as written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.config import Teacher
from engine.durable import partial_of
from engine.store_format import (
    MANIFEST,
    PARTIAL,
    Key,
    Manifest,
    StoreError,
    cache_directory,
    find,
    kept_logits,
    layout_digest,
    read_manifest,
    sizes,
    store_directory,
    verify,
    write_manifest,
)
from engine.store_writer import StoreWriter
from engine.teacher_store import StoredTeacher

SEQUENCE, WIDTH, ROWS, HELDOUT = 4, 6, 11, 3
CPU = torch.device("cpu")


def key(**changes: Any) -> Key:
    given: dict[str, Any] = {
        "kind": "hidden",
        "teacher": "a" * 64,
        "teacher_config": "b" * 64,
        "precision": "fp32",
        "tokenizer": "c" * 64,
        "data": "d" * 64,
        "sequence": SEQUENCE,
        "heldout": HELDOUT,
    }
    return Key(**(given | changes))


def begun(of: Key, wanted: int = 10) -> Manifest:
    return Manifest(key=of, created=0.0, teacher="t", vocab=ROWS, width=WIDTH, parameters="e" * 64, wanted=wanted)


def window(index: int) -> Tensor:
    """Hidden states that are told apart by their window."""
    return (torch.arange(SEQUENCE * WIDTH).view(1, SEQUENCE, WIDTH) + 100 * index).to(torch.bfloat16)


def write(cache: Path, of: Key, indices: list[int], per_shard: int = 3, finish: bool = True) -> Path:
    """A store with these windows, in files of so many."""
    directory = store_directory(cache, of)
    writer = StoreWriter(directory, begun(of, len(indices)), 1 << 30)
    try:
        if not writer.has_head:
            writer.put_head(torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH))
            writer.add("heldout", {"hidden": torch.cat([window(-1 - i).float() for i in range(HELDOUT)])})
            writer.flush()
        missing = [index for index in indices if index not in writer.have]
        for begin in range(0, len(missing), per_shard):
            part = missing[begin : begin + per_shard]
            tensors = {"hidden": torch.cat([window(i) for i in part])}
            if of.kind == "topk":
                shape = (len(part), SEQUENCE, 2)
                tensors = {
                    "ids": torch.full(shape, 40_000, dtype=torch.uint16),
                    "logits": torch.tensor(part).view(-1, 1, 1).expand(shape).half(),
                    "tail": torch.zeros(len(part), SEQUENCE),
                }
            writer.add("train", tensors | {"windows": torch.tensor(part)})
            writer.flush()
        writer.verify(lambda done: None)
        if finish:
            writer.finish({"teacher_logit_error": 0.5})
    finally:
        writer.close()
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_every_window_is_read_as_it_was_written(cache: Path) -> None:
    indices = [7, 2, 90, 4, 0, 11, 5]
    write(cache, key(), indices)
    store = StoredTeacher(*find(cache, key()), CPU)
    assert (store.kind, store.vocab, store.heldout_windows, store.name) == ("hidden", ROWS, HELDOUT, "t")
    for wanted in ([7], [5, 90, 2], indices, [0, 0]):
        told = store.read(wanted)
        assert list(told) == ["hidden"]
        assert torch.equal(told["hidden"], torch.cat([window(i) for i in wanted]))
    assert torch.equal(store.heldout(1, 3), torch.cat([window(-2), window(-3)]).float())
    assert torch.equal(store.head, torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH))
    assert store.manifest.measures == {"teacher_logit_error": 0.5}
    assert store.stored([7, 3, 90]) == 2


def test_logits_come_with_ids_that_an_index_takes(cache: Path) -> None:
    of = key(kind="topk", top_k=2, temperature=1.0, vocabulary=50_000)
    write(cache, of, [3, 1, 2])
    told = StoredTeacher(*find(cache, of), CPU).read([2, 3])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in told.items()} == {
        "ids": (torch.int32, (2, SEQUENCE, 2)),
        "logits": (torch.float16, (2, SEQUENCE, 2)),
        "tail": (torch.float32, (2, SEQUENCE)),
    }
    assert int(told["ids"].min()) == 40_000  # above what 16 signed bits hold
    assert told["logits"][:, 0, 0].tolist() == [2, 3]


def test_a_window_that_is_not_stored_is_refused(cache: Path) -> None:
    write(cache, key(), [1, 2])
    store = StoredTeacher(*find(cache, key()), CPU)
    for wanted in ([3], [0, 1], [2, 99]):
        with pytest.raises(StoreError, match="windows are stored; run kdconsole prepare"):
            store.read(wanted)


def test_few_files_are_mapped_at_once_however_many_there_are(cache: Path) -> None:
    directory = write(cache, key(), list(range(90)), per_shard=1)
    store = StoredTeacher(*find(cache, key()), CPU)
    told = store.read(list(range(90)))
    assert torch.equal(told["hidden"][89:], window(89))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line}
    assert 1 <= len(mapped) <= 66  # 64, and the head


def test_several_threads_read_what_one_reads(cache: Path) -> None:
    write(cache, key(), list(range(80)), per_shard=1)
    store = StoredTeacher(*find(cache, key()), CPU)
    failed: list[int] = []

    def read(offset: int) -> None:
        for index in range(80):
            index = (index * 7 + offset) % 80
            if not torch.equal(store.read([index])["hidden"], window(index)):
                failed.append(index)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_an_unfinished_store_is_not_found_and_is_gone_on_with(cache: Path) -> None:
    directory = write(cache, key(), [1, 2, 3], finish=False)
    with pytest.raises(StoreError, match=r"not whole: 3 of 3 windows; run kdconsole prepare CONFIG again"):
        find(cache, key())
    # What a process leaves that is killed while it writes, or before it could note the file.
    partial_of(directory / "train-00001.safetensors").write_bytes(b"half")
    for name in ("train-00001.safetensors", "train-00007.safetensors"):
        (directory / name).write_bytes(b"not noted")
    before = (directory / "train-00000.safetensors").stat().st_mtime_ns
    write(cache, key(), [1, 2, 3, 4, 5])
    assert (directory / "train-00000.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.iterdir()) == [
        "head.safetensors",
        "heldout-00000.safetensors",
        MANIFEST,
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    assert StoredTeacher(*find(cache, key()), CPU).stored([1, 2, 3, 4, 5]) == 5


def test_a_store_that_grows_serves_what_it_held_meanwhile(cache: Path) -> None:
    write(cache, key(), [1, 2])
    write(cache, key(), [1, 2, 3], finish=False)
    assert StoredTeacher(*find(cache, key()), CPU).stored([1, 2, 3]) == 2
    write(cache, key(), [1, 2, 3])
    assert StoredTeacher(*find(cache, key()), CPU).stored([1, 2, 3]) == 3


def test_two_processes_do_not_write_one_store(cache: Path) -> None:
    writer = StoreWriter(store_directory(cache, key()), begun(key()), 1 << 20)
    try:
        with pytest.raises(StoreError, match="another process stores this teacher"):
            StoreWriter(store_directory(cache, key()), begun(key()), 1 << 20)
    finally:
        writer.close()
    StoreWriter(store_directory(cache, key()), begun(key()), 1 << 20).close()


def test_files_are_about_as_large_as_asked(cache: Path) -> None:
    writer = StoreWriter(store_directory(cache, key()), begun(key()), 3 * window(0).nbytes)
    for index in range(10):
        writer.add("train", {"hidden": window(index), "windows": torch.tensor([index])})
    writer.flush()
    writer.close()
    assert [row.windows for row in writer.manifest.files] == [3, 3, 3, 1]


def test_a_full_disk_keeps_what_is_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache, key(), [1, 2], finish=False)
    writer = StoreWriter(store_directory(cache, key()), begun(key()), 1 << 20)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.store_writer.write_new", full)
    writer.add("train", {"hidden": window(9), "windows": torch.tensor([9])})
    with pytest.raises(StoreError, match=r"No space left on device; 2 of 10 windows are stored; free space"):
        writer.flush()
    writer.close()
    monkeypatch.undo()
    write(cache, key(), [1, 2, 9])
    assert StoredTeacher(*find(cache, key()), CPU).stored([1, 2, 9]) == 3


def test_any_changed_byte_is_found_when_the_whole_is_read_back(cache: Path) -> None:
    directory = write(cache, key(), [1, 2])
    _, manifest = find(cache, key())
    assert sum(verify(directory, manifest)) == manifest.bytes
    for row in manifest.files:
        path = directory / row.name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(StoreError, match=rf"{row.name}: damaged: its SHA-256"):
            list(verify(directory, manifest))
        content[-1] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["head.safetensors", "heldout-00000.safetensors", "train-00000.safetensors"])
def test_a_missing_or_cut_file_is_found_when_the_store_is_opened(cache: Path, name: str) -> None:
    directory = write(cache, key(), [1, 2])
    os.truncate(directory / name, 10)
    with pytest.raises(StoreError, match=rf"{name}: damaged: 10 bytes, not [\d,]+ bytes; remove .* and run kdconsole"):
        find(cache, key())
    (directory / name).unlink()
    with pytest.raises(StoreError, match=f"{name}: damaged: No such file or directory"):
        find(cache, key())


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"v": 1}', "changed", "version"])
def test_a_manifest_that_is_not_as_written_is_refused(cache: Path, damage: str) -> None:
    path = write(cache, key(), [1, 2]) / MANIFEST
    document = json.loads(path.read_text())
    if damage == "changed":
        damage = json.dumps(document | {"vocab": 12})
    elif damage == "version":
        damage = json.dumps(document | {"v": 2})
    path.write_text(damage)
    with pytest.raises(StoreError, match="run kdconsole prepare"):
        find(cache, key())


def test_the_nearest_store_is_named_by_what_differs(cache: Path) -> None:
    write(cache, key(), [1])
    topk = {"kind": "topk", "top_k": 2, "temperature": 2.0, "vocabulary": 64}
    write(cache, key(**topk), [1])
    with pytest.raises(StoreError) as refused:
        find(cache, key(**topk | {"temperature": 1.5, "data": "f" * 64}))
    text = str(refused.value)
    assert (
        "differs in the corpus (dddddddddddd… there, ffffffffffff… here), distill.temperature (2 there, 1.5 here)"
        in text
    )
    assert "teacher.top_k" not in text
    assert text.endswith("put that back, or run kdconsole prepare CONFIG")


def test_every_part_of_a_key_makes_another_store() -> None:
    changes: dict[str, Any] = {"kind": "topk", "sequence": 5, "heldout": 4, "precision": "bf16"} | {
        name: "0" * 64 for name in ("teacher", "teacher_config", "tokenizer", "data")
    }
    changes |= {"top_k": 3, "temperature": 2.0, "vocabulary": 9}
    assert set(changes) == {field.name for field in msgspec.structs.fields(Key)}
    digests = {key(**{name: value}).digest for name, value in changes.items()}
    assert len(digests | {key().digest}) == len(changes) + 1
    for name, value in changes.items():
        assert len(key(**{name: value}).differences(key())) == 1


def test_sizes_are_those_of_the_numbers_that_are_stored() -> None:
    hidden = sizes("hidden", sequence=512, windows=10, heldout=2, width=1536, rows=151_936, wide=2)
    assert (hidden.token, hidden.heldout, hidden.head) == (3_072, 2 * 512 * 1536 * 2, 151_936 * 1536 * 2)
    assert hidden.total == 10 * (512 * 3_072 + 8) + hidden.heldout + hidden.head
    few = {"sequence": 512, "windows": 1, "heldout": 1, "width": 8, "rows": 8, "wide": 2, "top_k": 256}
    assert sizes("topk", vocabulary=65_536, **few).token == 256 * 4 + 4  # type: ignore[arg-type]
    assert sizes("topk", vocabulary=65_537, **few).token == 256 * 6 + 4  # type: ignore[arg-type]
    assert [kept_logits(256, vocabulary) for vocabulary in (50_000, 257, 256, 2)] == [256, 256, 255, 1]


@pytest.mark.parametrize(
    ("cache", "environ", "wanted"),
    [
        ("/there", {"XDG_CACHE_HOME": "/cache"}, "/there"),
        (None, {"XDG_CACHE_HOME": "/cache"}, "/cache/kdconsole/teacher"),
        (None, {"XDG_CACHE_HOME": "relative"}, "~/.cache/kdconsole/teacher"),
        (None, {}, "~/.cache/kdconsole/teacher"),
    ],
)
def test_stores_live_in_the_users_cache_unless_another_place_is_named(
    cache: str | None, environ: dict[str, str], wanted: str
) -> None:
    assert cache_directory(Teacher(path="t", cache=cache), environ) == Path(wanted).expanduser()


def test_layouts_are_told_apart_by_names_and_shapes() -> None:
    layout = {"a": (2, 3), "b": (4,)}
    assert layout_digest(layout) == layout_digest(dict(reversed(layout.items())))
    assert len({layout_digest(each) for each in (layout, {"a": (3, 2), "b": (4,)}, {"a": (2, 3), "c": (4,)})}) == 3


@pytest.fixture
def unreadable(cache: Path) -> Path:
    directory = write(cache, key(), [1])
    (directory / "train-00000.safetensors").write_bytes(
        bytes(len((directory / "train-00000.safetensors").read_bytes()))
    )
    return directory


def test_a_file_that_cannot_be_read_is_an_error_with_its_name(cache: Path, unreadable: Path) -> None:
    with pytest.raises(StoreError, match=r"train-00000.safetensors: cannot be read"):
        StoredTeacher(*find(cache, key()), CPU)
    with pytest.raises(StoreError, match=r"train-00000.safetensors: damaged"):
        write(cache, key(), [1, 2])


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / PARTIAL
    written = write_manifest(path, begun(key()))
    assert read_manifest(path) == written
    assert read_manifest(tmp_path / "none") is None
