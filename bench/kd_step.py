"""One whole step of distillation: ours against the loops that others would write, and against the peers' own.

    python bench/kd_step.py [--pair small] [--windows 2 --sequence 512] [--repeats 3] [--rows ours,plain,...] [--save]

A step is: teacher forward without gradients, student forward, loss, backward, clipping, AdamW. Every row is a process
of its own with the same weights, batches, precision and (fused) AdamW; the processes take turns, one repetition each,
so that whatever else the machine does falls on all rows alike. `bench/peers.py` says how each peer's loss is set to be
the same one, `bench/requirements.txt` installs them.

- ours: the engine's own `Pair` and `Stepper`; compiled: `train.compile: on` and `distill.compile: on`.
- ours, stored: the same with the teacher's hidden states stored beforehand (`teacher.source: hidden`).
- plain: what a competent user writes with transformers and PyTorch: autograd on whole logits.
- Liger, torchtune, TRL GKD: their losses in that same plain loop.
- TRL trainer: `DistillationTrainer.train()` itself. It makes its completions by sampling from the student; that part is
  replaced by ready token ids, and nothing else of it. Its loss has no hard labels, so that it is compared at alpha 0,
  with ours at alpha 0 (the rows called soft).

compiled: the bodies of teacher and student and the loss go through torch.compile, each loss in its package's own way.

Tokens/s are by the wall clock, median of the repetitions. Peak MiB is the highest memory of a step above what the
process held before it, models and AdamW's moments among that; on a GPU it is torch's own count. Loss is that of the
last step, after all the updates before it: it must be that of ours within --tolerance, or the command fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import turns

TEMPERATURE, ALPHA, RATE, CLIP, DECAY = 4.0, 0.3, 1e-3, 1.0, 0.01
ROWS = {
    "ours": "ours, eager",
    "ours-compiled": "ours, compiled",
    "ours-stored": "ours, eager, stored",
    "ours-stored-compiled": "ours, compiled, stored",
    "plain": "plain loop, eager",
    "plain-compiled": "plain loop, compiled",
    "liger": "Liger, eager",
    "liger-compiled": "Liger, compiled",
    "torchtune": "torchtune, eager",
    "torchtune-compiled": "torchtune, compiled",
    "trl-gkd": "TRL GKD, eager",
    "trl-gkd-compiled": "TRL GKD, compiled",
    "ours-soft": "ours, eager, soft",
    "ours-soft-compiled": "ours, compiled, soft",
    "trl-trainer": "TRL trainer, eager, soft",
    "trl-trainer-compiled": "TRL trainer, compiled, soft",
}
HOW_CLOSE = {"fp32": 1e-4, "bf16": 2e-2}
ROUNDING = 1e-3
"""Of stored hidden states, which are bfloat16."""


def batches(options: argparse.Namespace) -> list[Any]:
    """Token ids of every step, shape [windows, sequence + 1], int64."""
    import numpy as np
    import pairs

    numbers = np.random.default_rng(0)
    shape = (options.windows, options.sequence + 1)
    steps = (1 + options.repeats) * options.inner
    return [numbers.integers(0, pairs.vocabulary_of(options.pair), shape) for _ in range(steps)]


def run(row: str, options: argparse.Namespace, turn: turns.Turn) -> None:
    """The process of one row."""
    import pairs
    import torch

    from engine.config import Train
    from engine.optimizer import adamw

    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    compiled, soft = row.endswith("-compiled"), "-soft" in row or row.startswith("trl-trainer")
    alpha = 0.0 if soft else options.alpha
    teacher, student = pairs.make(options.pair, options.device, options.precision)
    settings = Train(learning_rate=RATE, weight_decay=DECAY, clip=CLIP, batch=options.windows)
    optimizer = adamw(student.model, settings, torch.device(options.device))
    data = batches(options)
    if options.adamw != "fused":
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = None, options.adamw == "foreach"
    name = row.removesuffix("-compiled").removesuffix("-soft")
    if name == "trl-trainer":
        trl_trainer(teacher, student, optimizer, data, compiled, options, turn)
        return
    make = ours if name.startswith("ours") else loop
    step, missing = make(name, teacher, student, optimizer, data, alpha, compiled, options)
    taken, more = 0, True
    while more:
        turn.begin()
        for _ in range(options.inner):
            loss = step(taken)
            taken += 1
        figures = turn.figures()
        optimizer.zero_grad(set_to_none=True)
        more = turn.end(figures, loss=float(loss()) + missing[taken - 1])


PASSED = (
    "pair",
    "windows",
    "sequence",
    "repeats",
    "inner",
    "alpha",
    "chunk-mib",
    "device",
    "precision",
    "accumulation",
    "compiles",
    "adamw",
    "threads",
)
"""Options that a row's process is given."""

