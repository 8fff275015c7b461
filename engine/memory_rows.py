"""The rows of an estimate that are memory: what a run holds on its device and in the host's memory."""

from __future__ import annotations

from engine import layer_bytes, stored_bytes
from engine.config import RunConfig
from engine.estimate_rows import GIB, MIB, Device, Pool, Row, counted, total
from engine.shapes import Shape

_CPU_FRAMEWORK = 450 * MIB
_CUDA_HOST_FRAMEWORK = 3 * GIB
_DEVICE_FRAMEWORK = 1 * GIB
_EVALUATION_CHUNKS = 9
"""Buffers of one chunk of logits in the plain reference loss that evaluates."""
_WHOLE_LOGITS = 11
"""The same in the plain loss that trains where a head is more than one product, its gradients included."""
_CHECK_CHUNKS = 4
"""The same where what was stored is computed again: both, what is left out, and its sum."""
_FIDELITY_CHUNKS = 8
"""The same where the largest logits are held against all: both models' probabilities and what is left of them."""
_PROMPT_TOKENS = 1_400
"""Of the longest prompt: HumanEval's has so many bytes, and no tokenizer makes more tokens than that of it."""
_SAMPLED_LOGITS = 5
"""Of a batch's newest logits while its next tokens are drawn: themselves, scaled, sorted, their sums, the order."""


