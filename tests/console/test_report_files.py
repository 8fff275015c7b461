"""`kdconsole report`: files that stand alone, whatever evidence would put into them, and that nothing is lost to."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from console import report_command as module
from console.cli import cli
from console.report_command import write_file
from console.run_reader import LoadedRun, load_run
from console.run_report import as_html, as_markdown, as_svg
from console.run_report.gather import report_of
from console.run_report.markup import escaped, fenced, markdown
from console.run_report.series import SERIES
from console.run_state import RunState
from console.series import StepSeries
from engine.errors import RunError
from engine.stream import Checkpoint, CheckpointFailed, End, Event, Log, Run, Verdict
from engine.text import clean
from tests import old_evidence as old
from tests.console.run_dirs import ending, good_train, make_run, train_contract, train_events
from tests.console_rig import ROOT
from tests.streams import run_event, with_verdicts

EVIL = (
    "\x1b]0;OWNED\x07\x9b31m\u202e</title></style></script><script>alert(1)</script><img src=http://evil.example/x "
    'onerror="alert(1)"> \' " onload=x javascript:alert(1) `|` ``` | a | b |\n# head\n![p](http://evil.example/p) '
    "[l](http://evil.example) <details open> &lt;b&gt; ]]> --> @everyone #1 https://evil.example www.evil.example $x$"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["report", *map(str, arguments)], standalone_mode=False)


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, RunError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_train(tmp_path_factory.mktemp("report"), name="a run")


def hostile_run(tmp_path: Path) -> Path:
    """A run whose every text would like to be more than text."""

    def evil(event: Event) -> Event:
        if isinstance(event, Run):
            changes = {"teacher": EVIL, "student": EVIL, "device_name": EVIL, "versions": {EVIL: EVIL}, "host": EVIL}
            return msgspec.structs.replace(event, **changes)
        if isinstance(event, Checkpoint):
            return msgspec.structs.replace(event, kind=EVIL, path=EVIL, sha256=EVIL)
        if isinstance(event, Log):
            return msgspec.structs.replace(event, message=EVIL)
        return event

    events = [evil(event) for event in train_events(120)]
    at = next(i for i, event in enumerate(events) if isinstance(event, Checkpoint))
    events.insert(at, CheckpointFailed(step=100, kind=EVIL, error=EVIL, seconds=1.0, t=events[at].t))
    whole = with_verdicts(events, train_contract(), msgspec.structs.replace(ending(120, 1), reason=EVIL))
    end = next(i for i, event in enumerate(whole) if isinstance(event, End))
    verdict = Verdict(id=EVIL, verdict=EVIL, severity=EVIL, claim=EVIL, expected=EVIL, observed=EVIL, step=1)
    whole.insert(end, msgspec.structs.replace(verdict, run=whole[0].run, seq=whole[end].seq, t=whole[end].t))
    whole[end + 1] = msgspec.structs.replace(whole[end + 1], seq=whole[end].seq + 1)
    path = make_run(tmp_path, whole, 1, "train", name=EVIL, host=EVIL, sets=["data.glob=<b>|`x`"])
    raw = json.loads((path / "dispatch.json").read_text())
    raw |= {"operator": EVIL, "overrides": [EVIL], "inputs": {EVIL: EVIL, "teacher": EVIL}, "device": EVIL}
    raw["attempts"] = [{"number": 1, "started": 1.0, "ended": 2.0, "end": EVIL}]
    (path / "dispatch.json").write_text(json.dumps(raw))
    (path / "contract.yaml").unlink()  # so that the hostile verdict is told, as stated
    return path


def hostile_old(tmp_path: Path) -> Path:
    """The predecessor's directory, no less hostile."""
    told = old.manifest(run_name=EVIL, host=EVIL, teacher=EVIL, student_init=EVIL, ticket=EVIL, **{EVIL: EVIL})
    lines = [f"F-EVIL-001 {EVIL} FAIL".replace("\n", " "), old.saved(50, EVIL.replace("\n", " "))]
    name = "<img src=x onerror=y>|`'\".log"
    return old.write_old(tmp_path / "<b>old", logs={name: old.train_log(more=lines)}, manifest=told)


HOSTILE = {"ours": hostile_run, "old": hostile_old}


