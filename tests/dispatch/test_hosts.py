"""hosts.yaml: all that is wrong in it is said at once, and what is added leaves what was there as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatch.hosts import Host, Hosts, add_host, config_dir, hosts_path, load_hosts, parse_hosts
from engine.errors import ConfigError, ExitCode

WHOLE = """\
# Where runs go
hosts:
  gx10:
    address: 192.168.1.40   # the lab
    port: 2222
    user: kd
    identity: ~/.ssh/gx10
    python: /opt/kd/bin/python
    run_dir: /data/kd
    env: [HF_HOME, WANDB_MODE]
    gpu: 1
  lambda-vector:
lanes: [gx10, lambda-vector]
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home"), "KDCONSOLE_HOSTS": str(tmp_path / "kd" / "hosts.yaml")}


def parse(text: str) -> Hosts:
    return parse_hosts(text, Path("/kd/hosts.yaml"), {"HOME": "/home/me"})


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.exit_code == ExitCode.USAGE
    return [line.removeprefix("/kd/hosts.yaml: ") for line in str(caught.value).splitlines()]


def written(environ: Mapping[str, str], text: str) -> Path:
    path = hosts_path(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_everything_that_the_file_may_say_is_read() -> None:
    hosts = parse(WHOLE)
    assert hosts.known["gx10"] == Host(
        "gx10",
        address="192.168.1.40",
        port=2222,
        user="kd",
        identity=Path("/home/me/.ssh/gx10"),
        python="/opt/kd/bin/python",
        run_dir="/data/kd",
        env=("HF_HOME", "WANDB_MODE"),
        gpu=1,
    )
    assert hosts.known["lambda-vector"] == Host("lambda-vector")
    assert hosts.lanes == ("gx10", "lambda-vector")


def test_without_a_file_every_name_may_be_one_of_ssh_config(environ: dict[str, str]) -> None:
    hosts = load_hosts(environ)
    assert (dict(hosts.known), hosts.lanes) == ({}, ())
    assert hosts.named("gx10") == Host("gx10")
    assert hosts.named("gx10").endpoint == "gx10"


def test_an_empty_file_is_no_error() -> None:
    assert not parse("").known
    assert not parse("hosts:\n").known
    assert not parse("# nothing yet\nhosts: {}\nlanes: []\n").known


def test_the_python_is_by_default_the_one_that_bootstrap_makes_below_the_run_directory() -> None:
    assert Host("a").python == "~/kdconsole/venv/bin/python"
    assert parse("hosts: {a: {run_dir: /data/kd}}").known["a"].python == "/data/kd/venv/bin/python"
    assert parse("hosts: {a: {run_dir: /data/kd, python: python3}}").known["a"].python == "python3"


def test_an_identity_starts_at_home_or_beside_the_file() -> None:
    def identity(text: str) -> Path | None:
        return parse(f"hosts: {{a: {{identity: {text}}}}}").known["a"].identity

    assert identity("~/.ssh/id") == Path("/home/me/.ssh/id")
    assert identity("keys/id") == Path("/kd/keys/id")
    assert identity("/etc/id") == Path("/etc/id")
    assert problems("hosts: {a: {identity: ~root/id}}") == [
        'line 1: hosts.a.identity: "~root/id": expected an absolute path, or one that begins ~/'
    ]


def test_the_next_lane_is_the_one_after() -> None:
    hosts = parse("hosts: {a: , b: , c: , d: }\nlanes: [a, b, c]")
    assert [hosts.next_lane(name) for name in "abcd"] == ["b", "c", None, "a"]


# What is wrong


def test_all_that_is_wrong_is_said_at_once_with_its_line_and_the_nearest_key() -> None:
    text = """\
hosts:
  gx10:
    adress: 10.0.0.1
    port: 70000
    run_dir: kd
    env: [OK, "not ok"]
  -oProxyCommand=x:
    user: me
  b: yes
lanse: [gx10]
lanes: [gx1O, gx10, gx10, 3, [gx10]]
"""
    assert problems(text) == [
        "line 3: hosts.gx10.adress: unknown key; did you mean address?",
        "line 4: hosts.gx10.port: 70000: expected an integer from 1 to 65535",
        'line 5: hosts.gx10.run_dir: "kd": expected a path on the host that begins with / or ~/',
        'line 6: hosts.gx10.env[1]: "not ok": expected a variable\'s name',
        "line 7: hosts.-oProxyCommand=x: no host's name; expected letters, digits, dots, dashes and underscores",
        'line 9: hosts.b: "yes": expected a mapping',
        "line 10: lanse: unknown key; did you mean lanes?",
        "line 11: lanes[3]: 3: expected text",
        "line 11: lanes[4]: a list: expected text",
        'line 11: lanes[0]: "gx1O": no such host; did you mean gx10?',
        'line 11: lanes[2]: "gx10": given twice',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- gx10\n", "a list at the top"),
        ("gx10\n", '"gx10" at the top'),
        ("hosts: [gx10]\n", "hosts: a list: expected a mapping of names"),
        ("hosts: 0\n", "hosts: 0: expected a mapping of names"),
        ("hosts: ''\n", 'hosts: "": expected a mapping of names'),
        ("hosts: {a: 0}\n", "hosts.a: 0: expected a mapping"),
        ("hosts: {a: {gpu: -1}}\n", "hosts.a.gpu: -1: expected an integer from 0"),
        ("hosts: {a: {}, a: {}}\n", "hosts.a: line 1: key given twice, first in line 1"),
        ("hosts: {a: &x {}, b: *x}\n", "line 1, column 12: anchors"),
        ("hosts: {\n", "line 2, column 1"),
        ("a: 1\n---\nb: 2\n", "a second document"),
    ],
)
def test_what_is_no_hosts_file_is_refused(text: str, message: str) -> None:
    assert message in "\n".join(problems(text))