Step = Callable[[int], Callable[[], float]]
"""Makes the step of that number; what it gives back reads its loss, which may wait for a GPU."""


def ours(
    name: str,
    teacher: Any,
    student: Any,
    optimizer: Any,
    data: list[Any],
    alpha: float,
    compiled: bool,
    options: argparse.Namespace,
) -> tuple[Step, list[float]]:
    """The engine's step."""
    import torch

    from engine.bodies import Bodies, checkpoint_activations
    from engine.checkpoint import OrderState
    from engine.distill import Pair
    from engine.feed import Fed
    from engine.step import Stepper

    autocast = torch.bfloat16 if options.precision == "bf16" else None
    if options.checkpointing:
        checkpoint_activations(student)
    if name == "ours-stored":
        teacher = stored_teacher(teacher, data, autocast, options)
    bodies = Bodies([student] if name == "ours-stored" else [teacher, student], autocast)
    windows = -(-options.windows // options.accumulation)
    if compiled and options.compiles != "loss" and (problem := bodies.compile([(windows, options.sequence)])):
        raise RuntimeError(f"the bodies do not compile: {problem}")
    compiled = compiled and options.compiles != "bodies"
    pair = Pair(student, teacher, TEMPERATURE, alpha, autocast, options.chunk_mib << 20, compiled)
    stepper = Stepper(pair, optimizer, parts=options.accumulation, clip=CLIP)
    order = OrderState(seed=0, epoch=0, position=0)
    seen: list[float] = []

    def step(number: int) -> Callable[[], float]:
        places = tuple(range(number * options.windows, (number + 1) * options.windows))
        stored = teacher.read(places) if name == "ours-stored" else None
        stepper.launch(number + 1, RATE, Fed(data[number], slice(None), places, stored, order))
        seen.extend(figures.loss for figures in stepper.ready())

        def read() -> float:
            seen.extend(figures.loss for figures in stepper.flush())
            return seen[-1]

        return read

    return step, [0.0] * len(data)


def stored_teacher(teacher: Any, data: list[Any], autocast: Any, options: argparse.Namespace) -> Any:
    """The teacher's hidden states for all steps in a store of the engine's own format, on the disk; not timed."""
    import atexit
    import shutil

    import torch

    from engine.store_format import Key, Manifest
    from engine.store_writer import StoreWriter
    from engine.teacher_store import StoredTeacher

    held = Path(tempfile.mkdtemp(prefix="kd-step-"))
    atexit.register(shutil.rmtree, held, ignore_errors=True)
    key = Key(
        kind="hidden",
        teacher="0" * 64,
        teacher_config="0" * 64,
        precision=options.precision,
        tokenizer="",
        data="0" * 64,
        sequence=options.sequence,
        heldout=0,
    )
    manifest = Manifest(
        key=key,
        created=0.0,
        teacher=teacher.name,
        vocab=teacher.vocab,
        width=teacher.head.shape[1],
        parameters="0" * 64,
        wanted=len(data) * options.windows,
    )
    writer = StoreWriter(held, manifest, 64 << 20)
    writer.put_head(teacher.head)
    for number, windows in enumerate(data):
        ids = torch.from_numpy(windows[:, :-1].copy()).to(teacher.head.device)
        with torch.no_grad(), torch.autocast(ids.device.type, dtype=autocast, enabled=autocast is not None):
            states = teacher.hidden(ids).to(torch.bfloat16).cpu()
        first = number * options.windows
        writer.add("train", {"hidden": states, "windows": torch.arange(first, first + options.windows)})
    writer.flush()
    manifest = writer.finish({})
    writer.close()
    return StoredTeacher(held, manifest, teacher.head.device)


def loop(
    name: str,
    teacher: Any,
    student: Any,
    optimizer: Any,
    data: list[Any],
    alpha: float,
    compiled: bool,
    options: argparse.Namespace,
) -> tuple[Step, list[float]]:
    """The plain loop around a peer's loss."""
    import pairs
    import peers
    import torch

    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    chunk = max(1, (options.chunk_mib << 20) // (4 * pairs.vocabulary_of(options.pair)))
    asked = peers.Asked(TEMPERATURE, alpha, min(chunk, options.windows * options.sequence), compiled)
    loss_of = peers.LOSSES[name](asked)
    inputs = [torch.from_numpy(windows[:, :-1].copy()) for windows in data]
    labels = [torch.from_numpy(windows[:, 1:].copy()).flatten() for windows in data]
    missing = [0.0] * len(data)
    bodies = [model.model.base_model for model in (teacher, student)]
    if options.checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == "torchtune":
        for number, ids in enumerate(inputs):
            with torch.no_grad():
                states = bodies[0](input_ids=ids.to(device)).last_hidden_state.flatten(0, 1)
            missing[number] = -(1 - alpha) * TEMPERATURE**2 * peers.entropy(states, teacher.head, TEMPERATURE)
    if compiled:
        for body in bodies:
            body.compile(dynamic=False)
    weights = list(student.model.parameters())

    def step(number: int) -> Callable[[], float]:
        ids, goals = (part[number].to(device, non_blocking=True) for part in (inputs, labels))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                wanted = bodies[0](input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).to(dtype)
            states = bodies[1](input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).to(dtype)
            loss = loss_of(states, student.head.to(dtype), wanted, teacher.head.to(dtype), goals)
        del states, wanted
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.detach()
        return lambda: float(value)

    return step, missing


def trl_trainer(
    teacher: Any,
    student: Any,
    optimizer: Any,
    data: list[Any],
    compiled: bool,
    options: argparse.Namespace,
    turn: turns.Turn,
) -> None:
    """TRL's Trainer runs its own loop; a callback begins and ends the repetitions at its step boundaries."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")

    class Ready(trl.DistillationTrainer):  # type: ignore[misc]
        """The first token of a window is the prompt, the rest the completion that would have been sampled."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            ids = torch.tensor(
                [
                    data[example["prompt"] // options.windows][example["prompt"] % options.windows].tolist()
                    for example in inputs
                ],
                device=self.accelerator.device,
            )
            ones = torch.ones_like(ids)
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": ones[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": ones[:, 1:],
                "num_items_in_batch": torch.tensor(ids[:, 1:].numel(), device=ids.device),
            }

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return range(len(data) * options.windows)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            self.seen = super().compute_loss(*arguments, **named)
            return self.seen

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        """One repetition is `inner` steps."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % options.inner == 0:
                turn.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % options.inner == 0:
                figures = turn.figures()
                loss = TEMPERATURE**2 * float(trainer.seen)
                control.should_training_stop = not turn.end(figures, loss=loss)

    bodies = [model.model.base_model for model in (teacher, student)]
    if compiled:
        for body in bodies:
            body.compile(dynamic=False)
    # T² stands in front of the whole loss here: AdamW and the clipped gradient have to see it too.
    for weight in student.model.parameters():
        weight.register_hook(lambda gradient: gradient * TEMPERATURE**2)
    with tempfile.TemporaryDirectory() as held:
        settings = trl.DistillationConfig(
            output_dir=held,
            per_device_train_batch_size=options.windows,
            max_steps=len(data),
            use_cpu=options.device == "cpu",
            bf16=options.precision == "bf16",
            beta=0.0,
            temperature=TEMPERATURE,
            learning_rate=RATE,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            gradient_checkpointing=options.checkpointing,
            dataloader_pin_memory=options.device == "cuda",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = datasets.Dataset.from_dict({"prompt": list(range(len(data) * options.windows))})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = Ready(
            model=student.model,
            teacher_model=teacher.model,
            args=settings,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Turns()],
            optimizers=(optimizer, schedule),
        )
        trainer.train()


def compare(results: dict[str, dict[str, Any]], tolerance: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Ours against the best peer of each kind, and the rows whose loss is not ours."""
    found, wrong = [], []
    for soft in (False, True):
        mine = "ours-soft" if soft else "ours"
        for suffix in ("", "-compiled"):
            own = results.get(mine + suffix, {}).get("median")
            if own is None:
                continue
            stored = results.get("ours-stored" + suffix, {}).get("median")
            if stored is not None and not soft:
                off = abs(stored["last_loss"] - own["last_loss"]) / abs(own["last_loss"])
                if not off <= max(tolerance, ROUNDING):
                    wrong.append(f"ours-stored{suffix}: {stored['last_loss']:.6f}, online {own['last_loss']:.6f}")
                found.append(
                    {
                        "stored": "ours-stored" + suffix,
                        "speed": stored["tokens_per_second"] / own["tokens_per_second"],
                        "memory": stored["peak_bytes"] / own["peak_bytes"],
                        "loss_off": off,
                    }
                )
            rivals = {
                row: result["median"]
                for row, result in results.items()
                if "median" in result
                and not row.startswith("ours")
                and row.endswith("-compiled") == bool(suffix)
                and row.startswith("trl-trainer") == soft
            }
            for row, median in rivals.items():
                off = abs(median["last_loss"] - own["last_loss"]) / abs(own["last_loss"])
                if not off <= tolerance:
                    wrong.append(f"{row}: {median['last_loss']:.6f}, ours {own['last_loss']:.6f}")
            if not rivals:
                continue
            quickest = max(rivals, key=lambda row: rivals[row]["tokens_per_second"])
            lightest = min(rivals, key=lambda row: rivals[row]["peak_bytes"])
            found.append(
                {
                    "ours": mine + suffix,
                    "quickest": quickest,
                    "speed": own["tokens_per_second"] / rivals[quickest]["tokens_per_second"],
                    "lightest": lightest,
                    "memory": own["peak_bytes"] / rivals[lightest]["peak_bytes"],
                    "memory_of_quickest": own["peak_bytes"] / rivals[quickest]["peak_bytes"],
                }
            )
    return found, wrong


def main() -> None:
    """Prints the table, or one JSON document; fails where losses differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pair", choices=("small", "body", "qwen", "tiny"), default="small", help="sizes of both models"
    )
    parser.add_argument("--windows", type=int, default=2, help="windows a step (%(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a window (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured repetitions of a row (%(default)s)")
    parser.add_argument("--inner", type=int, default=1, help="steps of a repetition (%(default)s)")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of the hard labels (%(default)s)")
    parser.add_argument("--chunk-mib", type=int, default=64, help="a chunk of logits, ours and Liger's (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--checkpointing", action="store_true", help="compute the student's layers again in backward")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step, ours only (%(default)s)")
    parser.add_argument("--compiles", choices=("both", "bodies", "loss"), default="both", help="what compiled means")
    parser.add_argument("--adamw", choices=("fused", "foreach", "loop"), default="fused", help="which of torch's")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: as torch chooses")
    parser.add_argument("--tolerance", type=float, help="of the last loss, relative (1e-4 in fp32, 2e-2 in bf16)")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of the rows (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--save", action="store_true", help="keep that document in bench/results too")
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.tolerance = options.tolerance or HOW_CLOSE[options.precision]
    if options.serve:
        turn = turns.Turn(options.device, options.repeats)
        turn.serve(lambda: run(options.serve, options, turn))
        return
    wanted = options.rows.split(",")
    if unknown := set(wanted) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    document = measure([row for row in ROWS if row in wanted], options)
    print(json.dumps(document) if options.json else "\n".join(table(document)))
    if options.save:
        print(f"kept as {turns.save(f'kd_step-{options.pair}', document)}", file=sys.stderr)
    if document["unequal"]:
        raise SystemExit("losses differ: " + "; ".join(document["unequal"]))
    if broken := [row for row, result in document["rows"].items() if row.startswith("ours") and "error" in result]:
        raise SystemExit("did not run: " + "; ".join(f"{row}: {document['rows'][row]['error']}" for row in broken))


def measure(rows: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Lets the rows take turns; everything that was found."""
    machine = turns.machine(options.device)
    settings = {key: getattr(options, key.replace("-", "_")) for key in PASSED}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    arguments += ["--checkpointing"] if options.checkpointing else []
    commands = {row: [sys.executable, __file__, f"--serve={row}", *arguments] for row in rows}
    seen = turns.take_turns(commands, options.repeats, note=lambda text: print(f"  {text}", file=sys.stderr))
    results = {row: found.figures() for row, found in seen.items()}
    tokens = options.windows * options.sequence * options.inner
    for result in results.values():
        if "median" in result:
            result["median"]["tokens_per_second"] = tokens / result["median"]["wall_seconds"]
            result["best_tokens_per_second"] = tokens / result["best_wall_seconds"]
            result["median"]["last_loss"] = result["repetitions"][-1]["loss"]
            del result["median"]["loss"]
    compared, wrong = compare(results, options.tolerance)
    return {
        "machine": machine,
        "load_after": turns.machine()["load"],
        "settings": {**settings, "checkpointing": options.checkpointing, "tolerance": options.tolerance},
        "models": models(options.pair),
        "rows": results,
        "compared": compared,
        "unequal": wrong,
    }


def models(pair: str) -> dict[str, Any]:
    """Parameters of both, in millions, and how many of them are the embedding's."""
    import pairs
    import torch
    from transformers import AutoModelForCausalLM

    told: dict[str, Any] = {"about": pairs.PAIRS[pair][2], "vocabulary": pairs.vocabulary_of(pair)}
    for role, size in zip(("teacher", "student"), pairs.PAIRS[pair][:2], strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(size.config(pairs.vocabulary_of(pair)))
        embedding = pairs.vocabulary_of(pair) * size.width
        told[role] = {
            "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
            "embedding_m": embedding / 1e6,
            "width": size.width,
            "layers": size.layers,
        }
    return told


def table(document: dict[str, Any]) -> list[str]:
    """All of it for people."""
    settings, told = document["settings"], document["models"]
    lines = [*turns.describe(document["machine"])]
    sizes = ", ".join(
        f"{role} {told[role]['parameters_m']:.1f} M ({told[role]['embedding_m']:.1f} M of it the embedding)"
        for role in ("teacher", "student")
    )
    lines.append(f"{told['about']}: {sizes}; vocabulary {told['vocabulary']:,}")
    lines.append(
        f"{settings['windows']} x {settings['sequence']} tokens a step, {settings['precision']} on "
        f"{settings['device']}, T = {TEMPERATURE:g}, alpha = {settings['alpha']:g} (soft: 0), AdamW, clip {CLIP:g}; "
        f"medians of {settings['repeats']}"
    )
    lines.append(f"{'':28} {'tokens/s':>9} {'best':>8} {'CPU s':>7} {'peak MiB':>9} {'first s':>8} {'last loss':>10}")
    for row, result in document["rows"].items():
        if "error" in result:
            lines.append(f"{ROWS[row]:28} did not run: {result['error']}")
            continue
        median = result["median"]
        lines.append(
            f"{ROWS[row]:28} {median['tokens_per_second']:9.1f} {result['best_tokens_per_second']:8.1f} "
            f"{median['cpu_seconds']:7.2f} {median['peak_bytes'] / 2**20:9.0f} {result['first_seconds']:8.1f} "
            f"{median['last_loss']:10.6f}"
        )
    for found in document["compared"]:
        if "stored" in found:
            lines.append(
                f"{ROWS[found['stored']]}: {found['speed']:.2f} x the tokens/s of online, {found['memory']:.2f} x its "
                f"memory, loss off by {found['loss_off']:.1e} of it"
            )
            continue
        lines.append(
            f"{ROWS[found['ours']]}: {found['speed']:.2f} x the tokens/s of the quickest peer "
            f"({ROWS[found['quickest']]}), {found['memory_of_quickest']:.2f} x its memory, "
            f"{found['memory']:.2f} x that of the lightest ({ROWS[found['lightest']]})"
        )
    equal = "differ: " + "; ".join(document["unequal"]) if document["unequal"] else "are the same"
    lines.append(
        f"losses after {(1 + settings['repeats']) * settings['inner']} steps {equal} (within {settings['tolerance']:g})"
    )
    return lines


if __name__ == "__main__":
    main()
