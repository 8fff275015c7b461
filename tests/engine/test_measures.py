"""A claim about what no part of a run measures is refused before the run; what is measured is what is said to be.

That the real engine emits exactly these measures is seen in `tests/incidents`, by every good run there.
"""

from __future__ import annotations

import pytest

from engine.config import RunConfig, load_config
from engine.contract import METRICS, Contract, builtin_contract, metrics_of, parse_contract
from engine.errors import ConfigError
from engine.export import LIMITS
from engine.measures import (
    MEASURES,
    OF_A_PART,
    OF_A_TRAINING,
    OF_HELDOUT_WITH_TEACHER,
    OF_TOPK,
    fidelity_names,
    require_measured,
)

SHIPPED = ("smoke", "train", "prepare", "publish", "evaluate-heldout", "evaluate-humaneval", "evaluate-problems")
HIDDEN, TOPK = ("teacher.source=hidden",), ("teacher.source=topk",)
HUMANEVAL = ("evaluate.suite=humaneval", "evaluate.run_generated_code=true")
ALONE = ("teacher=null", "distill.alpha=1", "data.tokenizer=builtin")


def config(mode: str, *sets: str) -> RunConfig:
    return load_config(template="builtin", sets=sets, overrides={"mode": mode})


def contract(metric: str, more: str = "") -> Contract:
    falsifier = f"{{id: F-MINE-001, claim: good, kind: present, metrics: [{metric}]{more}}}"
    return parse_contract(f"version: 1\nname: mine\nfalsifiers: [{falsifier}]\n", "mine.yaml")


@pytest.mark.parametrize("mode", ["smoke", "train"])
@pytest.mark.parametrize("sets", [(), ALONE], ids=["teacher", "alone"])
def test_the_contracts_that_ship_ask_for_nothing_else(mode: str, sets: tuple[str, ...]) -> None:
    require_measured(parse_contract(builtin_contract(mode), mode), config(mode, *sets), mode)


@pytest.mark.parametrize("sets", [HIDDEN, TOPK])
def test_so_does_the_one_of_a_preparation(sets: tuple[str, ...]) -> None:
    require_measured(parse_contract(builtin_contract("prepare"), "prepare"), config("prepare", *sets), "prepare")


def test_each_measure_is_asked_for_by_a_contract_that_ships() -> None:
    contracts = [parse_contract(builtin_contract(name), name) for name in SHIPPED]
    asked = {metric for each in contracts for falsifier in each.falsifiers for metric in metrics_of(falsifier)}
    # What stored logits keep is told; what must be kept is a key of the configuration, prepare.min_mass.
    told = {*OF_TOPK, *OF_A_PART, "pass_at_10", "pass_at_100", "heldout_perplexity", *OF_HELDOUT_WITH_TEACHER}
    assert asked - set(METRICS) == set(MEASURES) - {f"measure.{name}" for name in told}


def test_what_stored_logits_keep_has_a_name_for_each_temperature_and_number() -> None:
    assert fidelity_names(2.0, 256) == ("topk_mass_t2_k256", "topk_cosine_t2_k256")
    assert {*fidelity_names(1.0, 64), *fidelity_names(4.0, 1024)} < set(OF_TOPK)
    assert len(set(OF_TOPK)) == 2 + 2 * 3 * 5


def test_the_measures_of_an_export_are_those_that_it_is_held_to() -> None:
    assert set(OF_A_TRAINING) == set(LIMITS)


@pytest.mark.parametrize(
    ("mode", "sets", "metric", "why"),
    [
        ("smoke", (), "measure.weather", "nothing brings it"),
        ("train", (), "measure.model_file", "nothing brings it; did you mean measure.model_files?"),
        ("smoke", (), "measure.export_missing_bytes", "only a training brings it"),
        ("train", (), "projection.p50_seconds", "only a smoke brings it"),
        ("train", ALONE, "measure.teacher_logit_error", "only a run with a teacher brings it"),
        ("smoke", ALONE, "eval.cosine", "only a run with a teacher brings it"),
        ("train", HIDDEN, "measure.store_cosine", "only a preparation brings it"),
        ("prepare", HIDDEN, "measure.topk_mass", "only a preparation with teacher.source topk brings it"),
        ("prepare", TOPK, "measure.teacher_student_distance", "a preparation does not bring it"),
        ("prepare", TOPK, "measure.steps_per_second", "a preparation does not bring it"),
        ("prepare", TOPK, "eval.loss", "a preparation makes no steps"),
        ("evaluate", (), "step.loss", "an evaluation makes no steps"),
        ("evaluate", (), "measure.pass_at_1", "only an evaluation on problems brings it"),
        ("evaluate", HUMANEVAL, "measure.heldout_loss", "only an evaluation on the held-out part brings it"),
        ("evaluate", HUMANEVAL, "measure.teacher_logit_error", "an evaluation does not bring it"),
        ("publish", (), "measure.pass_at_1", "only an evaluation on problems brings it"),
        ("train", (), "measure.publish_files_differ", "only a publication brings it"),
    ],
)
def test_what_nothing_brings_is_refused_by_name(mode: str, sets: tuple[str, ...], metric: str, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_measured(contract(metric), config(mode, *sets), "mine.yaml")
    assert str(refused.value).startswith(f"mine.yaml: F-MINE-001: {metric}: {why}; expected a metric that this run has")


@pytest.mark.parametrize(
    ("mode", "sets", "metric", "more"),
    [
        ("train", (), "measure.export_missing_bytes", ""),
        ("smoke", (), "projection.p50_seconds", ""),
        ("smoke", (), "eval.cosine", ""),
        ("smoke", ALONE, "eval.loss", ""),
        ("smoke", ALONE, "measure.teacher_logit_error", ", needs: [teacher]"),
        ("train", (), "measure.weather", ", needs: [max_steps]"),
    ],
)
def test_what_is_brought_or_does_not_apply_is_not(mode: str, sets: tuple[str, ...], metric: str, more: str) -> None:
    require_measured(contract(metric, more), config(mode, *sets), "mine.yaml")
