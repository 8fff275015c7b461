"""Secrets taken out of texts that an operator typed, before they are written anywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

REDACTED: Final = "[redacted]"
MIN_SECRET: Final = 8
"""Characters; a shorter value of a variable would be found in innocent texts."""
_SECRET_NAME: Final = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)$", re.IGNORECASE
)
"""Of variables that hold one."""
_SECRET: Final = re.compile(
    r"""
      \b(?:hf|sk|pk|rk|ghp|gho|ghu|ghs|ghr|github_pat|glpat|npm|pypi|wandb)[_-][A-Za-z0-9_-]{16,}  # tokens of services
    | \bAKIA[0-9A-Z]{16}\b
    | \bxox[a-z]-[A-Za-z0-9-]{10,}
    | \beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*       # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                                   # the user and password of an address
    | (?<=bearer\ )\S{8,}
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_ASSIGNED: Final = re.compile(
    r"((?:token|secret|password|passwd|passphrase|api[_-]?key|access[_-]?key)=)(\S{6,})", re.IGNORECASE
)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a secret: tokens by their form, `token=…`, and values of such variables of ours.

    Args:
        text: of an operator or of a log.
        environ: whose variables with names like HF_TOKEN are looked for.
    """
    for name, value in environ.items():
        if len(value) >= MIN_SECRET and _SECRET_NAME.search(name) and not value.startswith(("/", "~")):
            text = text.replace(value, REDACTED)
    text = _ASSIGNED.sub(lambda found: f"{found[1]}{REDACTED}", text)
    return _SECRET.sub(REDACTED, text)