HOSTILE = [
    "-oProxyCommand=touch x",
    "-x",
    "a b",
    "a\nb",
    "a\x1b[2J",
    "a;id",
    "$(id)",
    "`id`",
    "ɡx10",
    "gx10\u202e",
    "",
    " a",
    "a/b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_addresses_and_users_are_refused(name: str, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no host's name") as caught:
        load_hosts(environ).named(name)
    assert all(character.isprintable() for character in str(caught.value))
    with pytest.raises(ConfigError):
        add_host(name, {}, environ)
    for key in ("address", "user"):
        with pytest.raises(ConfigError, match=f"host gx10: {key}: ") as caught:
            add_host("gx10", {key: name}, environ)
        assert "\x1b" not in str(caught.value)
        assert "\u202e" not in str(caught.value)
    assert not hosts_path(environ).exists()


@pytest.mark.parametrize("key", ["identity", "python", "run_dir"])
@pytest.mark.parametrize("value", ["-rf", "", "/a\nb", "/a\x00b", "/a\u202eb", "~/x\x1b"])
def test_hostile_paths_are_refused(key: str, value: str, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"host gx10: {key}: "):
        add_host("gx10", {key: value}, environ)


@pytest.mark.parametrize("name", ["gx10", "GX10.lab", "a_b-c", "9"])
def test_plain_names_are_taken(name: str, environ: dict[str, str]) -> None:
    assert load_hosts(environ).named(name).name == name


@pytest.mark.parametrize("address", ["10.0.0.1", "fe80::1%eth0", "[2001:db8::1]", "gx10.lab.example", "host_a"])
def test_plain_addresses_are_taken(address: str, environ: dict[str, str]) -> None:
    assert add_host("gx10", {"address": address}, environ).known["gx10"].address == address


# Odd files


def test_what_is_no_file_is_refused_and_not_waited_for(environ: dict[str, str]) -> None:
    path = hosts_path(environ)
    path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"hosts\.yaml: no regular file"):
        load_hosts(environ)
    path.rmdir()
    os.mkfifo(path)
    for use in (lambda: load_hosts(environ), lambda: add_host("a", {}, environ)):
        with pytest.raises(ConfigError, match=r"hosts\.yaml: no regular file"):
            use()


