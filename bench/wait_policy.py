"""What sleeping instead of spinning threads cost and save: a step of the built-in smoke under both policies.

    python bench/wait_policy.py

OpenMP's threads spin at the end of each parallel region by default. Alone on the machine that is a little faster;
beside another busy process every barrier waits for a thread that is not running. Each figure comes from fresh
processes; "beside" has one busy loop a core running at the same time.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import subprocess
import sys

STEP = """
import time, torch
from engine.config import Student, Teacher
from engine.distill import Pair
from engine.models import load_student, load_teacher
cpu = torch.device("cpu")
teacher = load_teacher(Teacher(path="builtin:teacher"), cpu, torch.float32)
student = load_student(Student(path="builtin:student"), cpu, 0)
pair = Pair(student, teacher, 2.0, 0.3, None, 64 << 20, False)
windows = torch.randint(0, student.vocab, (8, 129))
times = []
for _ in range(12):
    started = time.perf_counter()
    pair.loss(windows, 1024).total.backward()
    times.append(time.perf_counter() - started)
print(sorted(times[2:])[5])
"""


def step_seconds(policy: str) -> float:
    """Median seconds of one forward and backward pass in a fresh process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def spin() -> None:
    """A busy core."""
    while True:
        pass


def main() -> None:
    """Prints milliseconds a step, alone and beside a busy loop on every core."""
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.node()}, {cores} cores; milliseconds a step, median of 3 processes")
    for place in ("alone", "beside"):
        busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(cores if place == "beside" else 0)]
        for process in busy:
            process.start()

        medians = {
            policy: statistics.median(step_seconds(policy) for _ in range(3)) for policy in ("ACTIVE", "PASSIVE")
        }
        for process in busy:
            process.terminate()
        spinning, sleeping = medians["ACTIVE"] * 1000, medians["PASSIVE"] * 1000
        print(f"{place:7} spinning {spinning:8.1f}  sleeping {sleeping:8.1f}  ratio {spinning / sleeping:.2f}")


if __name__ == "__main__":
    main()
