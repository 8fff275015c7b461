"""No process that draws a screen, or waits for one that trains, ever imports torch."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import console
import dispatch

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "safetensors", "tokenizers")
MODULES = sorted(
    module.name
    for package in (console, dispatch)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)
PROGRAM = f"""
import importlib, json, sys
modules, arguments = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
if arguments is not None:
    from console.cli import main
    sys.argv = ["kdconsole", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def loaded(tmp_path: Path, modules: list[str], arguments: list[str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([modules, arguments])],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


def test_no_module_of_console_or_dispatch_imports_torch(tmp_path: Path) -> None:
    assert {"console.cli", "console.headless", "console.report", "dispatch.supervisor"} <= set(MODULES)
    assert loaded(tmp_path, MODULES) == "loaded: []"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "check"], ["config", "show"], ["runs"]])
def test_no_light_command_imports_torch(tmp_path: Path, arguments: list[str]) -> None:
    assert loaded(tmp_path, [], arguments) == "loaded: []"


def test_the_check_itself_sees_torch(tmp_path: Path) -> None:
    assert loaded(tmp_path, ["safetensors"]) == "loaded: ['safetensors']"
