from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from huggingface_hub import ModelCard, constants

from engine.config import RunConfig, load_config
from engine.errors import ConfigError, ExitCode, KdError, ModelError, RunError
from engine.publish_card import MARK, Facts, Metric, Result, card, front_matter
from engine.publish_check import files_differ, logit_error
from engine.publish_compare import bare_environment
from engine.publish_files import choose, made, put_in_place, require_ours, require_room, stage, staging_of
from engine.publish_hub import Hub, HubError, HubUnreachable, checked_repo, checked_revision, take_token
from engine.publish_licence import Licence, checked_id, licence_at, licences, parse_stated, read_text, text_at
from tests.engine.model_fixtures import save_qwen2
from tests.hub_rig import TOKEN, HubRig, running_hub

REPO = "my-org/my-model"
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


# Licences


@pytest.mark.parametrize(
    ("files", "licence", "source"),
    [
        ({"README.md": "---\nlicense: Apache-2.0\n---\n# A model\n"}, "apache-2.0", "README.md"),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": APACHE}, "mit", "README.md"),
        ({"LICENSE": APACHE}, "apache-2.0", "LICENSE"),
        ({"README.md": "---\nlicense: other\n---\n", "LICENSE.txt": "MIT License\n\nCopyright"}, "mit", "LICENSE.txt"),
        ({"COPYING": "SPDX-License-Identifier: CC-BY-4.0\n"}, "cc-by-4.0", "COPYING"),
        ({"LICENSE": "/* SPDX-License-Identifier: MIT */\r\n"}, "mit", "LICENSE"),
    ],
)
def test_a_directory_states_its_licence(tmp_path: Path, files: dict[str, str], licence: str, source: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_at(str(tmp_path)) == Licence(licence, source)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": "# A model under the Apache License, perhaps\n"},
        {"README.md": "---\nlicense: unknown\n---\n"},
        {"README.md": "---\nlicense: [mit, gpl]\n---\n"},
        {"LICENSE": "All rights reserved. See the MIT License elsewhere.\n"},
        {"LICENSE": "SPDX-License-Identifier: NOASSERTION\n"},
        {"LICENSE": "SPDX-License-Identifier: MIT AND GPL-3.0-only\n"},
        {"LICENSE": "MIT License\n\nSPDX-License-Identifier: (MIT OR Apache-2.0)\n"},
        {"LICENSE": "SPDX-License-Identifier:\nGPL\n"},
    ],
)
def test_nothing_is_guessed(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_at(str(tmp_path)) is None


def test_a_file_is_under_what_its_own_sidecar_says_and_not_under_its_directorys(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    (tmp_path / "LICENSE").write_text(APACHE)
    assert licence_at(str(corpus)) is None
    (tmp_path / "corpus.txt.license").write_text("SPDX-License-Identifier: CC0-1.0\n")
    assert licence_at(str(corpus)) == Licence("cc0-1.0", "corpus.txt.license")


def config_of(**paths: Path | str) -> RunConfig:
    settings = {"teacher.path": "builtin:teacher", "student.path": "builtin:student", "data.path": "builtin:stdlib"}
    settings |= {f"{name}.path": str(path) for name, path in paths.items()}
    return load_config(sets=[f"{key}={value}" for key, value in settings.items()], environ={})


def test_data_of_the_same_name_keeps_each_licence(tmp_path: Path) -> None:
    places = [tmp_path / name / "text" for name in ("one", "other")]
    for place, licence in zip(places, ("mit", "gpl-3.0"), strict=True):
        place.mkdir(parents=True)
        (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    config = config_of(teacher="builtin:teacher", student="builtin:student", data=places[0])
    config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, path=[str(p) for p in places]))
    found = licences(config, {})
    assert [each.id for name, each in found.items() if name.startswith("data text")] == ["mit", "gpl-3.0"]


def test_what_is_built_in_has_a_known_licence_and_its_text() -> None:
    found = licences(config_of(), {})
    assert {name: each.id for name, each in found.items()} == {
        "teacher builtin:teacher": "psf-2.0",
        "student builtin:student": "psf-2.0",
        "data builtin:stdlib": "psf-2.0",
    }
    text = text_at("builtin:teacher")
    assert text is not None
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in read_text(text)


def test_what_is_unknown_is_refused_by_name_and_the_operator_may_state_it(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text")
    config = config_of(data=corpus)
    with pytest.raises(ModelError, match=r"data .*corpus.*: its licence is unknown.*--license-of data=ID"):
        licences(config, {"student": "psf-2.0"})
    found = licences(config, {"data": "cc0-1.0"})
    assert found["data corpus"] == Licence("cc0-1.0", "stated by the operator")
    (corpus / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    with pytest.raises(ModelError, match=r"states cc-by-4.0 itself \(README.md\), and --license-of states cc0-1.0"):
        licences(config, {"data": "cc0-1.0"})


@pytest.mark.parametrize("text", ["data", "data=", "data=other", "model=mit", "data=a b", "data=" + "x" * 50])
def test_a_statement_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--license-of"):
        parse_stated([text])
    with pytest.raises(ConfigError, match=r"given twice"):
        parse_stated(["data=mit", "data=mit"])
    assert checked_id(" MIT ", "--license") == "mit"


# The files


def a_model(root: Path) -> tuple[Path, dict[str, str]]:
    model = root / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "notes.txt"):
        (model / name).write_text(f"{name} of a model")
    return model, {file.name: file.sha256 for file in made({p.name: p.read_text() for p in model.iterdir()})}


def test_only_what_a_model_is_made_of_is_taken(tmp_path: Path) -> None:
    model, listed = a_model(tmp_path)
    files, left = choose(listed, model)
    assert [file.name for file in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert left == ["notes.txt"]
    for name, words in (("tokenizer.json", "tokenizer.json is missing"), ("config.json", "config.json is missing")):
        with pytest.raises(ModelError, match=words):
            choose({key: value for key, value in listed.items() if key != name}, model)


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    model, listed = a_model(tmp_path)
    files, _ = choose(listed, model)
    texts = {"LICENSE": "text"}
    stage(tmp_path / "out", model, [*files, *made(texts)], texts)
    assert sorted(os.listdir(tmp_path / "out")) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert files_differ(tmp_path / "out", {f.name: f.sha256 for f in [*files, *made(texts)]})[0] == 0
    (model / "model.safetensors").write_text("model.safetensors of another")
    with pytest.raises(ModelError, match=r"model/model.safetensors: SHA-256 .* expected "):
        stage(tmp_path / "again", model, files, {})


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "to"
    require_ours(target, False)
    target.mkdir()
    require_ours(target, False)
    (target / "README.md").write_text("# mine")
    for force in (False, True):
        with pytest.raises(RunError, match=r"holds README.md, which is of no publication"):
            require_ours(target, force)
    (target / "README.md").write_text(f"# x\n{MARK}, from evidence")
    with pytest.raises(RunError, match=r"holds a publication already.*--force"):
        require_ours(target, False)
    require_ours(target, True)
    (target / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"thesis.tex, which is of no publication"):
        require_ours(target, True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match=r"no directory"):
        require_ours(file, True)


def test_a_directory_gets_its_name_at_once_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "to"
    for text in ("one", "two"):
        staged = staging_of(target)
        staged.mkdir()
        (staged / "README.md").write_text(text)
        put_in_place(staged, target)
        assert (target / "README.md").read_text() == text
    assert os.listdir(tmp_path) == ["to"]


def test_an_interrupted_replacement_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "to", os.rename
    target.mkdir()
    (target / "README.md").write_text("one")
    staged = staging_of(target)
    staged.mkdir()

    def interrupted(source: Path, to: Path) -> None:
        if source == staged:
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(staged, target)
    assert (target / "README.md").read_text() == "one"


def test_a_disk_without_room_is_told_before(tmp_path: Path) -> None:
    require_room(tmp_path, 10, 2)
    with pytest.raises(RunError, match=r"MB free.*2 times"):
        require_room(tmp_path, 1 << 60, 2)


# The card


def some_facts(**changes: Any) -> Facts:
    facts = Facts(
        title="my-model",
        architecture="Qwen2ForCausalLM",
        parameters=607_360,
        dtype="bfloat16",
        run="20260102-030405-train-1a2b3c",
        evidence_id="e" * 64,
        config="c" * 64,
        steps=20,
        tokens_per_step=128,
        temperature=2.0,
        alpha=0.3,
        teacher="qwen-1.5b",
        student="qwen-0.5b",
        data=["corpus"],
        inputs={"teacher": "a" * 64},
        licence="apache-2.0",
        licence_source="stated by the operator",
        licences={"teacher qwen-1.5b": Licence("apache-2.0", "README.md")},
        verdicts=[("F-X-001", "gate", "PASS", "0")],
        results=[
            Result(
                "openai_humaneval",
                "HumanEval",
                (Metric("pass@1", "pass@1", 0.25),),
                "20260103-000000-evaluate-000000",
                "f" * 64,
                ("164 problems, 1 answers each, greedy, seed 0.",),
            )
        ],
    )
    return replace(facts, **changes)


def test_a_hub_reads_licence_and_results_from_the_card() -> None:
    read = ModelCard(card(some_facts(base_model="my-org/base"), REPO))
    assert read.data.license == "apache-2.0"
    assert read.data.base_model == "my-org/base"
    assert read.data.pipeline_tag == "text-generation"
    [result] = read.data.eval_results or []
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("openai_humaneval", "pass@1", 0.25)
    for words in ("e" * 64, "f" * 64, "F-X-001", "164 problems", f'from_pretrained("{REPO}")', MARK):
        assert words in read.text, words


def test_a_licence_that_hubs_do_not_know_is_named_beside_other() -> None:
    front = front_matter(some_facts(licence="psf-2.0"))
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "psf-2.0", "LICENSE")


def test_names_of_others_stay_text_in_the_card() -> None:
    hostile = "x\n---\nlicense: mit\n---\n<script>|`"
    read = ModelCard(card(some_facts(title=hostile, teacher=hostile, data=[hostile], student=hostile), None))
    assert read.data.license == "apache-2.0"
    assert "<script>" not in read.text.replace("\\<script\\>", "")


@pytest.mark.parametrize(
    "name", ["1e3", "no", "0o17", "12", "x: y", "---", "# x", "null", "2026-01-01", "\u2028x", "'"]
)
def test_any_name_is_a_text_to_whoever_reads_the_card(name: str) -> None:
    written = card(some_facts(title=name, licence="1e3"), None).split("---\n")[1]
    read = yaml.safe_load(written)
    assert (read["model-index"][0]["name"], read["license_name"]) == (name, "1e3")
    assert 'license_name: "1e3"' in written  # of itself PyYAML writes 1e3, which is a number in YAML 1.2


# What came back


def test_every_file_is_held_against_what_was_sent(tmp_path: Path) -> None:
    model, listed = a_model(tmp_path)
    (model / ".gitattributes").write_text("of the hub")
    assert files_differ(model, listed) == (0.0, "5 files, byte for byte")
    (model / "config.json").write_text("config.json of a modem")
    (model / "tokenizer.json").unlink()
    (model / "extra.bin").write_text("")
    value, detail = files_differ(model, listed)
    assert value == 3.0
    assert detail == "config.json: other bytes; extra.bin: was not sent; tokenizer.json: missing"


def test_one_bit_of_a_weight_is_seen_in_the_logits(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path / "model")
    back = tmp_path / "back"
    shutil.copytree(model, back)
    assert logit_error(back, model)[0] == 0.0
    weights = back / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 0x40
    weights.write_bytes(data)
    assert logit_error(back, model)[0] > 0.0
    weights.write_bytes(data[:-100])
    value, detail = logit_error(back, model)
    assert math.isinf(value)
    assert detail.startswith("what came back does not load: ")


def test_what_is_started_has_no_token_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HEADER", f"Bearer {TOKEN}")
    given = bare_environment(TOKEN)
    assert TOKEN not in json.dumps(given)
    assert "HF_TOKEN" not in given
    assert given["HF_HUB_OFFLINE"] == "1"
    assert given["PATH"] == os.environ["PATH"]


# The hub


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does in a process of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRig]:
    with running_hub() as rig:
        point_at(monkeypatch, rig.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield rig


SENT = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    directory = tmp_path / "sent"
    directory.mkdir()
    for name, data in SENT.items():
        (directory / name).write_bytes(data)
    return directory


def publish(sent: Path, token: str = TOKEN, *, private: bool = False, revision: str = "main") -> Any:
    to = Hub(token, REPO)
    ready = to.prepare(frozenset(SENT), private=private, revision=revision)
    return to, to.upload(sent, frozenset(SENT), ready, "Publish", "evidence", revision)


def test_what_is_sent_comes_back_of_the_commit_that_it_made(hub: HubRig, sent: Path, tmp_path: Path) -> None:
    to, commit = publish(sent, private=True, revision="v1")
    assert {name: data for name, data in hub.files(REPO, "v1").items() if name != ".gitattributes"} == SENT
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hub.repos[REPO].private
    assert commit.id == hub.repos[REPO].branches["v1"]
    hub.repos[REPO].commit("v1", {"config.json": b"somebody else's"})
    back = to.download(commit, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in back.iterdir() if path.name in SENT} == SENT
    assert hub.asked("PUT", "/lfs/") == 1


def test_the_same_again_sends_nothing_and_makes_no_commit(hub: HubRig, sent: Path) -> None:
    _, first = publish(sent)
    _, second = publish(sent)
    assert first == second
    assert hub.asked("PUT", "/lfs/") == 1
    assert hub.asked("POST", "/commit/") == 1


def test_other_files_are_told_of_and_removed_in_the_same_commit(hub: HubRig, sent: Path) -> None:
    hub.made(REPO, {"pytorch_model.bin": b"old"})
    ready = Hub(TOKEN, REPO).prepare(frozenset(SENT), private=False, revision="main")
    assert ready.others == ("pytorch_model.bin",)
    publish(sent)
    assert "pytorch_model.bin" not in hub.files(REPO)
    assert len(hub.repos[REPO].commits) == 2


def test_a_public_repository_is_not_taken_for_a_private_one(hub: HubRig, sent: Path) -> None:
    hub.made(REPO, {})
    with pytest.raises(HubError, match=r"my-org/my-model is public, and --private makes only a new"):
        publish(sent, private=True)


@pytest.mark.parametrize(
    ("where", "status", "words", "code"),
    [
        (("POST", "repos/create"), 401, "401.*the token is not accepted.*hf auth login", ExitCode.USAGE),
        (("POST", "/preupload/"), 403, "the upload failed: 403.*this token may not write there", ExitCode.USAGE),
        (("POST", "/preupload/"), 404, "404.*there is no such repository or branch", ExitCode.USAGE),
        (("POST", "/commit/"), 409, "409.*changed meanwhile.*publish again", ExitCode.USAGE),
        (("GET", "/revision/"), 500, "500.*publish again later", ExitCode.CONNECTION),
        (("POST", "/objects/batch"), 400, "the upload failed: 400", ExitCode.USAGE),
    ],
)
def test_each_refusal_is_one_line_without_the_token(
    hub: HubRig, sent: Path, where: tuple[str, str], status: int, words: str, code: ExitCode
) -> None:
    hub.answers[where] = status
    hub.echo = f"your token {TOKEN}\x1b[31m"
    with pytest.raises(HubError, match=words) as caught:
        publish(sent)
    assert caught.value.exit_code == code
    assert TOKEN not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "127.0.0.1" in str(caught.value)


def test_a_wrong_token_is_refused_by_the_hub(hub: HubRig, sent: Path) -> None:
    with pytest.raises(HubError, match=r"401: Invalid credentials.*hf auth login") as caught:
        publish(sent, "hf_anotherTokenAltogether0000")
    assert "hf_another" not in str(caught.value)
    with pytest.raises(HubError, match=r"there is no token.*HF_TOKEN"):
        Hub(None, REPO)
    assert TOKEN not in repr(Hub(TOKEN, REPO))


def test_an_upload_that_failed_half_way_is_taken_up_again(hub: HubRig, sent: Path) -> None:
    hub.answers["POST", "/commit/"] = 400
    with pytest.raises(HubError, match=r"the upload failed"):
        publish(sent)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.answers.clear()
    publish(sent)
    assert set(hub.files(REPO)) == {".gitattributes", *SENT}
    assert hub.asked("PUT", "/lfs/") == 1


def test_a_connection_that_breaks_once_is_made_again(hub: HubRig, sent: Path, tmp_path: Path) -> None:
    hub.cut = {("PUT", "/lfs/"): 1}
    to, commit = publish(sent)
    assert hub.asked("PUT", "/lfs/") == 2
    assert {name: (to.download(commit, tmp_path) / name).read_bytes() for name in SENT} == SENT


def test_a_hub_that_nobody_reaches_is_told_as_such(hub: HubRig, sent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut = {("POST", "repos/create"): 100}
    with pytest.raises(HubUnreachable, match=r"cannot make the repository.*check the connection"):
        publish(sent)
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match=r"127.0.0.1") as caught:
        publish(sent)
    assert caught.value.exit_code == ExitCode.CONNECTION


def test_a_commit_on_something_that_was_not_looked_at_is_refused(hub: HubRig, sent: Path) -> None:
    hub.on_commit = lambda repo: repo.commit("main", {"config.json": b"somebody else's"})
    with pytest.raises(HubError, match=r"412.*changed meanwhile: publish again"):
        publish(sent)


def test_what_a_hub_loses_or_changes_is_seen(hub: HubRig, sent: Path, tmp_path: Path) -> None:
    hub.dropped = {"config.json"}
    hub.flipped = {"model.safetensors"}
    to, commit = publish(sent)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in SENT.items()}
    value, detail = files_differ(to.download(commit, tmp_path / "cache"), sums)
    assert (value, detail) == (2.0, "config.json: missing; model.safetensors: other bytes")


def test_the_token_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert take_token() == (TOKEN, "HF_TOKEN")
    assert TOKEN not in os.environ.values()
    assert take_token() == (None, "")
    (tmp_path / "token").write_text(TOKEN)
    assert take_token() == (TOKEN, "huggingface_hub's store")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*--to DIR"):
        Hub(TOKEN, REPO)


@pytest.mark.parametrize("text", ["model", "a/b/c", "../x/y", "a/b--c", "a/b.git", "/b", "a/", "a b/c", "a/\x1b[31m"])
def test_a_repository_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(KdError, match=r"--repo .*ORG/NAME"):
        checked_repo(text)
    assert checked_repo("my-org/My_model.v2") == "my-org/My_model.v2"
    for wrong in ("", "refs/pr/1", "a..b", "0" * 40):
        with pytest.raises(KdError, match=r"--revision"):
            checked_revision(wrong)