# Self-contained, and nothing in it but ours


class Page(HTMLParser):
    """What stands in a page: its tags, their attributes, its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


_HTML = (
    "html head meta title style body main header h1 h2 p span div dl dt dd section table thead tbody tr th td code pre"
)
HTML_TAGS = {*_HTML.split(), *["details", "summary", "footer", "svg", "rect", "path", "clippath", "circle", "text"]}
_PAGE = "lang charset http-equiv content name class id role scope data-of xmlns width height viewbox"
_DRAWN = "font-family font-size font-weight text-anchor x y d rx r cx cy fill fill-opacity clip-path"
_STROKE = "stroke stroke-width stroke-opacity stroke-linecap stroke-linejoin stroke-dasharray"
ATTRIBUTES = {*_PAGE.split(), *_DRAWN.split(), *_STROKE.split()}


def assert_alone(page: Page) -> None:
    """No script, no handler, and nothing that is fetched from anywhere."""
    for tag, attributes in page.tags:
        assert tag in HTML_TAGS, tag
        assert set(attributes) <= ATTRIBUTES, attributes
        for name, value in attributes.items():
            if name == "xmlns":
                assert value == "http://www.w3.org/2000/svg"
            elif name == "clip-path":
                assert value == "url(#plot)"
            elif name != "data-of":
                assert not re.search(r"https?:|javascript:|url\(", value), (name, value)
    assert not page.open


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_a_run_becomes_more_than_text_in_html(tmp_path: Path, kind: str) -> None:
    written = call(HOSTILE[kind](tmp_path), "--format", "html", "-o", "-").stdout
    page = Page(written)
    assert_alone(page)
    assert page.text.count("<script>alert(1)</script>") >= 10, "it is shown as text"
    style = "".join(re.findall(r"<style>(.*?)</style>", written, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", written)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_a_run_becomes_more_than_text_in_svg(tmp_path: Path, kind: str) -> None:
    written = call(HOSTILE[kind](tmp_path), "--format", "svg", "-o", "-").stdout
    for element in ElementTree.fromstring(written).iter():
        tag = element.tag.rpartition("}")[2].lower()
        assert tag in HTML_TAGS, tag
        assert {name.lower() for name in element.attrib} <= ATTRIBUTES
        assert not re.search(r"https?:|javascript:", " ".join(element.attrib.values()))
    assert "url(" not in re.findall(r"<style>(.*?)</style>", written, re.DOTALL)[0]
    assert "alert(1)" in written, "it is shown as text"


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_a_run_becomes_more_than_text_in_markdown(tmp_path: Path, kind: str) -> None:
    written = call(HOSTILE[kind](tmp_path), "--format", "md", "-o", "-").stdout
    found = {"link": 0, "table": 0, "heading": 0}
    for token in _tokens(written):
        assert token.type not in ("image", "link_open"), token
        if token.type in ("html_inline", "html_block"):
            assert re.fullmatch(
                r"</?(details|summary)>|<details>\n<summary>[^<>]*</summary>\n|</details>\n", token.content
            ), token.content
        found["table"] += token.type == "table_open"
        found["heading"] += token.type == "heading_open"
    plain = call(good_train(tmp_path / "good"), "--format", "md", "-o", "-").stdout
    expected = sum(token.type == "heading_open" for token in _tokens(plain))
    assert abs(found["heading"] - expected) <= 2, "no heading of theirs"
    # What GitHub would make a link or a mention of stands in code.
    texts = "".join(t.content for t in _tokens(written) if t.type == "text")
    assert "evil.example" not in texts
    assert "@everyone" not in texts
    assert "alert(1)" in written


def _tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def test_every_table_of_markdown_has_as_many_cells_as_its_header(tmp_path: Path) -> None:
    written = call(hostile_run(tmp_path), "--format", "md", "-o", "-").stdout
    tables = re.findall(r"(?:^\|.*\n)+", written, re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text(alphabet="<>&\"' =/x\x1b\u202e", max_size=9)
)
def test_a_text_comes_back_as_it_was_shown(text: str) -> None:
    shown = escaped(text)
    page = Page(f'<p title="{shown}">{shown}</p>')
    [(tag, attributes)] = page.tags
    assert (tag, set(attributes)) == ("p", {"title"})
    assert html.unescape(shown) == page.text == attributes["title"] == clean(text)


@given(st.text(alphabet="ab`|*_\\<>[]()!&~$#-+=.1 @/:\n\x1b", max_size=40), st.booleans())
def test_a_text_in_a_table_of_markdown_stays_one_cell_with_the_same_text(text: str, code: bool) -> None:
    shown = markdown(text, code=code, cell=True)
    tokens = list(_tokens(f"| a | b |\n| - | - |\n| {shown or ' '} | end |\n"))
    kinds = {token.type for token in tokens}
    assert not kinds & {"image", "link_open", "em_open", "strong_open", "html_block", "html_inline"}
    assert [t.content for t in tokens if t.type == "inline"][3:] == ["end"]
    told = "".join(t.content for t in tokens if t.type in ("text", "code_inline"))
    assert told.removeprefix("ab").removesuffix("end").replace(" ", "") == clean(text).replace(" ", "")


@example(["```"])
@example(["~~~", "````", "<b>"])
@given(st.lists(st.text(alphabet="`~a \n<", max_size=12), max_size=5))
def test_no_line_ends_a_block_of_code(lines: list[str]) -> None:
    tokens = list(_tokens(f"{fenced(lines)}\n\nafter\n"))
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]


def test_html_forbids_everything_from_elsewhere_and_tells_light_from_dark(run: Path) -> None:
    written = call(run, "-o", "-").stdout
    page = Page(written)
    [policy] = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "prefers-color-scheme:dark" in written
    assert "@media print" in written
    assert len(re.findall("<svg ", written)) == 2, "curve and timeline stand in the page"
    assert [tag for tag, _ in page.tags].count("details") == 1


@pytest.mark.parametrize("name", old.SCENES)
def test_html_and_svg_of_old_evidence_are_well_formed(tmp_path: Path, name: str) -> None:
    path = old.SCENES[name](tmp_path / "scene")
    assert_alone(Page(call(path, "-o", "-").stdout))
    ElementTree.fromstring(call(path, "--format", "svg", "-o", "-").stdout)


# Size


def test_a_million_steps_make_no_larger_file_and_keep_their_spike() -> None:
    count = 1_000_000
    step = np.arange(1.0, count + 1)
    loss = 3.0 + 0.2 * np.sin(step * 12.9898)
    loss[654_321] = 17.0
    columns = [step, 1e9 + step, loss, loss, loss * 0, step * 0, step * 0, step * 0 + 8_192, step * 0 + 0.5]
    state = RunState(steps=StepSeries(np.array(columns)), run=run_event(mode="train", target_steps=count), events=1)
    told = report_of(LoadedRun(Path("run"), state=state))
    written = as_html.document(told)
    assert len(written) < 1_000_000
    assert len(as_svg.document(told)) < 1_000_000
    [curve] = re.findall(r'<div class="picture"><svg.*?</svg>', written, re.DOTALL)[:1]
    assert _highest(curve) < _highest(curve, 0.5) - 50


def _highest(curve: str, share: float = 0.0) -> float:
    """How high the area of every step reaches, as y of the picture; with a share, what most of it stays below."""
    area = next(path for path in re.findall(r'<path d="(M[^"]+)"[^>]*fill-opacity', curve))
    heights = sorted(float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", area))
    return heights[int(share * (len(heights) - 1))]


# Files


def test_the_file_is_named_after_the_run_and_others_may_read_it(run: Path) -> None:
    result = call(run)
    assert result.output == f"{run.name}-report.html\n"
    path = Path(f"{run.name}-report.html")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir() == [path.name]


@pytest.mark.parametrize(
    ("arguments", "name", "begins"),
    [
        (["--format", "md"], "{}-report.md", "# a run"),
        (["--format", "svg"], "{}-report.svg", "<svg "),
        (["--format", "csv"], "{}-steps.csv", "step,t_unix_seconds,"),
        (["--format", "csv", "--series", "verdicts"], "{}-verdicts.csv", "id,verdict,"),
        (["-o", "mine.md"], "mine.md", "# a run"),
        (["-o", "mine.txt"], "mine.txt", "<!DOCTYPE html>"),
    ],
)
def test_each_format_has_its_file(run: Path, arguments: list[str], name: str, begins: str) -> None:
    assert call(run, *arguments).exit_code == 0
    assert Path(name.format(run.name)).read_text().startswith(begins)


def test_a_log_alone_is_named_after_itself(tmp_path: Path) -> None:
    log = old.SCENES["bare-log"](tmp_path / "x") / "run.log"
    assert call(log).output == "run-report.html\n"


def test_a_file_that_is_there_is_replaced_only_by_force(run: Path) -> None:
    Path("mine.md").write_text("precious")
    told = refused(run, "-o", "mine.md")
    assert told == "mine.md: is there already; choose another name with -o, or replace it with --force"
    assert Path("mine.md").read_text() == "precious"
    assert call(run, "-o", "mine.md", "--force").exit_code == 0
    assert Path("mine.md").read_text().startswith("# a run")
    assert os.listdir() == ["mine.md"]


def test_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    Path("mine.md").symlink_to(tmp_path / "target")
    assert "is there already" in refused(run, "-o", "mine.md")
    assert call(run, "-o", "mine.md", "--force").exit_code == 0
    assert (tmp_path / "target").read_text() == "precious"
    assert not Path("mine.md").is_symlink()


def test_what_was_made_by_somebody_else_meanwhile_is_not_replaced() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"ours"
        Path("late").write_text("theirs")

    with pytest.raises(RunError, match="is there already"):
        write_file(Path("late"), pieces(), replace=False)
    assert Path("late").read_text() == "theirs"
    assert os.listdir() == ["late"]


def test_nothing_is_made_where_the_file_is_there_already() -> None:
    asked_for = []

    def pieces() -> Iterator[bytes]:
        asked_for.append("a piece")
        yield b""

    Path("mine").write_text("precious")
    with pytest.raises(RunError, match="is there already"):
        write_file(Path("mine"), pieces(), replace=False)
    assert asked_for == []


def test_nothing_is_left_of_a_file_that_could_not_be_written_whole() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    Path("mine").write_text("precious")
    with pytest.raises(RunError, match="No space left on device"):
        write_file(Path("mine"), pieces(), replace=True)
    assert Path("mine").read_text() == "precious"
    assert os.listdir() == ["mine"]


def test_a_directory_or_a_place_that_is_not_there_is_refused(run: Path) -> None:
    Path("sub").mkdir()
    assert "is a directory" in refused(run, "-o", "sub", "--force")
    assert "No such file or directory" in refused(run, "-o", "nowhere/x.md")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")
    assert "gone" in refused(tmp_path / "gone")
    assert not os.listdir()


def test_a_run_may_be_told_by_its_id(run: Path) -> None:
    assert call(run.name, "--evidence", run.parent).output == f"{run.name}-report.html\n"


def test_series_go_with_csv_alone(run: Path) -> None:
    assert "--series goes with --format csv" in str(call(run, "--series", "evals").exception)


def test_the_series_that_the_help_names_are_those_that_there_are() -> None:
    assert module._SERIES == SERIES


def test_a_failed_run_is_reported_with_exit_code_0(tmp_path: Path) -> None:
    assert call(hostile_run(tmp_path)).exit_code == 0


@pytest.mark.parametrize("form", ["html", "csv"])
def test_a_reader_that_goes_away_is_no_error(run: Path, form: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "console", "report", str(run), "--format", form, "-o", "-"],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_of_the_evidence_is_changed(run: Path) -> None:
    def state() -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in run.iterdir() if file.is_file()}

    before = state()
    for form in ("html", "md", "svg", "csv"):
        assert call(run, "--format", form).exit_code == 0
    assert state() == before


def test_a_report_is_the_same_in_another_process(run: Path) -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", "console", "report", str(run), "--format", "svg", "-o", "-"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LANG": "C"},
            capture_output=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] == call(run, "--format", "svg", "-o", "-").stdout_bytes


def test_every_format_says_the_same_status(tmp_path: Path) -> None:
    told = report_of(load_run(good_train(tmp_path / "x")))
    for write in (as_html.document, as_markdown.document, as_svg.document):
        assert f"{told.mark.glyph} {told.mark.word}" in write(told), "never by colour alone"
