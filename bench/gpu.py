"""Everything that wants a GPU, by one command: 1.5 B to 0.5 B with the true Qwen2.5-Coder sizes and random weights.

    python bench/gpu.py                        # on a machine with a CUDA GPU of 40 GiB or more: about half an hour
    python bench/gpu.py --device cpu --tiny    # the same commands at toy sizes, to see that they run: some minutes

In turn, each a command of its own whose failure is noted and stops none of the others:

1. head: `bench/kd_loss.py` at 4,096 tokens: ours and the peers' against the matrix-product floor (aim: 1.25 or less).
2. steps: `bench/kd_step.py` at 4,096 tokens a micro-batch: ours and the peers', tokens/s, peak memory, utilisation.
3. knobs: our step again with one setting changed at a time: compile off, chunks of 16 to 1,024 MiB, activation
   checkpointing, float32, 8,192 and 16,384 tokens.
4. run: models are written to disk and `kdconsole --headless train` distils them; its evidence directory is kept.

Utilisation is `engine.flops` a token times tokens/s over the device's peak: published where `engine.flops` knows the
device, measured by a large matrix product elsewhere. The whole goes to bench/results/gpu-<time>.json, the evidence to
--evidence; toy figures are not kept. Peers are those of bench/requirements.txt; one that is not installed is shown with
the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import turns

HERE = Path(__file__).resolve().parent
PARTS = ("head", "steps", "knobs", "run")
KNOBS: dict[str, list[str]] = {
    "as it is": [],
    "compile off": ["--rows=ours"],
    "chunk_mib 16": ["--chunk-mib=16"],
    "chunk_mib 256": ["--chunk-mib=256"],
    "chunk_mib 1024": ["--chunk-mib=1024"],
    "activation_checkpointing": ["--checkpointing"],
    "precision fp32": ["--precision=fp32"],
    "8,192 tokens": ["--windows=8"],
    "16,384 tokens, activation_checkpointing": ["--windows=16", "--checkpointing"],
}
MODELS = "bench-gpu-models"


def ask(script: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """One benchmark as its JSON document; `error` says why there is none."""
    command = [sys.executable, str(HERE / script), *arguments, "--json"]
    print(f"{script} {' '.join(arguments)}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {seconds:g} s"}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}


def flops_and_peak(pair: str, device: str, precision: str) -> tuple[float, str, float, str]:
    """FLOP a token and its formula, FLOP/s of the device and who says so."""
    import pairs
    import torch

    from engine.flops import flops_per_token, peak_flops
    from engine.shapes import shape_of
    from engine.step_clock import measure_peak

    with tempfile.TemporaryDirectory() as held:
        teacher, student = (shape_of(files) for files in pairs.model_files(pair, Path(held)))
    flops = flops_per_token(student, teacher, "online")
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    known = peak_flops(name, precision)
    if known is not None:
        return flops.total, flops.formula, known.flops, known.source
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return flops.total, flops.formula, measure_peak(torch.device(device), dtype), "measured: a large matrix product"


def with_utilisation(document: dict[str, Any], pair: str, device: str) -> dict[str, Any]:
    """A document of kd_step.py with the utilisation of each of its rows."""
    if "error" in document:
        return document
    flops, formula, peak, source = flops_and_peak(pair, device, document["settings"]["precision"])
    document["utilisation"] = {"flop_a_token": flops, "formula": formula, "peak": peak, "peak_source": source}
    for result in document["rows"].values():
        if "median" in result:
            result["utilisation"] = result["median"]["tokens_per_second"] * flops / peak
    return document


def real_run(options: argparse.Namespace) -> dict[str, Any]:
    """Models on disk, a corpus, and one headless training run of the product's own; its stream's figures."""
    import pairs

    held = Path(tempfile.mkdtemp(prefix="kd-gpu-"))
    try:
        for role in ("teacher", "student"):
            pairs.save(options.pair, role, held / MODELS / role, options.device)
        config = held / "gpu.yaml"
        config.write_text(
            json.dumps(
                {
                    "mode": "train",
                    "teacher": str(held / MODELS / "teacher"),
                    "student": {"path": str(held / MODELS / "student"), "init": "random"},
                    "distill": {"temperature": 4.0, "alpha": 0.3, "compile": "on", "chunk_mib": options.chunk_mib},
                    "data": {"path": "builtin:stdlib", "limit_bytes": 3_000_000, "heldout_windows": 4},
                    "train": {
                        "steps": options.steps,
                        "batch": options.windows,
                        "sequence": options.sequence,
                        "learning_rate": 3e-4,
                        "warmup_steps": 5,
                        "device": options.device,
                        "compile": "on",
                    },
                    "checkpoint": {"every_steps": 0},
                }
            )
        )
        command = [sys.executable, "-m", "console", "--headless", "train", str(config), "--json", "--quiet"]
        command += ["--evidence", str(options.evidence or (held if options.tiny else Path.cwd()) / "evidence")]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        print("kdconsole --headless train", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=options.limit, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {options.limit:g} s"}
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [""]
            return {"error": f"exit code {done.returncode}: {lines[-1][:300]}"}
        return {"exit_code": done.returncode, "document": found, "efficiency": efficiencies(found)}
    finally:
        shutil.rmtree(held, ignore_errors=True)


def efficiencies(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The `efficiency` events of the run's stream, where its evidence lies."""
    where = next((str(found[key]) for key in ("evidence", "directory", "run_dir", "path") if found.get(key)), "")
    if not where:
        return []
    streams = sorted(Path(where).rglob("*.jsonl"))
    events = []
    for stream in streams:
        for line in stream.read_text(errors="replace").splitlines():
            if '"efficiency"' in line:
                events.append(json.loads(line))
    return events


