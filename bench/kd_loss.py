"""What the distillation loss costs: ours, the peers', and the matrix products that no form of it can do without.

    python bench/kd_loss.py [--tokens 512,1024] [--repeats 5] [--rows products,eager,...] [--json] [--save]

Every row is a process of its own. The processes are started one after another and then take turns, one repetition
each, so that whatever else the machine does falls on all rows alike. A row warms up once before it is measured.

- products: s = h Ws', t = g Wt', the gradient of the hidden states d Ws and of the head d' h, in the same chunks as
  ours, with nothing between them. This is the floor; the ratios are to it.
- products, one piece: the same over all tokens at once. Shows what chunking itself costs in time and saves in memory.
- ours, eager and ours, compiled: `fused_kd_loss` forward and backward.
- naive autograd: `kd_loss_reference` on whole logits, forward and backward.
- the peers: bench/peers.py says how each is set to be the same loss; bench/requirements.txt installs them. TRL's tiles
  have no hard labels: they do that much less, and their value is held against the soft part alone. A peer that is not
  installed or does not run is shown with the reason.

The value of every row must be that of ours, within 1e-4 of it, or the command fails.

CPU s is the CPU time of the process in all its threads, median over the repetitions (a busy machine stretches it less
than it does the wall clock). Peak MiB is the highest resident memory of a repetition above what the process held
before it, that is above weights and hidden states; the student head's gradient counts, 519 MiB at the default sizes.
First s is the wall time of the warm-up less the median repetition: compiling, first of all.
The inputs are random float32 numbers; temperature 4, alpha 0.3, every position labelled. With `--device cuda` they are
bfloat16, the heads float32 as in training, and seconds are those of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import turns

SIZES = {
    "student-width": (896, "hidden size of the student"),
    "teacher-width": (1536, "hidden size of the teacher"),
    "vocabulary": (151_936, "rows of both heads"),
    "repeats": (5, "measured repetitions of a row"),
    "chunk-mib": (64, "size of a chunk of logits, ours and Liger's"),
}
ROWS = {
    "products": "matrix products (floor)",
    "whole": "products, one piece",
    "eager": "ours, eager",
    "compiled": "ours, compiled",
    "naive": "naive autograd",
    "liger": "Liger, eager",
    "liger-compiled": "Liger, compiled",
    "torchtune": "torchtune, eager",
    "torchtune-compiled": "torchtune, compiled",
    "trl-gkd": "TRL GKD",
    "trl-tiles": "TRL tiles (soft alone)",
}
DEFAULT = ",".join(ROWS)
TEMPERATURE, ALPHA = 4.0, 0.3
CLOSE = 1e-4


def work(row: str, options: argparse.Namespace, tokens: int) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Makes the inputs; returns one repetition of the row, which gives its value, and what lets go of its gradients."""
    import peers
    import torch

    from engine import kd_loss

    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student = torch.randn(tokens, options.student_width).to(device, dtype).requires_grad_()
    student_head = torch.randn(options.vocabulary, options.student_width) / options.student_width**0.5
    student_head = student_head.to(device).requires_grad_()
    teacher = torch.randn(tokens, options.teacher_width).to(device, dtype)
    teacher_head = torch.randn(options.vocabulary, options.teacher_width) / options.teacher_width**0.5
    teacher_head = teacher_head.to(device, dtype)
    labels = torch.randint(options.vocabulary, (tokens,))
    chunk_bytes = options.chunk_mib << 20
    chunk = max(1, min(tokens, chunk_bytes // (4 * options.vocabulary)))

    def products() -> None:
        rows = tokens if row == "whole" else chunk
        with torch.no_grad():
            head = student_head.to(dtype)
            student.grad = torch.empty_like(student)
            grad_head = torch.zeros_like(student_head) if dtype != torch.float32 else torch.empty_like(student_head)
            logits, teacher_logits = (torch.empty(rows, options.vocabulary, device=device, dtype=dtype) for _ in "st")
            for begin in range(0, tokens, rows):
                part = slice(begin, min(begin + rows, tokens))
                states = student[part]
                s, t = logits[: len(states)], teacher_logits[: len(states)]
                torch.mm(states, head.T, out=s)
                torch.mm(teacher[part], teacher_head.T, out=t)
                torch.mm(s, head, out=student.grad[part])
                if dtype == torch.float32:
                    grad_head.addmm_(s.T, states, beta=1 if begin else 0)
                else:
                    grad_head.add_(torch.mm(s.T, states))
            student_head.grad = grad_head

    def ours() -> Any:
        loss = kd_loss.fused_kd_loss(
            student,
            student_head,
            teacher,
            teacher_head,
            labels,
            temperature=TEMPERATURE,
            alpha=ALPHA,
            chunk_bytes=chunk_bytes,
            compile=row == "compiled",
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.total, "soft": loss.kd}

    def naive() -> Any:
        with torch.no_grad():
            goal = teacher @ teacher_head.T
        loss = kd_loss.kd_loss_reference(
            student @ student_head.to(dtype).T, goal, labels.to(device), temperature=TEMPERATURE, alpha=ALPHA
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.total}

    def clear() -> None:
        student.grad = student_head.grad = None

    own = {"products": products, "whole": products, "eager": ours, "compiled": ours, "naive": naive}
    if row in own:
        return own[row], clear
    name, _, compiled = row.partition("-compiled")
    alone = name == "trl-tiles"
    alpha = 0.0 if alone else ALPHA
    loss = peers.LOSSES[name](peers.Asked(TEMPERATURE, alpha, chunk, bool(row != name or compiled)))
    there = labels.to(device)
    missing = 0.0
    if name == "torchtune":
        missing = (1 - alpha) * TEMPERATURE**2 * peers.entropy(teacher, teacher_head, TEMPERATURE)

    def peer() -> Any:
        value = loss(student, student_head.to(dtype), teacher, teacher_head, there)
        value.backward()  # type: ignore[no-untyped-call]
        return {"soft" if alone else "loss": value.detach() - missing}

    return peer, clear


def serve(row: str, options: argparse.Namespace, tokens: int) -> None:
    """The process of one row: one repetition for every line on standard input, its figures on standard output."""
    turn = turns.Turn(options.device, options.repeats)

    def repetitions() -> None:
        repetition, clear = work(row, options, tokens)
        more = True
        while more:
            turn.begin()
            values = repetition()
            # Read after the clock has stopped, where a device would be waited for.
            figures = turn.figures()
            clear()
            more = turn.end(figures, **{name: float(value) for name, value in (values or {}).items()})

    turn.serve(repetitions)


def measure(options: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """Lets the rows take turns, and returns the figures of each."""
    arguments = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in [*SIZES, "device"]]
    commands = {
        row: [sys.executable, __file__, f"--serve={row}", f"--tokens={tokens}", *arguments] for row in options.rows
    }
    rows = turns.take_turns(commands, options.repeats, note=lambda text: print(f"  {text}", file=sys.stderr))
    results = [{"row": name, "tokens": tokens, **row.figures()} for name, row in rows.items()]
    if "error" in results[0]:
        raise SystemExit(f"products: {results[0]['error']}")
    for result in results:
        for key in ("cpu_seconds", "wall_seconds", "peak_bytes"):
            if "median" in result:
                result[f"{key}_ratio"] = result["median"][key] / results[0]["median"][key]
    return results


def unequal(results: list[dict[str, Any]], close: float) -> list[str]:
    """Says which rows' values are not those of ours."""
    known = {result["row"]: result.get("median", {}) for result in results}
    ours = known.get("eager") or known.get("compiled") or {}
    return [
        f"{row}: {name} {median[name]:.6f}, ours {ours[name]:.6f}"
        for row, median in known.items()
        for name in ("loss", "soft")
        if name in median and name in ours and abs(median[name] - ours[name]) > close * abs(ours[name])
    ]


def main() -> None:
    """Prints the table, or one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="512,1024", help="token counts, comma-separated (%(default)s)")
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", default=DEFAULT, help="rows to run; the floor is always among them (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--save", action="store_true", help="keep that document in bench/results too")
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.tokens.split(",")]
    if options.serve:
        serve(options.serve, options, counts[0])
        return
    if unknown := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    options.rows = [row for row in ROWS if row in options.rows.split(",") or row == "products"]
    machine = turns.machine(options.device)
    clock = "wall" if options.device == "cuda" else "cpu"
    if not options.json:
        print(*turns.describe(machine), sep="\n")
        sizes = f"widths {options.student_width}/{options.teacher_width}, vocabulary {options.vocabulary:,}"
        print(f"{sizes}, {options.device}, T = {TEMPERATURE:g}, alpha = {ALPHA}, medians of {options.repeats}")
        print(
            f"{'tokens':>6}  {'':24} {clock + ' s':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'first s':>8} "
            f"{'loss':>9}"
        )
    results = []
    wrong: list[str] = []
    for tokens in counts:
        measured = measure(options, tokens)
        results += measured
        wrong += unequal(measured, CLOSE if options.device == "cpu" else 1e-2)
        if not options.json:
            print(*(_line(result, clock) for result in measured), sep="\n", flush=True)
    document = {
        "machine": machine,
        "sizes": {name: getattr(options, name.replace("-", "_")) for name in SIZES},
        "device": options.device,
        "rows": results,
        "unequal": wrong,
    }
    if options.json:
        print(json.dumps(document))
    if options.save:
        print(f"kept as {turns.save('kd_loss', document)}", file=sys.stderr)
    if wrong:
        raise SystemExit("values differ: " + "; ".join(wrong))


def _line(result: dict[str, Any], clock: str) -> str:
    name = f"{result['tokens']:6}  {ROWS[result['row']]:24}"
    if "error" in result:
        return f"{name} did not run: {result['error']}"
    median, key = result["median"], f"{clock}_seconds"
    value = f"{median['loss']:.5f}" if "loss" in median else f"{median['soft']:.5f}" if "soft" in median else ""
    return (
        f"{name} {median[key]:7.2f} {result[key + '_ratio']:6.2f} {median['peak_bytes'] / 2**20:9.0f} "
        f"{result['peak_bytes_ratio']:6.2f} {result['first_seconds']:8.1f} {value:>9}"
    )


if __name__ == "__main__":
    main()
