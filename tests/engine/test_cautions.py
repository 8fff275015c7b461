"""What an operator hears before a run that may be meant and has cost others days."""

from __future__ import annotations

import pytest

from engine.cautions import cautions
from engine.config import load_config

NOTHING = "20,000 steps without a periodic checkpoint: a crash loses all of them; set checkpoint.every_steps"
BEST = "20,000 steps without a periodic checkpoint: a crash loses what came after the best one so far; set checkpoint."


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["checkpoint.every_steps=0"], NOTHING),
        (["checkpoint.every_steps=20000"], NOTHING),
        (["checkpoint.every_steps=30000", "train.evaluate_every=20000"], NOTHING),
        (["checkpoint.every_steps=0", "train.evaluate_every=1000"], BEST),
        (["checkpoint.every_steps=0", "train.max_steps=5000"], NOTHING.replace("20,000", "5,000")),
    ],
)
def test_a_long_run_that_nothing_is_saved_of_is_told(sets: list[str], told: str) -> None:
    config = load_config(template="builtin", sets=["mode=train", "train.steps=20000", "train.evaluate_every=0", *sets])
    [caution] = cautions(config)
    assert caution.startswith(told)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["checkpoint.every_steps=19999"],
        ["checkpoint.every_steps=0", "train.max_steps=4999"],
        ["checkpoint.every_steps=0", "train.steps=4999"],
        ["checkpoint.every_steps=0", "mode=smoke"],
    ],
)
def test_a_run_that_is_saved_or_short_is_not(sets: list[str]) -> None:
    assert cautions(load_config(template="gx10", sets=["train.steps=20000", *sets])) == []


@pytest.mark.parametrize("mode", ["prepare", "smoke", "train"])
def test_the_largest_logits_of_a_softened_teacher_are_told_to_be_few(mode: str) -> None:
    sets = [f"mode={mode}", "teacher.source=topk", "teacher.top_k=64"]
    [caution] = cautions(load_config(template="builtin", sets=[*sets, "distill.temperature=4"]))
    assert caution.startswith(
        "teacher.source: topk at distill.temperature 4: softened, the 64 largest logits hold less"
    )
    assert caution.endswith("teacher.source: hidden is exact at any temperature")
    assert cautions(load_config(template="builtin", sets=[*sets, "distill.temperature=1"])) == []
    assert cautions(load_config(template="builtin", sets=[*sets[:1], "teacher.source=hidden"])) == []
