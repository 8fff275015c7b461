"""`python -P -m engine.export_run RUN_DIR [STEP | best] [apr=DIR]`: the model of a run's checkpoint, verified.

Prints one JSON object: `path`, `step`, `ok` and `problems`. Exit codes as everywhere (`engine.errors.ExitCode`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.checkpoint import MODEL, CheckpointError, Manifest, committed, directory_name, find_latest, read_manifest
from engine.config import load_config
from engine.errors import ExitCode, KdError


def choose(run_dir: Path, which: str | None) -> Path:
    """The checkpoint that is meant: a step's, the one with the lowest held-out loss, or the newest whole one.

    Raises:
        CheckpointError: there is none.
    """
    if which is None:
        found = find_latest(run_dir)
    elif which == "best":
        manifests: list[tuple[float, Manifest]] = []
        for path in committed(run_dir):
            manifest = read_manifest(path)
            if "best" in manifest.kinds and manifest.state.best is not None:
                manifests.append((manifest.state.best.loss, manifest))
        best = min(manifests, key=lambda item: item[0], default=None)
        found = None if best is None else run_dir / "checkpoints" / directory_name(best[1].step)
    else:
        found = run_dir / "checkpoints" / directory_name(int(which))
    if found is None or not found.is_dir():
        there = ", ".join(path.name for path in committed(run_dir)) or "none"
        raise CheckpointError(f"{run_dir}: no such checkpoint: {which or 'newest'}", expected=f"one of: {there}")
    return found


def main(argv: list[str]) -> int:
    """Loads the checkpoint into the configured student and exports it."""
    apr_dir = Path(argv.pop().removeprefix("apr=")) if argv and argv[-1].startswith("apr=") else None
    if not 1 <= len(argv) <= 2:
        print("usage: python -P -m engine.export_run RUN_DIR [STEP | best] [apr=DIR]", file=sys.stderr)
        return ExitCode.USAGE
    run_dir = Path(argv[0])
    try:
        path = choose(run_dir, argv[1] if len(argv) == 2 else None)
        config = load_config(run_dir / "config.yaml")

        import torch

        from engine.account import provenance
        from engine.export import export, weights_digests
        from engine.export_apr import export_apr
        from engine.formats import resolve_builtin
        from engine.keeper import Totals
        from engine.models import load_student
        from engine.snapshot import load

        student = load_student(config.student, torch.device("cpu"), config.train.seed)
        initial = weights_digests(student.model)
        state = load(path, student.model)
        tokenizer_dir = student.files.tokenizer_dir
        if config.data.tokenizer is not None:
            builtin = config.data.tokenizer == "builtin"
            tokenizer_dir = resolve_builtin("builtin:teacher") if builtin else Path(config.data.tokenizer)
        if apr_dir is not None:
            exported = export_apr(
                student.model,
                apr_dir,
                path / MODEL,
                run=run_dir.name,
                initial=initial,
                tokenizer_dir=tokenizer_dir,
            )
        else:
            exported = export(
                student.model,
                run_dir,
                provenance=provenance(config, run_dir.name, Totals.of(state), []),
                initial=initial,
                tokenizer_dir=tokenizer_dir,
            )
    except KdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    told = {"path": str(exported.path), "step": state.step, "ok": exported.ok, "problems": exported.problems}
    print(json.dumps(told))
    return ExitCode.OK if exported.ok else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
