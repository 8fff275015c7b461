"""The old launch scripts' variables mean what they meant, are told one by one, and never count without being told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from console.legacy_env import HOST_KEYS, KEYS, NAMES, NOTHING, OPTIONS, Legacy, Mode, read_legacy
from dispatch.hosts import Host, Hosts
from engine.errors import ConfigError
from tests.console_rig import ROOT, Desk, write_corpus

DOC = ROOT / "docs" / "legacy-environment.md"
HOSTS = Hosts(Path("hosts.yaml"), {"gx10": Host("gx10", user="kd", run_dir="/data/kd")})


def read(
    environ: dict[str, str], mode: Mode = "train", given: dict[str, str] | None = None, host: str | None = None
) -> Legacy:
    return read_legacy(environ, mode, given or {}, host, HOSTS)


def variables(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (each.partition("=") for each in text.split())}


def test_every_variable_is_taken_or_told_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("big", "small"):
        (tmp_path / name).mkdir()
    environ = variables(
        f"""GX10_HOST=gx10 GX10_USER=kd GX10_REPO_PATH=/src/apr GX10_RUN_PREFIX=/runs
        TEACHER_REPO=big STUDENT_INIT={tmp_path}/small STEPS=50000 BATCH_SIZE=16 LR=1.5e-5 T=4.0 ALPHA=0.3
        EVIDENCE_DIR=runs DRY_RUN=1 APR_DISTILL_MAX_STEPS=200 APR_DISTILL_PROJECT_TO_STEPS=50000
        APR_DISTILL_CHECKPOINT_EVERY=5000 APR_DISTILL_LOG_EVERY=1 HOME={tmp_path}"""
    )
    assert set(NAMES) == {*KEYS, *OPTIONS, *HOST_KEYS, *NOTHING}
    assert set(NAMES) <= set(environ)
    taken = read(environ)
    assert taken.told == (
        "GX10_HOST=gx10 -> --host gx10",
        "GX10_USER=kd: says what counts here too: `user` of gx10 in hosts.yaml, else ssh_config",
        f"GX10_REPO_PATH=/src/apr: has no equivalent: {NOTHING['GX10_REPO_PATH']}",
        "GX10_RUN_PREFIX=/runs: not taken: `run_dir` of gx10 in hosts.yaml counts, and that is /data/kd",
        f"TEACHER_REPO=big -> teacher={tmp_path}/big",
        f"STUDENT_INIT={tmp_path}/small -> student={tmp_path}/small",
        "STEPS=50000 -> train.steps=50000",
        "BATCH_SIZE=16 -> train.batch=16",
        "LR=1.5e-5 -> train.learning_rate=1.5e-5",
        "T=4.0 -> distill.temperature=4.0",
        "ALPHA=0.3 -> distill.alpha=0.3",
        "EVIDENCE_DIR=runs -> --evidence runs",
        "DRY_RUN=1 -> --dry-run",
        "APR_DISTILL_MAX_STEPS=200 -> train.max_steps=200",
        "APR_DISTILL_PROJECT_TO_STEPS=50000: passed over: a training projects to its own last step",
        "APR_DISTILL_CHECKPOINT_EVERY=5000 -> checkpoint.every_steps=5000",
        f"APR_DISTILL_LOG_EVERY=1: has no equivalent: {NOTHING['APR_DISTILL_LOG_EVERY']}",
    )
    assert (taken.host, taken.evidence, taken.dry_run) == ("gx10", Path("runs"), True)
    assert taken.variables["KDCONSOLE_TRAIN__STEPS"] == "50000"
    smoke = read(environ, "smoke").told
    assert "APR_DISTILL_MAX_STEPS=200 -> smoke.max_steps=200" in smoke
    assert "APR_DISTILL_PROJECT_TO_STEPS=50000 -> smoke.project_to=50000" in smoke
    assert "APR_DISTILL_CHECKPOINT_EVERY=5000: passed over: a smoke saves no checkpoint" in smoke


def test_options_and_our_own_variables_win_and_it_is_said() -> None:
    environ = variables(
        """STEPS=1 LR=2 TEACHER_REPO=no/such EVIDENCE_DIR=a GX10_HOST=gx10
        KDCONSOLE_TRAIN__LEARNING_RATE=3 KDCONSOLE_EVIDENCE=b"""
    )
    given = {"train.steps": "--set train.steps", "teacher.path": "--set teacher.path"}
    found = read(environ, given=given, host="other")
    assert found.told == (
        "GX10_HOST=gx10: passed over: --host is given",
        "TEACHER_REPO=no/such: passed over: --set teacher.path is given",
        "STEPS=1: passed over: --set train.steps is given",
        "LR=2: passed over: KDCONSOLE_TRAIN__LEARNING_RATE is given",
        "EVIDENCE_DIR=a: passed over: KDCONSOLE_EVIDENCE is given",
    )
    assert (found.variables, found.host, found.evidence) == ({}, None, None)


def test_empty_ones_are_passed_over_and_false_is_false() -> None:
    found = read({"STEPS": "", "DRY_RUN": "no"})
    assert found.told == ("STEPS=: empty, so passed over", "DRY_RUN=no -> no --dry-run")
    assert not found.dry_run


def test_without_a_host_its_variables_stand_for_nothing() -> None:
    [user, prefix] = read({"GX10_USER": "kd", "GX10_RUN_PREFIX": "/runs"}).told
    assert user.endswith("not taken: the run stays on this machine")
    assert prefix.endswith("not taken: the run stays on this machine")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"GX10_HOST": "kd@10.0.0.7"}, 'GX10_HOST: "kd@10.0.0.7": no host\'s name; expected a name of hosts.yaml'),
        ({"DRY_RUN": "maybe"}, 'DRY_RUN: "maybe"; expected 1 or 0'),
        ({"TEACHER_REPO": "/no/such/model"}, "TEACHER_REPO: /no/such/model: no such directory"),
        ({"STUDENT_INIT": "Qwen/Qwen2.5-0.5B"}, "hf download Qwen/Qwen2.5-0.5B fetches it"),
    ],
)
def test_what_can_mean_nothing_is_one_message_that_names_the_variable(
    environ: dict[str, str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        read({**environ, "HF_HOME": str(tmp_path)})
    assert words in str(raised.value)
    assert str(raised.value).startswith(next(iter(environ)))


def test_a_repository_is_found_where_it_was_downloaded_to(tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    for root in (tmp_path / "hub", tmp_path / "huggingface" / "hub"):
        kept = root / "models--Qwen--Qwen2.5-1.5B"
        (kept / "snapshots" / revision).mkdir(parents=True)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(revision)
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        where = tmp_path / "hub" if variable == "HF_HUB_CACHE" else tmp_path
        found = read({"TEACHER_REPO": "Qwen/Qwen2.5-1.5B", variable: str(where)})
        root = tmp_path / "huggingface" / "hub" if variable == "XDG_CACHE_HOME" else tmp_path / "hub"
        path = root / "models--Qwen--Qwen2.5-1.5B" / "snapshots" / revision
        assert found.told == (f"TEACHER_REPO=Qwen/Qwen2.5-1.5B -> teacher={path}, from the cache of Hugging Face",)
        assert json.loads(found.variables["KDCONSOLE_TEACHER"]) == str(path)
    # What the cache names leads nowhere else.
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-1.5B" / "refs" / "main").write_text("../../..")
    with pytest.raises(ConfigError, match="nor in the cache"):
        read({"TEACHER_REPO": "Qwen/Qwen2.5-1.5B", "HF_HOME": str(tmp_path)})


def test_paths_of_the_host_and_built_in_models_are_taken_as_they_are() -> None:
    found = read({"TEACHER_REPO": "gx10:/models/big", "STUDENT_INIT": "builtin:student"})
    assert found.told == (
        "TEACHER_REPO=gx10:/models/big -> teacher=gx10:/models/big",
        "STUDENT_INIT=builtin:student -> student=builtin:student",
    )


# By the command


def test_the_command_takes_them_only_when_it_is_told_to(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    write_corpus(desk.cwd / "corpus.txt", 50)
    old = variables(
        f"""TEACHER_REPO=builtin:teacher STUDENT_INIT=builtin:student STEPS=6000 BATCH_SIZE=2 LR=3e-4 DRY_RUN=1
        EVIDENCE_DIR={tmp_path}/runs"""
    )
    without = desk.call("smoke", "--dry-run", "--json", variables=old)
    assert without.rc == 0, without.said
    assert without.err == ""
    # No file is needed then: what the old scripts had as defaults are ours.
    given = ("train", "--legacy-env", "--data", "corpus.txt", "--set", "train.sequence=32", "--json")
    taken = desk.call(*given, variables={**old, "KDCONSOLE_EVIDENCE": ""})
    assert taken.rc == 2, taken.said
    assert taken.err.splitlines()[2] == "STEPS=6000 -> train.steps=6000"
    assert f"EVIDENCE_DIR={tmp_path}/runs -> --evidence {tmp_path}/runs" in taken.err
    told = json.loads(taken.out)
    [refusal] = told["refusals"]
    assert "make it: kdconsole smoke --data corpus.txt --set train.sequence=32 --legacy-env; or" in refusal
    steps = {each["step"]: each for each in told["steps"]}
    assert steps["check"]["text"].startswith("a training of 6,000 steps")
    assert steps["make"]["here"] == f"{tmp_path}/runs/RUN"
    # The same as with options.
    models = ("--teacher", "builtin:teacher", "--student", "builtin:student")
    sets = ("--set", "train.batch=2", "--set", "train.learning_rate=3e-4", "--set", "train.steps=6000")
    other = desk.call(*given, *models, *sets, "--dry-run")
    assert json.loads(other.out)["steps"][0]["fingerprint"] == steps["check"]["fingerprint"]
    bad = desk.call("--headless", *given[:-1], variables={**old, "LR": "-1", "BATCH_SIZE": "many"})
    assert bad.rc == 2, bad.said
    errors = bad.err[bad.err.index("error: ") :].splitlines()
    assert len(errors) == 2
    assert any("BATCH_SIZE: " in line and "expected an integer" in line for line in errors)
    assert any("LR: -1: expected a number above 0" in line for line in errors)
    resumed = desk.call("--headless", "train", "--resume", "x", "--legacy-env")
    assert resumed.rc == 2
    assert "leave out --legacy-env" in resumed.err


# The documents


def test_the_documents_table_is_the_codes() -> None:
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (.+?) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(name for name, _ in rows) == NAMES
    for name, equivalent in rows:
        if name in KEYS:
            for key in dict.fromkeys(KEYS[name].format(mode=mode) for mode in ("smoke", "train")):
                assert f"`{key}`" in equivalent, name
        elif name in OPTIONS:
            assert f"`{OPTIONS[name]}" in equivalent, name
        elif name in HOST_KEYS:
            assert f"`{HOST_KEYS[name]}`" in equivalent, name
        else:
            assert equivalent == "none", name
