"""Directories as the predecessor left them, made of the line forms that its logs have, in every variant.

How to use it:

    directory = SCENES["asked-50-ran-62"](tmp_path / "old")       # one of the usual scenes, written to disk
    for name, build in SCENES.items(): ...                         # all of them
    expected = EXPECTED["asked-50-ran-62"]                         # what must be read from it: an `Expected`

    log = smoke_log(STYLES["lost arrow"], steps=62)                # bytes of a log in a style
    write_old(tmp_path / "mine", logs={"launch-victory.txt": log}, manifest=manifest(steps=50), notes={...})

The functions that give one line each (`step`, `complete`, `projected`, ...) give it without its newline and as it was
printed; `Style.text` joins lines and does to them what became of such logs: lost arrows, mojibake, CRLF, colours,
logger's prefixes, UTF-16. `kernel_lines` are what stands around them by the hundreds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ARROW, TICK = "\u2192", "\u2713"
GPU = "GPU: NVIDIA GB10 (128.5 GB)"
STAMP = "[2026-05-01T12:00:00Z] "
PANIC = "thread 'main' panicked at crates/train/src/student.rs:210:9:"
PANIC_WHAT = "Block 0 upload: CUDA_ERROR_OUT_OF_MEMORY"


@dataclass(frozen=True)
class Style:
    """What became of a log on its way; `change` is done to the text, `encoding` makes the bytes."""

    change: Callable[[str], str] = str
    prefix: str = ""
    newline: str = "\n"
    encoding: str = "utf-8"

    def text(self, lines: Iterable[str]) -> bytes:
        """The lines as a file's bytes."""
        whole = "".join(self.prefix + line + self.newline for line in lines)
        return self.change(whole).encode(self.encoding)


def _without(text: str) -> str:
    return text.replace(ARROW, "").replace(f"{TICK} ", "")


def _ascii(text: str) -> str:
    return text.replace(ARROW, "->").replace(f"{TICK} ", "")


def _question(text: str) -> str:
    return text.replace(ARROW, "?").replace(TICK, "?")


def _replaced(text: str) -> str:
    return text.replace(ARROW, "\ufffd\ufffd\ufffd").replace(TICK, "\ufffd\ufffd\ufffd")


def _mojibake(encoding: str) -> Callable[[str], str]:
    # UTF-8 that somebody took for another encoding, and wrote as UTF-8 again.
    return lambda text: text.encode().decode(encoding, "replace")


def _coloured(text: str) -> str:
    for word, code in (("Step", 36), ("loss:", 1), ("complete", 32), ("[SMOKE]", 35), ("panicked", 31), ("PASS", 32)):
        text = text.replace(word, f"\x1b[{code}m{word}\x1b[0m")
    return text


STYLES: dict[str, Style] = {
    "whole": Style(),
    "lost arrow": Style(_without),
    "ascii arrow": Style(_ascii),
    "question marks": Style(_question),
    "replacement characters": Style(_replaced),
    "latin-1 mojibake": Style(_mojibake("latin-1")),
    "cp1252 mojibake": Style(_mojibake("cp1252")),
    "crlf": Style(newline="\r\n"),
    "trailing blanks": Style(newline=" \t \n"),
    "indented": Style(prefix="    "),
    "timestamps": Style(prefix=STAMP),
    "logger": Style(prefix="2026-05-01 12:00:00,123 INFO apr::distill: "),
    "colours": Style(_coloured),
    "utf-8 with bom": Style(encoding="utf-8-sig"),
    "utf-16": Style(encoding="utf-16"),
}


# One line each


def step(step: int, total: int, loss: float) -> str:
    return f"  Step {step}/{total}: loss: {loss:.4f}"


def epoch(epoch: int, epochs: int, loss: float, seconds: float, val_loss: float | None = None) -> str:
    held_out = "" if val_loss is None else f", val_loss: {val_loss:.4f}"
    return f"Epoch {epoch}/{epochs}: loss: {loss:.4f}{held_out} ({seconds:.1f}s)"


def complete(initial: float, final: float, steps: int, seconds: float) -> str:
    losses = f"initial_loss={initial:.4f} {ARROW} final_loss={final:.4f}"
    return f"{TICK} Distillation complete: {losses} ({steps} steps, {seconds:.1f}s)"


