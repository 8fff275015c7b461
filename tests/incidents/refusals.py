"""Incidents that are refused before anything is started: 5, 6, 7, 8 and 12."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import model_dirs
from scene import SMOKE, TRAIN, Scene, Way

CONTRACT = """\
version: 1
name: mine
falsifiers:
  - {id: F-MINE-001, claim: it gets better, kind: KIND, metric: METRIC, at_most: 1.0}
"""


def vocabulary(scene: Scene) -> Iterator[Way]:
    """The teacher had 152,064 rows and the student 151,936: the first step died or hung on the shape, for days.

    A larger teacher is cut and renormalised (see the good runs). Made is the one that cannot be: a teacher with fewer
    rows than its student, of the real sizes, and the built-in one.
    """
    desk = scene.desk()
    model_dirs.hollow(desk.cwd / "small", model_dirs.QWEN2_0_5B)
    model_dirs.of_config(desk.cwd / "large", model_dirs.QWEN2_0_5B | {"vocab_size": 152_064})
    student = "student={path: large, init: random}"
    made = "a teacher of 151,936 rows for a student of 152,064"
    real = (*SMOKE, "--teacher", "small", "--set", student, "--force")
    yield scene.refused(made, desk, *real, words=("vocabulary", "151,936", "152,064"))
    config = {**model_dirs.of_builtin_teacher(), "vocab_size": 4_096}
    model_dirs.of_config(desk.cwd / "wide", config)
    small = (*TRAIN, "--set", "student={path: wide, init: random}")
    yield scene.refused("the same with 2,048 and 4,096", desk, *small, words=("vocabulary", "2,048", "4,096"))


def foreign_format(scene: Scene) -> Iterator[Way]:
    """The loader was handed another format's file and said "header too large": a day.

    Made by standing such a file in the place of the teacher's weights.
    """
    page = b"<!DOCTYPE html><html><title>Sign in</title></html>"
    for what, name, content, words in (
        ("a GGUF file", model_dirs.WEIGHTS, b"GGUF\x03\0\0\0" + bytes(56), ("a GGUF file", "kdconsole import")),
        ("an APR container", model_dirs.WEIGHTS, b"APR\0\x02\0" + bytes(58), ("an APR container", "convert it")),
        ("a pickle", "pytorch_model.bin", pickle.dumps({"w": 1.0}, 2), ("a Python pickle", "never loaded")),
        ("a web page", model_dirs.WEIGHTS, page, ("a web page", "download the file again")),
    ):
        desk = scene.desk()
        model_dirs.teacher_with(desk.cwd / "teacher", name, content)
        given = (*SMOKE, "--teacher", "teacher")
        yield scene.refused(f"{what} as {name}", desk, *given, words=(f"teacher/{name}", *words))


def unknown_flags(scene: Scene) -> Iterator[Way]:
    """The launch script passed six flags that the trainer did not have: a day.

    Made as an option, a key of `--set` and keys of the file.
    """
    desk = scene.desk()
    yield scene.refused("--max-step 200", desk, *TRAIN, "--max-step", "200", words=("--max-step", "--max-steps"))
    made = "--set train.learning_rat=1e-5"
    yield scene.refused(
        made, desk, *TRAIN, *made.split(), words=("train.learning_rat", "did you mean", "learning_rate")
    )
    text = desk.cwd.joinpath("config.yaml").read_text()
    desk.write("config.yaml", f"{text}distil: {{kd_temprature: 2.0}}\n")
    yield scene.refused("distil: in config.yaml", desk, *TRAIN, words=("distil", "did you mean distill"))


def too_large(scene: Scene) -> Iterator[Way]:
    """Out of memory at "Block 0 upload": weights, gradients, moments and activations did not fit: a day.

    Made with the sizes of a real 72B model: by its config.json as the student, and as the teacher with weights besides,
    which are a hole in their file and take no room on the disk.
    """
    desk = scene.desk()
    model_dirs.of_config(desk.cwd / "student72b", model_dirs.QWEN2_72B)
    student = "student={path: student72b, init: random}"
    words = ("not enough room", "memory", "GiB needed", "GiB free")
    without = ("--set", "teacher=null", "--set", "distill.alpha=1", "--set", "data.tokenizer=builtin")
    yield scene.refused("a student of 72B parameters", desk, *TRAIN, *without, "--set", student, words=words)
    model_dirs.hollow(desk.cwd / "teacher72b", model_dirs.QWEN2_72B)
    yield scene.refused("a teacher of 72B parameters", desk, *SMOKE, "--teacher", "teacher72b", words=words)


def empty_claim(scene: Scene) -> Iterator[Way]:
    """A change was merged with its contract and none of the code that it described: 19 days.

    Made are contracts that nothing could ever judge: of a kind that is not there, or about what no part of such a run
    measures.
    """
    desk = scene.desk()
    for made, kind, metric, words in (
        ("kind: improves", "improves", "eval.loss", ("improves", "expected", "threshold")),
        ("metric: eval.perplexity", "threshold", "eval.perplexity", ("unknown metric eval.perplexity",)),
        ("metric: measure.humaneval_pass", "threshold", "measure.humaneval_pass", ("nothing brings it",)),
        (
            "metric: measure.export_missing_bytes, in a smoke",
            "threshold",
            "measure.export_missing_bytes",
            ("only a training brings it",),
        ),
    ):
        desk.write("mine.yaml", CONTRACT.replace("KIND", kind).replace("METRIC", metric))
        yield scene.refused(made, desk, *SMOKE, "--contract", "mine.yaml", words=("mine.yaml", "F-MINE-001", *words))
