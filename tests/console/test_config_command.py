from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from console.config_command import config_group
from engine.config import TEMPLATES, fingerprint, gate_fingerprint, load_config, parse_config, template
from engine.errors import ConfigError, ExitCode

MINIMAL = "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KDCONSOLE_EVIDENCE", "KDCONSOLE_HOME", "KDCONSOLE_DEBUG", "KDCONSOLE_TRAIN__STEPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(config_group, args, input=stdin)


def good(*args: str, stdin: str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*args: str, stdin: str | None = None) -> ConfigError:
    error = run(*args, stdin=stdin).exception
    assert isinstance(error, ConfigError)
    assert error.exit_code == ExitCode.USAGE
    return error


@pytest.mark.parametrize("name", TEMPLATES)
def test_init_prints_a_template_that_check_accepts(name: str) -> None:
    text = good("init", "--template", name)
    assert text == template(name)
    assert good("check", "-", stdin=text).startswith("standard input: ok\n")


def test_init_prints_the_builtin_template_by_default() -> None:
    assert good("init") == template("builtin")


def test_check_says_ok_and_both_fingerprints() -> None:
    Path("config.yaml").write_text(MINIMAL)
    config = parse_config(MINIMAL)
    assert good("check", "config.yaml").splitlines() == [
        "config.yaml: ok",
        f"fingerprint: sha256:{fingerprint(config)}",
        f"gate_fingerprint: sha256:{gate_fingerprint(config)}",
    ]


def test_check_without_a_file_takes_the_builtin_template() -> None:
    assert good("check").startswith("template builtin: ok\n")


def test_check_refuses_with_every_problem() -> None:
    Path("config.yaml").write_text(MINIMAL + "distill: {temprature: 3}\n")
    assert str(refusal("check", "config.yaml", "--set", "train.steps=-3")).splitlines() == [
        "config.yaml: distill.temprature: unknown key; did you mean distill.temperature?",
        "--set train.steps: -3: expected an integer of at least 1",
    ]


def test_check_as_json_is_one_document_whether_right_or_wrong() -> None:
    Path("config.yaml").write_text(MINIMAL)
    document = json.loads(good("check", "config.yaml", "--json"))
    config = parse_config(MINIMAL)
    assert document == {
        "schema": "kdconsole.config-check/1",
        "source": "config.yaml",
        "ok": True,
        "problems": [],
        "fingerprint": f"sha256:{fingerprint(config)}",
        "gate_fingerprint": f"sha256:{gate_fingerprint(config)}",
    }
    wrong = run("check", "config.yaml", "--set", "x=1", "--json")
    assert isinstance(wrong.exception, ConfigError)
    document = json.loads(wrong.stdout)
    assert document["ok"] is False
    assert [problem.split(":")[0] for problem in document["problems"]] == ["--set x"]
    missing = json.loads(run("check", "missing.yaml", "--json").stdout)
    assert missing["problems"][0].startswith("missing.yaml: no such file")


def test_show_prints_a_configuration_that_resolves_to_itself_with_its_fingerprints_in_comments() -> None:
    Path("config.yaml").write_text(MINIMAL.replace("builtin:teacher", "models/t"))
    shown = good("show", "config.yaml", "--set", "train.steps=900")
    config = load_config(Path("config.yaml"), sets=["train.steps=900"])
    assert parse_config(shown, base=Path("/elsewhere")) == config
    assert shown.splitlines()[-2:] == [
        f"# fingerprint: sha256:{fingerprint(config)}",
        f"# gate_fingerprint: sha256:{gate_fingerprint(config)}",
    ]
    assert good("show", "-", stdin=shown) == shown


def test_show_as_json_has_the_whole_configuration() -> None:
    document = json.loads(good("show", "--json"))
    config = load_config(template="builtin")
    assert document["schema"] == "kdconsole.config/1"
    assert document["source"] == "template builtin"
    assert document["fingerprint"] == f"sha256:{fingerprint(config)}"
    assert document["config"]["student"]["from"] is None
    assert parse_config(json.dumps(document["config"])) == config


def test_mode_and_variables_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCONSOLE_TRAIN__STEPS", "777")
    config = parse_config(good("show", "--mode", "train"))
    assert (config.mode, config.train.steps) == ("train", 777)
    monkeypatch.setenv("KDCONSOLE_TRAIN__STEPS", "0")
    assert str(refusal("show")) == "KDCONSOLE_TRAIN__STEPS: 0: expected an integer of at least 1"


@pytest.mark.parametrize(
    "args", [["check", "--mode", "long"], ["init", "--template", "x"], ["show", "a", "b"], ["list"]]
)
def test_wrong_usage_exits_2(args: list[str]) -> None:
    assert run(*args).exit_code == ExitCode.USAGE


@pytest.mark.parametrize("command", ["check", "show", "init"])
def test_help_of_each_command_has_examples_and_fits_80_columns(command: str) -> None:
    text = good(command, "--help")
    assert f"kdconsole config {command}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_never_imports_torch() -> None:
    code = "import sys, console.config_command; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
