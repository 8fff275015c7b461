from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import (
    TEMPLATES,
    Checkpoint,
    ConfigProblems,
    Data,
    Distill,
    RunConfig,
    Smoke,
    Student,
    Teacher,
    Train,
    fingerprint,
    gate_fingerprint,
    load_config,
    parse_config,
    template,
    to_yaml,
)
from engine.errors import ConfigError, ExitCode
from engine.text import clean

MINIMAL = "teacher: builtin:teacher\nstudent: builtin:student\ndata: {path: builtin:stdlib}\n"


def with_keys(text: str) -> str:
    return MINIMAL + text


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, source="config.yaml")
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


def refused_options(
    sets: Sequence[str] = (), environ: Mapping[str, str] | None = None, name: str = "builtin"
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(template=name, sets=sets, environ=environ)
    return str(caught.value).split("\n")


# --- defaults and templates


def test_the_three_required_keys_make_a_configuration_with_production_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.mode == "train"
    assert config.teacher == Teacher(path="builtin:teacher")
    assert config.student == Student(path="builtin:student")
    assert config.data == Data(path="builtin:stdlib")
    assert (config.distill, config.train, config.checkpoint) == (Distill(), Train(), Checkpoint())
    assert config.contract.path == "builtin"


def test_defaults_are_the_production_values_and_no_smoke_value_leaks_into_them() -> None:
    train, distill = Train(), Distill()
    assert (distill.temperature, distill.alpha) == (4.0, 0.3)
    assert (train.steps, train.batch, train.sequence) == (50_000, 16, 512)
    assert (train.learning_rate, train.min_learning_rate, train.schedule) == (1.5e-5, 5e-7, "cosine")
    assert Checkpoint().every_steps == 5000
    production = load_config(template="gx10")
    assert production.distill == distill
    assert production.checkpoint == Checkpoint()
    assert production.smoke == Smoke()
    own = {
        "precision": "bf16",
        "device": "cuda",
        "evaluate_every": production.train.evaluate_every,
        "accumulation": "auto",
    }
    assert production.train == msgspec.structs.replace(train, **own)


def test_the_gx10_template_is_a_train_run_with_two_different_models() -> None:
    config = load_config(template="gx10")
    assert config.mode == "train"
    assert config.teacher is not None
    assert config.teacher.path != config.student.path
    assert config.teacher.path == os.path.expanduser("~/models/Qwen2.5-Coder-1.5B-Instruct")


def test_the_builtin_template_is_a_smoke_on_what_ships() -> None:
    config = load_config(template="builtin")
    assert config.mode == "smoke"
    assert config.teacher == Teacher(path="builtin:teacher")
    assert config.student.path == "builtin:student"
    assert config.data.path == "builtin:stdlib"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_valid_commented_and_survives_the_round_trip(name: str) -> None:
    config = load_config(template=name)
    assert parse_config(to_yaml(config)) == config
    assert parse_config(template(name)) == config
    assert "#" in template(name)


def test_an_unknown_template_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="template gx11: unknown; expected builtin or gx10"):
        template("gx11")


# --- shorthands and paths


def test_a_text_for_a_model_is_short_for_its_path() -> None:
    long = "teacher: {path: builtin:teacher}\nstudent: {path: builtin:student}\ndata: {path: [builtin:stdlib]}\n"
    assert parse_config(long) == parse_config(MINIMAL)
    assert fingerprint(parse_config(long)) == fingerprint(parse_config(MINIMAL))


