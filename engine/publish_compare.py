"""Has a fresh process compare what came back of a publication with the exported model. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from engine.measures import OF_A_PUBLICATION
from engine.stream import Measure

MADE_BY_HUBS: Final = frozenset((".gitattributes",))
"""Files that a hub adds to a repository by itself."""
_POLL_SECONDS: Final = 0.2
_TIMEOUT_SECONDS: Final = 3_600.0
_SECRETS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


def compare(
    back: Path,
    model: Path,
    files: Mapping[str, str],
    token: str | None = None,
    poll: Callable[[], object] = lambda: None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> list[Measure]:
    """Has a fresh process compare what came back with the exported model.

    Args:
        back: the directory that came back.
        model: the exported model.
        files: SHA-256 of what was sent, by name.
        token: a secret that no variable of the process may hold.
        poll: called often; may raise to stop, which ends the process.
        timeout_seconds: after which the process is ended and nothing counts as compared.

    Returns:
        One measure for each of `OF_A_PUBLICATION`, infinite where the process ended without an answer.
    """
    asked = {"files": dict(files), "back": str(back), "model": str(model)}
    environment = bare_environment(token)
    command = [sys.executable, "-P", "-m", "engine.publish_check"]
    started = time.monotonic()
    # A file: neither side waits for the other, however much is said.
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer:
        question.write(json.dumps(asked).encode())
        question.seek(0)
        # A group of its own: Ctrl-C is for this process, which ends it, and not for both of them.
        with subprocess.Popen(command, stdin=question, stdout=answer, env=environment, process_group=0) as child:
            try:
                while child.poll() is None:
                    poll()
                    if time.monotonic() - started > timeout_seconds:
                        return _untold(f"no answer after {timeout_seconds:g} s")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_POLL_SECONDS)
            finally:
                if child.poll() is None:
                    child.kill()
        answer.seek(0)
        output = answer.read()
    try:
        told = json.loads(output.splitlines()[-1])
        return [Measure(name=name, value=float(told[name][0]), detail=str(told[name][1])) for name in OF_A_PUBLICATION]
    except (ValueError, LookupError, TypeError):
        return _untold(f"the comparing process ended with exit code {child.returncode} and no answer")


def bare_environment(token: str | None) -> dict[str, str]:
    """This process's variables for a child: none that is a token of the hub or holds the given one, and offline."""
    home = str(Path(__file__).resolve().parent.parent)
    passed = {
        name: value for name, value in os.environ.items() if name not in _SECRETS and not (token and token in value)
    }
    return passed | {
        "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _untold(why: str) -> list[Measure]:
    return [Measure(name=name, value=math.inf, detail=why) for name in OF_A_PUBLICATION]
