"""Token windows from text files, token shards or the standard library's own source, in a reproducible order.

Windows are `sequence + 1` tokens at a stride of `sequence`: the first `sequence` are inputs, the last `sequence` their
labels. A fixed part is held out: whole files where there are enough of them, else the end of the token stream.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from engine.config import Data
from engine.errors import DataError
from engine.text import clean

Tokens = npt.NDArray[np.generic]
Batch = npt.NDArray[np.int64]
Progress = Callable[[float], None]

BUILTIN = "builtin:stdlib"
SHARD_SUFFIX = ".bin"
MIN_FILES_TO_HOLD_OUT = 20
"""With fewer files than this the held-out part is the end of the token stream instead of whole files."""

_STDLIB_LEFT_OUT = frozenset(
    ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip", "pydoc_data")
)
_PIECE_BYTES = 1 << 20
_GROUP_BYTES = 1 << 21


class Windows(Sequence[Batch]):
    """Windows over one or more token arrays; none crosses from one array into the next.

    Args:
        arrays: token arrays, memory-mapped or not.
        sequence: inputs a window; a window holds one token more.
    """

    def __init__(self, arrays: Sequence[Tokens], sequence: int) -> None:
        self._arrays, self.sequence = arrays, sequence
        self._ends = list(accumulate(max(0, (len(a) - 1) // sequence) for a in arrays))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        """Window `index` as int64, shape [sequence + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        start = (index - (self._ends[which - 1] if which else 0)) * self.sequence
        return np.asarray(self._arrays[which][start : start + self.sequence + 1], dtype=np.int64)

    def stack(self, indices: Sequence[int]) -> Batch:
        """These windows as one array, shape [len(indices), sequence + 1]."""
        return np.stack([self[int(i)] for i in indices])


@dataclass(frozen=True)
class Corpus:
    """A corpus split in two, and what an operator wants to know of it."""

    train: Windows
    heldout: Windows
    description: str
    documents: int
    train_tokens: int
    heldout_tokens: int

    def heldout_batch(self, count: int) -> Batch:
        """At most `count` held-out windows, evenly spaced, shape [windows, sequence + 1]; the same ones every time."""
        chosen = np.unique(np.linspace(0, len(self.heldout) - 1, min(count, len(self.heldout))).astype(np.int64))
        return self.heldout.stack([int(i) for i in chosen])


class Order:
    """The order of training windows, a pure function of (seed, epoch, position): those three integers are its state."""

    def __init__(self, windows: Windows, seed: int, epoch: int = 0, position: int = 0) -> None:
        self._windows, self.seed, self.epoch, self.position = windows, seed, epoch, position
        self._permutation = self._permute()

    def next(self, count: int) -> Batch:
        """The next `count` windows, shape [count, sequence + 1]; each epoch visits every window once."""
        chosen: list[int] = []
        while len(chosen) < count:
            if self.position >= len(self._permutation):
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._permute()
            take = self._permutation[self.position : self.position + count - len(chosen)]
            chosen.extend(int(i) for i in take)
            self.position += len(take)
        return self._windows.stack(chosen)

    def _permute(self) -> npt.NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch])))
        return generator.permutation(len(self._windows))


def degenerate(batch: Batch, ignored: npt.NDArray[np.bool_] | None = None) -> str | None:
    """Names what makes a batch useless for learning, or None.

    Args:
        batch: windows, shape [windows, sequence + 1].
        ignored: labels that do not count, shape [windows, sequence].
    """
    inputs, labels = batch[:, :-1], batch[:, 1:]
    if labels.size == 0 or (ignored is not None and bool(ignored.all())):
        return "empty labels: no position counts"
    if bool((batch == batch[0, 0]).all()):
        return f"one token repeated: every token is {int(batch[0, 0])}"
    if len(batch) > 1 and bool((inputs == inputs[0]).all()) and not bool((labels == labels[0]).all()):
        return f"the same inputs with different labels: {len(batch)} windows differ in their labels alone"
    return None