def test_a_file_without_end_is_refused(environ: dict[str, str]) -> None:
    with written(environ, "").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_hosts(environ)


def test_a_file_that_is_no_text_is_refused(environ: dict[str, str]) -> None:
    written(environ, "").write_bytes(b"hosts:\n  a: \xff\n")
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        load_hosts(environ)


def test_a_link_to_nothing_is_said(environ: dict[str, str], tmp_path: Path) -> None:
    path = written(environ, "")
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="a link to a file that is not there"):
        load_hosts(environ)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_said(environ: dict[str, str]) -> None:
    written(environ, "").chmod(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_hosts(environ)


def test_a_directory_that_cannot_be_made_is_said(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "kd").write_text("a file")
    with pytest.raises(ConfigError, match=r"hosts\.yaml: cannot be"):
        add_host("a", {}, environ)


def test_without_the_variable_the_file_is_where_the_platform_keeps_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere/config")
    assert hosts_path({}) == Path("/somewhere/config/kdconsole/hosts.yaml")
    assert config_dir({"KDCONSOLE_HOSTS": ""}) == Path("/somewhere/config/kdconsole")


# Adding


def test_adding_the_first_host_makes_the_file_for_its_owner_alone(environ: dict[str, str]) -> None:
    hosts = add_host("gx10", {"address": "10.0.0.1", "port": None, "user": "kd", "env": ["HF_HOME"]}, environ)
    path = hosts_path(environ)
    assert path.read_text() == "hosts:\n  gx10:\n    address: 10.0.0.1\n    user: kd\n    env:\n    - HF_HOME\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert hosts == load_hosts(environ)
    assert hosts.known["gx10"].user == "kd"


def test_adding_keeps_comments_and_every_other_line(environ: dict[str, str]) -> None:
    text = """\
# mine
hosts:
    a:   # first
        user: x

    # b was here
    #   user: y

# what follows
lanes: [a]
"""
    path = written(environ, text)
    add_host("c", {"user": "z"}, environ)
    assert path.read_text() == text.replace("    #   user: y\n", "    #   user: y\n    c:\n      user: z\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# a comment, no end of line",
        "lanes: []\n",
        "---\nhosts:\n...\n",
        "hosts: {}\n",
        "hosts: { } # none yet\n",
        "\ufeffhosts:\n",
    ],
)
def test_adding_to_a_file_without_hosts(text: str, environ: dict[str, str]) -> None:
    written(environ, text)
    assert set(add_host("a", {"user": "x"}, environ).known) == {"a"}
    assert set(add_host("b", {}, environ).known) == {"a", "b"}
    assert load_hosts(environ).known["a"].user == "x"


@pytest.mark.parametrize("text", ["hosts: {a: {user: x}}\n", '"hosts":\n  a:\n', "{hosts: {}}\n"])
def test_a_file_that_cannot_be_added_to_is_left_alone_and_what_to_put_there_is_shown(
    text: str, environ: dict[str, str]
) -> None:
    path = written(environ, text)
    with pytest.raises(ConfigError, match="cannot be added to") as caught:
        add_host("new", {"user": "kd"}, environ)
    assert "new:\n  user: kd" in str(caught.value)
    assert path.read_text() == text


def test_a_file_that_is_wrong_already_is_not_written_to(environ: dict[str, str]) -> None:
    path = written(environ, "hosts:\n  a:\n    prot: 1\n")
    with pytest.raises(ConfigError, match=r"hosts\.a\.prot: unknown key; did you mean port\?"):
        add_host("b", {}, environ)
    assert path.read_text() == "hosts:\n  a:\n    prot: 1\n"


def test_a_name_that_is_taken_is_refused(environ: dict[str, str]) -> None:
    path = written(environ, WHOLE)
    with pytest.raises(ConfigError, match="has a host gx10 already"):
        add_host("gx10", {}, environ)
    assert path.read_text() == WHOLE


