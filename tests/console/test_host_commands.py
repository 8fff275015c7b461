"""The commands about runs on hosts as far as they need no host: what they refuse, ask and print."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from console.cli import cli
from console.fetch_command import Teller, lines
from console.host_runs_table import host_runs_lines, size
from dispatch.fetch import Fetched
from dispatch.runs import create_run
from dispatch.survey import HostRun, Survey
from dispatch.transfer import Progress
from engine.config import load_config
from engine.errors import ConfigError


@pytest.mark.parametrize("more", [[], ["--json"], ["--json", "--older-than", "0"]])
def test_nothing_is_removed_without_a_yes(more: list[str], tmp_path: Path) -> None:
    outcome = CliRunner().invoke(cli, ["clean", "--host", "gx10", "--evidence", str(tmp_path), *more])
    assert isinstance(outcome.exception, ConfigError)
    assert "there is no terminal to ask for a yes; give --yes, or --dry-run" in str(outcome.exception)


@pytest.mark.parametrize(
    "arguments",
    [["clean"], ["clean", "--host", "x", "--older-than", "-1"], ["fetch", "x", "--checkpoints", "some"], ["fetch"]],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == 2


@pytest.mark.parametrize("command", ["fetch", "clean", "stop", "runs"])
def test_help_has_examples(command: str) -> None:
    told = CliRunner().invoke(cli, [command, "--help"])
    assert told.exit_code == 0
    assert f"kdconsole {command}" in told.output


def test_a_run_of_this_machine_is_here_already(tmp_path: Path) -> None:
    made = create_run(load_config(None, template="builtin"), evidence=tmp_path, contract_text="x")
    outcome = CliRunner().invoke(cli, ["fetch", made.id, "--evidence", str(tmp_path)])
    assert outcome.exit_code == 0
    assert outcome.output == f"{made.id}: is a run of this machine: it is here already, in {made.path}\n"


def test_what_came_is_told(tmp_path: Path) -> None:
    made = create_run(load_config(None, template="builtin"), evidence=tmp_path, contract_text="x")
    path = made.path / "checkpoints" / "ckpt-step-000004"
    fetched = Fetched(made, False, "ended", 12_345_678, (path,), made.path / "model", (), ("one thing",))
    assert [line.strip() for line in lines(fetched)] == [
        f"{made.id}: ended on {made.manifest.where}; 12.3 MB came now; in {made.path}",
        "checkpoints/ckpt-step-000004: whole and verified",
        "model/: whole and verified",
        "note: one thing",
    ]


def test_progress_has_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("console.fetch_command.PLAIN_SECONDS", 0.0)
    Teller(quiet=False).progress(Progress(50_000_000, 200_000_000, 10e6, 15.0))
    Teller(quiet=True).progress(Progress(50_000_000, 200_000_000, 10e6, 15.0))
    assert capsys.readouterr().err == "25% of 200.0 MB, 10.0 MB/s, 0:00:15 to go\n"


def test_a_row_has_state_step_age_and_size() -> None:
    run = HostRun(
        id="r",
        run="u",
        label="mine",
        mode="train",
        by="laptop",
        created=0.0,
        state="running",
        step=1200,
        changed=0.0,
        bytes=5_000_000_000,
        events_bytes=1,
        checkpoints=(),
        model_bytes=0,
    )
    [line] = host_runs_lines(Survey(base="/b", time=7200.0, free=1, runs=(run,), rest=()), [run], {"r": "a remark"})
    assert line == "r  mine  running  step 1,200  2 h 0 min  5.0 GB  a remark"
    assert [size(count) for count in (0, 999, 1_500, 2_000_000_000_000)] == ["0 B", "999 B", "1.5 kB", "2.0 TB"]
