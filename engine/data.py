"""Token windows from text files, token shards or the standard library's own source, in a reproducible order.

Windows are `sequence + 1` tokens at a stride of `sequence`: the first `sequence` are inputs, the last `sequence` their
labels. A fixed part is held out: whole files where there are enough of them, else the end of the token stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engine.config import Data
from engine.data_files import SHARD_SUFFIX, find_files, name_of
from engine.errors import DataError
from engine.text import clean
from engine.windows import Batch, Tokens, Windows

Progress = Callable[[float], None]

MIN_FILES_TO_HOLD_OUT = 20
"""With fewer files than this the held-out part is the end of the token stream instead of whole files."""

_PIECE_CHARACTERS = 1 << 20
_GROUP_CHARACTERS = 1 << 21
_SCAN_TOKENS = 1 << 24
_DIGEST_BYTES = 1 << 30


@dataclass(frozen=True)
class Corpus:
    """A corpus split in two, and what an operator wants to know of it."""

    train: Windows
    heldout: Windows
    description: str
    documents: int
    train_tokens: int
    heldout_tokens: int
    undecodable: int = 0
    """Replacement characters (U+FFFD) in the text: bytes that are not UTF-8, but for those that stood there already."""

    def digest(self) -> str:
        """SHA-256 over the tokens of both parts; of an array above 1 GiB over its size and its two ends only."""
        found = hashlib.sha256()
        for array in (*self.train.arrays, *self.heldout.arrays):
            found.update(f"{array.dtype} {len(array)}\n".encode())
            parts = [array] if array.nbytes <= _DIGEST_BYTES else [array[:_SCAN_TOKENS], array[-_SCAN_TOKENS:]]
            for part in parts:
                found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()

    def heldout_batch(self, count: int) -> Batch:
        """At most `count` held-out windows, evenly spaced, shape [windows, sequence + 1]; the same ones every time."""
        chosen = np.unique(np.linspace(0, len(self.heldout) - 1, min(count, len(self.heldout))).astype(np.int64))
        return self.heldout.stack([int(i) for i in chosen])


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
    files = find_files(data.paths, data.glob)
    shards = [path for _, path in files if path.suffix == SHARD_SUFFIX]
    if not shards:
        return _text_corpus(files, data, tokenizer_dir, sequence, rows, progress)
    if len(shards) != len(files):
        text = next(path for _, path in files if path.suffix != SHARD_SUFFIX)
        both = f"{name_of(shards[0])} and {name_of(text)}"
        raise DataError(f"data.path: both token shards and text, {both}", expected="one kind")
    return _shard_corpus(shards, data, sequence, rows, progress)


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
    top = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if top >= rows:
        raise DataError(
            f"data.tokenizer: {name_of(tokenizer_dir)} has ids up to {top:,}",
            expected=f"ids below the student's {rows:,} rows",
        )
    if data.limit_bytes is not None:
        files = _limited(files, data.limit_bytes)
    shown = clean(data.paths[0], 300) if len(data.paths) == 1 else f"{len(data.paths)} paths"
    by_file = len(files) >= MIN_FILES_TO_HOLD_OUT
    parts: dict[bool, list[Tokens]] = {False: [], True: []}
    dtype = np.uint16 if rows <= 1 << 16 else np.uint32
    total, done, undecodable = sum(_size(path) for _, path in files), 0, 0
    for group in _grouped((_fraction(name) < data.heldout_fraction, path) for name, path in files):
        for (held, _, last), ids in zip(group, _encoded(tokenizer, [text for _, text, _ in group]), strict=True):
            if last and end_of_text is not None:
                ids.append(end_of_text)
            parts[held and by_file].append(np.asarray(ids, dtype=dtype))
        done += sum(len(text) for _, text, _ in group)
        undecodable += sum(text.count("\ufffd") for _, text, _ in group)
        progress(min(1.0, done / max(1, total)))
    if not done:
        raise _empty(shown)
    train, heldout = (np.concatenate([np.empty(0, dtype), *parts.pop(held)]) for held in (False, True))
    if not by_file or min(len(train), len(heldout)) <= sequence:
        # Few files, or chance left one part without a window: the end of everything is held out instead.
        everything = np.concatenate([train, heldout])
        cut = len(everything) - int(len(everything) * data.heldout_fraction)
        train, heldout = everything[:cut], everything[cut:]
    return replace(_checked([train], [heldout], sequence, shown, len(files)), undecodable=undecodable)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception, for a text without a token too
        raise DataError(f"data.tokenizer: cannot encode the text: {clean(str(error), 200)}") from None


def _shard_corpus(shards: list[Path], data: Data, sequence: int, rows: int, progress: Progress) -> Corpus:
    train: list[Tokens] = []
    heldout: list[Tokens] = []
    for path in shards:
        size = _size(path)
        if size == 0 or size % 4:
            wanted = "a multiple of 4 above 0: u32 little-endian tokens"
            raise DataError(f"{name_of(path)}: {size:,} bytes", expected=wanted)
        try:
            tokens = np.memmap(path, dtype="<u4", mode="r")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{name_of(path)}: cannot be read: {clean(reason, 200)}") from None
        # One pass over the map: an id out of range would otherwise be an index error on the device, hours later.
        for start in range(0, len(tokens), _SCAN_TOKENS):
            top = int(tokens[start : start + _SCAN_TOKENS].max())
            if top >= rows:
                raise DataError(f"{name_of(path)}: token id {top:,}", expected=f"ids below the student's {rows:,} rows")
            progress((len(train) + start / len(tokens)) / len(shards))
        cut = len(tokens) - int(len(tokens) * data.heldout_fraction)
        train.append(tokens[:cut])
        heldout.append(tokens[cut:])
    return _checked(train, heldout, sequence, _counted(shards, "token shard"), len(shards))


def _checked(train: list[Tokens], heldout: list[Tokens], sequence: int, description: str, documents: int) -> Corpus:
    corpus = Corpus(
        train=Windows(train, sequence),
        heldout=Windows(heldout, sequence),
        description=description,
        documents=documents,
        train_tokens=sum(len(a) for a in train),
        heldout_tokens=sum(len(a) for a in heldout),
    )
    for part, windows, arrays, do in (
        ("training", corpus.train, train, "give more text, or lower train.sequence"),
        ("held-out", corpus.heldout, heldout, "give more text, lower train.sequence or raise data.heldout_fraction"),
    ):
        if not len(windows):
            longest = max(len(a) for a in arrays)
            of = f" in the longest of {_counted(arrays, 'piece')}" if len(arrays) > 1 else ""
            raise DataError(
                f"data.path: {description}: its {part} part has {longest:,} tokens{of}",
                expected=f"at least one window of {sequence + 1:,} tokens",
                do=do,
            )
    return corpus


def _empty(description: str) -> DataError:
    return DataError(f"data.path: {description} is empty", expected="text", do="check the path")


def _counted(things: Sequence[object], unit: str) -> str:
    return f"{len(things):,} {unit}{'' if len(things) == 1 else 's'}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{name_of(path)}: cannot be read: {error.strerror}", do="check its permissions") from None


def load_tokenizer(directory: Path) -> tuple[Tokenizer, int | None]:
    """The directory's tokenizer and the id that ends a document (None where it names no such token).

    Raises:
        DataError: `tokenizer.json` is missing or not a tokenizer.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"data.tokenizer: {name_of(directory)} has no tokenizer.json",
            expected="a directory that has one, or builtin",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every fault of the file
        raise DataError(
            f"{name_of(path)}: no tokenizer: {clean(str(error), 200)}", expected="a tokenizer.json"
        ) from None
    # A tokenizer.json may carry the limits of the model it was made for; they would cut every piece of the corpus.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        token = settings.get("eos_token")
    except (OSError, ValueError, AttributeError):
        token = None
    if isinstance(token, dict):
        token = token.get("content")
    return tokenizer, tokenizer.token_to_id(token) if isinstance(token, str) else None


