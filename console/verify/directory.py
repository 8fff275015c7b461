"""A run directory proven: every hash, event, verdict and number computed anew and held against what it states."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from console.run_files import host_state, read_contract, read_exit, read_manifest, read_small
from console.verify.answers import answer_claims
from console.verify.claims import Claim, Mark, differs, untold
from console.verify.end import end_claims
from console.verify.files import not_plain, verify_files
from console.verify.log import LOG, log_claims
from console.verify.manifest import exit_claims, manifest_claims
from console.verify.stream import Replay, replay, stream_claims, verdict_claims
from console.verify.weights import weight_claims
from dispatch.bundle import engine_bundle
from dispatch.ended import JOURNAL, attempts_of
from dispatch.manifest import CONFIG, CONTRACT, EVENTS, EXIT, MANIFEST, SUMS, ExitRecord, Manifest
from dispatch.sums import MAX_FILES, Progress
from engine.config import RunConfig, parse_config
from engine.errors import ConfigError, ExitCode, RunError, StreamError
from engine.falsifiers import Contract
from engine.text import clean

Say = Callable[[str], object]
TELL_SECONDS: Final = 5.0
"""Between two lines of progress."""
_SMALL: Final = (CONFIG, CONTRACT, MANIFEST, EVENTS, LOG, JOURNAL, EXIT)


@dataclass(frozen=True)
class Verified:
    """What became of one piece of evidence."""

    path: Path
    kind: str
    id: str
    run: str | None
    """uuid of the run; None where nobody says it."""
    evidence_id: str | None
    """SHA-256 of SHA256SUMS; None where there is none."""
    claims: tuple[Claim, ...]

    @property
    def differences(self) -> list[Claim]:
        """What does not hold."""
        return [claim for claim in self.claims if claim.mark is Mark.DIFFERS]

    @property
    def unproven(self) -> list[Claim]:
        """What cannot be told, and without which the evidence is not proven."""
        return [claim for claim in self.claims if claim.essential and claim.mark is Mark.UNTOLD]

    @property
    def exit_code(self) -> ExitCode:
        """FAILED on any difference, UNDECIDED where something essential cannot be told, else OK."""
        if self.differences:
            return ExitCode.FAILED
        return ExitCode.UNDECIDED if self.unproven else ExitCode.OK


def verify(path: Path, given_id: str | None = None, say: Say = lambda text: None) -> Verified:
    """Proves a piece of evidence; nothing is written.

    Args:
        path: a run directory that is over, the predecessor's directory, or a log.
        given_id: evidence id that it must have, or its beginning.
        say: told every few seconds how far it is.

    Raises:
        RunError: there is nothing to verify, or the run still goes on.
    """
    path = Path(os.path.abspath(path))
    if not os.path.lexists(path):
        raise RunError(f"{clean(str(path), 300)}: no such path", expected="a run directory")
    if path.is_dir() and _is_ours(path):
        return verify_run(path, given_id, say)
    from console.verify.old import verify_old

    return verify_old(path, given_id)


def _is_ours(path: Path) -> bool:
    """Whether a directory was made by this software, however little is left of it."""
    if any(os.path.lexists(path / name) for name in (SUMS, EVENTS, CONTRACT)):
        return True
    return _manifest(path)[0] is not None


def verify_run(path: Path, given_id: str | None, say: Say) -> Verified:
    """Proves a run directory of ours; arguments and errors as those of `verify`."""
    odd = not_plain(path, _SMALL)
    manifest, problems = _manifest(path)
    _require_over(path, manifest)
    meter = _Meter(say, _bytes(path))
    files = verify_files(path, manifest, given_id, meter)
    claims = list(files.claims)
    told = {claim.name for claim in claims if claim.mark is Mark.DIFFERS}
    claims += [differs("files", name, "a file", "no regular file", name) for name in odd if name not in told]
    claims += problems
    contract, why = _contract(path)
    played, broken = _replayed(path, contract, manifest, meter)
    claims += broken
    fold = None if played is None else played.fold
    record = _exit(path)
    if played is not None and fold is not None:
        starts = 0 if odd else len(attempts_of(path, record))
        claims += stream_claims(played, starts)
        claims += verdict_claims(fold, why, same_engine=_same_engine(manifest))
        claims += end_claims(fold, record)
        claims += answer_claims(path, manifest, fold, _config(path), meter)
    if manifest is not None:
        claims += manifest_claims(path, manifest, fold, plain=not odd)
    if JOURNAL not in odd:
        claims += exit_claims(path, manifest.run if manifest else None)
    if fold is not None:
        claims += log_claims(path, fold, meter)
    claims += weight_claims(path, manifest, fold, files.hashes, meter)
    run = manifest.run if manifest else played.run if played else None
    name = manifest.id if manifest else path.name
    return Verified(path, "run", clean(name, 200), run, files.evidence_id, tuple(claims))


class _Meter:
    """Tells every few seconds how far the reading is."""

    def __init__(self, say: Say, total: int) -> None:
        self._say, self._total, self._done = say, max(total, 1), 0
        self._next = time.monotonic() + TELL_SECONDS

    def __call__(self, name: str, count: int) -> None:
        self._done += count
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TELL_SECONDS
            share = min(self._done / self._total, 1.0)
            self._say(f"verifying {clean(name, 120)}: {share:.0%} of {self._total / 1e6:,.0f} MB")


def _bytes(directory: Path) -> int:
    """About what will be read: every file once, and the stream and what was printed twice."""
    total = seen = 0
    for place, _, names in os.walk(directory):
        for name in names:
            seen += 1
            try:
                size = os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
            total += size * (2 if name in (EVENTS, LOG) else 1)
        if seen > MAX_FILES:
            break
    return total


def _manifest(path: Path) -> tuple[Manifest | None, list[Claim]]:
    try:
        return read_manifest(path), []
    except RunError as error:
        return None, [differs("manifest", MANIFEST, "a manifest", "cannot be read", str(error))]


def _require_over(path: Path, manifest: Manifest | None) -> None:
    """Refuses a run that goes on: what is held against each other would change meanwhile."""
    over = manifest is None or manifest.outcome is not None
    if over or os.path.lexists(path / SUMS) or os.path.lexists(path / EXIT):
        return
    try:
        state = host_state(path)
    except RunError:
        return
    if manifest is not None and state in ("starting", "running"):
        where = "on its host, or" if manifest.remote is not None else "or"
        raise RunError(
            f"run {clean(manifest.id, 200)}: it goes on, {where} its end is not known here",
            expected="a run that has ended",
            do=f"kdconsole --headless attach {clean(manifest.id, 200)}",
        )


def _contract(path: Path) -> tuple[Contract | None, str]:
    try:
        return read_contract(path), ""
    except (RunError, ConfigError) as error:
        return None, f"there is nothing to judge by: {error}"


def _config(path: Path) -> RunConfig | None:
    """As it stands there; what is wrong with it the manifest's claims tell."""
    with contextlib.suppress(RunError, ConfigError, UnicodeDecodeError):
        return parse_config((read_small(path / CONFIG) or b"").decode(), source=CONFIG, base=path)
    return None


def _exit(path: Path) -> ExitRecord | None:
    try:
        return read_exit(path)
    except RunError:
        return None  # told beside the journal


def _replayed(
    path: Path, contract: Contract | None, manifest: Manifest | None, meter: Progress
) -> tuple[Replay | None, list[Claim]]:
    try:
        played = replay(path, contract, manifest, meter)
    except StreamError as error:
        return None, [differs("stream", EVENTS, "a stream", "cannot be read", str(error))]
    if played is None:
        return None, [untold("stream", EVENTS, "", "there is none: the trainer never came to write one")]
    return played, []


def _same_engine(manifest: Manifest | None) -> bool:
    """Whether the engine that judges here is the one that ran."""
    return manifest is not None and manifest.engine_sha256 == engine_bundle().sha256
