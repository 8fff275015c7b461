"""Corpora of text and of token shards: windows, their order, the held-out part, and what is refused."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import data as data_module
from engine.config import Data
from engine.data import MIN_FILES_TO_HOLD_OUT, Corpus, load_corpus, load_tokenizer, split_documents
from engine.data_files import BUILTIN, find_files, stdlib_sources
from engine.errors import DataError
from engine.windows import Order, Windows, degenerate
from tests.engine.model_fixtures import save_tokenizer

WORDS = [f"w{i}" for i in range(200)]
SEQUENCE = 8
END = "<end>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A word a token: `[unk]` is 0, `wN` is N + 1, `<end>` is 201."""
    directory = save_tokenizer(tmp_path / "tokenizer", ["[unk]", *WORDS], {201: END})
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}), encoding="utf-8")
    return directory


def corpus(path: Path | str | list[str], tokenizer: Path | None, *, rows: int = 202, **options: Any) -> Corpus:
    sequence = options.pop("sequence", SEQUENCE)
    progress = options.pop("progress", lambda fraction: None)
    given_path = path if isinstance(path, list) else str(path)
    return load_corpus(Data(path=given_path, **options), tokenizer, sequence=sequence, rows=rows, progress=progress)


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % 200] for i in range(count)) + "\n"


def shard(path: Path, tokens: list[int] | np.ndarray) -> Path:
    np.asarray(tokens, dtype="<u4").tofile(path)
    return path


def tokens_of(windows: Windows) -> list[int]:
    """The tokens that the windows cover, in order; windows overlap by one token."""
    whole = windows.stack(range(len(windows)))
    return [*whole[:, :-1].ravel().tolist(), int(whole[-1, -1])]


