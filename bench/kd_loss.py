"""What the distillation loss costs over the matrix products that no form of it can do without.

    python bench/kd_loss.py [--tokens 512,1024] [--repeats 5] [--json]

Every row is a process of its own. The processes are started one after another and then take turns, one repetition
each, so that whatever else the machine does falls on all rows alike. A row warms up once before it is measured.

- products: s = h Ws', t = g Wt', the gradient of the hidden states d Ws and of the head d' h, in the same chunks as
  ours, with nothing between them. This is the floor; the ratios are to it.
- products, one piece: the same over all tokens at once. Shows what chunking itself costs in time and saves in memory.
- ours, eager and ours, compiled: `fused_kd_loss` forward and backward.
- naive autograd: `kd_loss_reference` on whole logits, forward and backward.

CPU s is the CPU time of the process in all its threads, median over the repetitions (a busy machine stretches it less
than it does the wall clock). Peak MiB is the highest resident memory of a repetition above what the process held
before it, that is above weights and hidden states; the student head's gradient counts, 519 MiB at the default sizes.
First s is the wall time of the warm-up less the median repetition: compiling, first of all.
The inputs are random float32 numbers; temperature 4, alpha 0.3, every position labelled.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = {
    "student-width": (896, "hidden size of the student"),
    "teacher-width": (1536, "hidden size of the teacher"),
    "vocabulary": (151_936, "rows of both heads"),
    "repeats": (5, "measured repetitions of a row"),
}
ROWS = {
    "products": "matrix products (floor)",
    "whole": "products, one piece",
    "eager": "ours, eager",
    "compiled": "ours, compiled",
    "naive": "naive autograd",
}


def work(row: str, options: argparse.Namespace, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Makes the inputs; returns one repetition of the row, and what lets go of its gradients."""
    import torch

    from engine import kd_loss

    torch.manual_seed(0)
    student = torch.randn(tokens, options.student_width).requires_grad_()
    student_head = (
        torch.randn(options.vocabulary, options.student_width) / options.student_width**0.5
    ).requires_grad_()
    teacher = torch.randn(tokens, options.teacher_width)
    teacher_head = torch.randn(options.vocabulary, options.teacher_width) / options.teacher_width**0.5
    labels = torch.randint(options.vocabulary, (tokens,))

    def products() -> None:
        rows = tokens if row == "whole" else max(1, min(tokens, kd_loss.CHUNK_BYTES // (4 * options.vocabulary)))
        with torch.no_grad():
            student.grad, student_head.grad = torch.empty_like(student), torch.empty_like(student_head)
            logits, teacher_logits = (torch.empty(rows, options.vocabulary) for _ in range(2))
            for begin in range(0, tokens, rows):
                chunk = slice(begin, min(begin + rows, tokens))
                states = student[chunk]
                s, t = logits[: len(states)], teacher_logits[: len(states)]
                torch.mm(states, student_head.T, out=s)
                torch.mm(teacher[chunk], teacher_head.T, out=t)
                torch.mm(s, student_head, out=student.grad[chunk])
                student_head.grad.addmm_(s.T, states, beta=1 if begin else 0)

    def ours() -> None:
        kd_loss.fused_kd_loss(
            student, student_head, teacher, teacher_head, labels, temperature=4.0, alpha=0.3, compile=row == "compiled"
        ).total.backward()  # type: ignore[no-untyped-call]

    def naive() -> None:
        with torch.no_grad():
            teacher_logits = teacher @ teacher_head.T
        kd_loss.kd_loss_reference(
            student @ student_head.T, teacher_logits, labels, temperature=4.0, alpha=0.3
        ).total.backward()  # type: ignore[no-untyped-call]

    def clear() -> None:
        student.grad = student_head.grad = None

    return {"eager": ours, "compiled": ours, "naive": naive}.get(row, products), clear


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest since it was reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def serve(row: str, options: argparse.Namespace, tokens: int) -> None:
    """The process of one row: one repetition for every line on standard input, its figures on standard output."""
    repetition, clear = work(row, options, tokens)
    for _ in range(1 + options.repeats):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew from here
        before, cpu, wall = resident_bytes("VmRSS"), time.process_time(), time.perf_counter()
        repetition()
        figures = {
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "peak_bytes": resident_bytes("VmHWM") - before,
        }
        clear()
        print(json.dumps(figures), flush=True)
        if not sys.stdin.readline():
            return  # whoever asks is gone


def measure(options: argparse.Namespace, tokens: int) -> list[dict[str, float | str]]:
    """Starts a process a row, lets them take turns, and returns the figures of each row."""
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        arguments = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in SIZES]
        # An empty cache, so that the time to compile is what a first run sees.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        children: dict[str, subprocess.Popen[str]] = {}
        warm: dict[str, dict[str, float]] = {}
        seen: dict[str, list[dict[str, float]]] = {row: [] for row in options.rows}
        for row in options.rows:
            command = [sys.executable, __file__, f"--serve={row}", f"--tokens={tokens}", *arguments]
            pipe = subprocess.PIPE
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            stack.callback(child.wait)
            stack.callback(child.kill)
            children[row] = child
            warm[row] = answer(row, child)
        for _ in range(options.repeats):
            for row, child in children.items():
                print("", file=child.stdin, flush=True)
                seen[row].append(answer(row, child))
    results: list[dict[str, float | str]] = []
    for row, repetitions in seen.items():
        median = {key: statistics.median(figures[key] for figures in repetitions) for key in repetitions[0]}
        first = warm[row]["wall_seconds"] - median["wall_seconds"]
        results.append({"row": row, "tokens": tokens, **median, "first_seconds": max(0.0, first)})
    for result in results:
        for key in ("cpu_seconds", "peak_bytes"):
            result[f"{key}_ratio"] = float(result[key]) / float(results[0][key])
    return results


def answer(row: str, child: subprocess.Popen[str]) -> dict[str, float]:
    """The next figures of a row's process."""
    line = child.stdout.readline() if child.stdout else ""
    if not line:
        raise SystemExit(f"{row}: its process ended with exit status {child.wait()}")
    figures: dict[str, float] = json.loads(line)
    return figures


def main() -> None:
    """Prints the table, or one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="512,1024", help="token counts, comma-separated (%(default)s)")
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to run, the floor among them (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--serve", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.tokens.split(",")]
    if options.serve:
        serve(options.serve, options, counts[0])
        return
    options.rows = [row for row in ROWS if row in options.rows.split(",") or row == "products"]
    sizes = f"widths {options.student_width}/{options.teacher_width}, vocabulary {options.vocabulary:,}"
    if not options.json:
        print(f"{sizes}, float32, medians of {options.repeats}")
        print(f"{'tokens':>6}  {'':24} {'CPU s':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'first s':>8}")
    results = []
    for tokens in counts:
        for result in measure(options, tokens):
            results.append(result)
            if not options.json:
                print(
                    f"{tokens:6}  {ROWS[str(result['row'])]:24} {result['cpu_seconds']:7.2f} "
                    f"{result['cpu_seconds_ratio']:6.2f} {float(result['peak_bytes']) / 2**20:9.0f} "
                    f"{result['peak_bytes_ratio']:6.2f} {result['first_seconds']:8.1f}",
                    flush=True,
                )
    if options.json:
        print(
            json.dumps({"sizes": {name: getattr(options, name.replace("-", "_")) for name in SIZES}, "rows": results})
        )


if __name__ == "__main__":
    main()