def main() -> int:
    """Runs the parts asked for and keeps what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that all of it runs, measures nothing")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them (%(default)s)")
    parser.add_argument("--rows", default="", help="rows of kd_step.py; all of them unless given")
    parser.add_argument("--repeats", type=int, default=3, help="measured repetitions (%(default)s)")
    parser.add_argument("--evidence", type=Path, help="where the run goes (evidence; with --tiny nowhere)")
    parser.add_argument("--limit", type=float, default=1_800, help="seconds for one command (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                f"error: no GPU: torch {torch.__version__} finds no CUDA device here\n"
                "expected: a machine with an NVIDIA GPU and a CUDA build of torch\n"
                "do: run it there; here `python bench/gpu.py --device cpu --tiny` shows that the commands work",
                file=sys.stderr,
            )
            return 4
    options.pair = "tiny" if options.tiny else "qwen"
    options.windows, options.sequence = (2, 32) if options.tiny else (4, 1024)
    options.steps, options.chunk_mib = (20, 1) if options.tiny else (60, 64)
    inner, tokens = ("1", "64") if options.tiny else ("5", "4096")
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    device, repeats = f"--device={options.device}", f"--repeats={options.repeats}"
    shape = [f"--pair={options.pair}", f"--windows={options.windows}", f"--sequence={options.sequence}"]
    shape += [device, repeats, f"--inner={inner}", f"--chunk-mib={options.chunk_mib}"]
    begun = time.monotonic()
    document: dict[str, Any] = {"machine": turns.machine(options.device), "tiny": options.tiny}
    if "head" in chosen:
        toy = ["--student-width=32", "--teacher-width=64", "--vocabulary=2048", "--chunk-mib=1"] if options.tiny else []
        document["head"] = ask("kd_loss.py", f"--tokens={tokens}", device, repeats, *toy, seconds=options.limit)
    if "steps" in chosen:
        rows = [f"--rows={options.rows}"] if options.rows else []
        found = ask("kd_step.py", *shape, *rows, seconds=options.limit)
        document["steps"] = with_utilisation(found, options.pair, options.device)
    if "knobs" in chosen:
        document["knobs"] = {}
        for name, changed in KNOBS.items():
            found = ask("kd_step.py", *shape, "--rows=ours-compiled", *changed, seconds=options.limit)
            document["knobs"][name] = with_utilisation(found, options.pair, options.device)
    if "run" in chosen:
        document["run"] = real_run(options)
    document["seconds"] = time.monotonic() - begun
    print("\n".join(summary(document)))
    if not options.tiny:
        print(f"kept as {turns.save('gpu', document)}")
    return int(any("error" in document[part] for part in chosen if part in document))


def summary(document: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    lines = [*turns.describe(document["machine"])]
    if document["tiny"]:
        lines.append("toy sizes: these figures say that the commands work, and nothing about speed")
    if head := document.get("head"):
        lines.append("loss head, ratio to its matrix products:")
        lines += [f"  failed: {head['error']}"] if "error" in head else []
        for row in head.get("rows", ()):
            said = (
                row.get("error") or f"{row['wall_seconds_ratio']:.2f}, {row['median']['peak_bytes'] / 2**20:,.0f} MiB"
            )
            lines.append(f"  {row['row']:24} {said}")
    if "steps" in document:
        lines += ["whole step:", *_steps(document["steps"])]
    for name, found in document.get("knobs", {}).items():
        lines += [f"ours with {name}:", *_steps(found)]
    if run := document.get("run"):
        last = (run.get("efficiency") or [{}])[-1]
        said = run.get("error") or f"exit code {run['exit_code']}; last efficiency event: {json.dumps(last)}"
        lines.append(f"kdconsole run: {said}")
    return lines


def _steps(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"  failed: {found['error']}"]
    lines = []
    for row, result in found["rows"].items():
        if "error" in result:
            lines.append(f"  {row:24} did not run: {result['error']}")
            continue
        median = result["median"]
        lines.append(
            f"  {row:24} {median['tokens_per_second']:12,.1f} tokens/s {result['utilisation']:7.1%} of peak "
            f"{median['peak_bytes'] / 2**20:10,.0f} MiB"
        )
    lines += [f"  losses differ: {row}" for row in found["unequal"]]
    return lines


if __name__ == "__main__":
    sys.exit(main())