def test_everything_wrong_with_what_is_added_is_said_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        add_host("gx10", {"port": 0, "user": "-l", "run_dir": "kd"}, environ)
    assert str(caught.value).splitlines() == [
        "host gx10: port: 0: expected an integer from 1 to 65535",
        'host gx10: user: "-l": expected a user name',
        'host gx10: run_dir: "kd": expected a path on the host that begins with / or ~/',
    ]


def test_a_file_behind_a_link_stays_behind_it(environ: dict[str, str], tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.yaml"
    real.write_text("hosts:\n  a:\n")
    path = written(environ, "")
    path.unlink()
    path.symlink_to(real)
    add_host("b", {}, environ)
    assert path.is_symlink()
    assert set(parse_hosts(real.read_text(), real).known) == {"a", "b"}


def test_several_who_add_at_once_all_stand_there(environ: dict[str, str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: add_host(f"h{index}", {"port": 1 + index}, environ), range(24)))
    assert {host.port for host in load_hosts(environ).known.values()} == set(range(1, 25))


_PLAIN = st.text("abcXYZ019 ._-#:'\"é✓", max_size=12)
_COMMENT = _PLAIN.map(lambda text: f"# {text}")
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "user": st.sampled_from(["kd", '"root"', "'a.b'"]),
        "port": st.sampled_from(["22", "2222"]),
        "run_dir": st.sampled_from(["/data/kd", '"/d # x/y"', "~/kd"]),
        "env": st.sampled_from(["[A, B]", "[]", "\n{0}  - A\n{0}  # inside\n{0}  - B", "[\n{0}  A,\n\n{0}  B]"]),
    },
)


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Ways to write a hosts file by hand."""
    indent, deeper = " " * draw(st.integers(1, 6)), " " * draw(st.integers(1, 4))
    lines: list[str] = []

    def maybe(at: str) -> None:
        for _ in range(draw(st.integers(0, 2))):
            lines.append(
                draw(st.one_of(st.just(""), _COMMENT.map(lambda text: draw(st.sampled_from(["", at])) + text)))
            )

    def hosts() -> None:
        lines.append("hosts:" + draw(st.sampled_from(["", " ", "   # all of them"])))
        for name in names:
            maybe(indent)
            fields: dict[str, Any] = draw(_FIELDS)
            lines.append(f"{indent}{name}:" + ("" if fields else draw(st.sampled_from(["", " {}", " ~", "  # bare"]))))
            for key, value in fields.items():
                maybe(indent + deeper)
                lines.append(f"{indent}{deeper}{key}: {value.format(indent + deeper)}")
        maybe(indent)

    names = draw(st.lists(st.sampled_from(["gx10", "a.b", "lambda-vector", "x_1"]), unique=True, max_size=4))
    parts = draw(st.permutations([hosts, lambda: lines.append(f"lanes: [{', '.join(names)}]")]))
    if draw(st.booleans()):
        lines.append("---")
    for part in parts:
        maybe("")
        part()
    return draw(st.sampled_from(["\n", "\r\n"])).join([*lines, *draw(st.sampled_from([[""], [], ["", ""]]))])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=layouts())
def test_however_a_file_is_written_what_stood_there_stays_and_means_the_same(
    text: str, environ: dict[str, str]
) -> None:
    path = written(environ, text)
    before = load_hosts(environ)
    after = add_host("new", {"address": "10.0.0.9", "port": 4022, "env": ["X"]}, environ)
    now = path.read_bytes().decode()
    assert after == load_hosts(environ)
    assert {**after.known} == {**before.known, "new": Host("new", address="10.0.0.9", port=4022, env=("X",))}
    assert after.lanes == before.lanes
    left = iter(now.splitlines())
    assert all(line in left for line in text.splitlines()), "a line is gone or moved"
    assert len(now.splitlines()) == len(text.splitlines()) + 5