def output(path: str = "/home/op/runs/output.apr") -> str:
    return f"  Output: {path}"


def saved(step: int, path: str = "/home/op/runs/checkpoint.apr") -> str:
    return f"[PMAT-699] checkpoint saved at step {step}: {path}"


def not_saved(step: int, error: str = "No space left on device (os error 28)") -> str:
    return f"[PMAT-699] checkpoint save at step {step} failed: {error} (training continues)"


def smoke_mode(steps: int) -> str:
    after = f"(early-break after {steps} steps; no final output.apr written)"
    return f"[PMAT-706] smoke mode: APR_DISTILL_MAX_STEPS={steps} {after}"


def smoked(steps: int, seconds: float, initial: float, final: float) -> str:
    losses = f"initial_loss={initial:.4f}, final_loss={final:.4f}"
    return f"[SMOKE] {steps} steps in {seconds:.2f}s: {losses}, throughput={steps / seconds:.2f} step/s"


def projected(steps: int, seconds: float, *, decimals: int = 1) -> str:
    times = f"{seconds / 3600:.2f}h / {seconds / 60:.1f} min / {seconds:.{decimals}f}s"
    return f"[SMOKE] projected full-run wall time ({steps} steps): {times}"


def no_export() -> str:
    return "[PMAT-706] smoke mode: skipping export — no model.safetensors / output.apr written"


def kernel_lines(count: int, first: int = 0) -> list[str]:
    kinds = ("fused_qkv_rope", "rmsnorm", "swiglu_gate_up", "attention_flash")
    return [
        f"[FWD-CACHE] OK '{kinds[n % len(kinds)]}_{n}' sm_121 block=(256,1,1) {0.01 * (n % 97):.3f}ms"
        for n in range(first, first + count)
    ]


def head(kernels: int = 200) -> list[str]:
    """What every log begins with."""
    return [GPU, "Loading teacher...", "Loaded 290 weight tensors", *kernel_lines(kernels), "error_rate=0.0, 0 errors"]


# Whole logs


def falling(first: float, last: float, steps: int) -> list[float]:
    """Losses from the first to the last, falling."""
    return [first + (last - first) * n / max(1, steps - 1) for n in range(steps)]


def train_log(
    style: Style = STYLES["whole"],
    *,
    steps: int = 62,
    total: int | None = None,
    first: float = 7.6746,
    last: float = 7.2036,
    seconds: float = 122.7,
    every: int = 1,
    kernels: int = 200,
    more: Iterable[str] = (),
) -> bytes:
    """A run that came to its end; `every`: only every so many steps stand in it, `more` follows at the end."""
    losses = falling(first, last, steps)
    lines = [step(n, total or steps, losses[n - 1]) for n in range(1, steps + 1) if n % every == 0]
    return style.text([*head(kernels), *lines, complete(first, last, steps, seconds), output(), *more])


def smoke_log(
    style: Style = STYLES["whole"],
    *,
    steps: int = 62,
    max_steps: int | None = None,
    first: float = 7.6746,
    last: float = 7.2036,
    seconds: float = 122.7,
    project_to: int = 50_000,
    decimals: int = 1,
    more: Iterable[str] = (),
) -> bytes:
    """A smoke that came to its end."""
    losses = falling(first, last, steps)
    return style.text(
        [
            *head(),
            smoke_mode(steps if max_steps is None else max_steps),
            *(step(n, steps, losses[n - 1]) for n in range(1, steps + 1)),
            smoked(steps, seconds, first, last),
            projected(project_to, seconds / steps * project_to, decimals=decimals),
            no_export(),
            *more,
        ]
    )


def broken_log(style: Style = STYLES["whole"], *, steps: int = 30, total: int = 62, how: Iterable[str]) -> bytes:
    """A run that broke off after so many steps, with these lines last."""
    losses = falling(7.6746, 7.4, steps)
    return style.text([*head(), *(step(n, total, losses[n - 1]) for n in range(1, steps + 1)), *how])


# Directories