def _pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces of about a million characters, so that memory stays bounded.

    A piece ends with a line; within a line of more than that, before a word; within a longer word, anywhere.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rest = ""
            while more := file.read(_PIECE_CHARACTERS):
                if "\0" in more:
                    raise DataError(f"{name_of(path)}: holds NUL bytes", expected="UTF-8 text, or a .bin token shard")
                rest += more
                if len(rest) < _PIECE_CHARACTERS:
                    continue
                cut = rest.rfind("\n") + 1 or max(0, rest.rfind(" ")) or len(rest)
                yield rest[:cut]
                rest = rest[cut:]
            if rest:
                yield rest
    except OSError as error:
        raise DataError(f"{name_of(path)}: cannot be read: {error.strerror}", do="check its permissions") from None


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
            if size >= _GROUP_CHARACTERS:
                yield group
                group, size = [], 0
            ahead = piece
        group.append((held, ahead, True))
        size += len(ahead)
    if group:
        yield group


def _limited(files: list[tuple[str, Path]], limit_bytes: int) -> list[tuple[str, Path]]:
    """Files of at most `limit_bytes` in all, taken in an order that mixes them and returned sorted."""
    chosen: list[tuple[str, Path]] = []
    total = 0
    for name, path in sorted(files, key=lambda item: _fraction("limit:" + item[0])):
        total += _size(path)
        if total > limit_bytes and chosen:
            break
        chosen.append((name, path))
    return sorted(chosen)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32


def split_documents(data: Data) -> tuple[list[Path], list[Path]]:
    """The text files that are trained on and those held out, where whole files are held out."""
    files = find_files(data.paths, data.glob)
    train = [path for name, path in files if _fraction(name) >= data.heldout_fraction]
    heldout = [path for name, path in files if _fraction(name) < data.heldout_fraction]
    return train, heldout