def load_corpus(
    data: Data, tokenizer_dir: Path | None, *, sequence: int, rows: int, progress: Progress = lambda fraction: None
) -> Corpus:
    """Reads, tokenises and splits what `data.path` names.

    Args:
        data: the configuration's section.
        tokenizer_dir: where `tokenizer.json` is; may be None for token shards.
        sequence: tokens a window has as inputs.
        rows: vocabulary rows of the student; a token id beyond is refused.
        progress: told the fraction done, often; may raise to stop.

    Raises:
        DataError: missing, unreadable, empty, binary or too small corpus; no tokenizer; ids beyond the student's rows.
    """
    files = _find(data.paths, data.glob)
    shards = [path for _, path in files if path.suffix == SHARD_SUFFIX]
    if not shards:
        return _text_corpus(files, data, tokenizer_dir, sequence, rows, progress)
    if len(shards) != len(files):
        text = next(path for _, path in files if path.suffix != SHARD_SUFFIX)
        raise DataError(f"data.path: both token shards and text, {_name(shards[0])} and {_name(text)}", expected="one kind")
    return _shard_corpus(shards, data, sequence, rows)


def _find(paths: Sequence[str], glob: str) -> list[tuple[str, Path]]:
    """Every file that the paths stand for, as (name that decides its part, path), sorted."""
    found: list[tuple[str, Path]] = []
    for given in paths:
        path = Path(given)
        if given == BUILTIN:
            found += _stdlib_sources()
        elif path.is_dir():
            try:
                inside = sorted(p for p in path.glob(glob) if p.is_file())
                inside = inside or sorted(p for p in path.rglob(f"*{SHARD_SUFFIX}") if p.is_file())
            except (OSError, ValueError, NotImplementedError) as error:
                raise DataError(f"data.path: {_name(path)} with data.glob {clean(glob, 200)!r}: {error}") from None
            if not inside:
                raise DataError(
                    f"data.path: {_name(path)} holds no file that matches {clean(glob, 200)!r} and no {SHARD_SUFFIX} shard",
                    expected="text files or token shards",
                    do="set data.glob, for example '**/*.py'",
                )
            found += [(p.relative_to(path).as_posix(), p) for p in inside]
        elif path.is_file():
            found.append((path.name, path))
        else:
            raise DataError(f"data.path: {_name(path)}: no such file or directory", do="check the path")
    return found


