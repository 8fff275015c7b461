"""What is to be published, all of it checked before anything is written or sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console.publish_facts import facts_of
from console.publish_gate import MODEL, Proven, Say, exported, prove, require_same_model
from dispatch.runs import RunDir
from engine.errors import ModelError
from engine.publish_card import Facts, card
from engine.publish_files import CARD, LICENCE, File, choose, made
from engine.publish_licence import Licence, Origin, licences, origins, read_text, text_at
from engine.text import clean


@dataclass(frozen=True)
class Asked:
    """What the operator asks for, each part checked for its form."""

    repo: str | None
    """ORG/NAME on the hub; None: a directory."""
    directory: Path | None
    """Absolute; None: the hub."""
    revision: str
    private: bool
    force: bool
    licence: str | None
    stated: Mapping[str, str]
    """Licences of teacher, student and data, as the operator states them."""
    licence_file: Path | None
    base_model: str | None

    @property
    def title(self) -> str:
        """What the model is called."""
        return self.repo.partition("/")[2] if self.repo else clean(self.directory.name if self.directory else "", 100)


@dataclass(frozen=True)
class Plan:
    """A publication that nothing speaks against."""

    asked: Asked
    run: Proven
    evaluations: tuple[Proven, ...]
    files: tuple[File, ...]
    """In the order of their names."""
    texts: Mapping[str, str]
    """What is written for it: the card and the licence's text, by name."""
    left_out: tuple[str, ...]
    facts: Facts
    checks: tuple[str, ...]
    """What was looked at, and what was found, a sentence each."""

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.run.path / MODEL

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by name."""
        return {file.name: file.sha256 for file in self.files}

    def document(self) -> dict[str, Any]:
        """What it is, as plain data."""
        return {
            "run": self.run.run.id,
            "evidence_id": self.run.evidence_id,
            "evaluations": {each.run.id: each.evidence_id for each in self.evaluations},
            "licence": {"id": self.facts.licence, "source": self.facts.licence_source},
            "licences": {name: {"id": each.id, "source": each.source} for name, each in self.facts.licences.items()},
            "files": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in self.files],
            "left_out": list(self.left_out),
        }


def make_plan(run: RunDir, evaluations: Sequence[RunDir], asked: Asked, say: Say) -> Plan:
    """Everything that can be looked at without writing or sending anything.

    Args:
        run: the training whose exported model is published.
        evaluations: of that model.
        asked: where to, and under which licences.
        say: told what takes long.

    Raises:
        KdError: something speaks against it; see `console.publish_gate` and `engine.publish_licence`.
    """
    proven = prove(run, "train", say)
    model = exported(proven)
    others = tuple(prove(each, "evaluate", say) for each in evaluations)
    for each in others:
        require_same_model(each, model, run)
    found = licences(proven.config, asked.stated)
    licence = _licence(asked, found)
    text, text_source = _licence_text(asked, proven, found, licence)
    facts = facts_of(
        proven,
        others,
        model,
        title=asked.title,
        licence=licence,
        licences=found,
        base_model=asked.base_model,
    )
    texts = {CARD: card(facts, asked.repo), LICENCE: text}
    below = {name.removeprefix(f"{MODEL}/"): digest for name, digest in proven.hashes.items() if _below(name)}
    taken, left_out = choose(below, proven.path / MODEL)
    files = sorted([*taken, *made(texts)], key=lambda file: file.name)
    checks = [
        *(f"{each.run.id}: every gating verdict is PASS: {_named(each)}" for each in (proven, *others)),
        *(f"{each.run.id}: its evidence holds, id {each.evidence_id}" for each in (proven, *others)),
        *(f"{each.run.id}: is of this model" for each in others),
        *(f"licence of the {name}: {each.id} ({each.source})" for name, each in found.items()),
        f"licence of this model: {licence.id} ({licence.source}), its text from {text_source}",
        f"{len(taken)} files of {MODEL}/ are what the run's checksums say",
    ]
    return Plan(
        asked=asked,
        run=proven,
        evaluations=others,
        files=tuple(files),
        texts=texts,
        left_out=tuple(clean(name, 200) for name in left_out),
        facts=facts,
        checks=tuple(clean(each, 1000) for each in checks),
    )


def _below(name: str) -> bool:
    return name.startswith(f"{MODEL}/") and "/" not in name.removeprefix(f"{MODEL}/")


def _named(run: Proven) -> str:
    return ", ".join(each.id for each in run.run.manifest.verdicts if each.severity in ("gate", "fatal"))


def _licence(asked: Asked, found: Mapping[str, Licence]) -> Licence:
    if asked.licence is not None:
        return Licence(asked.licence, "stated by the operator")
    ids = sorted({each.id for each in found.values()})
    if len(ids) == 1:
        return Licence(ids[0], "that of everything it was made from")
    told = ", ".join(f"{name} {each.id}" for name, each in found.items())
    raise ModelError(
        f"the licence of this model is not known: it was made from several ({told})",
        do="decide which one binds it, and state it with --license ID",
    )


def _licence_text(asked: Asked, run: Proven, found: Mapping[str, Licence], licence: Licence) -> tuple[str, str]:
    """The text that is published as LICENSE, and where it is from."""
    if asked.licence_file is not None:
        return read_text(asked.licence_file), clean(str(asked.licence_file), 300)
    same = [origin for origin in origins(run.config) if _of(origin, found).id == licence.id and origin.part != "data"]
    for origin in same:
        file = text_at(origin.path)
        if file is not None:
            return read_text(file), f"the {origin.part}: {clean(str(file), 300)}"
    raise ModelError(
        f"there is no text of the licence {licence.id}: "
        + (f"no LICENSE file in {clean(same[0].path, 300)}" if same else "nothing that it was made from has that one"),
        expected="the whole text, which is published as LICENSE",
        do="give it with --license-file FILE",
    )


def _of(origin: Origin, found: Mapping[str, Licence]) -> Licence:
    return found[f"{origin.part} {origin.name}"]