def test_relative_paths_of_a_file_start_from_its_directory_and_those_of_options_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "config.yaml"
    file.write_text(
        "teacher: ../t\nstudent: s\ndata: {path: [./a, /b, builtin:stdlib], tokenizer: tok}\ncontract: c.yaml\n"
    )
    config = load_config(
        Path("conf/config.yaml"),
        sets=["student=here/s"],
        environ={"KDCONSOLE_CONTRACT__PATH": "there.yaml"},
        overrides={"data.tokenizer": Path("tok2")},
    )
    assert config.teacher == Teacher(path=str(tmp_path / "t"))
    assert config.student.path == str(tmp_path / "here/s")
    assert config.data.path == [str(tmp_path / "conf/a"), "/b", "builtin:stdlib"]
    assert config.data.tokenizer == str(tmp_path / "tok2")
    assert config.contract.path == str(tmp_path / "there.yaml")


def test_home_is_expanded_and_a_hub_name_is_a_path_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/operator")
    config = parse_config(
        "teacher: Qwen/Qwen2.5-Coder-1.5B\nstudent: ~/m\ndata: {path: builtin:stdlib}\n", base=Path("/base")
    )
    assert config.teacher == Teacher(path="/base/Qwen/Qwen2.5-Coder-1.5B")
    assert config.student.path == "/home/operator/m"


def test_the_home_of_an_unknown_user_is_an_error() -> None:
    assert "no such user's home" in refusal(MINIMAL.replace("builtin:teacher", "~no-such-user-here/m"))


def test_a_wrong_builtin_name_is_an_error_with_the_right_ones() -> None:
    assert refusal(MINIMAL.replace("builtin:teacher", "builtin:teachr")) == (
        'config.yaml: teacher: "builtin:teachr": expected a model directory, builtin:teacher or builtin:student; '
        "did you mean builtin:teacher?"
    )


def test_from_and_layers_make_a_student_of_some_of_a_models_layers() -> None:
    config = parse_config(MINIMAL.replace("builtin:student", "{from: builtin:teacher, layers: [0, 2]}"))
    assert config.student == Student(path=None, from_="builtin:teacher", layers=[0, 2])