def _stdlib_sources() -> list[tuple[str, Path]]:
    """The running Python's own standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [(name, root / name) for name in names if not _STDLIB_LEFT_OUT.intersection(name.split("/"))]


def _text_corpus(
    files: list[tuple[str, Path]],
    data: Data,
    tokenizer_dir: Path | None,
    sequence: int,
    rows: int,
    progress: Progress,
) -> Corpus:
    if tokenizer_dir is None:
        raise DataError(
            "data.tokenizer: text needs a tokenizer, and neither student nor teacher has a tokenizer.json",
            do="set data.tokenizer to a directory that has one, or give token shards",
        )
    tokenizer, end_of_text = load_tokenizer(tokenizer_dir)
    if tokenizer.get_vocab_size() > rows:
        raise DataError(
            f"data.tokenizer: {_name(tokenizer_dir)} has {tokenizer.get_vocab_size():,} ids",
            expected=f"at most the student's {rows:,} rows",
        )
    if data.limit_bytes is not None:
        files = _limited(files, data.limit_bytes)
    by_file = len(files) >= MIN_FILES_TO_HOLD_OUT
    parts: dict[bool, list[Tokens]] = {False: [], True: []}
    dtype = np.uint16 if rows <= 1 << 16 else np.uint32
    total, done = sum(path.stat().st_size for _, path in files), 0
    for group in _grouped((_fraction(name) < data.heldout_fraction, path) for name, path in files):
        for (held, _, last), encoding in zip(
            group, tokenizer.encode_batch_fast([text for _, text, _ in group], add_special_tokens=False), strict=True
        ):
            ids = encoding.ids + [end_of_text] if last and end_of_text is not None else encoding.ids
            parts[held and by_file].append(np.asarray(ids, dtype=dtype))
        done += sum(len(text) for _, text, _ in group)
        progress(min(1.0, done / max(1, total)))
    train, heldout = (_joined(parts[held], dtype) for held in (False, True))
    if not by_file:
        cut = len(train) - int(len(train) * data.heldout_fraction)
        train, heldout = train[:cut], train[cut:]
    shown = clean(data.paths[0], 300) if len(data.paths) == 1 else f"{len(data.paths)} paths"
    return _checked([train], [heldout], sequence, shown, len(files))


def _shard_corpus(shards: list[Path], data: Data, sequence: int, rows: int) -> Corpus:
    train: list[Tokens] = []
    heldout: list[Tokens] = []
    for path in shards:
        size = path.stat().st_size
        if size == 0 or size % 4:
            raise DataError(f"{_name(path)}: {size:,} bytes", expected="a multiple of 4 above 0: u32 little-endian tokens")
        try:
            tokens = np.memmap(path, dtype="<u4", mode="r")
        except OSError as error:
            raise DataError(f"{_name(path)}: cannot be read: {error.strerror}") from None
        # One pass over the map: an id out of range would otherwise be an index error on the device, hours later.
        top = max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
        if top >= rows:
            raise DataError(f"{_name(path)}: token id {top:,}", expected=f"ids below the student's {rows:,} rows")
        cut = len(tokens) - int(len(tokens) * data.heldout_fraction)
        train.append(tokens[:cut])
        heldout.append(tokens[cut:])
    return _checked(train, heldout, sequence, f"{len(shards)} token shards", len(shards))


def _checked(train: list[Tokens], heldout: list[Tokens], sequence: int, description: str, documents: int) -> Corpus:
    corpus = Corpus(
        train=Windows(train, sequence),
        heldout=Windows(heldout, sequence),
        description=description,
        documents=documents,
        train_tokens=sum(len(a) for a in train),
        heldout_tokens=sum(len(a) for a in heldout),
    )
    for part, windows, tokens in (
        ("training", corpus.train, corpus.train_tokens),
        ("held-out", corpus.heldout, corpus.heldout_tokens),
    ):
        if not len(windows):
            empty = corpus.train_tokens + corpus.heldout_tokens == 0
            raise DataError(
                f"data.path: {description} is empty"
                if empty
                else f"data.path: {description}: its {part} part has {tokens:,} tokens",
                expected=f"at least one window of {sequence + 1:,} tokens",
                do="give more text" if empty else "give more text, lower train.sequence or raise data.heldout_fraction",
            )
    return corpus


def load_tokenizer(directory: Path) -> tuple[Tokenizer, int | None]:
    """The directory's tokenizer and the id that ends a document (None where it names no such token).

    Raises:
        DataError: `tokenizer.json` is missing or not a tokenizer.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise DataError(f"{_name(path)}: no tokenizer: {clean(str(error), 200)}", expected="a tokenizer.json") from None
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        token = settings.get("eos_token")
    except (OSError, ValueError, AttributeError):
        token = None
    if isinstance(token, dict):
        token = token.get("content")
    return tokenizer, tokenizer.token_to_id(token) if isinstance(token, str) else None


def _pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces of about 1 MiB, each ending with a line, so that memory stays bounded."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            while lines := file.readlines(_PIECE_BYTES):
                piece = "".join(lines)
                if "\0" in piece:
                    raise DataError(f"{_name(path)}: holds NUL bytes", expected="UTF-8 text, or a .bin token shard")
                yield piece
    except OSError as error:
        raise DataError(f"{_name(path)}: cannot be read: {error.strerror}", do="check its permissions") from None


def _grouped(files: Iterable[tuple[bool, Path]]) -> Iterator[list[tuple[bool, str, bool]]]:
    """Pieces as (held out, text, last of its file), a few megabytes at a time: enough to keep every core busy."""
    group: list[tuple[bool, str, bool]] = []
    size = 0
    for held, path in files:
        ahead = ""  # one piece behind the reader, so that the last one is known as such
        for piece in _pieces(path):
            if ahead:
                group.append((held, ahead, False))
                size += len(ahead)
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
            ahead = piece
        group.append((held, ahead, True))
        size += len(ahead)
    if group:
        yield group


def _limited(files: list[tuple[str, Path]], limit_bytes: int) -> list[tuple[str, Path]]:
    """Files of at most `limit_bytes` in all, taken in an order that mixes them and returned sorted."""
    chosen, total = [], 0
    for name, path in sorted(files, key=lambda item: _fraction("limit:" + item[0])):
        total += path.stat().st_size
        if total > limit_bytes and chosen:
            break
        chosen.append((name, path))
    return sorted(chosen)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32


def _joined(parts: list[Tokens], dtype: type[np.generic]) -> Tokens:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _name(path: Path) -> str:
    return clean(str(path), 300)
