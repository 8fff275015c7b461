"""One run from self-check to verdicts, reading top to bottom: phases, the training loop, what ends it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.account import against, run_event, summary
from engine.bodies import Bodies, checkpoint_activations
from engine.cautions import cautions
from engine.checkpoint import DIRECTORY as CHECKPOINTS
from engine.checkpoint import Best, Kind, OrderState
from engine.conclusion import await_inputs, export_model, projected
from engine.config import RunConfig
from engine.crew import SHARES, agreed, divided, loads_on, placed, poll, whole_student, without
from engine.device import device_memory, device_peak_bytes, smi_name
from engine.distill import Pair
from engine.errors import ExitCode
from engine.export import weights_digests
from engine.falsifiers import FAIL, JUDGE_PHASE, exit_code_of
from engine.feed import Feed
from engine.flops import Peak
from engine.inputs import event as inputs_event
from engine.inputs import tell_meanwhile
from engine.keeper import Keeper, Totals
from engine.loading import Loaded, load
from engine.models import CausalLM
from engine.optimizer import adamw, learning_rate
from engine.projection import MIN_STEPS
from engine.rank_process import Seat
from engine.ranks import ALONE, Lost, join
from engine.recorder import Recorder
from engine.selfcheck import check_loss
from engine.sizing import meter_of, peak_of, settled
from engine.step import Stepper
from engine.step_clock import StepClock
from engine.stop import StopRequest
from engine.stream import End, Eval, Measure
from engine.teacher_store import StoredTeacher
from engine.training import Ended, Training
from engine.windows import Order

PHASE_BUDGET_SECONDS = 1_800.0
_REASONS = {"steps": "every step is done", "max_steps": "max_steps is reached", "budget": "the time budget is reached"}
_MARGIN_SECONDS = 1.0


class Trainer:
    """Runs one configuration in its run directory.

    Args:
        config: resolved.
        run_dir: where the artefacts go.
        recorder: where everything that happens goes.
        stop: polled between units of work.
        started: `time.monotonic()` of the engine's start; a smoke's budget counts from it.
        contract_digest: SHA-256 of the contract that the recorder judges.
        seat: of this process among several that train the run together; None for the only one.
        given: config.yaml by itself, where a resume asked for other devices than it; its digests are the run's.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        recorder: Recorder,
        stop: StopRequest,
        started: float,
        contract_digest: str,
        seat: Seat | None = None,
        given: RunConfig | None = None,
    ) -> None:
        self.config, self.run_dir, self.recorder, self.stop = config, run_dir, recorder, stop
        self.started, self.contract_digest, self.seat = started, contract_digest, seat
        self.given = given or config
        self.ranks = ALONE
        self.smoke = config.mode == "smoke"
        self.deadline = started + config.smoke.budget_seconds if self.smoke else math.inf
        self.totals = Totals()
        self.keeper: Keeper | None = None
        self.order: OrderState | None = None
        self.training: Training | None = None
        self.evals: list[Eval] = []
        self.start_seconds = 0.0
        self.telling: threading.Thread | None = None

    def run(self) -> End:
        """Every phase in turn; the `end` event that closes the stream is returned, not emitted."""
        try:
            return self._phases()
        except Ended as ended:
            reason = ended.reason
            if ended.status == "STOPPED":
                self._save(["interrupt"], wait=True)
                if self.keeper is not None and (problem := self.keeper.last_error) is not None:
                    reason += f"; step {self.totals.step:,} is not saved: {problem}"
            return self._end(ended.status, reason, ended.exit_code)
        except RuntimeError as error:  # what a collective raises that somebody has left
            lost = error.record if isinstance(error, Lost) else self.ranks.lost()
            if lost is None:
                raise
            end = without(lost, self._rescue())
            return self._end(end.status, end.reason, end.exit_code)
        finally:
            if self.keeper is not None:
                self.keeper.drain()

    def _phases(self) -> End:
        self.placement = placed(self.config, self.seat)
        self.ranks = join(self.seat, self.config.train.devices, self.placement.device, self.run_dir, self._poll_alone)
        self.recorder.attempt = self.ranks.share(self.recorder.attempt)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        torch.manual_seed(self.config.train.seed + self.ranks.rank)
        self.recorder.device_memory = lambda: device_memory(self.placement.device)
        self.recorder.machine.gpu = smi_name(self.placement.device)
        before = self.recorder.first_run
        found = settled(self.config, self.placement, before)
        self.parts, self.way = agreed(found, self.ranks, kept=before is not None)
        world, parts = self.ranks.world, self.parts
        self.recorder.emit(
            run_event(self.given, self.placement, self.contract_digest, accumulation=parts, world_size=world)
        )
        if self.ranks.world > 1:
            self.recorder.log(f"{self.ranks.world} processes, {SHARES[self.way]}")

        self._enter("self-check")
        for measure in check_loss(
            self.placement.device,
            self.placement.dtype,
            self.config.distill.temperature,
            compile=self._compiles(self.config.distill.compile),
        ):
            self.recorder.emit(measure)
        peak = peak_of(self.placement)

        there = loads_on(self.placement, self.way)
        loaded = load(self.config, there, self.recorder, self._enter, self._poll_alone)
        self.initial = weights_digests(loaded.student.model)
        if self.way == "fsdp":
            loaded = divided(loaded, self.ranks, self.placement.device)
        student, corpus = loaded.student, loaded.corpus
        pair = self._pair(loaded)
        if self.config.train.activation_checkpointing:
            checkpoint_activations(student)
        heldout = torch.from_numpy(corpus.heldout_batch(self.config.data.heldout_windows)).to(self.placement.device)

        optimizer = adamw(student.model, self.config.train, self.placement.device)
        self.order = OrderState(seed=self.config.train.seed, epoch=0, position=0)
        if self.smoke:
            self.telling = tell_meanwhile(loaded, self.initial["fp32"], self.recorder)
        else:
            self._enter("resume" if self.recorder.attempt > 1 else "prepare-checkpoints")
            self._keep(loaded, optimizer)
        self._compile(loaded)

        self.start_seconds = time.monotonic() - self.started
        if self.totals.step == 0:
            self._enter("baseline-evaluation")
            self._evaluate(pair, heldout)

        self._enter("train")
        self.training = self._training(loaded, pair, optimizer, peak)
        try:
            reason = self._train(self.training, pair, heldout)
        finally:
            self.training.close()

        self._enter("final-evaluation")
        if not self.evals or self.evals[-1].step != self.totals.step:
            self._evaluate(pair, heldout)
        kinds: list[Kind] = ["final", "best"] if self._is_best() else ["final"]
        self._save(kinds, wait=True)
        self.bodies.release()
        if self.way == "fsdp" and not self.smoke:
            student = whole_student(student, self.config, self.ranks)

        if not self._goes_on():
            return self._end("COMPLETED", _REASONS[reason], ExitCode.OK)
        self._conclude(student, loaded.tokenizer_dir)
        await_inputs(self.telling, self.deadline - _MARGIN_SECONDS, self._poll, self.recorder)
        self._enter(JUDGE_PHASE, reason)
        if self.smoke and reason == "budget" and self.totals.step < MIN_STEPS:
            return self._end(
                "TIMEOUT",
                f"the budget of {self.config.smoke.budget_seconds:g} s ended the run after "
                f"{self.totals.step} steps; {MIN_STEPS} are needed for a verdict",
                ExitCode.TIMEOUT,
            )
        code = exit_code_of(self.recorder.verdicts)
        if code == ExitCode.FAILED:
            failed = [v for v in self.recorder.verdicts if v.severity != "warn" and v.verdict == FAIL]
            return self._end("FAILED", against(failed), code)
        return self._end("COMPLETED", _REASONS[reason], code)

    def _pair(self, loaded: Loaded) -> Pair:
        distill = self.config.distill
        return Pair(
            student=loaded.student,
            teacher=loaded.teacher,
            temperature=distill.temperature,
            alpha=distill.alpha,
            autocast=self.placement.autocast,
            chunk_bytes=distill.chunk_mib << 20,
            compile=self._compiles(distill.compile),
        )

    def _compiles(self, wanted: str) -> bool:
        """Whether auto, on or off means that something is compiled; what is checked before training is what trains."""
        return wanted == "on" or (wanted == "auto" and self.placement.device.type == "cuda")

    def _compile(self, loaded: Loaded) -> None:
        """Compiles the bodies of the models where that is wanted, for the micro-batches that training has."""
        models = [loaded.student, *([loaded.teacher] if isinstance(loaded.teacher, CausalLM) else [])]
        self.bodies = Bodies(models, self.placement.autocast)
        if not self._compiles(self.config.train.compile):
            return
        if self.way == "fsdp":
            self.recorder.log("train.compile: a model that is divided among devices runs without torch.compile")
            return
        self._enter("compile")
        mine = self.config.train.batch // self.ranks.world
        sizes = {len(part) for part in torch.arange(mine).tensor_split(self.parts)}
        if problem := self.bodies.compile((size, self.config.train.sequence) for size in sorted(sizes)):
            self.recorder.log(f"teacher and student run without torch.compile, which failed: {problem}", "warning")

    def _training(self, loaded: Loaded, pair: Pair, optimizer: torch.optim.Optimizer, peak: Peak) -> Training:
        """What makes the steps, from where the order of the data stands."""
        train, device = self.config.train, self.placement.device
        assert self.order is not None
        clock = StepClock(device)
        feed = Feed(
            Order.at(loaded.corpus.train, self.order),
            train.batch,
            ahead=train.prefetch,
            read=loaded.teacher.read if isinstance(loaded.teacher, StoredTeacher) else None,
            mine=self.ranks.mine(train.batch),
            device=device,
        )
        stepper = Stepper(
            pair, optimizer, parts=self.parts, clip=train.clip, clock=clock, ranks=self.ranks, way=self.way
        )
        return Training(stepper, feed, clock, meter_of(self.config, loaded, peak), self.totals, self.recorder)

    def _keep(self, loaded: Loaded, optimizer: torch.optim.Optimizer) -> None:
        """Sets the checkpoints of a full run up, and goes on from the newest one where this is a later attempt."""
        for caution in cautions(self.config):
            self.recorder.log(caution, "warning")
        self.keeper = Keeper(
            self.run_dir,
            self.given,
            loaded,
            optimizer,
            self.recorder,
            self.placement.device,
            self.ranks,
            self.way == "fsdp",
        )
        self.recorder.emit(inputs_event(self.keeper.inputs, self.initial["fp32"]))
        found = self.keeper.resume() if self.recorder.attempt > 1 else None
        if found is not None:
            self.totals, self.order = found
        self.recorder.on_vitals = self.keeper.watch_space

    def _save(self, kinds: Sequence[Kind], *, wait: bool = False) -> None:
        """Saves the present state of a full run, once there is something to save."""
        if self.keeper is not None and self.order is not None and self.totals.step and kinds:
            self.keeper.save(kinds, self.totals, self.order, wait=wait)

    def _is_best(self) -> bool:
        """Whether the newest evaluation is the best so far; notes it if so."""
        newest, best = self.evals[-1], self.totals.best
        worse = newest.step == 0 or not math.isfinite(newest.loss) or (best is not None and newest.loss >= best.loss)
        if not self.ranks.share(not worse):
            return False
        self.totals.best = Best(step=newest.step, loss=newest.loss)
        return True

    def _train(self, training: Training, pair: Pair, heldout: torch.Tensor) -> str:
        """The loop; returns why it ended: `steps`, `max_steps` or `budget`."""
        train, limit = self.config.train, self.config.steps_asked
        reason = "steps" if limit == train.steps else "max_steps"
        pair.student.model.train()
        try:
            for step in range(self.totals.step + 1, limit + 1):
                if self._budget_is_spent(training):
                    reason = "budget"
                    break
                self._step(training, step)
                self._poll()
                kinds = self.keeper.kinds_due(step) if self.keeper is not None else []
                evaluates = bool(train.evaluate_every) and step % train.evaluate_every == 0
                if step < limit and (kinds or evaluates):
                    training.settle()
                    if evaluates:
                        self._evaluate(pair, heldout)
                        kinds += ["best"] if self._is_best() else []
                    self._save(kinds)
                    training.go_on()
        except Ended as ended:
            if ended.status == "STOPPED":
                training.settle()  # what is saved then is the step launched last
            raise
        training.finish()
        return reason

    def _step(self, training: Training, step: int) -> None:
        warmup = self.config.smoke.warmup_steps if self.smoke else self.config.train.warmup_steps
        self.order = training.step(step, learning_rate(step, self.config.train, warmup))

    def _budget_is_spent(self, training: Training) -> bool:
        """Whether another step would leave too little of a smoke's budget for what comes after training."""
        if not self.smoke:
            return False
        reserve = 1.3 * self.evals[0].seconds + _MARGIN_SECONDS
        longest = max(training.step_seconds[-20:], default=0.0)
        spent = time.monotonic() + (1 + training.pending) * longest + reserve > self.deadline
        return bool(self.ranks.agree(spent))

    def _evaluate(self, pair: Pair, heldout: torch.Tensor) -> None:
        started = time.monotonic()
        with self.bodies.eager():
            # As much at once as a micro-batch of training, which is known to fit.
            windows = max(1, self.config.train.batch // (self.ranks.world * self.parts))
            result = pair.evaluate(heldout, windows, self._poll)
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
            seconds = self.training.step_seconds if self.training else []
            told = projected(self.config, seconds, self.evals, self.start_seconds, student, self.run_dir)
            if told is not None:
                self.recorder.emit(told)
        else:
            self._enter("export")
            export_model(
                self.given, student, tokenizer_dir, self.run_dir, self.totals, self.initial, self.recorder, self._poll
            )
        files = sum(CHECKPOINTS not in path.parts for path in self.run_dir.rglob("*.safetensors"))
        self.recorder.emit(Measure(name="model_files", value=float(files)))

    def _enter(self, phase: str, detail: str = "") -> None:
        self._poll()
        # A smoke is bounded as a whole; in a full run a phase that loads or evaluates for this long counts as stalled.
        bounded = not self.smoke and phase != "train"
        self.recorder.enter(phase, detail, PHASE_BUDGET_SECONDS if bounded else None)

    def _poll(self) -> None:
        """All: ends the run when a signal asked for it or a fatal verdict fell; the heartbeat watches the budget."""
        poll(self.ranks, self.stop, self.recorder)

    def _poll_alone(self) -> None:
        """The same where processes do not keep step, such as in the middle of reading a corpus."""
        if self.ranks.world == 1 or self.stop.signal is not None:
            poll(ALONE, self.stop, self.recorder)

    def _goes_on(self) -> bool:
        """All: what is left after training is rank 0's; whether this is it. It is alone from here on."""
        self._poll()
        main = self.ranks.main
        self.ranks.close()
        self.ranks = ALONE
        return main

    def _rescue(self) -> str:
        """Saves what is left in memory after a process was lost, where that is whole; says what a resume finds."""
        whole = self.way == "ddp" and self.placement.device.type == "cpu"
        if not whole or not self.ranks.main or self.keeper is None or not self.totals.step:
            # A GPU may have gone on with gradients that never came together; of a divided model a part is missing.
            return "a resume goes on from the newest checkpoint"
        self._save(["interrupt"], wait=True)
        problem = self.keeper.last_error
        return f"step {self.totals.step:,} is {'saved' if problem is None else f'not saved: {problem}'}"

    def _end(self, status: str, reason: str, code: ExitCode) -> End:
        return End(
            status=status,
            reason=reason,
            exit_code=code,
            steps=self.totals.step,
            seconds=time.monotonic() - self.started,
            summary=summary(self.totals, self.recorder.phase_seconds, device_peak_bytes(self.placement.device)),
        )
