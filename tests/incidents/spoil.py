"""Works inside a run's own engine and makes the cause of an incident real there: nothing that catches it is touched.

The real command gets it as its `sitecustomize` (see `scene`). Each function here is one way to spoil an engine; what it
changes is what really went wrong, at the place where it went wrong. Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import struct
import sys
import time
from typing import Any


def export_of_an_empty_map() -> None:
    """The exporter's serialiser is handed a map with nothing in it."""

    def spoil(module: Any) -> None:
        real = module.safe_save_file
        module.safe_save_file = lambda tensors, *rest, **options: real({}, *rest, **options)

    _once_imported("transformers.modeling_utils", spoil)


def export_of_200_bytes() -> None:
    """The exporter leaves a whole file of 200 bytes that names no tensor, as the real one did."""

    def save_file(tensors: object, filename: str, **options: object) -> None:
        header = b'{"__metadata__":{"format":"pt"}}'.ljust(192)
        with open(filename, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)

    def spoil(module: Any) -> None:
        module.safe_save_file = save_file

    _once_imported("transformers.modeling_utils", spoil)


def export_of_the_untrained() -> None:
    """The exporter saves the weights from before training: a file that is whole, and not what was trained."""

    def spoil(module: Any) -> None:
        exporter: Any = sys.modules["engine.export"]
        first: dict[str, Any] = {}
        real_load, real_write = module.load, exporter._write

        def load(*arguments: Any) -> Any:
            loaded = real_load(*arguments)
            first.update({name: tensor.detach().clone() for name, tensor in loaded.student.model.state_dict().items()})
            return loaded

        def write(model: Any, *rest: Any) -> None:
            trained = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(first)
            real_write(model, *rest)
            model.load_state_dict(trained)

        module.load, exporter._write = load, write

    _once_imported("engine.trainer", spoil)


def sleep_at_step_0() -> None:
    """The first step never comes back; the process lives, and so do its other threads."""

    def spoil(module: Any) -> None:
        module.Trainer._step = lambda *arguments: time.sleep(3_600)

    _once_imported("engine.trainer", spoil)


def judge_that_passes_all() -> None:
    """An evaluation takes every answer for a right one, whatever its test said."""
    _judge("passed")


def judge_that_passes_none() -> None:
    """An evaluation takes no answer for a right one, whatever its test said."""
    _judge("wrong")


def _judge(outcome: str) -> None:
    def spoil(module: Any) -> None:
        module._outcome = lambda *arguments: (outcome, "")

    _once_imported("engine.sandbox", spoil)


def slow_disk() -> None:
    """Every wait for the disk takes a fifth of a second longer. No incident: a good run may have such a disk."""
    real = os.fsync

    def fsync(fd: Any) -> None:
        time.sleep(0.2)
        real(fd)

    os.fsync = fsync


def _once_imported(name: str, do: Any) -> None:
    """Has something done to a module as soon as it is imported, before anybody gets it."""
    if name in sys.modules:
        do(sys.modules[name])
        return

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> Any:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec: Any = importlib.util.find_spec(fullname)
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                do(module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())


def customize(way: str) -> None:
    """What every Python process of a command does at its start; only its engine is spoilt."""
    if sys.orig_argv[2:4] == ["-m", "engine"]:
        globals()[way]()
