"""A stored teacher, opened: what stands in a run where the model itself stood."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import RunConfig
from engine.data import Corpus
from engine.formats import ModelFiles
from engine.store_format import (
    HEAD,
    PREPARE,
    Key,
    Manifest,
    StoreError,
    cache_directory,
    files_digest,
    find,
    kept_logits,
)
from engine.text import clean
from engine.windows import Order

_OPEN_FILES = 64
"""Shards that stay mapped; a store has thousands, and a process has so many descriptors."""


class StoredTeacher:
    """What was stored of a teacher, for the training windows of one corpus; stands where a `CausalLM` stood.

    Args:
        directory: of the store.
        manifest: of it.
        device: that trains; the head is put there.

    Raises:
        StoreError: a file cannot be read.
    """

    def __init__(self, directory: Path, manifest: Manifest, device: torch.device) -> None:
        self.directory, self.manifest = directory, manifest
        self.name, self.kind, self.vocab = clean(manifest.teacher), manifest.key.kind, manifest.vocab
        self.heldout_windows = manifest.key.heldout
        self._lock = threading.Lock()
        self._mapped: OrderedDict[str, Any] = OrderedDict()
        self._files = {part: [r for r in manifest.files if r.part == part] for part in ("heldout", "train")}
        self._starts = {part: np.cumsum([0, *(r.windows for r in rows)]) for part, rows in self._files.items()}
        places = [self._rows(row.name, "windows", slice(None)) for row in self._files["train"]]
        stored = torch.cat(places).numpy() if places else np.empty(0, np.int64)
        order = np.argsort(stored, kind="stable")
        self._sorted, self._places = stored[order], order
        self.head: Tensor = self._rows(HEAD, "head", slice(None)).to(device)

    @property
    def key(self) -> Key:
        """What it was stored of, and for."""
        return self.manifest.key

    def stored(self, indices: Sequence[int]) -> int:
        """How many of these training windows it holds."""
        return int(np.isin(np.asarray(indices, dtype=np.int64), self._sorted).sum())

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What a step needs of training windows, copied out of the mapped files into new CPU tensors.

        Safe to call from any thread.

        Args:
            indices: of the windows, as `engine.windows.Order.take` gives them.

        Returns:
            `hidden`, bfloat16, shape [windows, sequence, width]; or `ids` (int32) and `logits` (float16), both of
            shape [windows, sequence, K], and `tail` (float32), shape [windows, sequence]: see `topk_loss.TopK`.

        Raises:
            StoreError: a window is not stored, or a file cannot be read.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        at = np.searchsorted(self._sorted, wanted).clip(max=max(0, len(self._sorted) - 1))
        if not len(self._sorted) or bool((self._sorted[at] != wanted).any()):
            raise StoreError(
                f"{clean(str(self.directory), 300)}: {self.stored(indices):,} of {len(wanted):,} windows are stored",
                do=f"run {PREPARE}",
            )
        names = ("hidden",) if self.kind == "hidden" else ("ids", "logits", "tail")
        places = self._places[at]
        return {name: torch.stack([self._one("train", name, int(place)) for place in places]) for name in names}

    def heldout(self, begin: int, end: int) -> Tensor:
        """Hidden states of held-out windows `begin` to `end`, shape [windows, sequence, width], in the head's dtype.

        Raises:
            StoreError: a file cannot be read.
        """
        return torch.stack([self._one("heldout", "hidden", place) for place in range(begin, end)])

    def _one(self, part: str, name: str, place: int) -> Tensor:
        which = int(np.searchsorted(self._starts[part], place, side="right")) - 1
        row = place - int(self._starts[part][which])
        found = self._rows(self._files[part][which].name, name, slice(row, row + 1))[0]
        return found.to(torch.int32) if name == "ids" else found

    def _rows(self, file: str, name: str, rows: slice) -> Tensor:
        try:
            with self._lock:
                tensor: Tensor = self._opened(file).get_slice(name)[rows]
                return tensor
        except (SafetensorError, OSError, RuntimeError) as error:
            where = clean(str(self.directory / file), 300)
            reason = clean(str(error), 200)
            raise StoreError(f"{where}: cannot be read: {reason}", do=f"check the disk, or run {PREPARE}") from None

    def _opened(self, name: str) -> Any:
        if name in self._mapped:
            self._mapped.move_to_end(name)
        else:
            self._mapped[name] = safe_open(str(self.directory / name), framework="pt", device="cpu")
            if len(self._mapped) > _OPEN_FILES:
                self._mapped.popitem(last=False)
        return self._mapped[name]


def key_of(
    config: RunConfig, precision: str, teacher: ModelFiles, tokenizer_dir: Path | None, corpus: Corpus, vocabulary: int
) -> Key:
    """The key of what a run needs to be stored; reads the teacher's weights once for their digest.

    Args:
        config: of the run, its `teacher.source` being hidden or topk.
        precision: fp32 or bf16, as resolved.
        teacher: its files.
        tokenizer_dir: where the corpus' tokenizer is; None where it needs none.
        corpus: of the run.
        vocabulary: the student's rows.

    Raises:
        OSError: a file cannot be read.
    """
    spec = config.teacher
    assert spec is not None
    assert spec.source != "online"
    topk = spec.source == "topk"
    return Key(
        kind=spec.source,
        teacher=files_digest(teacher.weights),
        teacher_config=files_digest(teacher.config_files),
        precision=precision,
        tokenizer=files_digest([tokenizer_dir / "tokenizer.json"]) if tokenizer_dir is not None else "",
        data=corpus.digest(),
        sequence=config.train.sequence,
        heldout=min(config.data.heldout_windows, len(corpus.heldout)),
        top_k=kept_logits(spec.top_k, vocabulary) if topk else None,
        temperature=float(config.distill.temperature) if topk else None,
        vocabulary=vocabulary if topk else None,
    )


def visited(config: RunConfig, corpus: Corpus) -> tuple[int, ...]:
    """Training windows that a run's steps take, in the order of the first epoch; all of them for more than one."""
    count = min(config.steps_asked * config.train.batch, len(corpus.train))
    return Order(corpus.train, config.train.seed).take(count)


def open_store(config: RunConfig, key: Key, corpus: Corpus, device: torch.device) -> StoredTeacher:
    """The stored teacher of a run.

    Args:
        config: of the run.
        key: see `key_of`.
        corpus: of the run.
        device: that trains.

    Raises:
        StoreError: nothing of this key is stored, and what is instead; it is damaged; or windows are missing.
    """
    assert config.teacher is not None
    store = StoredTeacher(*find(cache_directory(config.teacher), key), device)
    wanted = visited(config, corpus)
    if (there := store.stored(wanted)) < len(wanted):
        raise StoreError(
            f"{clean(str(store.directory), 300)}: {there:,} of the {len(wanted):,} windows that "
            f"{config.steps_asked:,} steps take are stored",
            expected="all of them",
            do=f"run {PREPARE} with these steps and this seed; what is stored stays",
        )
    return store
