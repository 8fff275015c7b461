"""Stores a teacher: a run like any other, which makes no steps. What is whole when it ends is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.account import against, run_event, summary
from engine.config import RunConfig
from engine.data import Corpus
from engine.device import device_memory, device_peak_bytes, place, smi_name
from engine.errors import ExitCode, ModelError
from engine.falsifiers import FAIL, JUDGE_PHASE, exit_code_of
from engine.fidelity import FIDELITY_TOKENS, Fidelity, lines, measure
from engine.formats import inspect_model_dir, resolve_builtin
from engine.keeper import Totals
from engine.loading import layout_of, load_data, load_the_student, stored_key, teacher_error, tell_vocabulary
from engine.measures import FIDELITY_COUNTS, FIDELITY_TEMPERATURES, fidelity_names
from engine.models import CausalLM, load_teacher
from engine.recorder import Recorder
from engine.sizing import settled
from engine.stop import StopRequest
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
from engine.stream import End, Inputs, Measure, Progress
from engine.teacher_output import TeacherOutput
from engine.teacher_store import StoredTeacher, visited
from engine.text import clean
from engine.training import Ended

PROGRESS_SECONDS = 2.0
_MARGIN_BYTES = 16 << 20


class Preparer:
    """Stores what a configuration's training needs of its teacher.

    Args:
        config: resolved, `teacher.source` being hidden or topk.
        run_dir: where the stream is; the store lives in the cache.
        recorder: where everything that happens goes.
        stop: polled between batches.
        started: `time.monotonic()` of the engine's start.
        contract_digest: SHA-256 of the contract that the recorder judges.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        recorder: Recorder,
        stop: StopRequest,
        started: float,
        contract_digest: str,
    ) -> None:
        self.config, self.run_dir, self.recorder, self.stop = config, run_dir, recorder, stop
        self.started, self.contract_digest = started, contract_digest
        self.writer: StoreWriter | None = None
        self.measures: dict[str, float] = {}
        self._told = self._work_started = -PROGRESS_SECONDS

    def run(self) -> End:
        """Every phase in turn; the `end` event that closes the stream is returned, not emitted."""
        try:
            return self._phases()
        except Ended as ended:
            reason = ended.reason
            if self.writer is not None:
                self.writer.flush()
                there, wanted = self.writer.windows("train"), self.writer.manifest.wanted
                reason += f"; {there:,} of {wanted:,} windows are stored, and a preparation goes on from there"
            return self._end(ended.status, reason, ended.exit_code)
        finally:
            if self.writer is not None:
                self.writer.close()

    def _phases(self) -> End:
        config = self.config
        assert config.teacher is not None
        self.placement = place(config.train)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.recorder.device_memory = lambda: device_memory(self.placement.device)
        self.recorder.machine.gpu = smi_name(self.placement.device)
        self.parts = settled(config, self.placement, self.recorder.first_run).train.parts
        self.recorder.emit(run_event(config, self.placement, self.contract_digest, accumulation=self.parts))

        student = load_the_student(config, self.placement, self.recorder, self._enter)
        files = inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
        corpus, tokenizer_dir = load_data(config, student, files, self.recorder, self._enter, self._poll)
        key = stored_key(config, self.placement, files, tokenizer_dir, corpus, student)
        self.recorder.emit(Inputs(digests={"teacher": key.teacher, "tokenizer": key.tokenizer, "data": key.data}))
        self._poll()
        wanted = visited(config, corpus)
        directory = store_directory(cache_directory(config.teacher), key)
        if (whole := self._whole(directory, wanted)) is not None:
            return self._already(directory, whole)

        self._enter("load-teacher", config.teacher.path)
        teacher = load_teacher(config.teacher, self.placement.device, self.placement.dtype)
        tell_vocabulary(teacher.vocab, student, files, self.recorder)
        if teacher.head is None:
            raise ModelError(
                f"{teacher.name}: {teacher.head_reason}: its hidden states alone do not tell its logits",
                expected="a head that is one matrix product",
                do="set teacher.source: online",
            )
        self._measure("teacher_logit_error", teacher_error(teacher, student, self.placement))
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
        self._poll()
        if key.kind == "topk":
            self._fidelity(output, student, corpus)
        del student

        self._enter("store", clean(str(directory), 300))
        try:
            self._store(output, corpus, begun, size, directory, wanted)
        except OSError as error:
            where = clean(str(error.filename or directory), 300)
            raise StoreError(
                f"{where}: {error.strerror}", do="set teacher.cache to a directory that can be written"
            ) from None
        self._enter("check")
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
            self._measure(name, value, "as measured when it was stored")
        self._require_mass()
        return self._judge("everything is stored already")

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
        self._enter("fidelity")
        key, vocabulary = output.key, output.vocabulary
        chosen = (output.temperature, key.top_k or 1)
        grid = [(t, k) for t in FIDELITY_TEMPERATURES for k in FIDELITY_COUNTS if k < vocabulary]
        windows = corpus.heldout_batch(max(1, FIDELITY_TOKENS // key.sequence))
        rows = measure(output, student, windows, [*grid, chosen], self._poll)
        tokens = min(FIDELITY_TOKENS, len(windows) * key.sequence)
        self.recorder.log(f"what the largest logits keep, over {tokens:,} held-out tokens and the student's gradient:")
        for line in lines(rows, chosen):
            self.recorder.log(line)
        for row in rows:
            names = fidelity_names(row.temperature, row.k) if (row.temperature, row.k) in grid else ()
            for name, value in zip(names, (row.mass, row.cosine), strict=False):
                self._measure(name, value)
        own = next(row for row in rows if (row.temperature, row.k) == chosen)
        self._measure("topk_mass", own.mass, f"K {own.k}, T {own.temperature:g}")
        self._measure("topk_gradient_cosine", own.cosine, f"K {own.k}, T {own.temperature:g}")
        self._require_mass(rows)

    def _require_mass(self, rows: Sequence[Fidelity] = ()) -> None:
        least, mass = self.config.prepare.min_mass, self.measures.get("topk_mass")
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
        self._work_started = time.monotonic()
        done, total = 0, ahead + len(missing)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._progress(len(heldout) + len(wanted) - total, done, total, "windows")

        for begin in range(len(heldout) - ahead, len(heldout), batch):
            self._poll()
            rows = heldout[begin : begin + batch]
            made.add("heldout", output.heldout(rows))
            advance(len(rows))
        made.flush()
        for begin in range(0, len(missing), batch):
            self._poll()
            indices = missing[begin : begin + batch]
            tensors = output.train(corpus.train.stack(indices))
            made.add("train", tensors | {"windows": torch.tensor(indices, dtype=torch.int64)})
            advance(len(indices))
        made.flush()
        # Read back from the disk, every byte of it.
        self._work_started, self._told = time.monotonic(), -PROGRESS_SECONDS
        whole = made.bytes

        def read(so_far: int) -> None:
            self._poll()
            self._progress(0, so_far, whole, "bytes read back")

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
            self._poll()
            indices = [int(i) for i in generator.choice(np.asarray(wanted), batch, replace=False)]
            smallest, others = output.compare(store.read(indices), corpus.train.stack(indices))
            cosine, differ = min(cosine, smallest), differ + others
            tokens += batch * self.config.train.sequence
        self._measure("store_cosine", cosine, f"smallest of {tokens:,} tokens, computed again")
        self._measure("store_ids_differ", float(differ), f"in {tokens:,} tokens, computed again")

    def _publish(self, made: StoreWriter, directory: Path) -> End:
        """Names the store whole, unless a verdict stands against it."""
        self._poll()
        if not any(v.verdict == FAIL and v.severity != "warn" for v in self.recorder.verdicts):
            manifest = made.finish(self.measures)
            self.recorder.log(
                f"{clean(str(directory), 300)}: whole: {manifest.windows:,} windows, {manifest.bytes:,} bytes"
            )
        return self._judge("every window is stored")

    def _judge(self, reason: str) -> End:
        self._enter(JUDGE_PHASE, reason)
        verdicts = [v for v in self.recorder.verdicts if v.severity != "warn"]
        code = exit_code_of(verdicts)
        if code == ExitCode.FAILED:
            return self._end("FAILED", against([v for v in verdicts if v.verdict == FAIL]), code)
        return self._end("COMPLETED", reason, code)

    def _measure(self, name: str, value: float, detail: str = "") -> None:
        self.measures[name] = value
        self.recorder.emit(Measure(name=name, value=value, detail=detail))

    def _progress(self, before: int, done: int, total: int, unit: str) -> None:
        """Tells how far it is, every two seconds and at the end.

        Args:
            before: what earlier attempts had done.
            done: by this one.
            total: of this one.
            unit: of all three.
        """
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS and done < total:
            return
        self._told, seconds = now, now - self._work_started
        self.recorder.emit(
            Progress(
                done=before + done,
                total=before + total,
                unit=unit,
                seconds=seconds,
                seconds_left=seconds * (total - done) / done if done else None,
            )
        )

    def _enter(self, phase: str, detail: str = "") -> None:
        self.recorder.enter(phase, detail)
        self._poll()

    def _poll(self) -> None:
        if self.stop.signal is not None:
            raise Ended("STOPPED", f"{self.stop.signal} in phase {self.recorder.phase}", ExitCode.INTERRUPTED)
        if (fatal := self.recorder.fatal) is not None:
            raise Ended("FAILED", against([fatal]), ExitCode.FAILED)

    def _end(self, status: str, reason: str, code: ExitCode) -> End:
        peak = device_peak_bytes(self.placement.device)
        return End(
            status=status,
            reason=reason,
            exit_code=code,
            steps=0,
            seconds=time.monotonic() - self.started,
            summary=summary(Totals(), self.recorder.phase_seconds, peak),
        )
