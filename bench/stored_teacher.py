"""A stored teacher against the online one: equal losses, and the time of a step.

    python bench/stored_teacher.py [--steps 120] [--repeats 8] [--json]

Runs the engine itself, as `kdconsole` does, in a temporary directory: preparations and trainings of the built-in models
with the teacher online and stored, with the same data in the same order. Then a random Qwen2-like teacher several times
the student's size, both kinds of step in turn in one process. Figures of the machine that it runs on; nothing else
should be busy there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
sys.path[0] = str(HERE)  # a module beside this one is called dispatch as well


def engine(root: Path, mode: str, *sets: str) -> list[dict[str, Any]]:
    """A run of the engine; its events."""
    from dispatch.runs import create_run
    from engine.config import load_config
    from engine.contract import builtin_contract

    config = load_config(None, template="builtin", sets=[f"mode={mode}", f"teacher.cache={root / 'cache'}", *sets])
    run = create_run(config, evidence=root / "runs", contract_text=builtin_contract(mode))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine", str(run.path)], check=False, capture_output=True, text=True, cwd=HERE
    )
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_bytes().splitlines()]
    if events[-1].get("status") != "COMPLETED" and not any(event["event"] == "eval" for event in events):
        sys.exit(f"{mode} {' '.join(sets)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return events


def equal_losses(root: Path, source: str, temperature: float, steps: int) -> dict[str, Any]:
    """Trains once with the teacher online and once from a store; the losses of both."""
    common = (
        f"distill.temperature={temperature}",
        f"train.steps={steps}",
        f"smoke.max_steps={steps}",
        "smoke.budget_seconds=3600",
        "data.limit_bytes=2000000",
        "train.device=cpu",
        "teacher.path=builtin:teacher",
    )
    prepared = engine(root, "prepare", *common, f"teacher.source={source}")
    found: dict[str, Any] = {"source": source, "temperature": temperature, "steps": steps}
    for each in ("online", source):
        events = engine(root, "smoke", *common, f"teacher.source={each}")
        losses = [event["loss"] for event in events if event["event"] == "step"]
        held = [event["loss"] for event in events if event["event"] == "eval"][-1]
        found["online" if each == "online" else "stored"] = {"first": losses[0], "last": losses[-1], "heldout": held}
        if each == "online":
            online = losses
    found["largest_step_difference"] = max(abs(a - b) / abs(a) for a, b in zip(online, losses, strict=True))
    found["heldout_difference"] = abs(found["stored"]["heldout"] / found["online"]["heldout"] - 1)
    found["table"] = [event["message"] for event in prepared if event["event"] == "log" and event["message"][:1] == " "]
    found["sizes"] = [
        event["message"] for event in prepared if event["event"] == "log" and "bytes a token" in event["message"]
    ]
    return found


def step_seconds(root: Path, repeats: int, hidden: int, layers: int) -> dict[str, Any]:
    """Medians of a step's teacher, loss and gradients, online and stored in turn, with a teacher that dominates."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from engine.config import load_config
    from engine.contract import builtin_contract
    from engine.device import place
    from engine.distill import Pair
    from engine.falsifiers import parse_contract
    from engine.formats import resolve_builtin
    from engine.loading import load
    from engine.recorder import Recorder
    from engine.teacher_store import StoredTeacher, visited

    teacher = root / "teacher"
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_builtin("builtin:teacher") / name, teacher / name)
    sets = [
        f"teacher.path={teacher}",
        f"teacher.cache={root / 'cache'}",
        "distill.temperature=4",
        "train.device=cpu",
        f"train.steps={2 * repeats + 2}",
        "train.warmup_steps=0",
        "data.limit_bytes=1000000",
    ]
    engine(root, "prepare", *sets, "teacher.source=hidden")
    pairs, batches = {}, {}
    for source in ("online", "hidden"):
        config = load_config(None, template="builtin", sets=["mode=train", *sets, f"teacher.source={source}"])
        contract = parse_contract(builtin_contract("train"), "train.yaml")
        recorder = Recorder(root / f"{source}.jsonl", "0" * 8, contract)
        loaded = load(config, place(config.train), recorder, lambda phase, detail: None, lambda: None)
        recorder.machine.close()
        pairs[source] = Pair(loaded.student, loaded.teacher, 4.0, 0.3, None, 64 << 20, False)
        batches[source] = loaded.corpus.train, visited(config, loaded.corpus), config.train.batch
    seconds: dict[str, list[float]] = {"online": [], "hidden": []}
    losses: dict[str, list[float]] = {"online": [], "hidden": []}
    for turn in range(repeats + 1):
        for source, pair in pairs.items():
            windows, order, batch = batches[source]
            indices = order[turn * batch : (turn + 1) * batch]
            begun = time.perf_counter()
            rows = torch.from_numpy(windows.stack(indices))
            stored = pair.teacher.read(indices) if isinstance(pair.teacher, StoredTeacher) else None
            loss = pair.loss(rows[:, :-1], rows[:, 1:].reshape(-1), rows[:, 1:].numel(), stored)
            loss.total.backward()
            if turn:  # the first one warms up
                seconds[source].append(time.perf_counter() - begun)
                losses[source].append(loss.total.item())
            pair.student.model.zero_grad(set_to_none=True)
    medians = {source: statistics.median(each) for source, each in seconds.items()}
    student = sum(p.numel() for p in pairs["online"].student.model.parameters())
    return {
        "teacher_parameters": parameters,
        "student_parameters": student,
        "tokens": batches["online"][2] * 128,
        "seconds": medians,
        "speedup": medians["online"] / medians["hidden"],
        "largest_loss_difference": max(abs(a / b - 1) for a, b in zip(losses["hidden"], losses["online"], strict=True)),
    }


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="width of the random teacher")
    parser.add_argument("--layers", type=int, default=12, help="layers of the random teacher")
    parser.add_argument("--only-time", action="store_true", help="leave the trainings out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    found: dict[str, Any] = {"machine": machine}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if not options.only_time:
            found["losses"] = [
                equal_losses(root, "hidden", 4.0, options.steps),
                equal_losses(root, "topk", 1.0, options.steps),
            ]
        found["step"] = step_seconds(root, options.repeats, options.hidden, options.layers)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(machine)
    for each in found.get("losses", []):
        print(
            f"{each['source']} at T = {each['temperature']:g}, {each['steps']} steps: last loss online "
            f"{each['online']['last']:.5f}, stored {each['stored']['last']:.5f} (largest difference of a step "
            f"{each['largest_step_difference']:.2e}); held out {each['online']['heldout']:.5f}, "
            f"{each['stored']['heldout']:.5f} (difference {each['heldout_difference']:.2e})"
        )
        for line in (*each["sizes"], *each["table"]):
            print(f"  {line}")
    step = found["step"]
    print(
        f"teacher {step['teacher_parameters'] / 1e6:.1f} M, student {step['student_parameters'] / 1e6:.1f} M, "
        f"{step['tokens']:,} tokens: online {step['seconds']['online']:.3f} s, "
        f"stored {step['seconds']['hidden']:.3f} s, "
        f"{step['speedup']:.2f} times faster; losses differ by {step['largest_loss_difference']:.1e} at most"
    )


if __name__ == "__main__":
    main()
