"""What a generated program costs in the sandbox: the 164 canonical solutions of HumanEval, and 164 bodies of `pass`.

    python bench/sandbox.py [--workers 2]

Processor time is that of everything that was started, by the operating system's account.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

from engine.controls import control_programs
from engine.problems import HUMANEVAL, read_problems, suite_bytes
from engine.sandbox import Limits, Sandbox, containment


def main() -> None:
    """Prints a line for each kind of answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers: int = parser.parse_args().workers
    problems = read_problems(suite_bytes(HUMANEVAL), HUMANEVAL)
    print(f"walls: {', '.join(containment().walls)}; load {os.getloadavg()[0]:.1f}; {workers} workers")
    for name in ("canonical", "pass"):
        programs = [(problem.task, control_programs(problem)[name]) for problem in problems]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with Sandbox(Limits(), workers) as sandbox:
            passed = sum(outcome.passed for _, outcome in sandbox.run_all(programs))
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{name:10} {passed:3} of {len(programs)} passed, {seconds:5.1f} s, "
            f"{1e3 * used / len(programs):4.0f} ms of processor time a program"
        )


if __name__ == "__main__":
    main()
