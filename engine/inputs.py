"""What a run was made from, by hash: what a resume compares, and what its evidence says."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from engine.loading import Loaded
from engine.recorder import Recorder
from engine.store_format import files_digest
from engine.stream import Inputs
from engine.teacher_store import StoredTeacher

STORE = "teacher_store"
"""Name of the digest of a stored teacher's key."""


def digests_of(loaded: Loaded) -> dict[str, str]:
    """SHA-256 over the teacher's weight files, a stored teacher's key, the tokenizer's file and the tokens, by name.

    Raises:
        OSError: a file that was loaded cannot be read any more.
    """
    found = {"data": loaded.corpus.digest()}
    if isinstance(loaded.teacher, StoredTeacher):
        # Its key was made from the weight files when it was opened.
        found |= {"teacher": loaded.teacher.key.teacher, STORE: loaded.teacher.key.digest}
    elif loaded.teacher is not None:
        found["teacher"] = files_digest(loaded.teacher.files.weights)
    if loaded.tokenizer_dir is not None:
        found["tokenizer"] = files_digest([loaded.tokenizer_dir / "tokenizer.json"])
    return found


def event(digests: Mapping[str, str], student: str) -> Inputs:
    """What the stream says of them.

    Args:
        digests: of `digests_of`.
        student: that of the untrained student's weights.
    """
    names = ("teacher", STORE, "tokenizer", "data")
    return Inputs(digests={"student": student} | {name: digests[name] for name in names if name in digests})


def tell_meanwhile(loaded: Loaded, student: str, recorder: Recorder) -> threading.Thread:
    """Emits it from a thread: to read a large teacher once more takes longer than a smoke may wait for it."""

    def work() -> None:
        try:
            recorder.emit(event(digests_of(loaded), student))
        except OSError as error:
            recorder.log(f"the inputs' hashes are not known: {error}", "warning")

    thread = threading.Thread(target=work, name="inputs", daemon=True)
    thread.start()
    return thread