# --- unknown keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distill: {temprature: 3}", "distill.temprature: unknown key; did you mean distill.temperature?"),
        ("temperature: 3", "temperature: unknown key; did you mean distill.temperature?"),
        ("train: {temperature: 3}", "train.temperature: unknown key; did you mean distill.temperature?"),
        ("train: {lr: 3}", "train.lr: unknown key; did you mean train.learning_rate?"),
        ("train: {batch_size: 3}", "train.batch_size: unknown key; did you mean train.batch?"),
        ("train: {max_step: 3}", "train.max_step: unknown key; did you mean train.max_steps?"),
        ("warmup_steps: 3", "warmup_steps: unknown key; did you mean train.warmup_steps or smoke.warmup_steps?"),
        ("train.steps: 3", "train.steps: unknown key; write steps as a key of its own below train"),
        ("checkpoint: {xyzzy: 3}", "checkpoint.xyzzy: unknown key; expected every_steps or keep_last"),
        ("Train: {steps: 3}", "Train: unknown key; did you mean train?"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_valid_one(text: str, message: str) -> None:
    assert refusal(with_keys(text)) == f"config.yaml: {message}"


def test_a_key_with_an_escape_sequence_cannot_reach_the_terminal() -> None:
    text = refusal(with_keys('train: {"\\e[31m\\u202ered": 3}'))
    assert text.isprintable()
    assert r"train.\x1b[31m\u202ered: unknown key" in text


# --- wrong values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: -3}", "train.steps: -3: expected an integer of at least 1"),
        ("train: {steps: 0}", "train.steps: 0: expected an integer of at least 1"),
        ("train: {steps: true}", "train.steps: true: expected an integer of at least 1"),
        ("train: {steps: 500.0}", "train.steps: 500.0: expected an integer of at least 1; write 500"),
        ("train: {steps: 500.5}", "train.steps: 500.5: expected an integer of at least 1"),
        (
            "train: {steps: '500'}",
            'train.steps: "500": expected an integer of at least 1; '
            "write 500, a number without quotes, underscores or commas",
        ),
        (
            "train: {steps: 50_000}",
            'train.steps: "50_000": expected an integer of at least 1; '
            "write 50000, a number without quotes, underscores or commas",
        ),
        ("train: {steps: many}", 'train.steps: "many": expected an integer of at least 1'),
        ("train: {steps: null}", "train.steps: null: expected an integer of at least 1"),
        ("train: {steps: [1]}", "train.steps: a list: expected an integer of at least 1"),
        ("train: {steps: {a: 1}}", "train.steps: a mapping: expected an integer of at least 1"),
        (
            "train: {seed: 9223372036854775808}",
            "train.seed: 9223372036854775808: expected an integer of at least 0 and at most 9223372036854775807",
        ),
        ("train: {sequence: 7}", "train.sequence: 7: expected an integer from 8 to 131072"),
        ("train: {learning_rate: 0}", "train.learning_rate: 0: expected a number above 0"),
        ("train: {learning_rate: .nan}", "train.learning_rate: .nan: expected a number above 0"),
        ("train: {learning_rate: .inf}", "train.learning_rate: .inf: expected a number above 0"),
        ("train: {learning_rate: 1e999}", "train.learning_rate: .inf: expected a number above 0"),
        ("train: {clip: true}", "train.clip: true: expected a number of at least 0"),
        ("train: {beta1: 1}", "train.beta1: 1: expected a number of at least 0 and below 1"),
        ("train: {threads: 0}", "train.threads: 0: expected an integer of at least 1 or null"),
        (
            "train: {schedule: cosin}",
            'train.schedule: "cosin": expected constant, cosine or linear; did you mean cosine?',
        ),
        ("distill: {temperature: 0}", "distill.temperature: 0: expected a number above 0 and at most 100"),
        ("distill: {alpha: 1.5}", "distill.alpha: 1.5: expected a number from 0 to 1"),
        ("distill: {compile: true}", "distill.compile: true: expected auto, off or on"),
        ("smoke: {budget_seconds: 0}", "smoke.budget_seconds: 0: expected a number above 0"),
        ("smoke: 5", "smoke: 5: expected a mapping"),
        ("smoke: [5]", "smoke: a list: expected a mapping"),
        ("smoke:", "smoke: null: expected a mapping; leave it out, or give it keys"),
        ("contract: 5", "contract: 5: expected a path or a mapping"),
        ("contract: ''", 'contract: "": expected a YAML file or builtin'),
        ("mode: 3", "mode: 3: expected evaluate, prepare, publish, smoke or train"),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(text: str, message: str) -> None:
    assert refusal(with_keys(text)) == f"config.yaml: {message}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{path: []}", "data.path: an empty list: expected a path or builtin:stdlib or a list of them"),
        ("{path: [a, 3]}", "data.path[1]: 3: expected a path or builtin:stdlib"),
        ('{path: "a\\0b"}', r'data.path: "a\x00b": expected text without control characters'),
        ("{}", "data.path: missing; expected a path or builtin:stdlib or a list of them"),
        ("builtin:stdlib", 'data: "builtin:stdlib": expected a mapping; write the text as its key `path`'),
    ],
)
def test_wrong_data_is_shown_with_what_was_expected(data: str, message: str) -> None:
    text = MINIMAL.replace("{path: builtin:stdlib}", data)
    assert refusal(text) == f"config.yaml: {message}"


def test_missing_sections_are_all_named() -> None:
    assert refusal("mode: train").split("\n") == [
        "config.yaml: teacher: missing; expected a path, a mapping or null",
        "config.yaml: student: missing; expected a path or a mapping",
        "config.yaml: data: missing; expected a mapping",
    ]


def test_all_problems_are_listed_in_the_order_of_their_lines() -> None:
    text = "train: {steps: 0}\nteacher: 3\nzebra: 1\n" + MINIMAL.split("\n", 1)[1] + "distill:\n  alpha: 2\n"
    where = [line.split(": ")[1] for line in refusal(text).split("\n")]
    assert where == ["train.steps", "teacher", "zebra", "distill.alpha"]


