"""What a checkpoint costs: seconds that training waits, seconds of the whole write, and megabytes a second.

    python bench/checkpoint.py [--directory DIR] [--repeats 5] [--json]

Each row saves a model with its AdamW moments as the trainer does: copy into the snapshot buffer, then write, sync,
read back and verify in the writer's thread. Training waits for the copy alone. "most" is the worst of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from engine.checkpoint import OrderState, State
from engine.checkpoint_writer import INITIAL_WEIGHTS, Checkpoints
from engine.config import Student, Train
from engine.models import load_student
from engine.optimizer import adamw
from engine.snapshot import Snapshot, capture_random_state
from engine.stream import Checkpoint, Event

CPU = torch.device("cpu")
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32_000}


def large() -> torch.nn.Module:
    """A Qwen2 of about 100 million random parameters."""
    config = Qwen2Config(**LARGE, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def builtin() -> torch.nn.Module:
    """The student of the built-in smoke."""
    model: torch.nn.Module = load_student(Student(path="builtin:student"), CPU, 0).model
    return model


def measure(model: torch.nn.Module, directory: Path, repeats: int) -> dict[str, float]:
    """Saves `repeats` checkpoints of a model whose weights change from one to the next."""
    optimizer = adamw(model, Train(), CPU)
    started = time.perf_counter()
    snapshot = Snapshot(model, optimizer)
    initial = snapshot.weights_sha256()
    prepared = time.perf_counter() - started
    events: list[Event] = []
    checkpoints = Checkpoints(
        directory,
        "bench",
        snapshot,
        emit=events.append,
        sync=lambda: None,
        log=lambda message, level: print(f"{level}: {message}"),
        keep_last=1,
    )
    for step in range(1, repeats + 1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3 * step)
        optimizer.step()
        optimizer.zero_grad()
        state = State(
            step=step,
            tokens=0,
            order=OrderState(seed=0, epoch=0, position=0),
            random=capture_random_state(CPU),
            learned=True,
            digests={INITIAL_WEIGHTS: initial},
        )
        checkpoints.save("periodic", state)
        checkpoints.drain()
    saved = [event for event in events if isinstance(event, Checkpoint)]
    if len(saved) != repeats:
        raise SystemExit(f"{repeats - len(saved)} checkpoints failed")
    seconds = statistics.median(event.seconds for event in saved)
    waited = statistics.median(event.waited_seconds for event in saved)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": saved[0].bytes,
        "prepare_seconds": prepared,
        "waited_seconds": waited,
        "seconds": seconds,
        "waited_share": waited / seconds,
        "waited_share_most": max(event.waited_seconds / event.seconds for event in saved),
        "megabytes_per_second": saved[0].bytes / 1e6 / seconds,
    }


def main() -> None:
    """Prints the table, or one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory by default")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints a model (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    if not options.json:
        print(f"{platform.node()}, {len(os.sched_getaffinity(0))} cores; medians of {options.repeats}")
        print(
            f"{'':18} {'MB':>7} {'prepare s':>10} {'waited s':>9} {'whole s':>8} {'waited':>7} {'most':>6} {'MB/s':>6}"
        )
    for name, make in (("built-in student", builtin), ("100 M parameters", large)):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            row = rows[name] = measure(make(), Path(directory), options.repeats)
        if not options.json:
            print(
                f"{name:18} {row['bytes'] / 1e6:7.1f} {row['prepare_seconds']:10.3f} {row['waited_seconds']:9.4f} "
                f"{row['seconds']:8.3f} {row['waited_share']:7.1%} {row['waited_share_most']:6.1%} "
                f"{row['megabytes_per_second']:6.0f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