class Memory:
    """The memory of one run; sizes that several rows need stand here once.

    Args:
        config: of the run; `auto` for accumulation counts as one part, `auto` for parallel as whole models.
        student: its shape.
        teacher: that of the teacher; None where there is none.
        mixed: products are made in bf16.
        device: what computes.
    """

    def __init__(self, config: RunConfig, student: Shape, teacher: Shape | None, mixed: bool, device: Device) -> None:
        self.config, self.student, self.teacher, self.mixed = config, student, teacher, mixed
        self.on_gpu = device == "cuda"
        self.where: Pool = "host" if device == "cpu" else "device"
        train = config.train
        self.processes = train.devices if config.makes_steps else 1
        self.divided = self.processes if train.parallel == "fsdp" else 1
        self.share = -(-train.batch // self.processes)
        self.windows = -(-self.share // train.parts)
        self.tokens = self.windows * train.sequence
        self.wide = 2 if mixed else 4
        self.size = f"{self.windows} x {train.sequence} tokens"
        self.source = "online" if config.teacher is None else config.teacher.source

    def rows(self) -> list[Row]:
        """Every row, of whichever mode; those of the host are for all processes together."""
        if not self.config.makes_steps:
            inner, alone = self._evaluating() if self.config.mode == "evaluate" else self._preparing(), list[Row]()
        else:
            inner = [*self._weights(), *self._working(), *self._batches()]
            alone = self._alone(total(inner) * (self.processes if self.where == "host" else 1))
        return [*map(self._of_all, inner), *alone, *map(self._of_all, self._framework(alone))]

    # From the first step to the last

    def _weights(self) -> list[Row]:
        p, over = self.student.parameters, self._over()
        weights, *copies = self._student_weights()
        rows = [
            weights,
            self._row("gradients", 4 * p // self.divided, f"{counted(p)} x 4 bytes, float32{over}"),
            self._row("AdamW moments", 8 * p // self.divided, f"{counted(p)} x 2 moments x 4 bytes{over}"),
            *copies,
            *self._teacher_weights(),
        ]
        if self.processes > 1:
            rows.append(self._exchanged())
        return rows

    def _student_weights(self) -> list[Row]:
        p = self.student.parameters
        said = f"{counted(p)} parameters ({self.student.source}) x 4 bytes, float32{self._over()}"
        rows = [self._row("student weights", 4 * p // self.divided, said)]
        if self.mixed:
            inner = self._in_layers(self.student)
            how = f"{counted(inner)} x 2 bytes: all but embedding and head"
            rows.append(self._row("bf16 copies of weights", 2 * inner, how))
        return rows

    def _teacher_weights(self) -> list[Row]:
        t = self.teacher
        if t is None:
            return []
        if self.source == "online" or self.config.mode == "prepare":
            how = f"{counted(t.parameters)} ({t.source}) x {self.wide} bytes"
            return [self._row("teacher weights", self.wide * t.parameters // self.divided, how + self._over())]
        how = f"{t.vocab:,} x {t.hidden:,} x {self.wide} bytes; its body stays away: its part is stored ({self.source})"
        return [self._row("teacher's head", self.wide * t.embedding, how)]

    def _exchanged(self) -> Row:
        """What several devices send each other: gradients on their way, or the whole of what each holds a part of."""
        s, t = self.student, self.teacher
        if self.divided == 1:
            how = f"{counted(s.parameters)} x 4 bytes: gradients that are being added up"
            return self._row("gradient buckets", 4 * s.parameters, how)
        size = 4 * (2 * s.embedding + 2 * self._in_layers(s) // max(1, s.layers))
        how = "embedding, head and two layers of the student x 4 bytes"
        if t is not None and self.source == "online":
            size += self.wide * (t.embedding + 2 * self._in_layers(t) // max(1, t.layers))
            how += f", head and two layers of the teacher x {self.wide} bytes"
        return self._row("gathered weights", size, f"{how}: whole while they are at work")

    # What a step makes and drops again

    def _working(self) -> list[Row]:
        s, t = self.student, self.teacher
        layer, ends = layer_bytes.saved(s, self.mixed), 12 * s.hidden
        sizes = f"hidden {s.hidden:,}, feed-forward {s.intermediate:,}, {s.heads} heads"
        if self.config.train.activation_checkpointing:
            each = layer_bytes.saved_input(s)
            kept = (s.layers * each + layer) * self.tokens
            how = (
                f"{self.size} x ({s.layers} layers x {each:,} bytes for its input, and {layer:,} bytes of the one that "
                f"is computed again; {sizes})"
            )
        else:
            kept = s.layers * layer * self.tokens
            how = f"{self.size} x {s.layers} layers x {layer:,} bytes ({sizes})"
        rows = [
            self._row("student activations", kept + ends * self.tokens, f"{how}; no sequence x sequence matrix (SDPA)")
        ]
        if t is not None and self.source == "online":
            rows.append(self._teacher_activations(t))
        return [*rows, *self._loss(kept)]

    def _teacher_activations(self, t: Shape) -> Row:
        each = layer_bytes.forward(t, self.wide)
        how = f"{self.size} x {each:,} bytes: one layer at a time, without gradients"
        return self._row("teacher activations", each * self.tokens, how)

    def _loss(self, activations: int) -> list[Row]:
        s, t, distill = self.student, self.teacher, self.config.distill
        if not (s.plain_head and (t is None or t.plain_head)):
            rows = max(s.vocab, t.vocab if t else 0)
            how = f"{self.size} x {rows:,} logits x 4 bytes x {_WHOLE_LOGITS}: a head is more than one product"
            return [self._row("whole logits", 4 * self.tokens * rows * _WHOLE_LOGITS, how)]
        chunk = self._chunk(self.tokens)
        chunk_tokens = chunk // (4 * s.vocab)
        compiled = distill.compile == "on" or (distill.compile == "auto" and self.on_gpu)
        buffers = 2 + (self.source == "topk") if compiled else 4
        # Evaluation keeps no activations, so that only what goes beyond them comes on top.
        evaluation = max(0, _EVALUATION_CHUNKS * chunk - buffers * chunk - activations)
        how = f"{buffers} x {chunk_tokens:,} tokens x {s.vocab:,} logits x 4 bytes" + (", compiled" if compiled else "")
        if evaluation:
            how += f"; {_EVALUATION_CHUNKS} of them when it is evaluated"
        head = 4 * s.embedding
        copies = 4 * s.vocab * t.hidden if self.mixed and t is not None else 0
        heads = f"the head's own gradient, {s.vocab:,} x {s.hidden:,} x 4 bytes"
        if copies:
            heads += f", and the teacher's head in float32, {s.vocab:,} x {t.hidden if t else 0:,} x 4 bytes"
        return [
            self._row("loss chunks", buffers * chunk + evaluation, how),
            self._row("heads in the loss", head + copies, heads),
        ]

    def _batches(self) -> list[Row]:
        """Batches that were made ready ahead, and the stored teacher's part of them."""
        train = self.config.train
        held = train.prefetch + 1
        tokens = 8 * self.share * (train.sequence + 1) * held
        batches = f"{held} batches of {self.share} x {train.sequence} tokens"
        if self.teacher is None or self.source == "online":
            return [Row(name="batches made ready", bytes=tokens, where="host", how=f"{batches} x 8 bytes")]
        each = stored_bytes.read_bytes(self.config, self.student, self.teacher)
        said = stored_bytes.how_a_token(self.config, self.student, self.teacher)
        ready = tokens + held * self.share * train.sequence * each
        rows = [Row(name="batches made ready", bytes=ready, where="host", how=f"{batches} x (8 bytes, and {said})")]
        wide = 4 * self.teacher.hidden if self.source == "hidden" and not self.mixed else 0
        how = f"{self.size} x {said}" + (f", and {self.teacher.hidden:,} x 4 bytes in float32" if wide else "")
        rows.append(self._row("stored teacher at work", self.tokens * (each + wide), how))
        return rows

    # Mode prepare

    def _preparing(self) -> list[Row]:
        """Both models, the teacher's forward pass, what it is held against, and what is being written."""
        s, t, mib = self.student, self.teacher, self.config.prepare.shard_mib
        assert t is not None  # the schema asks for one
        states = self.tokens * t.hidden * (2 + self.wide)
        check, first = self._chunk(self.tokens), self._chunk(self.config.train.sequence)
        logits, how = _CHECK_CHUNKS * check, f"{_CHECK_CHUNKS} x {check // (4 * s.vocab):,} tokens"
        student, until = 4 * s.parameters, "until the teacher is held against it"
        if self.source == "topk":  # of one window at a time, and the student's logits of all of it
            whole = 4 * s.vocab * self.config.train.sequence
            if _FIDELITY_CHUNKS * first + whole > logits:
                logits, how = (
                    _FIDELITY_CHUNKS * first + whole,
                    f"{_FIDELITY_CHUNKS} x {first // (4 * s.vocab):,} tokens",
                )
                how += f" and {self.config.train.sequence:,} tokens"
        else:
            student, until = (
                max(0, student - states - logits),
                "while its vocabulary is looked at; what rows below leave",
            )
        said = f"{counted(s.parameters)} parameters ({s.source}) x 4 bytes, {until}"
        stored = stored_bytes.sizes_of(self.config, s, t, self.wide)
        file = max(stored.head, min(mib * MIB, max(stored.heldout, stored.window * stored.windows)))
        written = f"2 x the larger of prepare.shard_mib, {mib:,} MiB, and the head, {stored.head // MIB:,} MiB"
        return [
            self._row("student weights", student, said),
            *self._teacher_weights(),
            self._teacher_activations(t),
            self._row("last hidden states", states, f"{self.size} x {t.hidden:,} units x (2 + {self.wide}) bytes"),
            self._row("chunks of logits", logits, f"{how} x {s.vocab:,} logits x 4 bytes, where they are compared"),
            Row(name="file being written", bytes=2 * file, where="host", how=written),
        ]

    # Mode evaluate

    def _evaluating(self) -> list[Row]:
        """Models that only say what they think: no gradients, no moments, nothing kept for a backward pass."""
        return [*self._student_weights(), *(self._answering() if self.config.evaluate.runs_code else self._held_out())]

    def _held_out(self) -> list[Row]:
        """Both models on a part of a batch of held-out windows, and the plain loss on their logits."""
        s, t = self.student, self.teacher
        each = layer_bytes.forward(s, self.wide)
        how = f"{self.size} x {each:,} bytes: one layer at a time, without gradients"
        rows = [*self._teacher_weights(), self._row("student activations", each * self.tokens, how)]
        rows += [] if t is None else [self._teacher_activations(t)]
        if not (s.plain_head and (t is None or t.plain_head)):
            vocab = max(s.vocab, t.vocab if t else 0)
            how = f"{self.size} x {vocab:,} logits x 4 bytes x {_WHOLE_LOGITS}: a head is more than one product"
            return [*rows, self._row("whole logits", 4 * self.tokens * vocab * _WHOLE_LOGITS, how)]
        chunk = self._chunk(self.tokens)
        how = f"{_EVALUATION_CHUNKS} x {chunk // (4 * s.vocab):,} tokens x {s.vocab:,} logits x 4 bytes"
        return [*rows, self._row("chunks of logits", _EVALUATION_CHUNKS * chunk, how)]

    def _answering(self) -> list[Row]:
        """A batch of answers at its longest."""
        s, asked = self.student, self.config.evaluate
        length = _PROMPT_TOKENS + asked.max_new_tokens
        each = 2 * (s.layers + 1) * s.key_value * self.wide  # a layer's are copied as they grow
        size = f"{asked.batch} x ({_PROMPT_TOKENS:,} + {asked.max_new_tokens:,}) tokens"
        cached = f"{size} x 2 x ({s.layers} + 1) layers x {s.key_value:,} x {self.wide} bytes (key-value heads x width)"
        through = layer_bytes.forward(s, self.wide)
        prompts = f"{asked.batch} x {_PROMPT_TOKENS:,} tokens x {through:,} bytes: one layer at a time"
        drawn = f"{asked.batch} answers x {s.vocab:,} logits x 4 bytes x {_SAMPLED_LOGITS}, where tokens are drawn"
        return [
            self._row("keys and values", asked.batch * length * each, cached),
            self._row("prompts going through", asked.batch * _PROMPT_TOKENS * through, prompts),
            self._row("logits of a batch", asked.batch * s.vocab * 4 * _SAMPLED_LOGITS, drawn),
        ]

    # The host

    def _alone(self, working: int) -> list[Row]:
        """What one process alone holds in the host's memory, however many train."""
        if self.config.mode != "train":
            return []
        p = self.student.parameters
        saved, how = 12 * p, f"{counted(p)} x 3 x 4 bytes: weights and moments, written from here by a thread"
        if self.on_gpu:  # torch rounds what it pins
            saved, how = 1 << (saved - 1).bit_length(), f"{how}; pinned, so up to the next power of two"
        # After training: the export's copy, and the fresh process that loads it.
        export = 6 * p + _CPU_FRAMEWORK
        extra = export if self.on_gpu else export - working + 16 * p
        after = f"{counted(p)} x (2 + 4) bytes and a second process that reads it back, after training"
        return [
            Row(name="checkpoint snapshot", bytes=saved, where="host", how=how),
            Row(name="export and its check", bytes=max(0, extra), where="host", how=after),
        ]

    def _framework(self, alone: list[Row]) -> list[Row]:
        if not self.on_gpu:
            how = "Python, torch and transformers, 330 MiB as imported, and their thread pools"
            return [Row(name="framework", bytes=_CPU_FRAMEWORK, where="host", how=how)]
        loaded = [4 * self.student.parameters]
        if self.teacher is not None:
            whole = self.source == "online" or self.config.mode == "prepare"
            loaded.append(self.wide * (self.teacher.parameters if whole else self.teacher.embedding))
        rest = max(0, max(loaded, default=0) - total(alone))
        how = "the larger model in host memory, before it moves to the device; what other rows leave of it"
        return [
            Row(name="models being loaded", bytes=rest, where="host", how=how),
            Row(
                name="framework on the device",
                bytes=_DEVICE_FRAMEWORK,
                where="device",
                how="an allowance: CUDA context, cuBLAS workspaces, what the allocator rounds up",
            ),
            Row(
                name="framework",
                bytes=_CUDA_HOST_FRAMEWORK,
                where="host",
                how="an allowance: Python, torch and transformers with CUDA's libraries",
            ),
        ]

    # Small things

    def _chunk(self, tokens: int) -> int:
        """Bytes of one chunk of the student's logits in float32, where there are so many tokens."""
        row = 4 * self.student.vocab
        return row * max(1, min(tokens, self.config.distill.chunk_mib * MIB // row))

    def _of_all(self, row: Row) -> Row:
        """A row of one process as that of all: they have a device each and share the host's memory."""
        if self.processes == 1 or row.where != "host":
            return row
        how = f"{row.how}; in each of {self.processes} processes"
        return Row(name=row.name, bytes=row.bytes * self.processes, where=row.where, how=how)

    def _over(self) -> str:
        return f", over {self.divided} devices" if self.divided > 1 else ""

    @staticmethod
    def _in_layers(model: Shape) -> int:
        """Parameters that are neither embedding nor head."""
        return max(0, model.parameters - model.embedding * (1 if model.tied else 2))

    def _row(self, name: str, size: int, how: str) -> Row:
        return Row(name=name, bytes=size, where=self.where, how=how)
