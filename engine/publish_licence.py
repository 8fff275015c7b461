"""Under which licence a model, its origin and its data are: what their directories state, or what the operator does.

Nothing is guessed: a front matter, an SPDX line or the well-known first lines of a licence count, and nothing else.
Needs no torch.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from engine.config import RunConfig
from engine.errors import ConfigError, ModelError
from engine.import_card import licence_of
from engine.text import clean

Part = Literal["teacher", "student", "data"]
PARTS: Final[tuple[Part, ...]] = ("teacher", "student", "data")
TEXT_NAMES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
BUILTIN: Final = "psf-2.0"
"""Of builtin:stdlib, which is Python's own source text, and so of the two models that were made of nothing else."""
TEXT_CAP: Final = 1 << 20
_HEAD: Final = 4096
_ID: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")
_NO_ANSWER: Final = frozenset(("other", "unknown", "none", "noassertion"))
_SPDX: Final = re.compile(r"SPDX-License-Identifier:[ \t]*([^\r\n]*)")
_SPDX_END: Final = re.compile(r"[ \t]*(\*/|-->)?[ \t]*$")
_FIRST_LINES: Final = (
    (re.compile(r"\A\s*Apache License\s+Version 2\.0\b"), "apache-2.0"),
    (re.compile(r"\A\s*(?:The )?MIT License\b"), "mit"),
    (re.compile(r"\A\s*BSD 3-Clause\b"), "bsd-3-clause"),
)
_HUB_TEXT: Final = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
    gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma
"""
HUB_IDS: Final = frozenset(_HUB_TEXT.split())
"""What the hub takes as `license`; any other is `other`, with its name beside it."""


@dataclass(frozen=True)
class Licence:
    """The licence of one thing, and who says so."""

    id: str
    """In lower case, as SPDX or the hub spells it."""
    source: str
    """`README.md`, `LICENSE`, `built in`, `stated by the operator`: safe to print."""


@dataclass(frozen=True)
class Origin:
    """What a run was made from: a name for people, and where it stands here."""

    part: Part
    name: str
    """Safe to publish: `builtin:teacher`, or the last part of a path, and nothing else of this machine."""
    path: str
    """As the configuration has it."""


def origins(config: RunConfig) -> list[Origin]:
    """Everything whose licence binds the model of a run: teacher, the student's origin, each path of the data."""
    found = [] if config.teacher is None else [_origin("teacher", config.teacher.path)]
    return [*found, _origin("student", config.student.source), *(_origin("data", path) for path in config.data.paths)]


def _origin(part: Part, path: str) -> Origin:
    name = path if path.startswith("builtin:") else path.rstrip("/").rpartition("/")[2] or path
    return Origin(part, clean(name, 200), path)


def checked_id(text: str, where: str) -> str:
    """A licence's identifier as an operator gives it, in lower case.

    Raises:
        ConfigError: it is none, or one that says nothing.
    """
    licence = text.strip().lower()
    if not _ID.fullmatch(licence) or licence in _NO_ANSWER:
        raise ConfigError(
            f"{where} {clean(repr(text), 100)}: no identifier of a licence",
            expected="one such as apache-2.0, mit, cc-by-4.0 or psf-2.0 (see https://spdx.org/licenses)",
        )
    return licence


def parse_stated(texts: Sequence[str]) -> dict[str, str]:
    """`--license-of teacher=apache-2.0` and the like as identifiers by part.

    Raises:
        ConfigError: another form, an unknown part, or one given twice.
    """
    stated: dict[str, str] = {}
    for text in texts:
        part, equals, licence = text.partition("=")
        if not equals or part not in PARTS or part in stated:
            why = "given twice" if part in stated else f"expected PART=ID, where PART is one of {', '.join(PARTS)}"
            raise ConfigError(f"--license-of {clean(repr(text), 100)}: {why}")
        stated[part] = checked_id(licence, f"--license-of {part}=")
    return stated