def test_hundreds_of_problems_are_counted_rather_than_listed() -> None:
    lines = refusal(with_keys("".join(f"key{number}: 1\n" for number in range(300)))).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "and 280 more problems"


# --- values that are wrong together


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {accumulation: 17}", "train.accumulation: 17: expected at most train.batch (16)"),
        (
            "train: {min_learning_rate: 1e-3}",
            "train.min_learning_rate: 0.001: expected at most train.learning_rate (1.5e-05)",
        ),
        (
            "train: {warmup_steps: 30, steps: 30}",
            "train.warmup_steps: 30: expected less than train.steps (30)",
        ),
        ("train: {steps: 30}", "train.warmup_steps: 500 by default: expected less than train.steps (30)"),
        (
            "smoke: {warmup_steps: 50000}",
            "smoke.warmup_steps: 50000: expected less than train.steps (50000)",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(text: str, message: str) -> None:
    assert refusal(with_keys(text)) == f"config.yaml: {message}"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("{init: random}", "student: a mapping: expected one of its keys path and from"),
        ("{path: /a, from: /b}", 'student.from: "/b": expected no student.path beside it; give one of the two'),
        (
            "{path: /a, layers: [0]}",
            "student.layers: a list: expected student.from beside it, the model that the layers are taken from",
        ),
        ("{from: /a, layers: [1, 0]}", "student.layers: a list: expected ascending layer numbers, each once"),
        ("{from: /a, layers: [1, 1]}", "student.layers: a list: expected ascending layer numbers, each once"),
        (
            "{from: /a, init: random}",
            'student.init: "random": expected pretrained or auto with student.from, whose weights are kept',
        ),
        (
            "{from: /a, layers: []}",
            "student.layers: an empty list: expected a list of layer numbers, the first being 0 or null",
        ),
    ],
)
def test_a_contradictory_student_is_refused(student: str, message: str) -> None:
    assert refusal(MINIMAL.replace("builtin:student", student)) == f"config.yaml: {message}"


def test_no_teacher_is_allowed_only_when_nothing_is_distilled() -> None:
    alone = MINIMAL.replace("builtin:teacher", "null")
    assert refusal(alone) == "config.yaml: teacher: null: expected a model, unless distill.alpha is 1 (it is 0.3)"
    assert parse_config(alone + "distill: {alpha: 1}").teacher is None


@pytest.mark.parametrize("glob", ["/etc/*", "~/*", "../*.txt"])
def test_a_pattern_that_leaves_the_data_directory_is_refused(glob: str) -> None:
    text = MINIMAL.replace("{path: builtin:stdlib}", f"{{path: /d, glob: '{glob}'}}")
    assert refusal(text).startswith("config.yaml: data.glob: ")


