"""Files of problems that are small enough to be asked in a test."""

from __future__ import annotations

import json
from pathlib import Path

PROBLEMS = [
    ("add", "def add(a, b):\n    '''The sum.'''\n", "    return a + b\n", "assert candidate(1, 2) == 3"),
    ("twice", "def twice(a):\n    '''Doubled.'''\n", "    return 2 * a\n", "assert candidate(4) == 8"),
    ("last", "def last(a):\n    '''The last.'''\n", "    return a[-1]\n", "assert candidate([1, 7]) == 7"),
]


def suite_of(path: Path, count: int = 3) -> Path:
    """A file of problems, HumanEval's form."""
    rows = [
        {
            "task_id": f"Own/{name}",
            "prompt": prompt,
            "entry_point": name,
            "canonical_solution": answer,
            "test": f"def check(candidate):\n    {test}\n",
        }
        for name, prompt, answer, test in PROBLEMS[:count]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