def licences(config: RunConfig, stated: Mapping[str, str]) -> dict[str, Licence]:
    """The licence of everything that a run was made from, by the part's name and, of several data paths, each.

    Args:
        config: of the run.
        stated: what the operator states, of `parse_stated`.

    Raises:
        ModelError: one of them is not known, or the operator states another than the thing itself.
    """
    found: dict[str, Licence] = {}
    for origin in origins(config):
        own, said = licence_at(origin.path), stated.get(origin.part)
        what = f"{origin.part} {clean(repr(origin.path), 300)}"
        if own is not None and said is not None and own.id != said:
            raise ModelError(
                f"{what}: it states {own.id} itself ({own.source}), and --license-of states {said}",
                do="correct one of the two",
            )
        licence = own or (None if said is None else Licence(said, "stated by the operator"))
        if licence is None:
            raise ModelError(
                f"{what}: its licence is unknown",
                expected="`license:` in the front matter of its README.md, or a LICENSE file that can be told"
                + ("" if Path(origin.path).is_dir() else ", or of a file by itself FILE.license beside it"),
                do=f"find it out, and state it with --license-of {origin.part}=ID",
            )
        found[_free_name(f"{origin.part} {origin.name}", found)] = licence
    return found


def _free_name(name: str, found: Mapping[str, Licence]) -> str:
    # Two paths of the data may end alike, and each of their licences binds.
    names = (name, *(f"{name} ({number})" for number in range(2, len(found) + 2)))
    return next(each for each in names if each not in found)


def licence_at(path: str) -> Licence | None:
    """What a model's or a corpus's own directory states; None where it states nothing that can be told.

    Args:
        path: a directory, a file, or a `builtin:` name. Of a file what stands beside it says nothing but FILE.license,
            as the REUSE specification has it.
    """
    if path.startswith("builtin:"):
        return Licence(BUILTIN, "built in")
    place = Path(path)
    if not place.is_dir():
        beside = place.with_name(f"{place.name}.license")
        licence = _told(beside) if place.is_file() and beside.is_file() else None
        return None if licence is None else Licence(licence, clean(beside.name, 200))
    stated = licence_of(place / "README.md").strip().lower()
    if _ID.fullmatch(stated) and stated not in _NO_ANSWER:
        return Licence(stated, "README.md")
    file = text_at(path)
    licence = None if file is None else _told(file)
    return None if licence is None or file is None else Licence(licence, file.name)


def text_at(path: str) -> Path | None:
    """The file with a licence's text in the directory of a model or a corpus; None where there is none.

    Of what is built in it is Python's own, which an installation brings in its library's directory.
    """
    directory = Path(sysconfig.get_path("stdlib") if path.startswith("builtin:") else path)
    files = (directory / name for name in TEXT_NAMES)
    return next((file for file in files if file.is_file() and not file.is_symlink()), None)


def read_text(path: Path) -> str:
    """The text of a licence.

    Raises:
        ModelError: it cannot be read, is empty, too long, or no UTF-8.
    """
    try:
        size = os.stat(path).st_size
        text = path.read_text(encoding="utf-8") if path.is_file() and 0 < size <= TEXT_CAP else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ModelError(f"{clean(str(path), 300)}: {reason}", expected="the text of a licence") from None
    if not text.strip():
        raise ModelError(
            f"{clean(str(path), 300)}: no text of a licence", expected=f"a text file of at most {TEXT_CAP:,} bytes"
        )
    return text


def _told(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD).decode(errors="replace")
    except OSError:
        return None
    spdx = _SPDX.search(head)
    if spdx is not None:  # an expression, such as `MIT AND GPL-3.0`, is more than one licence: that is not for us
        stated = _SPDX_END.sub("", spdx[1]).lower()
        return stated if _ID.fullmatch(stated) and stated not in _NO_ANSWER else None
    return next((licence for pattern, licence in _FIRST_LINES if pattern.search(head)), None)
