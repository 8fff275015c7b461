"""One run from self-check to verdicts, reading top to bottom: phases, the training loop, what ends it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.account import against, provenance, run_event, summary
from engine.cautions import cautions
from engine.checkpoint import DIRECTORY as CHECKPOINTS
from engine.checkpoint import Best, Kind
from engine.config import RunConfig
from engine.device import device_memory, device_peak_bytes, place, smi_name
from engine.distill import Pair
from engine.errors import DataError, ExitCode
from engine.export import checkpoint_seconds, export, weights_digests
from engine.falsifiers import FAIL, JUDGE_PHASE, exit_code_of
from engine.inputs import event as inputs_event
from engine.inputs import tell_meanwhile
from engine.keeper import Keeper, Totals
from engine.loading import Loaded, load
from engine.models import CausalLM
from engine.optimizer import adamw, learning_rate
from engine.projection import MIN_STEPS, FixedCosts, project
from engine.recorder import Recorder
from engine.selfcheck import check_loss
from engine.stop import StopRequest
from engine.stream import End, Eval, Measure, Step
from engine.windows import Order, degenerate

PHASE_BUDGET_SECONDS = 1_800.0
_REASONS = {"steps": "every step is done", "max_steps": "max_steps is reached", "budget": "the time budget is reached"}
_MARGIN_SECONDS = 1.0
_POLL_SECONDS = 0.05


class _Ended(Exception):
    """The run ends before its last phase."""

    def __init__(self, status: str, reason: str, exit_code: ExitCode) -> None:
        super().__init__(reason)
        self.status, self.reason, self.exit_code = status, reason, exit_code


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
        self.totals = Totals()
        self.keeper: Keeper | None = None
        self.order: Order | None = None
        self.train_started = 0.0
        self.step_seconds: list[float] = []
        self.evals: list[Eval] = []
        self.start_seconds = 0.0
        self.telling: threading.Thread | None = None

    def run(self) -> End:
        """Every phase in turn; the `end` event that closes the stream is returned, not emitted."""
        try:
            return self._phases()
        except _Ended as ended:
            reason = ended.reason
            if ended.status == "STOPPED":
                self._save(["interrupt"], wait=True)
                if self.keeper is not None and (problem := self.keeper.last_error) is not None:
                    reason += f"; step {self.totals.step:,} is not saved: {problem}"
            return self._end(ended.status, reason, ended.exit_code)
        finally:
            if self.keeper is not None:
                self.keeper.drain()

    def _phases(self) -> End:
        self.placement = place(self.config.train)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        torch.manual_seed(self.config.train.seed)
        self.recorder.device_memory = lambda: device_memory(self.placement.device)
        self.recorder.machine.gpu = smi_name(self.placement.device)
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
        optimizer = adamw(student.model, self.config.train, self.placement.device)
        self.order = Order(corpus.train, self.config.train.seed)
        if self.smoke:
            self.telling = tell_meanwhile(loaded, self.initial["fp32"], self.recorder)
        else:
            self._enter("resume" if self.recorder.attempt > 1 else "prepare-checkpoints")
            self._keep(loaded, optimizer)

        self.start_seconds = time.monotonic() - self.started
        if self.totals.step == 0:
            self._enter("baseline-evaluation")
            self._evaluate(pair, heldout)

        self._enter("train")
        reason = self._train(pair, optimizer, heldout)

        self._enter("final-evaluation")
        if not self.evals or self.evals[-1].step != self.totals.step:
            self._evaluate(pair, heldout)
        kinds: list[Kind] = ["final", "best"] if self._is_best() else ["final"]
        self._save(kinds, wait=True)

        self._conclude(student, loaded.tokenizer_dir)
        self._await_inputs()
        self._enter(JUDGE_PHASE, reason)
        if self.smoke and reason == "budget" and self.totals.step < MIN_STEPS:
            return self._end(
                "TIMEOUT",
                f"the budget of {self.config.smoke.budget_seconds:g} s ended the run after "
                f"{self.totals.step} steps; {MIN_STEPS} are needed for a verdict",
                ExitCode.TIMEOUT,
            )
        verdicts = [v for v in self.recorder.verdicts if v.severity != "warn"]
        code = exit_code_of(verdicts)
        if code == ExitCode.FAILED:
            return self._end("FAILED", against([v for v in verdicts if v.verdict == FAIL]), code)
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

    def _keep(self, loaded: Loaded, optimizer: torch.optim.Optimizer) -> None:
        """Sets the checkpoints of a full run up, and goes on from the newest one where this is a later attempt."""
        for caution in cautions(self.config):
            self.recorder.log(caution, "warning")
        self.keeper = Keeper(self.run_dir, self.config, loaded, optimizer, self.recorder, self.placement.device)
        self.recorder.emit(inputs_event(self.keeper.inputs, self.initial["fp32"]))
        found = self.keeper.resume() if self.recorder.attempt > 1 else None
        if found is not None:
            self.totals, at = found
            self.order = Order(loaded.corpus.train, at.seed, at.epoch, at.position)
        self.recorder.on_vitals = self.keeper.watch_space

    def _save(self, kinds: Sequence[Kind], *, wait: bool = False) -> None:
        """Saves the present state of a full run, once there is something to save."""
        if self.keeper is not None and self.order is not None and self.totals.step and kinds:
            self.keeper.save(kinds, self.totals, self.order, wait=wait)

    def _is_best(self) -> bool:
        """Whether the newest evaluation is the best so far; notes it if so."""
        newest, best = self.evals[-1], self.totals.best
        if newest.step == 0 or not math.isfinite(newest.loss) or (best is not None and newest.loss >= best.loss):
            return False
        self.totals.best = Best(step=newest.step, loss=newest.loss)
        return True

    def _train(self, pair: Pair, optimizer: torch.optim.Optimizer, heldout: torch.Tensor) -> str:
        """The loop; returns why it ended: `steps`, `max_steps` or `budget`."""
        train = self.config.train
        warmup = self.config.smoke.warmup_steps if self.smoke else train.warmup_steps
        order, totals = self.order, self.totals
        assert order is not None
        limit = self.config.steps_asked
        reason = "steps" if limit == train.steps else "max_steps"
        pair.student.model.train()
        trained = totals.train_seconds
        self.train_started = last = time.monotonic()
        while totals.step < limit:
            self._poll()
            if self._budget_is_spent():
                reason = "budget"
                break
            step = totals.step + 1
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
            if math.isfinite(loss):  # the weights of a step that is none are those from before it
                totals.learned = totals.learned or rate > 0
                totals.train_seconds = trained + now - self.train_started
            totals.tokens += tokens
            self._advance(step, loss)
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
            kinds = self.keeper.kinds_due(step) if self.keeper is not None and step < limit else []
            if train.evaluate_every and step % train.evaluate_every == 0 and step < limit:
                self._evaluate(pair, heldout)
                kinds += ["best"] if self._is_best() else []
            self._save(kinds)
            last = time.monotonic()
        totals.train_seconds = trained + time.monotonic() - self.train_started
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

    def _advance(self, step: int, loss: float) -> None:
        shown = loss if math.isfinite(loss) else None
        self.totals.step = step
        self.totals.final_loss = shown
        if step == 1:
            self.totals.initial_loss = shown

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
                step=self.totals.step,
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
        loss = result.loss if math.isfinite(result.loss) else None
        self.totals.heldout_final = loss
        if self.totals.step == 0:
            self.totals.heldout_initial = loss

    def _conclude(self, student: CausalLM, tokenizer_dir: Path | None) -> None:
        """What a smoke projects, what a full run exports, and the measures that close the contract."""
        if self.totals.train_seconds > 0:
            self.recorder.emit(Measure(name="steps_per_second", value=self.totals.step / self.totals.train_seconds))
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
                provenance=provenance(self.config, self.run_dir.name, self.totals, self.recorder.verdicts),
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
        files = sum(CHECKPOINTS not in path.parts for path in self.run_dir.rglob("*.safetensors"))
        self.recorder.emit(Measure(name="model_files", value=float(files)))

    def _await_inputs(self) -> None:
        """Waits, within the budget, until what was loaded is told by hash."""
        while self.telling is not None and self.telling.is_alive():
            self._poll()
            if time.monotonic() > self.deadline - _MARGIN_SECONDS:
                self.recorder.log("no time is left to hash what was loaded: the evidence will not tell", "warning")
                break
            self.telling.join(_POLL_SECONDS)

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
            raise _Ended("FAILED", against([fatal]), ExitCode.FAILED)

    def _end(self, status: str, reason: str, code: ExitCode) -> End:
        return End(
            status=status,
            reason=reason,
            exit_code=code,
            steps=self.totals.step,
            seconds=time.monotonic() - self.started,
            summary=summary(self.totals, self.recorder.phase_seconds, device_peak_bytes(self.placement.device)),
        )