# --- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: a second document (---) begins; expected one document"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "line 1, column 4: tag tag:yaml.org,2002:python/object/apply:os.system is not supported; "
            "write the plain value, or quote it",
        ),
        (
            "a: !!int 3",
            "line 1, column 4: tag tag:yaml.org,2002:int is not supported; write the plain value, or quote it",
        ),
        (
            "a: &x 1\nb: *x",
            "line 1, column 4: anchors (&) and aliases (*) are not supported; write the value out, or quote it",
        ),
        (
            "a: *x",
            "line 1, column 4: anchors (&) and aliases (*) are not supported; write the value out, or quote it",
        ),
        (
            "train:\n  steps: 1\n  batch: 2\n  steps: 3\n",
            "train.steps: line 4: key given twice, first in line 2",
        ),
        ("a: \x1b[31m", "line 1, column 4: character U+001B is not allowed in YAML"),
        ("[a]: 3", "line 1, column 1: a list or mapping as a key; expected plain text"),
        ("[" * 100, "line 1, column 33: nested deeper than 32 levels"),
        ("a: " + "9" * 5000, "line 1, column 4: a number of 5000 digits; expected at most 64"),
        ('a: "\\UFFFFFFFF"', r"a \U escape stands for no character; expected at most \U0010FFFF"),
        ("- 1", "a list at the top; expected a mapping of sections such as `train:`"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    assert refusal(text) == f"config.yaml: {message}"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n...\n"])
def test_an_empty_file_says_what_to_write(text: str) -> None:
    assert refusal(text).startswith("config.yaml: empty; expected the sections teacher, student and data")


def test_plain_scalars_follow_yaml_1_2() -> None:
    config = parse_config(
        with_keys("distill: {compile: on}\ntrain: {learning_rate: 5e-3, seed: 010, min_learning_rate: 1E-7}")
    )
    assert config.distill.compile == "on"
    assert (config.train.learning_rate, config.train.min_learning_rate, config.train.seed) == (5e-3, 1e-7, 10)


@settings(max_examples=150)
@given(st.text(st.sampled_from("ab:-[]{}\"'#&*!|>%@`,?~ \n\t0.\\x\x1b\ufeff\u2028")) | st.text())
def test_any_text_at_all_gives_a_configuration_or_a_refusal_that_steers_no_terminal(text: str) -> None:
    message = ""
    try:
        parse_config(text)
    except ConfigError as error:
        message = str(error)
    assert clean(message, 100_000, keep="\n") == message


# --- files


def refused_file(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return str(caught.value)


def test_a_missing_file_a_directory_and_a_name_with_an_escape_are_refused_by_name(tmp_path: Path) -> None:
    assert refused_file(tmp_path / "no.yaml").startswith(f"{tmp_path}/no.yaml: no such file; ")
    assert refused_file(tmp_path) == f"{tmp_path}: is a directory; expected a YAML file"
    assert refused_file(Path("no\x1b.yaml")).startswith(r"no\x1b.yaml: no such file")
    assert "cannot be read" in refused_file(Path("no\0.yaml"))


def test_a_file_that_is_not_utf_8_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"mode: train\nteacher: \xe9\n")
    assert refused_file(file) == f"{file}: line 2: not UTF-8 (byte 0xe9); expected UTF-8 text"


def test_a_file_over_one_mebibyte_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"[" * ((1 << 20) + 1))
    assert refused_file(file).startswith(f"{file}: larger than 1 MiB")
    assert refusal("é" * (1 << 19) + "e").startswith("config.yaml: larger than 1 MiB")
    assert refused_file(Path("/dev/zero")).startswith("/dev/zero: larger than 1 MiB")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(file) == parse_config(MINIMAL)


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MINIMAL.encode() + b"zebra: 1")))
    assert refused_file(Path("-")).startswith("standard input: zebra: unknown key")


# --- options and variables


def test_an_option_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(with_keys("train: {batch: 2, sequence: 9, seed: 2}"))
    config = load_config(
        file,
        sets=["train.batch=4", "train.threads=1"],
        environ={"KDCONSOLE_TRAIN__BATCH": "3", "KDCONSOLE_TRAIN__SEQUENCE": "10", "PATH": "/bin"},
        overrides={"train.threads": 2, "mode": "smoke", "train.seed": None},
    )
    train = config.train
    assert (train.batch, train.sequence, train.seed, train.accumulation, train.threads) == (4, 10, 2, 1, 2)
    assert config.mode == "smoke"


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ("train.steps=500", lambda c: c.train.steps == 500),
        ("train.learning_rate=1e-2", lambda c: c.train.learning_rate == 0.01),
        ("distill.compile=on", lambda c: c.distill.compile == "on"),
        ("smoke.max_steps=null", lambda c: c.smoke.max_steps is None),
        ("teacher=/models/a #b: c", lambda c: c.teacher.path == "/models/a #b: c"),
        ("teacher=/models/a=b", lambda c: c.teacher.path == "/models/a=b"),
        ("teacher='[odd]'", lambda c: c.teacher.path.endswith("/[odd]")),
        ("data.path=[/a, builtin:stdlib]", lambda c: c.data.path == ["/a", "builtin:stdlib"]),
        ("student={from: builtin:teacher, layers: [0]}", lambda c: c.student.layers == [0]),
        ("student.init=random", lambda c: c.student == Student(path="builtin:student", init="random")),
        ("train={steps: 900, batch: 2}", lambda c: c.train == Train(steps=900, batch=2)),
    ],
)
def test_an_option_sets_a_scalar_a_list_or_a_whole_section(option: str, check: object) -> None:
    assert callable(check)
    assert check(load_config(template="builtin", sets=[option]))