class TestWindows:
    @given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 20))
    def test_windows_tile_each_array_and_cross_none(self, lengths: list[int], sequence: int) -> None:
        starts = np.cumsum([0, *lengths])
        arrays = [np.arange(a, b) for a, b in pairwise(starts)]
        windows = Windows(arrays, sequence)
        assert len(windows) == sum(max(0, (n - 1) // sequence) for n in lengths)
        expected = [
            list(range(int(start) + k * sequence, int(start) + (k + 1) * sequence + 1))
            for start, n in zip(starts, lengths, strict=False)
            for k in range(max(0, (n - 1) // sequence))
        ]
        assert [windows[i].tolist() for i in range(len(windows))] == expected

    def test_an_index_beyond_the_windows_is_an_index_error(self) -> None:
        windows = Windows([np.arange(20)], 8)
        for index in (-1, 2, 99):
            with pytest.raises(IndexError):
                windows[index]

    def test_a_stack_is_int64_whatever_the_tokens_are(self) -> None:
        stacked = Windows([np.arange(20, dtype=np.uint16)], 8).stack([1, 0])
        assert stacked.dtype == np.int64
        assert stacked.tolist() == [list(range(8, 17)), list(range(9))]


class TestOrder:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 30), st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
    def test_three_integers_are_its_whole_state(
        self, count: int, seed: int, batches: list[int], data: st.DataObject
    ) -> None:
        windows = Windows([np.arange(count * 4 + 1)], 4)
        order = Order(windows, seed)
        states, taken = [], []
        for size in batches:
            states.append((order.seed, order.epoch, order.position))
            taken.append(order.next(size))
        at = data.draw(st.integers(0, len(batches) - 1))
        resumed = Order(windows, *states[at])
        for size, expected in zip(batches[at:], taken[at:], strict=True):
            assert np.array_equal(resumed.next(size), expected)

    @pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
    def test_every_epoch_visits_every_window_once_in_another_order(self, batch: int) -> None:
        windows = Windows([np.arange(101)], 10)
        order = Order(windows, seed=3)
        firsts = np.concatenate([order.next(batch)[:, 0] for _ in range(40 // batch + 4)]) // 10
        epochs = firsts[: len(firsts) // 10 * 10].reshape(-1, 10).tolist()
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert epochs[0] != epochs[1]

    def test_another_seed_is_another_order(self) -> None:
        windows = Windows([np.arange(1_001)], 10)
        assert not np.array_equal(Order(windows, 0).next(50), Order(windows, 1).next(50))

    def test_at_the_end_of_an_epoch_the_next_one_follows(self) -> None:
        windows = Windows([np.arange(101)], 10)
        order = Order(windows, seed=0)
        order.next(10)
        assert (order.epoch, order.position) == (0, 10)
        resumed = Order(windows, 0, 0, 10)
        assert np.array_equal(order.next(4), resumed.next(4))
        assert (order.epoch, order.position) == (resumed.epoch, resumed.position) == (1, 4)

    def test_no_windows_have_no_order(self) -> None:
        with pytest.raises(ValueError, match="no windows"):
            Order(Windows([], 8), 0)


class TestDegenerate:
    def test_a_good_batch_has_no_name(self) -> None:
        assert degenerate(np.array([[1, 2, 3], [2, 3, 4]])) is None
        assert degenerate(np.array([[1, 2, 3], [1, 2, 3]])) is None
        assert degenerate(np.array([[1, 2, 3]])) is None

    @pytest.mark.parametrize(
        ("batch", "name"),
        [
            ([[5, 5, 5], [5, 5, 5]], "one token repeated: every token is 5"),
            ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], "the same inputs with different labels: 3 windows"),
            ([[1], [2]], "empty labels"),
        ],
    )
    def test_a_batch_that_teaches_nothing_is_named(self, batch: list[list[int]], name: str) -> None:
        assert name in str(degenerate(np.array(batch)))

    def test_labels_that_are_all_ignored_are_empty(self) -> None:
        batch = np.array([[1, 2, 3], [2, 3, 4]])
        assert "empty labels" in str(degenerate(batch, np.ones((2, 2), dtype=bool)))
        assert degenerate(batch, np.array([[True, True], [True, False]])) is None


class TestText:
    def test_one_file_is_trained_on_and_its_end_held_out(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_text(words(400))
        made = corpus(tmp_path / "a.txt", tokenizer, heldout_fraction=0.1)
        assert (made.documents, made.train_tokens, made.heldout_tokens) == (1, 361, 40)
        assert tokens_of(made.train)[:3] == [1, 2, 3]
        assert tokens_of(made.heldout)[0] == 361 % 200 + 1

    def test_each_document_ends_with_the_token_that_the_tokenizer_names(self, tmp_path: Path, tokenizer: Path) -> None:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(words(50))
        made = corpus(tmp_path, tokenizer, heldout_fraction=0.2, sequence=1)
        assert [i for i, token in enumerate(tokens_of(made.train)) if token == 201] == [50]

    def test_with_files_enough_whole_files_are_held_out(self, tmp_path: Path, tokenizer: Path) -> None:
        for i in range(100):
            (tmp_path / f"{i:03}.txt").write_text((WORDS[i] + " ") * 40)
        made = corpus(tmp_path, tokenizer, heldout_fraction=0.2, sequence=10)
        train, heldout = set(tokens_of(made.train)) - {201}, set(tokens_of(made.heldout)) - {201}
        assert 8 <= len(heldout) <= 35
        assert not train & heldout
        assert len(train | heldout) >= 98

    def test_what_is_held_out_depends_on_names_alone(self, tmp_path: Path, tokenizer: Path) -> None:
        parts = []
        for where in ("here", "there"):
            (tmp_path / where).mkdir()
            for i in range(60):
                (tmp_path / where / f"{i:03}.txt").write_text(words(40, i))
            parts.append(corpus(tmp_path / where, tokenizer, heldout_fraction=0.2))
        assert tokens_of(parts[0].heldout) == tokens_of(parts[1].heldout)
        assert np.array_equal(parts[0].heldout_batch(5), parts[1].heldout_batch(5))

    def test_where_chance_holds_no_file_out_the_end_of_the_stream_is(self, tmp_path: Path, tokenizer: Path) -> None:
        names = [name for i in range(2_000) if data_module._fraction(name := f"{i}.txt") >= 0.05]
        for i, name in enumerate(names[:MIN_FILES_TO_HOLD_OUT]):
            (tmp_path / name).write_text((WORDS[i] + " ") * 40)
        made = corpus(tmp_path, tokenizer, heldout_fraction=0.05)
        assert made.heldout_tokens == int(MIN_FILES_TO_HOLD_OUT * 41 * 0.05)
        assert len(made.heldout) > 0

    def test_a_file_that_two_paths_lead_to_is_read_once(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.txt").write_text(words(100))
        (tmp_path / "link.txt").symlink_to(tmp_path / "sub" / "a.txt")
        made = corpus([str(tmp_path / "sub" / "a.txt"), str(tmp_path)], tokenizer, heldout_fraction=0.2)
        assert (made.documents, made.train_tokens + made.heldout_tokens) == (1, 101)

    def test_a_glob_chooses_files(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "a.py").write_text(words(100))
        (tmp_path / "b.txt").write_text(words(100))
        assert corpus(tmp_path, tokenizer, glob="**/*.py", heldout_fraction=0.2).documents == 1
        assert corpus(tmp_path, tokenizer, glob="**/*", heldout_fraction=0.2).documents == 2 + 2  # the tokenizer's too

    def test_a_large_file_is_read_in_pieces_and_gives_the_same_tokens(
        self, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines, one_line = tmp_path / "lines.txt", tmp_path / "line.txt"
        lines.write_text("".join(words(17, i) for i in range(300)))
        one_line.write_text(lines.read_text().replace("\n", " "))
        whole = tokens_of(corpus(lines, tokenizer, sequence=1).train)
        monkeypatch.setattr(data_module, "_PIECE_CHARACTERS", 1_000)
        monkeypatch.setattr(data_module, "_GROUP_CHARACTERS", 2_500)
        fractions: list[float] = []
        assert tokens_of(corpus(lines, tokenizer, sequence=1, progress=fractions.append).train) == whole
        assert tokens_of(corpus(one_line, tokenizer, sequence=1).train) == whole
        assert len(fractions) > 5
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(st.sampled_from("ab \n\r\u00e9\u2603"), max_size=300), size=st.integers(1, 40))
    def test_pieces_add_up_to_the_file(self, tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
        path = tmp_path_factory.mktemp("pieces") / "a.txt"
        path.write_bytes(text.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data_module, "_PIECE_CHARACTERS", size)
            pieces = list(data_module._pieces(path))
        assert "".join(pieces) == text
        assert all(pieces)
        assert max(map(len, pieces), default=0) < 2 * size + 1

    def test_progress_may_stop_the_reading(self, tmp_path: Path, tokenizer: Path) -> None:
        class Stopped(Exception):
            pass

        def stop(fraction: float) -> None:
            raise Stopped

        (tmp_path / "a.txt").write_text(words(100))
        with pytest.raises(Stopped):
            corpus(tmp_path / "a.txt", tokenizer, progress=stop)

    def test_invalid_utf8_is_replaced(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_bytes(words(60).encode() + b"\xff\xfe caf\xe9 " + words(60).encode())
        made = corpus(tmp_path / "a.txt", tokenizer, heldout_fraction=0.1)
        assert made.train_tokens + made.heldout_tokens > 121
        assert 0 in tokens_of(made.train)

    def test_a_limit_takes_whole_files_up_to_about_so_many_bytes(self, tmp_path: Path, tokenizer: Path) -> None:
        for i in range(30):
            (tmp_path / f"{i:03}.txt").write_text("w1 w2 w3\n" * 11 + "\n")
        assert corpus(tmp_path, tokenizer, limit_bytes=1_000, heldout_fraction=0.5, sequence=1).documents == 10
        assert corpus(tmp_path, tokenizer, limit_bytes=1, heldout_fraction=0.5, sequence=1).documents == 1

    def test_held_out_windows_are_spread_evenly_and_always_the_same(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_text(words(2_000))
        made = corpus(tmp_path / "a.txt", tokenizer, heldout_fraction=0.5)
        batch = made.heldout_batch(10)
        assert batch.shape == (10, SEQUENCE + 1)
        assert np.array_equal(batch, made.heldout_batch(10))
        assert np.array_equal(batch[0], made.heldout[0])
        assert np.array_equal(batch[-1], made.heldout[len(made.heldout) - 1])
        assert len(made.heldout_batch(10_000)) == len(made.heldout)

    def test_limits_inside_the_tokenizer_file_do_not_cut_the_corpus(self, tmp_path: Path, tokenizer: Path) -> None:
        file = tokenizer / "tokenizer.json"
        settings_ = json.loads(file.read_text())
        settings_["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        settings_["padding"] = {
            "strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[unk]",
        }  # fmt: skip
        file.write_text(json.dumps(settings_))
        (tmp_path / "a.txt").write_text(words(100))
        made = corpus(tmp_path / "a.txt", tokenizer, heldout_fraction=0.2)
        assert made.train_tokens + made.heldout_tokens == 101

    def test_the_standard_library_comes_without_its_tests(self) -> None:
        names = [name for name, _ in stdlib_sources()]
        assert "json/decoder.py" in names
        assert len(names) > 300
        assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
        assert names == sorted(names)


class TestRefusedText:
    def refused(self, *arguments: Any, **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            corpus(*arguments, **options)
        assert str(caught.value).isprintable()
        return str(caught.value)

    def test_a_path_that_is_not_there(self, tmp_path: Path, tokenizer: Path) -> None:
        assert "nowhere: no such file" in self.refused(tmp_path / "nowhere", tokenizer)

    def test_a_pipe(self, tmp_path: Path, tokenizer: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "a device, pipe or socket" in self.refused(tmp_path / "pipe", tokenizer)

    def test_a_name_that_no_file_system_takes(self, tmp_path: Path, tokenizer: Path) -> None:
        assert "data.path" in self.refused(tmp_path / ("x" * 5_000), tokenizer)

    @pytest.mark.parametrize("pattern", ["/etc/*", "../../**x"])
    def test_a_glob_that_chooses_nothing_or_is_none(self, tmp_path: Path, tokenizer: Path, pattern: str) -> None:
        assert "data.glob" in self.refused(tmp_path, tokenizer, glob=pattern)

    def test_a_file_whose_content_cannot_be_read(self, tokenizer: Path) -> None:
        if not Path("/proc/self/mem").exists():
            pytest.skip("no /proc")
        assert "/proc/self/mem: cannot be read: Input/output error" in self.refused("/proc/self/mem", tokenizer)

    def test_an_empty_directory(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "empty").mkdir()
        message = self.refused(tmp_path / "empty", tokenizer)
        assert "holds no file that matches '**/*.txt'" in message
        assert "set data.glob" in message

    @pytest.mark.parametrize("count", [1, 3, 30])
    def test_empty_files(self, tmp_path: Path, tokenizer: Path, count: int) -> None:
        for i in range(count):
            (tmp_path / f"{i}.txt").touch()
        assert "is empty" in self.refused(tmp_path, tokenizer)

    def test_a_text_shorter_than_two_windows(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_text(words(30))
        message = self.refused(tmp_path / "a.txt", tokenizer)
        assert "its held-out part has 1 tokens; expected at least one window of 9 tokens" in message
        (tmp_path / "a.txt").write_text(words(4))
        message = self.refused(tmp_path / "a.txt", tokenizer)
        assert "its training part has 5 tokens" in message
        assert "heldout_fraction" not in message

    def test_nul_bytes(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"text \0 text" * 10)
        assert "a.txt: holds NUL bytes; expected UTF-8 text, or a .bin token shard" in self.refused(tmp_path, tokenizer)

    def test_text_without_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(100))
        assert "text needs a tokenizer" in self.refused(tmp_path, None)

    def test_a_directory_without_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(100))
        assert "has no tokenizer.json" in self.refused(tmp_path / "a.txt", tmp_path)

    @pytest.mark.parametrize("content", ["", "{}", "{", '{"model": {"type": "Magic"}}', "\x1b[2J"])
    def test_a_broken_tokenizer(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(words(100))
        (tmp_path / "tokenizer.json").write_text(content)
        assert "tokenizer.json: no tokenizer" in self.refused(tmp_path / "a.txt", tmp_path)

    def test_a_tokenizer_with_ids_beyond_the_students_rows(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "a.txt").write_text(words(100))
        message = self.refused(tmp_path / "a.txt", tokenizer, rows=201)
        assert "has ids up to 201; expected ids below the student's 201 rows" in message

    def test_a_tokenizer_with_few_ids_but_a_high_one(self, tmp_path: Path) -> None:
        directory = save_tokenizer(tmp_path / "sparse", ["[unk]", "a", "b"])
        file = directory / "tokenizer.json"
        file.write_text(file.read_text().replace('"b": 2', '"b": 70000'))
        (tmp_path / "a.txt").write_text("a b " * 50)
        assert "has ids up to 70,000" in self.refused(tmp_path / "a.txt", directory, rows=1_000)

    def test_a_tokenizer_that_has_no_token_for_a_word(self, tmp_path: Path) -> None:
        directory = save_tokenizer(tmp_path / "strict", ["[unk]", "a"])
        file = directory / "tokenizer.json"
        file.write_text(file.read_text().replace('"unk_token": "[unk]"', '"unk_token": "[none]"'))
        (tmp_path / "a.txt").write_text("a b " * 50)
        assert "cannot encode the text" in self.refused(tmp_path / "a.txt", directory)


class TestShards:
    def test_shards_are_mapped_and_the_end_of_each_is_held_out(self, tmp_path: Path) -> None:
        shard(tmp_path / "a.bin", np.arange(1_000) % 500)
        shard(tmp_path / "b.bin", np.arange(500))
        made = corpus(tmp_path, None, rows=500, heldout_fraction=0.1)
        assert (made.documents, made.train_tokens, made.heldout_tokens) == (2, 1_350, 150)
        assert made.train[0].tolist() == list(range(9))
        assert made.heldout[0].tolist() == list(range(400, 409))
        assert made.heldout[12].tolist() == list(range(450, 459))
        assert isinstance(made.train.arrays[0], np.memmap)

    def test_a_shard_can_be_named_itself(self, tmp_path: Path) -> None:
        made = corpus(shard(tmp_path / "a.bin", range(100)), None, rows=100, heldout_fraction=0.2)
        assert made.train_tokens == 80

    @pytest.mark.parametrize("size", [0, 1, 4_001, 4_002, 4_003])
    def test_a_size_that_is_no_number_of_tokens_is_refused(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "a.bin").write_bytes(b"\0" * size)
        with pytest.raises(DataError, match=f"a.bin: {size:,} bytes; expected a multiple of 4"):
            corpus(tmp_path / "a.bin", None)

    def test_an_id_beyond_the_rows_is_refused(self, tmp_path: Path) -> None:
        path = shard(tmp_path / "a.bin", [*range(99), 4_000_000_000])
        with pytest.raises(DataError, match="token id 4,000,000,000; expected ids below the student's 100 rows"):
            corpus(path, None, rows=100)

    def test_the_last_row_is_an_id(self, tmp_path: Path) -> None:
        assert corpus(shard(tmp_path / "a.bin", [99] * 400), None, rows=100).train_tokens == 380

    def test_ids_are_looked_at_to_the_end_and_progress_may_stop_that(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_module, "_SCAN_TOKENS", 10)
        fractions: list[float] = []
        path = shard(tmp_path / "a.bin", [1] * 400)
        corpus(path, None, progress=fractions.append)
        assert len(fractions) == 40
        shard(path, [1] * 399 + [999])
        with pytest.raises(DataError, match="token id 999"):
            corpus(path, None)

    def test_shards_and_text_together_are_refused(self, tmp_path: Path) -> None:
        shard(tmp_path / "a.bin", range(100))
        (tmp_path / "b.txt").write_text(words(100))
        with pytest.raises(DataError, match="both token shards and text"):
            corpus([str(tmp_path / "a.bin"), str(tmp_path / "b.txt")], None)

    def test_shards_too_short_for_a_window_are_refused(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin"):
            shard(tmp_path / name, range(8))
        with pytest.raises(DataError, match="training part has 8 tokens in the longest of 2 pieces"):
            corpus(tmp_path, None)


def test_a_tokenizer_without_an_end_token_gives_none(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path, ["[unk]", "a"])
    assert load_tokenizer(directory)[1] is None
    for content in ('{"eos_token": null}', '{"eos_token": "<gone>"}', "[]", "{", '{"eos_token": 3}'):
        (directory / "tokenizer_config.json").write_text(content)
        assert load_tokenizer(directory)[1] is None
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert load_tokenizer(directory)[1] == 1


def test_text_that_is_not_utf8_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"w1 caf\xe9 " * 300)
    assert corpus(text, tokenizer).undecodable == 300


def test_the_split_by_files_leaves_none_out_and_is_the_same_by_name() -> None:
    data = Data(path=BUILTIN)
    training, held = split_documents(data)
    assert 0 < len(held) < 0.1 * len(training)
    assert sorted(training + held) == sorted(path for _, path in find_files(data.paths, data.glob))
