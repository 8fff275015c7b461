"""Stores a teacher: a run like any other, which makes no steps. What is whole when it ends is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.data import Corpus
from engine.errors import ModelError
from engine.falsifiers import FAIL
from engine.fidelity import FIDELITY_TOKENS, Fidelity, lines, measure
from engine.formats import inspect_model_dir, resolve_builtin
from engine.loading import layout_of, load_data, load_the_student, stored_key, teacher_error, tell_vocabulary
from engine.measures import FIDELITY_COUNTS, FIDELITY_TEMPERATURES, fidelity_names
from engine.models import CausalLM, load_teacher
from engine.sizing import settled
from engine.stepless import Stepless
from engine.store_format import (
    MANIFEST,
    Manifest,
    Sizes,
    StoreError,
    cache_directory,
    check_sizes,
    read_manifest,
    sizes,
    store_directory,
)
from engine.store_writer import StoreWriter
from engine.stream import End, Inputs
from engine.teacher_output import TeacherOutput
from engine.teacher_store import StoredTeacher, visited
from engine.text import clean

_MARGIN_BYTES = 16 << 20


class Preparer(Stepless):
    """Stores what a configuration's training needs of its teacher.

    Args:
        config: resolved, `teacher.source` being hidden or topk.
        run_dir: where the stream is; the store lives in the cache.
        recorder: where everything that happens goes.
        stop: polled between batches.
        started: `time.monotonic()` of the engine's start.
        contract_digest: SHA-256 of the contract that the recorder judges.
    """

    parts: int
    """Of a batch, as training takes it."""
    writer: StoreWriter | None = None

    def settle(self) -> int:
        """The parts of a batch, which later attempts keep."""
        self.parts = settled(self.config, self.placement, self.recorder.first_run).train.parts
        return self.parts

    def left(self) -> str:
        """How much is stored."""
        if self.writer is None:
            return ""
        self.writer.flush()
        there, wanted = self.writer.windows("train"), self.writer.manifest.wanted
        return f"; {there:,} of {wanted:,} windows are stored, and a preparation goes on from there"

    def close(self) -> None:
        """Closes what is being written."""
        if self.writer is not None:
            self.writer.close()

    def phases(self) -> End:
        """Loads everything, stores what is missing, checks and names it whole."""
        config = self.config
        assert config.teacher is not None
        torch.manual_seed(config.train.seed)
        student = load_the_student(config, self.placement, self.recorder, self.enter)
        files = inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        corpus, tokenizer_dir = load_data(config, student, files, self.recorder, self.enter, self.poll)
        key = stored_key(config, self.placement, files, tokenizer_dir, corpus, student)
        self.recorder.emit(Inputs(digests={"teacher": key.teacher, "tokenizer": key.tokenizer, "data": key.data}))
        self.poll()
        wanted = visited(config, corpus)
        directory = store_directory(cache_directory(config.teacher), key)
        if (whole := self._whole(directory, wanted)) is not None:
            return self._already(directory, whole)

        self.enter("load-teacher", config.teacher.path)
        teacher = load_teacher(config.teacher, self.placement.device, self.placement.dtype)
        tell_vocabulary(teacher.vocab, student, files, self.recorder)
        if teacher.head is None:
            raise ModelError(
                f"{teacher.name}: {teacher.head_reason}: its hidden states alone do not tell its logits",
                expected="a head that is one matrix product",
                do="set teacher.source: online",
            )
        self.measure("teacher_logit_error", teacher_error(teacher, student, self.placement))
        output = TeacherOutput(
            teacher, self.placement, key, config.distill.temperature, student.vocab, config.distill.chunk_mib << 20
        )
        begun = Manifest(
            key=key,
            created=time.time(),
            teacher=config.teacher.path,
            vocab=teacher.vocab,
            width=output.head.shape[1],
            parameters=layout_of(teacher),
            wanted=len(wanted),
        )
        size = self._sizes(begun, student.vocab)
        self._say_size(size, directory)
        self.poll()
        if key.kind == "topk":
            self._fidelity(output, student, corpus)
        del student

        self.enter("store", clean(str(directory), 300))
        try:
            self._store(output, corpus, begun, size, directory, wanted)
        except OSError as error:
            where = clean(str(error.filename or directory), 300)
            raise StoreError(
                f"{where}: {error.strerror}", do="set teacher.cache to a directory that can be written"
            ) from None
        self.enter("check")
        assert self.writer is not None
        self._check(output, corpus, self.writer, wanted)
        return self._publish(self.writer, directory)

    def _whole(self, directory: Path, wanted: Sequence[int]) -> Manifest | None:
        """The manifest of a store that lacks nothing; None where there is none or windows are missing."""
        manifest = read_manifest(directory / MANIFEST)
        if manifest is None:
            return None
        check_sizes(directory, manifest)
        stored = StoredTeacher(directory, manifest, torch.device("cpu")).stored(wanted)
        return manifest if stored == len(wanted) else None

    def _already(self, directory: Path, manifest: Manifest) -> End:
        self.recorder.log(
            f"{clean(str(directory), 300)}: whole already: {manifest.windows:,} windows, {manifest.bytes:,} bytes; "
            "its measures are those of the run that made it"
        )
        for name, value in manifest.measures.items():
            self.measure(name, value, "as measured when it was stored")
        self._require_mass()
        return self.judge("everything is stored already")

    def _sizes(self, begun: Manifest, vocabulary: int) -> Sizes:
        key = begun.key
        return sizes(
            key.kind,
            sequence=key.sequence,
            windows=begun.wanted,
            heldout=key.heldout,
            width=begun.width,
            rows=begun.vocab,
            wide=self.placement.dtype.itemsize,
            top_k=key.top_k or 0,
            vocabulary=vocabulary,
        )

    def _say_size(self, size: Sizes, directory: Path) -> None:
        tokens = size.windows * self.config.train.sequence
        self.recorder.log(
            f"{size.token:,} bytes a token: {size.window * size.windows:,} for {tokens:,} tokens in {size.windows:,} "
            f"windows, {size.heldout:,} held out, {size.head:,} for the head, {size.total:,} bytes in all, in "
            f"{clean(str(directory), 300)}"
        )

    def _fidelity(self, output: TeacherOutput, student: CausalLM, corpus: Corpus) -> None:
        """What the coarse teacher keeps, told before anything is stored.

        Raises:
            StoreError: it keeps less of the probability than `prepare.min_mass`.
        """
        self.enter("fidelity")
        key, vocabulary = output.key, output.vocabulary
        chosen = (output.temperature, key.top_k or 1)
        grid = [(t, k) for t in FIDELITY_TEMPERATURES for k in FIDELITY_COUNTS if k < vocabulary]
        windows = corpus.heldout_batch(max(1, FIDELITY_TOKENS // key.sequence))
        rows = measure(output, student, windows, [*grid, chosen], self.poll)
        tokens = min(FIDELITY_TOKENS, len(windows) * key.sequence)
        self.recorder.log(f"what the largest logits keep, over {tokens:,} held-out tokens and the student's gradient:")
        for line in lines(rows, chosen):
            self.recorder.log(line)
        for row in rows:
            names = fidelity_names(row.temperature, row.k) if (row.temperature, row.k) in grid else ()
            for name, value in zip(names, (row.mass, row.cosine), strict=False):
                self.measure(name, value)
        own = next(row for row in rows if (row.temperature, row.k) == chosen)
        self.measure("topk_mass", own.mass, f"K {own.k}, T {own.temperature:g}")
        self.measure("topk_gradient_cosine", own.cosine, f"K {own.k}, T {own.temperature:g}")
        self._require_mass(rows)

    def _require_mass(self, rows: Sequence[Fidelity] = ()) -> None:
        least, mass = self.config.prepare.min_mass, self.figures.get("topk_mass")
        if mass is None or mass >= least:
            return
        assert self.config.teacher is not None
        temperature = self.config.distill.temperature
        enough = [row.k for row in rows if row.temperature == temperature and row.mass >= least]
        larger = f"teacher.top_k: {min(enough)}" if enough else "a lower distill.temperature"
        raise StoreError(
            f"teacher.top_k {self.config.teacher.top_k} at distill.temperature {temperature:g}: the stored logits "
            f"would hold {mass:.3f} of the probability",
            expected=f"at least prepare.min_mass, {least:g}",
            do=f"set teacher.source: hidden, which is exact at any temperature, or {larger}, or say --force",
        )

    def _store(
        self,
        output: TeacherOutput,
        corpus: Corpus,
        begun: Manifest,
        size: Sizes,
        directory: Path,
        wanted: Sequence[int],
    ) -> None:
        made = self.writer = StoreWriter(directory, begun, self.config.prepare.shard_mib << 20)
        missing = [index for index in wanted if index not in made.have]
        heldout = corpus.heldout_batch(self.config.data.heldout_windows)
        ahead = len(heldout) - made.windows("heldout")
        if made.bytes:
            self.recorder.log(f"{len(wanted) - len(missing):,} of {len(wanted):,} windows are there already")
        self._require_space(
            directory,
            size.window * len(missing) + size.heldout * ahead // len(heldout) + (not made.has_head) * size.head,
        )
        if not made.has_head:
            made.put_head(output.head)
        batch = max(1, self.config.train.batch // self.parts)
        self.begin_work()
        done, total = 0, ahead + len(missing)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(len(heldout) + len(wanted) - total, done, total, "windows")

        for begin in range(len(heldout) - ahead, len(heldout), batch):
            self.poll()
            rows = heldout[begin : begin + batch]
            made.add("heldout", output.heldout(rows))
            advance(len(rows))
        made.flush()
        for begin in range(0, len(missing), batch):
            self.poll()
            indices = missing[begin : begin + batch]
            tensors = output.train(corpus.train.stack(indices))
            made.add("train", tensors | {"windows": torch.tensor(indices, dtype=torch.int64)})
            advance(len(indices))
        made.flush()
        # Read back from the disk, every byte of it.
        self.begin_work()
        whole = made.bytes

        def read(so_far: int) -> None:
            self.poll()
            self.progress(0, so_far, whole, "bytes read back")

        made.verify(read)

    def _require_space(self, directory: Path, needed: int) -> None:
        free = shutil.disk_usage(directory).free
        if needed + _MARGIN_BYTES > free:
            raise StoreError(
                f"{clean(str(directory), 300)}: {needed:,} bytes are to be stored and {free:,} are free",
                expected=f"{needed + _MARGIN_BYTES:,}",
                do="free space, set teacher.cache to another disk, or lower train.steps",
            )

    def _check(self, output: TeacherOutput, corpus: Corpus, made: StoreWriter, wanted: Sequence[int]) -> None:
        """F-DISTILL-PREP-001 and 002: random batches, computed again."""
        store = StoredTeacher(made.directory, made.manifest, torch.device("cpu"))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.config.train.seed, 1])))
        batch = min(len(wanted), max(1, self.config.train.batch // self.parts))
        cosine, differ, tokens = 1.0, 0, 0
        for _ in range(self.config.prepare.check_batches):
            self.poll()
            indices = [int(i) for i in generator.choice(np.asarray(wanted), batch, replace=False)]
            smallest, others = output.compare(store.read(indices), corpus.train.stack(indices))
            cosine, differ = min(cosine, smallest), differ + others
            tokens += batch * self.config.train.sequence
        self.measure("store_cosine", cosine, f"smallest of {tokens:,} tokens, computed again")
        self.measure("store_ids_differ", float(differ), f"in {tokens:,} tokens, computed again")

    def _publish(self, made: StoreWriter, directory: Path) -> End:
        """Names the store whole, unless a verdict stands against it."""
        self.poll()
        if not any(v.verdict == FAIL and v.severity != "warn" for v in self.recorder.verdicts):
            manifest = made.finish(self.figures)
            self.recorder.log(
                f"{clean(str(directory), 300)}: whole: {manifest.windows:,} windows, {manifest.bytes:,} bytes"
            )
        return self.judge("every window is stored")
