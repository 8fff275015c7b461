"""The harness that people run: what it prints, and that it does not call a fault survived that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import checkpoint_damage
import harness
import pytest
from tally import Tally, table

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
OTHERWISE = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, str(Path.cwd().parents[1]))
import checkpoint_kills
from tally import Tally

class Elsewhere(checkpoint_kills.Rig):
    def digest(self):
        return f"{super().digest()} of {self.run_dir}"

checkpoint_kills.Rig = Elsewhere
anywhere, writing = Tally("anywhere"), Tally("writing")
with tempfile.TemporaryDirectory() as root:
    checkpoint_kills.warm(Path(root))
    try:
        checkpoint_kills.at_random(Path(root), 2, 0, anywhere, writing)
    except AssertionError as error:
        assert "is not the undisturbed one" in str(error)
print(anywhere.times + writing.times, anywhere.survived + writing.survived)
"""
"""Kills of a training whose end is never that of the undisturbed one."""


FEW = {
    "one flipped bit": checkpoint_damage.DAMAGES["one flipped bit"],
    "a missing manifest": checkpoint_damage.DAMAGES["a missing manifest"],
}


@pytest.fixture(autouse=True)
def _few_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the faults, and what is left behind for whoever looks into a failure."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(checkpoint_damage, "DAMAGES", FEW)


def test_the_table_is_markdown_with_a_row_a_fault() -> None:
    rows = [Tally("a flood", times=12, survived=11, lost=3), Tally("an earthquake of the larger kind", 1, 1)]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["fault", "times", "survived", "steps lost at most"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["a flood", "12", "11", "3"]
    assert len({len(line) for line in lines}) == 1


def test_the_table_is_printed_and_what_is_going_on_told_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.main(["--only", "files"]) == 0
    said = capsys.readouterr()
    for kind in (*FEW, *filter(checkpoint_damage.possible, checkpoint_damage.TROUBLES)):
        assert f"| {kind} " in said.out
    assert "all survived" in said.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("kdconsole-faults-")]


def test_a_fault_that_is_not_survived_is_counted_and_told_and_the_others_are_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_damage.damaged

    def lost(root: Path, damage: checkpoint_damage.Damage, cost: int) -> int:
        assert root.name != "2", "the checkpoint is lost"
        return real(root, damage, cost)

    monkeypatch.setattr(checkpoint_damage, "damaged", lost)
    assert harness.main(["--only", "files", "--json"]) == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    first, *others = told["rows"]
    assert not told["ok"]
    assert first["survived"] == first["times"] - 1
    assert all(row["survived"] == row["times"] > 0 for row in others)
    assert "the checkpoint is lost" in said.err


@pytest.mark.slow
def test_kills_that_do_not_end_bitwise_the_same_are_not_survived() -> None:
    done = subprocess.run([sys.executable, "-c", OTHERWISE], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 0\n"
