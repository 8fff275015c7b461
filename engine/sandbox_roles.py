"""The two programs that run inside the sandbox: the answer, and the checker that judges it from another process.

The answer's process has prompt and answer, and says nothing but what its function returned or raised. The checker's
has prompt and test, calls the function over a pipe, and alone has the pipe on which a verdict counts.

Standard library only: this runs inside the sandbox.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NoReturn

from engine.sandbox_plain import RubbishError, decode, encode, pack, receive, send

_BODIES: Final = ("    pass", "\tpass", "        pass", "  pass", "")
"""What makes a prompt, which ends inside a function, a program that can be run for the names it defines."""
_TEXT: Final = 600
"""Characters of an exception's text that are passed on."""
_ANSWER: Final = "<answer>"
_TEST: Final = "<test>"


def answer(source: str, entry_point: str, inlet: int, outlet: int) -> None:
    """Runs prompt and answer, then its function as often as it is asked. Nothing here is trusted once that ran."""
    space = _module("answer")
    reply: dict[str, Any]
    function: Any = None
    try:
        exec(compile(source, _ANSWER, "exec"), space)
        function = space.get(entry_point)
        reply = {"ready": True} if callable(function) else {"absent": True}
    except BaseException as problem:  # noqa: BLE001 - whatever it is, it is the answer's
        reply = _raised(problem)
    send(outlet, pack(reply))
    while True:
        try:
            request = receive(inlet)
            arguments: Any = decode(request["arguments"])
            named: Any = decode(request["named"])
            reply = {"returned": encode(function(*arguments, **named))}
            frame = pack(reply)
        except EOFError:
            return
        except RubbishError as problem:
            frame = pack({"rubbish": f"what it returned cannot be carried: {problem}"})
        except BaseException as problem:  # noqa: BLE001
            frame = pack(_raised(problem))
        send(outlet, frame)


def _raised(problem: BaseException) -> dict[str, Any]:
    """An exception of the answer as data: its name, text, line, and the built-in exception that it is one of."""
    if isinstance(problem, MemoryError):
        return {"memory": True}
    try:
        kind = type(problem)
        base = next((each.__name__ for each in kind.__mro__ if each.__module__ == "builtins"), "Exception")
        line = _line(problem, _ANSWER)
        reply = {"kind": kind.__name__[:100], "base": base, "text": str(problem)[:_TEXT], "line": line}
        pack(reply)
    except BaseException:  # noqa: BLE001 - its own text can raise
        return {"kind": "an exception", "base": "Exception", "text": "", "line": 0}
    return reply


class BrokenError(BaseException):
    """The answer's process can be asked no more; no `except Exception` of a test catches that."""


class AnswerError(Exception):
    """Stands for an exception of the answer that is of no built-in kind."""


class _Candidate:
    """The answer's function as the checker sees it."""

    def __init__(self, inlet: int, outlet: int) -> None:
        self._inlet, self._outlet = inlet, outlet
        self.broken: tuple[str, str] | None = None
        """The outcome and its detail, once the answer cannot be asked any more."""
        self.raised: list[tuple[BaseException, str]] = []
        """What it raised, each with its text."""

    def begin(self) -> None:
        """Waits until prompt and answer have run."""
        reply = self._receive()
        if reply.get("absent") is True:
            self._break("error", "it does not define the function")
        if reply.get("ready") is not True:
            self._raise(reply, "before its function was called")

    def call(self, *arguments: object, **named: object) -> object:
        """Asks the answer's process; returns plain data, or raises what was raised there."""
        if self.broken is not None:
            raise BrokenError
        try:
            frame = pack({"arguments": _plain(arguments), "named": _plain(named)})
        except RubbishError as problem:
            self._break("error", f"the test's arguments cannot be carried: {problem}")
        try:
            send(self._outlet, frame)
        except OSError:
            self._break("gone", "")
        reply = self._receive()
        if "returned" not in reply:
            self._raise(reply, "")
        try:
            return decode(reply["returned"])
        except (RubbishError, RecursionError):
            self._break("error", "what it wrote to its pipe is no result")

    def _receive(self) -> dict[str, Any]:
        try:
            return receive(self._inlet)
        except (EOFError, OSError):
            self._break("gone", "")
        except (RubbishError, RecursionError):
            self._break("error", "what it wrote to its pipe is no result")

    def _raise(self, reply: dict[str, Any], when: str) -> NoReturn:
        if reply.get("memory") is True:
            self._break("memory", "out of memory")
        if isinstance(why := reply.get("rubbish"), str):
            self._break("error", why[:_TEXT])
        kind, base, text, line = reply.get("kind"), reply.get("base"), reply.get("text"), reply.get("line")
        if not (isinstance(kind, str) and isinstance(base, str) and isinstance(text, str) and isinstance(line, int)):
            self._break("error", "what it wrote to its pipe is no result")
        where = f"line {line} of prompt and answer" if line else ""
        place = ", ".join(part for part in (where, when) if part)
        told = _told(kind, text) + (f" ({place})" if place else "")
        if when:
            self._break("error", told)
        raised = _same(base, text)
        self.raised.append((raised, told))
        raise raised

    def _break(self, outcome: str, detail: str) -> NoReturn:
        self.broken = (outcome, detail)
        raise BrokenError


