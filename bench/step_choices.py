"""What each choice of the step costs and brings: one configuration key changed at a time, all of them taking turns.

    python bench/step_choices.py [--pair small] [--repeats 3] [--choices base,bf16,...] [--save]

Each row is the engine's own step in a process of its own (see bench/kd_step.py), at the default sizes of that
benchmark; `base` is what the engine does on a CPU unless told otherwise. Ratios are to it: above 1 is more tokens/s,
or more memory. `--pair body` has a teacher whose body dominates, which is where storing it pays. Prefetching is apart,
since it changes no step: what it hides is the time to make a batch ready, printed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kd_step
import turns

CHOICES: dict[str, tuple[str, str, list[str]]] = {
    "base": ("as it is", "ours", []),
    "bf16": ("train.precision: bf16", "ours", ["--precision=bf16"]),
    "bodies": ("train.compile: on", "ours-compiled", ["--compiles=bodies"]),
    "loss": ("distill.compile: on", "ours-compiled", ["--compiles=loss"]),
    "both": ("train.compile: on, distill.compile: on", "ours-compiled", []),
    "chunk-8": ("distill.chunk_mib: 8", "ours", ["--chunk-mib=8"]),
    "chunk-256": ("distill.chunk_mib: 256", "ours", ["--chunk-mib=256"]),
    "parts-2": ("train.accumulation: 2", "ours", ["--accumulation=2"]),
    "checkpointing": ("train.activation_checkpointing: true", "ours", ["--checkpointing"]),
    "foreach": ("AdamW of tensor lists, not fused", "ours", ["--adamw=foreach"]),
    "loop": ("AdamW tensor by tensor", "ours", ["--adamw=loop"]),
    "hidden": ("teacher.source: hidden", "ours-stored", []),
}


def batch_seconds(windows: int, sequence: int) -> float:
    """Median seconds to make a batch ready from a corpus of 32 MiB of tokens in a file: what prefetching hides."""
    import numpy as np

    from engine.checkpoint import OrderState
    from engine.feed import Feed
    from engine.windows import Order, Windows

    with tempfile.TemporaryDirectory() as held:
        path = Path(held) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, 8 << 20, dtype=np.int32).tofile(path)
        corpus: Any = Windows([np.memmap(path, dtype=np.int32, mode="r")], sequence)
        feed = Feed(Order.at(corpus, OrderState(seed=0, epoch=0, position=0)), windows, ahead=0)
        taken = []
        for _ in range(50):
            begun = time.perf_counter()
            feed.take()
            taken.append(time.perf_counter() - begun)
        feed.close()
    return sorted(taken)[len(taken) // 2]


def main() -> None:
    """Prints the table, or one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pair", choices=("small", "body", "qwen", "tiny"), default="small", help="sizes of both models"
    )
    parser.add_argument("--windows", type=int, default=2, help="windows a step (%(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a window (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measured repetitions of a row (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--choices", default=",".join(CHOICES), help="some of them; base is always there (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--save", action="store_true", help="keep that document in bench/results too")
    options = parser.parse_args()
    asked = options.choices.split(",")
    if unknown := set(asked) - set(CHOICES):
        parser.error(f"--choices: {', '.join(sorted(unknown))}: expected some of {', '.join(CHOICES)}")
    shape = [f"--{key}={getattr(options, key)}" for key in ("pair", "windows", "sequence", "repeats", "device")]
    script = str(Path(kd_step.__file__).resolve())
    commands = {
        name: [sys.executable, script, f"--serve={row}", *shape, *changed]
        for name, (_, row, changed) in CHOICES.items()
        if name in asked or name == "base"
    }
    machine = turns.machine(options.device)
    rows = turns.take_turns(commands, options.repeats, note=lambda text: print(f"  {text}", file=sys.stderr))
    if rows["base"].error:
        raise SystemExit(f"base: {rows['base'].error}")
    document: dict[str, Any] = {
        "machine": machine,
        "settings": {key: getattr(options, key) for key in ("pair", "windows", "sequence", "repeats", "device")},
        "models": kd_step.models(options.pair),
        "rows": {name: {"choice": CHOICES[name][0], **row.figures()} for name, row in rows.items()},
        "batch_seconds": batch_seconds(options.windows, options.sequence),
    }
    print(json.dumps(document) if options.json else "\n".join(table(document)))
    if options.save:
        print(f"kept as {turns.save(f'step_choices-{options.pair}', document)}", file=sys.stderr)


def table(document: dict[str, Any]) -> list[str]:
    """All of it for people."""
    settings, base = document["settings"], document["rows"]["base"]["median"]
    tokens = settings["windows"] * settings["sequence"]
    lines = [*turns.describe(document["machine"])]
    lines.append(
        f"{document['models']['about']}; {settings['windows']} x {settings['sequence']} tokens a step on "
        f"{settings['device']}, medians of {settings['repeats']}"
    )
    lines.append(f"{'':40} {'tokens/s':>9} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'first s':>8} {'last loss':>10}")
    for row in document["rows"].values():
        if "error" in row:
            lines.append(f"{row['choice']:40} did not run: {row['error']}")
            continue
        median, last = row["median"], row["repetitions"][-1]["loss"]
        lines.append(
            f"{row['choice']:40} {tokens / median['wall_seconds']:9.1f} "
            f"{base['wall_seconds'] / median['wall_seconds']:6.2f} {median['peak_bytes'] / 2**20:9.0f} "
            f"{median['peak_bytes'] / base['peak_bytes']:6.2f} {row['first_seconds']:8.1f} {last:10.6f}"
        )
    share = document["batch_seconds"] / base["wall_seconds"]
    lines.append(
        f"train.prefetch: a batch is ready in {1e3 * document['batch_seconds']:.2f} ms, {share:.3%} of the step"
    )
    return lines


if __name__ == "__main__":
    main()
