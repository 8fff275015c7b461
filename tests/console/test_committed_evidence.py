"""What is committed in `evidence/` opens, holds together, and is what its README says it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from console.conclusion import conclude
from console.run_index import RunIndex
from console.run_reader import LoadedRun, load_run
from dispatch.sums import check_sums
from engine.errors import ExitCode

EVIDENCE = Path(__file__).resolve().parents[2] / "evidence"
TOLD = dict(re.findall(r"^\| `([^`]+)` \| ([A-Z]+) \|", (EVIDENCE / "README.md").read_text(), re.MULTILINE))
"""Directory and status, as the README has them."""


@pytest.fixture(scope="module")
def runs() -> dict[str, LoadedRun]:
    return {name: load_run(EVIDENCE / name) for name in TOLD}


def one(runs: dict[str, LoadedRun], ending: str) -> LoadedRun:
    return next(run for name, run in runs.items() if name.endswith(ending))


def test_the_readme_names_a_handful_of_runs() -> None:
    assert len(TOLD) == 5


@pytest.mark.parametrize("name", TOLD)
def test_each_opens_as_what_the_readme_says(runs: dict[str, LoadedRun], name: str) -> None:
    run = runs[name]
    assert not run.problem
    assert not run.remarks
    assert conclude(run.state, run.exit).status == TOLD[name]
    assert run.state.disagreements == []


@pytest.mark.parametrize("name", TOLD)
def test_the_files_of_each_are_as_they_were_when_it_ended(name: str) -> None:
    checked = check_sums(EVIDENCE / name)
    assert checked.problems == ()
    assert all(each.startswith(("checkpoints/", "model/")) for each in checked.absent)


def test_the_training_over_ssh_was_stopped_and_went_on_where_it_was(runs: dict[str, LoadedRun]) -> None:
    run = one(runs, "a02768")
    assert run.manifest is not None
    assert run.manifest.remote is not None
    assert [each.end for each in run.manifest.attempts] == ["exit code 130", "exit code 0"]
    assert run.state.run is not None
    assert run.state.run.attempt == 2
    assert run.state.steps.column("step").tolist() == list(range(1, 401))


def test_the_failed_run_fails_a_gate_though_every_loss_is_a_number(runs: dict[str, LoadedRun]) -> None:
    run = one(runs, "5a813d")
    failed = {v.id for v in run.state.judged if v.verdict == "FAIL" and v.severity != "warn"}
    assert failed == {"F-DISTILL-PIPELINE-001"}
    assert conclude(run.state, run.exit).exit_code == ExitCode.FAILED
    assert run.state.steps.column("loss")[-1] > run.state.steps.column("loss")[0]


def test_the_list_names_the_host_as_its_operator_does() -> None:
    index = RunIndex([EVIDENCE], clock=lambda: 0.0)
    for exact in (False, True):
        for _ in index.look():
            pass
        while exact and index.fold_next():
            pass
        rows = {row.id: row for row in index.rows() if row.id in TOLD}
        assert rows.keys() == TOLD.keys()
        assert {name for name, row in rows.items() if row.host == "loopback"} == {
            "20261121-212544-smoke-eede30",
            "20261121-212644-train-a02768",
        }
        assert all(row.exact for row in rows.values()) == exact


def test_a_run_whose_contract_is_lost_is_judged_by_the_one_that_ships_and_says_so_once(tmp_path: Path) -> None:
    name = next(name for name in TOLD if name.endswith("eede30"))
    shutil.copytree(EVIDENCE / name, tmp_path / name)
    (tmp_path / name / "contract.yaml").unlink()
    run = load_run(tmp_path / name)
    [remark] = run.remarks
    assert remark.startswith("no contract.yaml: judged by the one that ships for smoke")
    assert set(run.state.bases.values()) == {"stated, derived"}
    assert {v.verdict for v in run.state.judged} == {"PASS"}
