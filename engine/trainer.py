"""One run from self-check to verdicts, reading top to bottom: phases, the training loop, what ends it."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from engine.config import RunConfig, fingerprint, gate_fingerprint
from engine.data import Corpus
from engine.device import Placement, device_memory, device_peak_bytes, place
from engine.distill import Pair
from engine.errors import DataError, ExitCode
from engine.export import checkpoint_seconds, export, weights_digests
from engine.falsifiers import FAIL, JUDGE_PHASE, exit_code_of
from engine.loading import load
from engine.model_card import Provenance
from engine.models import CausalLM
from engine.optimizer import adamw, learning_rate
from engine.projection import MIN_STEPS, FixedCosts, project
from engine.recorder import Recorder, peak_rss_bytes
from engine.selfcheck import check_loss
from engine.stop import StopRequest
from engine.stream import End, Eval, Measure, Run, Step, Verdict
from engine.windows import Order, degenerate

PHASE_BUDGET_SECONDS = 1_800.0
_REASONS = {"steps": "every step is done", "max_steps": "max_steps is reached", "budget": "the time budget is reached"}
_MARGIN_SECONDS = 1.0


class _Ended(Exception):
    """The run ends before its last phase."""

    def __init__(self, status: str, reason: str, exit_code: ExitCode) -> None:
        super().__init__(reason)
        self.status, self.reason, self.exit_code = status, reason, exit_code


@dataclass
class _Progress:
    """What the loop has done so far."""

    step: int = 0
    tokens: int = 0
    initial_loss: float = math.nan
    final_loss: float = math.nan
    started: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Runs one configuration in its run directory.

    Args:
        config: resolved.
        run_dir: where the artefacts go.
        recorder: where everything that happens goes.
        stop: polled between units of work.
        started: `time.monotonic()` of the engine's start; a smoke's budget counts from it.
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
        self.smoke = config.mode == "smoke"
        self.deadline = started + config.smoke.budget_seconds if self.smoke else math.inf
        self.progress = _Progress()
        self.step_seconds: list[float] = []
        self.evals: list[Eval] = []
        self.start_seconds = 0.0

    def run(self) -> End:
        """Every phase in turn; the `end` event that closes the stream is returned, not emitted."""
        try:
            return self._phases()
        except _Ended as ended:
            return self._end(ended.status, ended.reason, ended.exit_code)

    def _phases(self) -> End:
        self.placement = place(self.config.train)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        torch.manual_seed(self.config.train.seed)
        self.recorder.device_memory = lambda: device_memory(self.placement.device)
        self.recorder.emit(run_event(self.config, self.placement, self.contract_digest))

        self._enter("self-check")
        for measure in check_loss(
            self.placement.device,
            self.placement.dtype,
            self.config.distill.temperature,
            compile=self._compiles_loss(),
        ):
            self.recorder.emit(measure)

        loaded = load(self.config, self.placement, self.recorder, self._enter, self._poll)
        student, corpus = loaded.student, loaded.corpus
        pair = self._pair(loaded.teacher, student)
        heldout = torch.from_numpy(corpus.heldout_batch(self.config.data.heldout_windows)).to(self.placement.device)

        self.initial = weights_digests(student.model)
        self._enter("baseline-evaluation")
        self.start_seconds = time.monotonic() - self.started
        self._evaluate(pair, heldout)

        self._enter("train")
        reason = self._train(pair, corpus, heldout)

        self._enter("final-evaluation")
        if self.evals[-1].step != self.progress.step:
            self._evaluate(pair, heldout)

        self._conclude(student, loaded.tokenizer_dir)
        self._enter(JUDGE_PHASE, reason)
        if self.smoke and reason == "budget" and self.progress.step < MIN_STEPS:
            return self._end(
                "TIMEOUT",
                f"the budget of {self.config.smoke.budget_seconds:g} s ended the run after "
                f"{self.progress.step} steps; {MIN_STEPS} are needed for a verdict",
                ExitCode.TIMEOUT,
            )
        verdicts = [v for v in self.recorder.verdicts if v.severity != "warn"]
        code = exit_code_of(verdicts)
        if code == ExitCode.FAILED:
            return self._end("FAILED", _against([v for v in verdicts if v.verdict == FAIL]), code)
        return self._end("COMPLETED", _REASONS[reason], code)

    def _pair(self, teacher: CausalLM | None, student: CausalLM) -> Pair:
        distill = self.config.distill
        return Pair(
            student=student,
            teacher=teacher,
            temperature=distill.temperature,
            alpha=distill.alpha,
            autocast=self.placement.autocast,
            chunk_bytes=distill.chunk_mib << 20,
            compile=self._compiles_loss(),
        )

    def _compiles_loss(self) -> bool:
        """Whether the loss's arithmetic is compiled; what is checked before training is what trains."""
        wanted = self.config.distill.compile
        return wanted == "on" or (wanted == "auto" and self.placement.device.type == "cuda")

    def _train(self, pair: Pair, corpus: Corpus, heldout: torch.Tensor) -> str:
        """The loop; returns why it ended: `steps`, `max_steps` or `budget`."""
        train = self.config.train
        warmup = self.config.smoke.warmup_steps if self.smoke else train.warmup_steps
        model = pair.student.model
        optimizer = adamw(model, train, self.placement.device)
        order = Order(corpus.train, train.seed)
        limit, reason = train.steps, "steps"
        if self.smoke and self.config.smoke.max_steps is not None and self.config.smoke.max_steps < limit:
            limit, reason = self.config.smoke.max_steps, "max_steps"
        model.train()
        self.progress.started = last = time.monotonic()
        while self.progress.step < limit:
            self._poll()
            if self._budget_is_spent():
                reason = "budget"
                break
            step = self.progress.step + 1
            batch = order.next(train.batch)
            if problem := degenerate(batch):
                self._degenerate(step, problem)
            rate = learning_rate(step, train, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, ce, kd, norm = self._step(pair, batch, optimizer)
            now = time.monotonic()
            self.step_seconds.append(now - last)
            tokens = train.batch * train.sequence
            self._advance(step, tokens, loss)
            self.recorder.emit(
                Step(
                    step=step,
                    loss=loss,
                    ce=ce,
                    kd=kd,
                    lr=rate,
                    grad_norm=norm,
                    tokens=tokens,
                    seconds=now - last,
                )
            )
            if not math.isfinite(loss):
                raise _Ended("FAILED", f"the loss of step {step} is {loss}; weights kept as before it", ExitCode.FAILED)
            last = time.monotonic()
            if train.evaluate_every and step % train.evaluate_every == 0 and step < limit:
                self._evaluate(pair, heldout)
                last = time.monotonic()
        self.progress.seconds = time.monotonic() - self.progress.started
        return reason

    def _step(self, pair: Pair, batch: object, optimizer: torch.optim.Optimizer) -> tuple[float, float, float, float]:
        """One optimizer step; loss, ce, kd and gradient norm. A non-finite loss changes no weight."""
        train = self.config.train
        windows = torch.as_tensor(batch).to(self.placement.device)
        normalizer = windows.shape[0] * (windows.shape[1] - 1)
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.placement.device)
        for micro in windows.tensor_split(train.accumulation):
            loss = pair.loss(micro, normalizer)
            loss.total.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss.total.detach(), loss.ce, loss.kd]).float()
        norm = torch.nn.utils.clip_grad_norm_(pair.student.model.parameters(), train.clip or math.inf)
        total, ce, kd = sums.tolist()
        if math.isfinite(total) and bool(torch.isfinite(norm)):
            optimizer.step()
        elif math.isfinite(total):
            total = float(norm)  # an infinite gradient is as final as an infinite loss
        return total, ce, kd, float(norm)

    def _degenerate(self, step: int, problem: str) -> None:
        """Refuses a corpus that begins with useless batches; a stray one in the middle of a long run is only told."""
        what = f"the batch of step {step} is degenerate: {problem}"
        if step <= MIN_STEPS:
            raise DataError(f"data: {what}", do="check the corpus")
        self.recorder.log(what, "warning")

    def _advance(self, step: int, tokens: int, loss: float) -> None:
        self.progress.step = step
        self.progress.tokens += tokens
        if step == 1:
            self.progress.initial_loss = loss
        self.progress.final_loss = loss

    def _budget_is_spent(self) -> bool:
        """Whether another step would leave too little of a smoke's budget for what comes after training."""
        if not self.smoke:
            return False
        reserve = 1.3 * self.evals[0].seconds + _MARGIN_SECONDS
        longest = max(self.step_seconds[-20:], default=0.0)
        return time.monotonic() + longest + reserve > self.deadline

    def _evaluate(self, pair: Pair, heldout: torch.Tensor) -> None:
        started = time.monotonic()
        result = pair.evaluate(heldout, max(1, self.config.train.batch // self.config.train.accumulation), self._poll)
        self.evals.append(
            Eval(
                step=self.progress.step,
                loss=result.loss,
                ce=result.ce,
                kd=result.kd,
                agreement=result.agreement,
                cosine=result.cosine,
                tokens=result.tokens,
                seconds=time.monotonic() - started,
            )
        )
        self.recorder.emit(self.evals[-1])

    def _conclude(self, student: CausalLM, tokenizer_dir: Path | None) -> None:
        """What a smoke projects, what a full run exports, and the measures that close the contract."""
        if self.progress.seconds > 0 and self.progress.step:
            self.recorder.emit(Measure(name="steps_per_second", value=self.progress.step / self.progress.seconds))
        if self.smoke:
            self._enter("projection")
            steps = self.config.smoke.project_to
            every, eval_every = self.config.checkpoint.every_steps, self.config.train.evaluate_every
            fixed = FixedCosts(
                start_seconds=self.start_seconds,
                evaluation_seconds=sum(e.seconds for e in self.evals) / len(self.evals),
                evaluations=2 + (steps // eval_every if eval_every else 0),
                checkpoint_seconds=checkpoint_seconds(student.model, self.run_dir) if every else 0.0,
                checkpoints=steps // every if every else 0,
            )
            projection = project(self.step_seconds, steps, fixed)
            if projection is not None:
                self.recorder.emit(projection)
        else:
            self._enter("export")
            exported = export(
                student.model,
                self.run_dir,
                provenance=self._provenance(),
                initial=self.initial,
                tokenizer_dir=tokenizer_dir,
                poll=self._poll,
            )
            for measure in exported.measures:
                self.recorder.emit(measure)
            if exported.ok:
                self.recorder.log(f"model written and verified by a fresh process: {exported.path.name}")
            else:
                self.recorder.log(f"the export is not the trained model: {'; '.join(exported.problems)}", "error")
        files = sum(1 for _ in self.run_dir.rglob("*.safetensors"))
        self.recorder.emit(Measure(name="model_files", value=float(files)))

    def _provenance(self) -> Provenance:
        """What the model card says of this run."""
        config, p = self.config, self.progress
        first, last = self.evals[0].loss, self.evals[-1].loss
        return Provenance(
            run=self.run_dir.name,
            teacher=config.teacher.path if config.teacher else None,
            student=config.student.path or config.student.from_ or "",
            data=config.data.paths,
            config=fingerprint(config),
            steps=p.step,
            tokens=p.tokens,
            temperature=config.distill.temperature,
            alpha=config.distill.alpha,
            losses={
                "train, first step": p.initial_loss,
                "train, last step": p.final_loss,
                "held-out, before": first,
                "held-out, after": last,
            },
            verdicts=[(v.id, v.verdict, v.observed) for v in self.recorder.verdicts if v.verdict != "PENDING"],
            versions={name: metadata.version(name) for name in ("torch", "transformers")},
        )

    def _enter(self, phase: str, detail: str = "") -> None:
        self._poll()
        # A smoke is bounded as a whole; in a full run a phase that loads or evaluates for this long counts as stalled.
        bounded = not self.smoke and phase != "train"
        self.recorder.enter(phase, detail, PHASE_BUDGET_SECONDS if bounded else None)

    def _poll(self) -> None:
        """Ends the run when a signal asked for it or a fatal verdict fell; the heartbeat watches the budget."""
        if self.stop.signal is not None:
            raise _Ended("STOPPED", f"{self.stop.signal} in phase {self.recorder.phase}", ExitCode.INTERRUPTED)
        fatal = self.recorder.fatal
        if fatal is not None:
            raise _Ended("FAILED", _against([fatal]), ExitCode.FAILED)

    def _end(self, status: str, reason: str, code: ExitCode) -> End:
        p = self.progress
        summary = {f"phase_{k}_seconds": v for k, v in self.recorder.phase_seconds.items() if k}
        summary["peak_rss_bytes"] = float(peak_rss_bytes())
        on_device = device_peak_bytes(self.placement.device)
        if on_device is not None:
            summary["peak_device_bytes"] = float(on_device)
        if p.step:
            seconds = p.seconds or time.monotonic() - p.started
            summary |= {
                "train_seconds": seconds,
                "initial_loss": p.initial_loss,
                "final_loss": p.final_loss,
                "steps_per_second": p.step / seconds,
                "tokens_per_second": p.tokens / seconds,
            }
        if self.evals:
            summary |= {"heldout_initial": self.evals[0].loss, "heldout_final": self.evals[-1].loss}
        return End(
            status=status,
            reason=reason,
            exit_code=code,
            steps=p.step,
            seconds=time.monotonic() - self.started,
            summary=summary,
        )


def _against(verdicts: list[Verdict]) -> str:
    """Why a run failed: each verdict that stands against it, as what does not hold."""
    return "; ".join(
        f"{v.id} is FAIL: not so that {v.claim} (expected {v.expected}, observed {v.observed})" for v in verdicts
    )


def run_event(config: RunConfig, placement: Placement, contract_digest: str) -> Run:
    """What is about to run, on what."""
    smoke = config.mode == "smoke"
    return Run(
        attempt=1,
        mode=config.mode,
        config=fingerprint(config),
        gate=gate_fingerprint(config),
        contract=contract_digest,
        teacher=config.teacher.path if config.teacher else None,
        student=config.student.path or config.student.from_ or "",
        host=platform.node(),
        device=str(placement.device),
        device_name=placement.name,
        precision=placement.precision,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")}
        | {"python": platform.python_version()},
        target_steps=config.train.steps,
        max_steps=config.smoke.max_steps if smoke else None,
        budget_seconds=config.smoke.budget_seconds if smoke else None,
        temperature=config.distill.temperature,
        alpha=config.distill.alpha,
        tokens_per_step=config.train.batch * config.train.sequence,
    )