def check(prompt: str, test: str, entry_point: str, inlet: int, outlet: int) -> dict[str, str]:
    """Runs the test against the answer's process; returns the verdict: `outcome` and `detail`.

    The names that the prompt defines are made here from the prompt alone: nothing of the answer is run.
    """
    candidate = _Candidate(inlet, outlet)

    def called(*arguments: object, **named: object) -> object:
        return candidate.call(*arguments, **named)

    called.__name__ = called.__qualname__ = entry_point
    try:
        space = _prompt_names(prompt)
        space[entry_point] = space["candidate"] = called
        candidate.begin()
        exec(compile(test, _TEST, "exec"), space)
        verify: Callable[[object], object] | None = space.get("check")
        if verify is None:
            return {"outcome": "error", "detail": "the test defines no check(candidate)"}
        verify(called)
    except BaseException as problem:  # noqa: BLE001 - the test's, or BrokenError
        return _verdict(candidate, problem, test)
    return _verdict(candidate, None, test)


def _verdict(candidate: _Candidate, problem: BaseException | None, test: str) -> dict[str, str]:
    if candidate.broken is not None:  # whatever the test made of it
        return {"outcome": candidate.broken[0], "detail": candidate.broken[1]}
    if problem is None:
        return {"outcome": "passed", "detail": ""}
    for raised, told in candidate.raised:
        if raised is problem:
            return {"outcome": "error", "detail": told}
    if isinstance(problem, MemoryError):
        return {"outcome": "memory", "detail": "out of memory in the test"}
    line = _line(problem, _TEST)
    lines = test.splitlines()
    source = lines[line - 1].strip()[:200] if 0 < line <= len(lines) else ""
    where = f" (line {line} of the test: {source})" if source else ""
    return {"outcome": "wrong", "detail": _told(type(problem).__name__, _text_of(problem)) + where}


def _text_of(problem: BaseException) -> str:
    try:
        return str(problem)
    except Exception:  # noqa: BLE001 - such as of `assert x == 1, x` where x is an int too long to be written
        return ""


def _prompt_names(prompt: str) -> dict[str, Any]:
    for body in _BODIES:
        try:
            code = compile(prompt + body + "\n", "<prompt>", "exec")
        except (SyntaxError, ValueError):
            continue
        space = _module("test")
        exec(code, space)
        return space
    return _module("test")


def _module(name: str) -> dict[str, Any]:
    """The namespace of a new module, registered: dataclasses and typing look there for names."""
    module = sys.modules[name] = ModuleType(name)
    return module.__dict__


def _plain(value: object) -> Any:
    """Encodes what a test passes, all of which must arrive."""
    data = encode(value)
    if (kind := _opaque(data)) is not None:
        raise RubbishError(f"a value of type {kind}")
    return data


def _opaque(data: Any) -> str | None:
    if isinstance(data, dict) and "o" in data:
        return str(data["o"])
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return next((found for found in map(_opaque, inner) if found is not None), None)


def _same(base: str, text: str) -> Exception:
    """An exception of the same built-in kind, so that a test may expect it.

    Not StopIteration: a test that goes through `map(candidate, ...)` would take it for the end, and pass.
    """
    kind = getattr(builtins, base, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration):
        try:
            return kind(text)
        except TypeError:  # UnicodeError's want more than a text
            pass
    return AnswerError(text)


def _told(kind: str, text: str) -> str:
    last = text.strip().splitlines()[-1:] if text else []
    return f"{kind}: {last[0]}" if last else kind


def _line(problem: BaseException, name: str) -> int:
    """The innermost line of that source that an exception came through; 0 where there is none."""
    if isinstance(problem, SyntaxError) and problem.filename == name:
        return problem.lineno or 0
    line, trace = 0, problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def tell(descriptor: int, verdict: dict[str, str]) -> None:
    """Writes the verdict, whole, and closes its pipe."""
    verdict["detail"] = verdict["detail"][:_TEXT]
    send(descriptor, pack(dict(verdict)))
    os.close(descriptor)
