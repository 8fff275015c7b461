"""`kdconsole runs`: every kind of evidence with its state, narrowed by the filter of the app, as lines and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from console import row_cache
from console.run_commands import runs_command
from tests.console.run_dirs import failed_verdict_run, good_smoke, good_train, live_run, lost_run, nan_run
from tests.old_evidence import SCENES
from tests.streams import EPOCH


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A passed training, a smoke that failed, one old smoke in a folder, and what is broken."""
    evidence = tmp_path / "evidence"
    good_train(evidence, 60, name="good", host="gx10", created=EPOCH + 20)
    failed_verdict_run(evidence, name="bad", created=EPOCH + 10)
    SCENES["smoke"](evidence / "predecessor" / "victory")
    (evidence / "broken").mkdir()
    (evidence / "broken" / "dispatch.json").write_text("{")
    return evidence


def call(evidence: Path, *arguments: str) -> Result:
    return CliRunner().invoke(runs_command, ["--evidence", str(evidence), *arguments])


def listed(evidence: Path, *arguments: str) -> list[dict[str, object]]:
    result = call(evidence, "--json", *arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "kdconsole.runs/1"
    runs: list[dict[str, object]] = document["runs"]
    return runs


def test_a_line_has_what_ran_where_and_how_it_was_judged(evidence: Path) -> None:
    old, good, bad, broken = call(evidence).stdout.splitlines()
    assert old.split("  ")[0].strip() == "victory"
    for text in ("2026-05-01T12:00:00Z", "gx10", "ended", "Qwen2.5-Coder-1.5B-Instruct → ", "5 PASS", "COMPLETED"):
        assert text in old, text
    for text in ("2025-10-09T08:53:40Z", "gx10", "ended", " 4 ", "1 FAIL 14 PASS", "exit code 0"):
        assert text in good, text
    for text in (" box ", " 3 ", "builtin:teacher → builtin:student", "2 FAIL 14 PASS", "exit code 1"):
        assert text in bad, text
    for text in ("broken", "unknown", "dispatch.json: no JSON"):
        assert text in broken, text


def test_a_machine_is_told_the_same_and_null_is_not_known(evidence: Path) -> None:
    old, good, bad, broken = listed(evidence)
    assert (old["kind"], old["state"], old["phase"], old["status"]) == ("predecessor", "ended", "3", "COMPLETED")
    assert good["model"] == {"teacher": "builtin:teacher", "student": "builtin:student"}
    assert (good["name"], good["mode"], good["exit"], good["step"]) == ("good", "train", "exit code 0", 60)
    assert (bad["status"], bad["verdicts"]) == ("FAILED", {"FAIL": 2, "PASS": 14})
    assert (broken["state"], broken["created"], broken["model"]) == (
        "unknown", None, {"teacher": None, "student": None}
    )  # fmt: skip
    assert [Path(str(each["path"])).is_dir() for each in (old, good, bad, broken)] == [True] * 4


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("verdict:fail", ["good", "bad"]),
        ("verdict:F-DISTILL-SMOKE-001=fail", ["bad"]),
        ("model:qwen", ["phase3-smoke"]),
        ("host:gx10", ["phase3-smoke", "good"]),
        ("date:2026", ["phase3-smoke"]),
        ("phase:3", ["phase3-smoke", "bad"]),
        ("phase:3 -box-", []),
        ("status:unread", [None]),
    ],
)
def test_the_filter_is_that_of_the_app(evidence: Path, query: str, names: list[str | None]) -> None:
    assert [each["name"] for each in listed(evidence, "--filter", query)] == names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--filter", "statsu:x date:x"], "statsu:x: unknown key; did you mean status:?; date:x: expected a day"),
        (["--filter", "x", "--host", "gx10"], "--filter goes with the runs of the evidence directory"),
    ],
)
def test_what_is_no_filter_is_refused(evidence: Path, arguments: list[str], said: str) -> None:
    result = call(evidence, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_where_none_passes_it_says_which_filter_it_was(evidence: Path, tmp_path: Path) -> None:
    result = call(evidence, "--filter", "zzz")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"no run in {evidence} passes zzz\n"
    assert "kdconsole --headless smoke makes one" in call(tmp_path / "none").stderr


def test_what_goes_on_is_asked_for_and_what_was_lost_is_lost(tmp_path: Path) -> None:
    live_run(tmp_path), lost_run(tmp_path)
    assert sorted(str(each["state"]) for each in listed(tmp_path)) == ["lost", "running"]


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    nan_run(tmp_path)
    [row] = listed(tmp_path)
    assert (row["loss"], row["status"]) == (None, "FAILED")


def test_the_second_call_reads_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", -3_600.0)
    good_smoke(tmp_path), good_train(tmp_path)
    first = listed(tmp_path)
    assert (own_cache / "kdconsole" / "rows").is_file()
    monkeypatch.setattr("console.run_reader.StreamFold.advance", lambda self: pytest.fail("a stream was read"))
    assert listed(tmp_path) == first


def test_readonly_writes_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(row_cache, "SETTLED_SECONDS", -3_600.0)
    good_smoke(tmp_path)
    for readonly in (True, False):
        result = CliRunner().invoke(
            runs_command, ["--evidence", str(tmp_path)], obj={"headless": False, "readonly": readonly}
        )
        assert "16 PASS" in result.stdout
        assert own_cache.exists() is not readonly


def test_a_date_that_is_none_breaks_nothing(tmp_path: Path) -> None:
    path = good_smoke(tmp_path)
    manifest = json.loads((path / "dispatch.json").read_text())
    (path / "dispatch.json").write_text(json.dumps(manifest | {"created_unix": 1e300}))
    [row] = listed(tmp_path)
    assert row["created"] is None
    assert "  -  " in call(tmp_path).stdout
