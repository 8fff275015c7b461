"""How true is the projection? A smoke projects a run, the same run is then made, and the two are held together.

    python bench/projection.py                  # 5 pairs, 600 steps each: about 20 minutes on 2 cores
    python bench/projection.py --runs 2 --steps 200 --budget 30

Each row is one pair: the smoke's p10, p50 and p90 in seconds, the seconds that the real run took from its engine's
start to its end, and p50 over actual. Meaningful on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLOSE = 0.10


def kdconsole(*arguments: str, evidence: Path) -> dict[str, Any]:
    """One headless run as its JSON document; ends the bench with the run's own words where it failed."""
    command = [
        sys.executable,
        "-m",
        "console",
        "--headless",
        *arguments,
        "--json",
        "--quiet",
        "--evidence",
        str(evidence),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip() or done.stdout}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Prints one row a pair, then how many were close."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--budget", type=int, default=60, help="seconds of each smoke")
    options = parser.parse_args()
    print(f"{platform.node()}, {os.cpu_count()} cores, {options.steps} steps, smoke of {options.budget} s")
    print(f"{'run':>3} {'steps':>6} {'p10':>8} {'p50':>8} {'p90':>8} {'actual':>8} {'p50/actual':>10}")
    close = 0
    with tempfile.TemporaryDirectory() as folder:
        evidence = Path(folder)
        config = evidence / "config.yaml"
        template = subprocess.run(
            [sys.executable, "-m", "console", "config", "init"], capture_output=True, text=True, check=True
        )
        config.write_text(template.stdout, encoding="utf-8")
        shared = [str(config), "--set", f"train.steps={options.steps}", "--set", "checkpoint.every_steps=0"]
        for number in range(1, options.runs + 1):
            limits = ["--budget", str(options.budget), "--project-to", str(options.steps)]
            smoke = kdconsole("smoke", *shared, *limits, evidence=evidence)
            actual = kdconsole("train", *shared, evidence=evidence)["seconds"]
            projected = smoke["projection"]
            ratio = projected["p50_seconds"] / actual
            close += abs(ratio - 1) <= CLOSE
            p10, p50, p90 = (projected[f"{p}_seconds"] for p in ("p10", "p50", "p90"))
            row = f"{number:>3} {smoke['steps']:>6} {p10:>8.1f} {p50:>8.1f} {p90:>8.1f} {actual:>8.1f} {ratio:>10.3f}"
            print(row, flush=True)
    print(f"within {CLOSE:.0%}: {close} of {options.runs}")


if __name__ == "__main__":
    main()