def manifest(**changes: object) -> dict[str, object]:
    """The predecessor's dispatch.json; numbers are strings as its scripts wrote them."""
    whole: dict[str, object] = {
        "ticket": "PMAT-706",
        "phase": "3",
        "falsifier": "F-DISTILL-PIPELINE-001",
        "run_name": "phase3-smoke",
        "host": "gx10",
        "teacher": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "student_init": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "steps": 50,
        "epochs": "1",
        "batch_size": "16",
        "learning_rate": "1.5e-5",
        "kd_temperature": "4.0",
        "kd_alpha": 0.3,
        "log_every": 1,
        "checkpoint_every": "0",
        "backend": "cuda",
        "dataset_dir": "/home/op/data/shards",
        "remote_run_dir": "/home/op/runs/phase3-smoke",
        "remote_log": "/home/op/runs/phase3-smoke/launch.log",
        "dispatched_at": "2026-05-01T12:00:00Z",
    }
    whole |= changes
    return {key: value for key, value in whole.items() if value is not ...}


def write_old(
    directory: Path,
    *,
    logs: Mapping[str, bytes] = {},
    manifest: Mapping[str, object] | bytes | None = None,
    notes: Mapping[str, str] = {},
) -> Path:
    """Writes a directory of the predecessor's; a manifest may be bytes that are none. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        raw = manifest if isinstance(manifest, bytes) else json.dumps(dict(manifest), indent=2).encode()
        (directory / "dispatch.json").write_bytes(raw)
    for name, log in logs.items():
        (directory / name).write_bytes(log)
    for name, note in notes.items():
        (directory / name).write_text(note, encoding="utf-8")
    return directory


@dataclass(frozen=True)
class Expected:
    """What must be read from a scene. `initial` and `final` are losses, `seconds` the End's; NaN where not told."""

    kind: str = "predecessor"
    status: str = "COMPLETED"
    steps: int = 62
    asked: int | None = 50
    initial: float = 7.6746
    final: float = 7.2036
    seconds: float = 122.7
    unit: str = "step"
    host: str = "gx10"
    bases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Of each falsifier: its verdict, and what is behind it."""
    contradicted: tuple[str, ...] = ()


_FALLS = {"F-DISTILL-PIPELINE-001": ("PASS", "derived"), "F-FINITE-001": ("PASS", "derived")}
_SMOKE = _FALLS | {f"FT-SMOKE-{n:03}": ("PASS", "derived") for n in (1, 3, 4)}
_CRASHED = Expected(status="CRASHED", steps=30, initial=math.nan, final=math.nan, seconds=math.nan)


def _scene(**parts: object) -> Callable[[Path], Path]:
    return lambda directory: write_old(directory, **parts)  # type: ignore[arg-type]


def _verdict_lines(*words: str) -> list[str]:
    names = ("F-DISTILL-PIPELINE-001", "FT-SMOKE-002", "FALSIFY-KD-LOSS-007")
    return [f"  {identifier}: {word}" for identifier, word in zip(names, words, strict=True)]


_EPOCHS = [*head(), epoch(1, 3, 7.6, 40.0, 7.9), epoch(2, 3, 7.4, 41.5, 7.7), epoch(3, 3, 7.3, 41.2, 7.5)]
_STAGE_C = train_log(steps=124, first=15.6094, last=6.0095, seconds=232.4)
_LAST_LINE_ONLY = STYLES["whole"].text([*head(700), complete(7.6746, 7.2036, 62, 122.7)])

SCENES: dict[str, Callable[[Path], Path]] = {
    "asked-50-ran-62": _scene(logs={"launch.log": train_log()}, manifest=manifest()),
    "smoke": _scene(logs={"launch-victory.txt": smoke_log()}, manifest=manifest(max_steps="62")),
    "smoke-6000s": _scene(
        logs={"launch-final-pass.txt": smoke_log(steps=60, seconds=60.0, project_to=6_000, decimals=0)},
        manifest=manifest(max_steps="60"),
    ),
    "smoke-6000.0s": _scene(
        logs={"launch-final-pass.txt": smoke_log(steps=60, seconds=60.0, project_to=6_000)},
        manifest=manifest(max_steps=60),
    ),
    "smoke-ran-too-far": _scene(logs={"launch.log": smoke_log(steps=62, max_steps=50)}, manifest=manifest()),
    "lost-encoding": _scene(logs={"launch.log": train_log(STYLES["lost arrow"])}, manifest=manifest()),
    "stated-verdicts": _scene(
        logs={"launch.log": train_log(more=_verdict_lines("PASS", "FAIL", "DISCHARGED"))}, manifest=manifest()
    ),
    "contradiction": _scene(
        logs={"launch.log": train_log(first=7.2, last=7.5, more=_verdict_lines("PASS", "PASS", "PASS"))},
        manifest=manifest(),
    ),
    "panic": _scene(logs={"launch.log": broken_log(how=[PANIC, PANIC_WHAT])}, manifest=manifest()),
    "error": _scene(logs={"launch.log": broken_log(how=["error: Validation failed: 3 tensors"])}, manifest=manifest()),
    "broken-off": _scene(logs={"launch.log": broken_log(how=[])}, manifest=manifest()),
    "last-line-only": _scene(logs={"launch.log": _LAST_LINE_ONLY}, manifest=manifest()),
    "epochs": _scene(logs={"train.txt": STYLES["whole"].text(_EPOCHS)}, manifest=manifest(steps=..., epochs=3)),
    "checkpoints": _scene(
        logs={"launch.log": train_log(more=[saved(50), not_saved(60), saved(62)])}, manifest=manifest()
    ),
    "every-tenth": _scene(
        logs={"launch.log": train_log(every=10)}, manifest=manifest(log_every="10", max_steps="62", steps="62")
    ),
    "several-logs": _scene(
        logs={
            "launch.log": broken_log(how=[PANIC, PANIC_WHAT]),
            "launch-victory.txt": train_log(),
            "launch-final-pass.txt": broken_log(steps=10, how=["error: Validation failed: no teacher"]),
        },
        notes={"findings.md": "# Findings\n\n  Step 1/62: loss: 1.0000\nF-DISTILL-PIPELINE-001: PASS\n"},
        manifest=manifest(),
    ),
    "bare-log": _scene(logs={"run.log": _STAGE_C}),
    "manifest-only": _scene(manifest=manifest(), notes={"notes.md": "The log was not kept.\n"}),
}
"""Each writes a directory and returns it."""

EXPECTED: dict[str, Expected] = {
    "asked-50-ran-62": Expected(bases=_FALLS),
    "smoke": Expected(bases=_SMOKE),
    "smoke-6000s": Expected(steps=60, seconds=60.0, bases=_SMOKE),
    "smoke-6000.0s": Expected(steps=60, seconds=60.0, bases=_SMOKE),
    "smoke-ran-too-far": Expected(bases=_SMOKE | {"FT-SMOKE-001": ("FAIL", "derived")}),
    "lost-encoding": Expected(bases=_FALLS),
    "stated-verdicts": Expected(
        bases=_FALLS
        | {
            "F-DISTILL-PIPELINE-001": ("PASS", "stated, derived"),
            "FT-SMOKE-002": ("FAIL", "stated"),
            "FALSIFY-KD-LOSS-007": ("PASS", "stated"),
        }
    ),
    "contradiction": Expected(
        initial=7.2,
        final=7.5,
        bases=_FALLS
        | {
            "F-DISTILL-PIPELINE-001": ("FAIL", "derived"),
            "FT-SMOKE-002": ("PASS", "stated"),
            "FALSIFY-KD-LOSS-007": ("PASS", "stated"),
        },
        contradicted=("F-DISTILL-PIPELINE-001",),
    ),
    "panic": _CRASHED,
    "error": _CRASHED,
    "broken-off": Expected(status="LOST", steps=30, initial=math.nan, final=math.nan, seconds=math.nan),
    "last-line-only": Expected(bases={"F-DISTILL-PIPELINE-001": ("PASS", "derived")}),
    "epochs": Expected(
        status="LOST",
        steps=3,
        asked=None,
        initial=math.nan,
        final=math.nan,
        seconds=math.nan,
        unit="epoch",
        bases=_FALLS | {"F-DISTILL-SMOKE-001": ("PASS", "derived")},
    ),
    "checkpoints": Expected(bases=_FALLS),
    "every-tenth": Expected(asked=62, bases=_FALLS | {"FT-SMOKE-001": ("PASS", "derived")}),
    "several-logs": Expected(bases=_FALLS),
    "bare-log": Expected(
        kind="log", steps=124, asked=None, initial=15.6094, final=6.0095, seconds=232.4, host="", bases=_FALLS
    ),
    "manifest-only": Expected(
        kind="manifest", status="LOST", steps=0, initial=math.nan, final=math.nan, seconds=math.nan
    ),
}