def test_the_last_of_two_options_for_a_key_wins_and_a_section_replaces_its_keys() -> None:
    config = load_config(
        template="builtin", sets=["train.steps=50", "train.steps=60", "student.init=random", "student=/s"]
    )
    assert config.train.steps == 60
    assert config.student == Student(path="/s")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.steps", "--set train.steps: expected KEY=VALUE, such as --set train.steps=500"),
        ("=5", "--set =5: expected KEY=VALUE, such as --set train.steps=500"),
        ("train.=5", "--set train.=5: expected KEY=VALUE, such as --set train.steps=500"),
        ("train.stepz=5", "--set train.stepz: unknown key; did you mean train.steps?"),
        ("temperature=5", "--set temperature: unknown key; did you mean distill.temperature?"),
        ("trian.steps=5", "--set trian.steps: trian: unknown key; did you mean train?"),
        ("train.steps=-3", "--set train.steps: -3: expected an integer of at least 1"),
        ("train.steps=", "--set train.steps: null: expected an integer of at least 1"),
        ("train.steps.x=1", "--set train.steps.x: train.steps is 2000, not a section"),
        ("train.steps=[1", "--set train.steps: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("student={form: x}", "--set student: student.form: unknown key; did you mean student.from?"),
        ("smoke.max_steps=2001", "--set smoke.max_steps: 2001: expected at most train.steps (2000)"),
        ("train.max_steps=2001", "--set train.max_steps: 2001: expected at most train.steps (2000)"),
        ("train.accumulation=17", "--set train.accumulation: 17: expected at most train.batch (8)"),
        ("train.\x1bc=1", "--set train.\\x1bc: unknown key"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(option: str, message: str) -> None:
    if message.endswith("2000, not a section"):
        message = message.replace("2000", str(load_config(template="builtin").train.steps))
    assert refused_options([option])[0].startswith(message)


def test_what_a_commands_own_option_sets_is_named_as_the_option() -> None:
    def refused(value: object, **options: str) -> str:
        with pytest.raises(ConfigProblems) as error:
            load_config(template="builtin", overrides={"train.max_steps": value}, options=options)
        return str(error.value)

    named = {"train.max_steps": "--max-steps"}
    assert refused(0, **named) == "--max-steps: 0: expected an integer of at least 1 or null"
    assert refused(10**9, **named).startswith("--max-steps: 1000000000: expected at most train.steps")
    assert refused(0).startswith("command line: train.max_steps: 0")


@pytest.mark.parametrize(
    ("sets", "most", "asked"),
    [
        ([], None, 2000),
        (["train.max_steps=20"], 20, 20),
        (["train.max_steps=2000"], 2000, 2000),
        (["smoke.max_steps=7"], None, 2000),
        (["mode=smoke", "train.max_steps=20"], None, 2000),
        (["mode=smoke", "train.max_steps=20", "smoke.max_steps=7"], 7, 7),
    ],
)
def test_each_mode_has_its_own_number_of_steps_to_end_after(sets: list[str], most: int | None, asked: int) -> None:
    config = load_config(template="builtin", sets=["mode=train", "train.steps=2000", *sets])
    assert (config.max_steps, config.steps_asked) == (most, asked)


@pytest.mark.parametrize(
    ("student", "source", "random"),
    [
        (Student(path="builtin:student"), "builtin:student", True),
        (Student(path="builtin:student", init="pretrained"), "builtin:student", False),
        (Student(path="/m"), "/m", False),
        (Student(path="/m", init="random"), "/m", True),
        (Student(from_="builtin:teacher", layers=[0]), "builtin:teacher", False),
    ],
)
def test_a_student_knows_where_it_comes_from_and_whether_its_weights_are_drawn(
    student: Student, source: str, random: bool
) -> None:
    assert (student.source, student.starts_random) == (source, random)


def test_a_section_in_the_file_that_is_none_is_reported_even_when_an_option_sets_a_key_of_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(with_keys("train: 5"))
    with pytest.raises(ConfigProblems) as caught:
        load_config(file, sets=["train.steps=600"])
    assert [str(problem) for problem in caught.value.problems] == [
        f"{file}: train: 5: expected a mapping",
        "--set train.steps: train is 5, not a section",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "KDCONSOLE_TRAIN__STEPZ",
            "1",
            "KDCONSOLE_TRAIN__STEPZ: unknown variable; did you mean KDCONSOLE_TRAIN__STEPS?",
        ),
        ("KDCONSOLE_TRAIN_STEPS", "1", "KDCONSOLE_TRAIN_STEPS: unknown variable; did you mean KDCONSOLE_TRAIN__STEPS?"),
        (
            "KDCONSOLE_TEMPERATURE",
            "1",
            "KDCONSOLE_TEMPERATURE: unknown variable; "
            "did you mean KDCONSOLE_DISTILL__TEMPERATURE or KDCONSOLE_EVALUATE__TEMPERATURE?",
        ),
        ("KDCONSOLE_EVIDENC", "1", "KDCONSOLE_EVIDENC: unknown variable; did you mean KDCONSOLE_EVIDENCE?"),
        ("KDCONSOLE_ZZZZ", "1", "KDCONSOLE_ZZZZ: unknown variable; expected a name such as KDCONSOLE_TRAIN__STEPS"),
        ("KDCONSOLE_TRAIN__STEPS", "many", 'KDCONSOLE_TRAIN__STEPS: "many": expected an integer of at least 1'),
        ("KDCONSOLE_DATA__PATH", "[a", "KDCONSOLE_DATA__PATH: line 1, column 3: expected ',' or ']'"),
        ("KDCONSOLE_STUDENT", "{form: 1}", "KDCONSOLE_STUDENT: student.form: unknown key; did you mean student.from?"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(variable: str, value: str, message: str) -> None:
    assert refused_options(environ={variable: value})[0].startswith(message)


def test_variables_set_keys_and_those_of_the_console_itself_are_passed_over() -> None:
    config = load_config(
        template="builtin",
        environ={
            "KDCONSOLE_TRAIN__STEPS": "700",
            "KDCONSOLE_STUDENT__FROM": "/m",
            "KDCONSOLE_STUDENT__PATH": "null",
            "KDCONSOLE_MODE": "train",
            "KDCONSOLE_EVIDENCE": "x",
            "KDCONSOLE_DEBUG": "1",
            "KDCONSOLE_HOME": "y",
        },
    )
    assert (config.train.steps, config.mode, config.student) == (700, "train", Student(path=None, from_="/m"))


# --- round trip and fingerprints

names = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), min_size=1, max_size=30)
paths = names.map(lambda name: os.path.abspath(f"/{name}"))
positive = st.floats(1e-12, 1e6)
students = st.one_of(
    st.builds(Student, path=paths, init=st.sampled_from(["auto", "pretrained", "random"])),
    st.builds(
        Student,
        from_=paths,
        path=st.none(),
        init=st.sampled_from(["auto", "pretrained"]),
        layers=st.none() | st.sets(st.integers(0, 99), min_size=1).map(sorted),
    ),
)
configs = st.builds(
    RunConfig,
    mode=st.sampled_from(["train", "smoke"]),
    teacher=st.builds(Teacher, path=paths),
    student=students,
    distill=st.builds(Distill, temperature=st.floats(0.01, 100), alpha=st.floats(0, 1)),
    data=st.builds(
        Data,
        path=paths | st.lists(paths, min_size=2, max_size=3),
        glob=names.filter(lambda name: not name.startswith(("/", "~")) and ".." not in name.split("/")),
        tokenizer=st.none() | paths,
    ),
    train=st.builds(
        Train,
        steps=st.integers(1000, 10**9),
        learning_rate=st.floats(1e-3, 10),
        min_learning_rate=st.floats(0, 1e-3),
        weight_decay=positive,
        seed=st.integers(0, 2**63 - 1),
        threads=st.none() | st.integers(1, 64),
    ),
    smoke=st.builds(Smoke, budget_seconds=positive, max_steps=st.none() | st.integers(1, 9)),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(configs)
def test_a_configuration_written_as_yaml_reads_back_the_same_with_the_same_fingerprints(config: RunConfig) -> None:
    again = parse_config(to_yaml(config))
    assert again == config
    assert fingerprint(again) == fingerprint(config)
    assert gate_fingerprint(again) == gate_fingerprint(config)


@pytest.mark.parametrize(
    "text", ["on", "no", "0o17", "1e-3", "5e-7", "12:30", "0x1f", ".nan", "~", "null", "=", "<<", "a: b"]
)
def test_text_that_looks_like_something_else_stays_text_in_the_round_trip(text: str) -> None:
    config = RunConfig(
        teacher=Teacher(path="/t"),
        student=Student(path="/s"),
        data=Data(path="/d", glob=text if text != "~" else "x ~"),
    )
    assert parse_config(to_yaml(config)) == config


def test_numbers_written_differently_give_the_same_fingerprint() -> None:
    one = parse_config(with_keys("train: {learning_rate: 1e-3, clip: 1}\ndistill: {alpha: -0.0}"))
    other = parse_config(with_keys("distill: {alpha: 0}\ntrain: {clip: 1.0, learning_rate: 0.001}\n# comment"))
    assert fingerprint(one) == fingerprint(other)
    by_hand = msgspec.structs.replace(one, train=msgspec.structs.replace(one.train, clip=1))
    assert fingerprint(by_hand) == fingerprint(one)


def test_the_fingerprint_of_a_configuration_changes_only_when_the_schema_does() -> None:
    assert fingerprint(parse_config(MINIMAL)) == "aadfdea7aa0ad5ce3035f9ebc26afd6231461dbe0ce99a904076a4890412e06f"


@pytest.mark.parametrize(
    "option",
    [
        *("mode=smoke", "train.steps=900", "train.max_steps=7", "smoke.max_steps=7", "smoke.warmup_steps=1"),
        *("checkpoint.every_steps=0", "supervise.stall_seconds=60", "supervise.kill_after_stall_seconds=60"),
    ],
)
def test_what_a_smoke_and_its_production_run_differ_in_is_left_out_of_the_gate_fingerprint(option: str) -> None:
    one, other = load_config(template="gx10"), load_config(template="gx10", sets=[option])
    assert fingerprint(one) != fingerprint(other)
    assert gate_fingerprint(one) == gate_fingerprint(other)


@pytest.mark.parametrize(
    "option",
    ["teacher=/x", "student=/x", "distill.alpha=0.5", "data.path=/x", "train.batch=8", "train.seed=1", "contract=/c"],
)
def test_everything_else_changes_both_fingerprints(option: str) -> None:
    one, other = load_config(template="gx10"), load_config(template="gx10", sets=[option])
    assert fingerprint(one) != fingerprint(other)
    assert gate_fingerprint(one) != gate_fingerprint(other)
