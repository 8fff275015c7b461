"""Works inside a run's own processes: stops the engine at a named moment, and lies about the time.

The real command gets it as its `sitecustomize`, a forked engine executes it (see `command_rig`). Standard library only.
"""

import json
import os
import signal
import sys
import time

A_WRITE, A_WRITE_THAT_HANGS = "a checkpoint's write", "a checkpoint's write that hangs"
_NEXT_STEP_SECONDS = 30.0


def stop_at(moments: list[str]) -> None:
    """From here on this process stops itself with SIGSTOP at each of these moments, in their order.

    Args:
        moments: `phase NAME` or `step N`, as soon as that event is in the stream; `a checkpoint's write`, which is
            begun then, with a step made since; `a checkpoint's write that hangs`, for ever.
    """
    left = list(moments)
    steps = 0
    real_write, real_mkdir = os.write, os.mkdir

    def meet(moment: str) -> bool:
        here = left[:1] == [moment]
        if here:
            del left[0]
            os.kill(os.getpid(), signal.SIGSTOP)
        return here

    def write(fd, data):  # type: ignore[no-untyped-def]
        nonlocal steps
        done = real_write(fd, data)
        if bytes(data[:1]) == b"{" and len(data) < 65_536:
            event = json.loads(bytes(data))
            steps += event.get("event") == "step"
            meet(" ".join(str(event[key]) for key in ("event", "name", "step") if key in event))
        return done

    def mkdir(path, *rest, **options):  # type: ignore[no-untyped-def]
        real_mkdir(path, *rest, **options)
        if not os.path.basename(path).startswith(".ckpt-step-"):
            return
        if left[:1] == [A_WRITE]:
            before, deadline = steps, time.monotonic() + _NEXT_STEP_SECONDS
            while steps == before and time.monotonic() < deadline:  # else there may be nothing to save after it
                time.sleep(0.001)
            meet(A_WRITE)
        elif meet(A_WRITE_THAT_HANGS):
            time.sleep(3_600)

    os.write, os.mkdir = write, mkdir


def believe(offset: str) -> None:
    """From here on this process believes it to be as many seconds later as the file says at that moment."""
    real = time.time

    def clock() -> float:
        with open(offset) as file:
            return real() + float(file.read())

    time.time = clock


def in_an_engine(moments: list[str], offset: str) -> None:
    """What an engine does at its start."""
    if os.path.exists(offset):
        believe(offset)
    if moments:
        stop_at(moments)


def customize(moments: list[str], offset: str) -> None:
    """What every Python process of a command does at its start; only its engine is stopped."""
    in_an_engine(moments if sys.orig_argv[2:4] == ["-m", "engine"] else [], offset)
