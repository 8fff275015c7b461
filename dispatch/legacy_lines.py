"""The line forms of the predecessor's logs, and of our own `launch.log`, which has them too and some more.

A line may stand behind a time or a logger's name, so forms are searched for and not matched from its beginning. The
arrow and the tick are passed over whatever became of them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from engine.falsifiers import builtin_contract, parse_contract

NUMBER: Final = (
    r"([-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?|[-+]?(?i:nan|inf(?:inity)?)\b)"
)
COUNT: Final = r"([0-9]{1,15})"


class Form:
    """A form of lines. Most lines that are held against it are of another, so a word of it is looked for first.

    Args:
        word: part of every line of this form.
        pattern: `#` is a number, `@` a count, a blank any blanks.
    """

    def __init__(self, word: str, pattern: str) -> None:
        self._word = word
        whole = pattern.replace("#", NUMBER).replace("@", COUNT).replace(" ", r"[ \t]*")
        self._pattern = re.compile(whole, re.ASCII | re.IGNORECASE)

    def search(self, text: str) -> re.Match[str] | None:
        """The first place in a line that is of this form."""
        return self._pattern.search(text) if self._word in text else None


# The one form that is worth its own care: of a long log half the lines may be of it.
STEP: Final = re.compile(
    rf"\b[Ss]tep[ \t]+{COUNT}[ \t]*/[ \t]*{COUNT}[ \t]*:[ \t]*[Ll]oss[ \t]*[:=][ \t]*{NUMBER}", re.ASCII
)
EPOCH: Final = Form("poch", r"\bepoch @ / @ : loss [:=] #(?: , val_loss [:=] #)?(?: \( # s \))?")
COMPLETE: Final = Form(
    "final_loss", r"\bdistillation complete : initial_loss = #.{0,40}?\bfinal_loss = #(?: \( @ steps? , # s \))?"
)
SMOKED: Final = Form(
    "[SMOKE]", r"\[smoke\] @ steps? in # s : initial_loss = # , final_loss = #(?: , throughput = # step/s)?"
)
PROJECTED: Final = Form("full-run", r"\bprojected full-run wall time \( @ steps? \) : # h / # min / # s")
SMOKE_MODE: Final = Form("MAX_STEPS", r"\bsmoke mode : APR_DISTILL_MAX_STEPS = @")
NO_EXPORT: Final = Form("skipping export", r"\bsmoke mode : skipping export\b")
OUTPUT: Final = re.compile(r"(?<!\w)Output:[ \t]+\S", re.ASCII)
SAVED: Final = Form(" saved ", r"\bcheckpoint saved at step @ : (\S.*)")
NOT_SAVED: Final = Form(" failed", r"\bcheckpoint save at step @ failed : (.*?)(?: \(training continues\))?\Z")
GPU: Final = re.compile(
    r"(?<![\w-])GPU:[ \t]+(?=.*[A-Za-z]{2})(\S.*?)(?:[ \t]*\([0-9.]+[ \t]*[KMGT]i?B\).*)?\Z", re.ASCII
)

# Those of our own launch.log; engine/human.py prints them.
PHASE: Final = re.compile(r"\Aphase ([a-z][a-z-]{1,40})(?:: (.*))?\Z")
BEGUN: Final = re.compile(
    # What may have a blank in it is bounded: names of models are paths. Without bounds a hostile line takes long.
    r"\A(smoke|train) of (\S.{0,500}?) on (\S.{0,500}?): ([a-z0-9:]{1,20}) \((.{0,100})\), (fp32|bf16), "
    r"([0-9,]{1,15}) tokens a step\Z"
)
HELD_OUT: Final = Form(
    "held-out", r"\bheld-out at step @ : loss [:=]? #(?: , ce [:=]? #)?(?: , kd [:=]? #)?(?: , top-1 agreement #%)?"
)
JUDGED: Final = re.compile(
    r"\A(PASS|FAIL|PENDING|UNKNOWN) ([A-Z][A-Z0-9-]{2,63}): expected (.*), observed (.*)\Z", re.ASCII
)
CLOSED: Final = Form(" steps", r"\A(COMPLETED|FAILED|STOPPED|TIMEOUT|CRASHED) : (.*) \( @ steps? , # s \)\Z")
LEVEL: Final = re.compile(r"\A(info|warning|error): ")

_ID = re.compile(r"(?<![\w-])(?:F|FT|FALSIFY)(?:-[A-Z0-9]{1,32}){1,8}(?![\w-])", re.ASCII)
_WORD = re.compile(r"(?<![\w-])(PASS(?:ED)?|FAIL(?:ED)?|DISCHARGED)(?![\w-])", re.ASCII)
_NOT = re.compile(r"(?:\bnot|n't|\bno|\bnever)[ \t]+\Z", re.ASCII | re.IGNORECASE)
_MAX_IDS = 64

_PANIC = re.compile(
    r"(?<!no )(?<!without )(?<!0 )\bpanic(?:ked|king)?\b(?![ \t]*=|-|[ \t]+(?:hook|handler|strategy))", re.I | re.ASCII
)
_CUDA = re.compile(r"CUDA_ERROR_(?!\w*[ \t]*=)")
_RAISED = re.compile(
    r"(?<![\w.])(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): |\ATraceback \(most recent call last\)"
)
_ERROR = re.compile(r"(?<![\w.-])error(?![\w-]|\(s\))", re.IGNORECASE | re.ASCII)
_NO_ERROR_BEFORE = re.compile(r"\b(?:no|0|zero|without|any|if|on)[ \t]+\Z", re.IGNORECASE | re.ASCII)
_NO_ERROR_AFTER = re.compile(
    r"[ \t]+(?:rates?|handling|handlers?|bars?|bounds?|budgets?|feedback|tolerance|margins?|correction|ratio|norm"
    r"|recovery|logs?|reporting|checks?|checking|metrics?|thresholds?)\b"
    r"|[ \t]*[=<>≤≥~]"
    r"|[ \t]*:?[ \t]*(?:none\b|ok\b|null\b|0(?![.\w])|[-+]?[0-9]*\.[0-9]+"
    r"|[-+]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+|[ \t]?%))",
    re.IGNORECASE | re.ASCII,
)
_MEASURED = re.compile(
    r"\b(?:max|min|mean|abs|absolute|rel|relative|gradient|squared|rounding|quanti[sz]ation|reconstruction|logits?|rms"
    r"|l2|average|avg|total|numerical|approximation|standard)[ \t]+\Z",
    re.IGNORECASE | re.ASCII,
)
_A_NUMBER = re.compile(r"[ \t]*[:=]?[ \t]*(?:is|of|at most|below|under)?[ \t]*[-+]?[.0-9]", re.IGNORECASE | re.ASCII)


def may_mean_something(text: str) -> bool:
    """A line that some form here could fit; false of nearly all lines, and much cheaper than the forms."""
    return (
        "oss" in text
        or "rror" in text
        or "RROR" in text
        or "anic" in text
        or "ANIC" in text
        or "PASS" in text
        or "FAIL" in text
        or "CHARGED" in text
        or "heckpoint sav" in text
        or "smoke" in text
        or "projected" in text
        or "GPU:" in text
        or "Validation" in text
        or "phase" in text
        or "steps," in text
        or "step," in text
        or "tokens a" in text
        or "Output" in text
        or "arn" in text
        or "WARN" in text
        or ": expected" in text
        or "xception" in text
        or "Traceback" in text
    )


def stated_verdicts(text: str) -> list[tuple[str, str]]:
    """Each falsifier that a line gives a verdict on, with the word that it uses.

    None where it has two words that contradict each other, or says that something is NOT so.
    """
    words = list(_WORD.finditer(text))
    if not words or len({each[1].startswith("FAIL") for each in words}) > 1:
        return []
    if any(_NOT.search(text, max(0, each.start() - 12), each.start()) for each in words):
        return []
    ids = dict.fromkeys(found[0] for found in _ID.finditer(text))
    return [(identifier, words[0][1]) for identifier in list(ids)[:_MAX_IDS] if len(identifier) <= 64]


def ends_a_run(text: str) -> bool:
    """A panic, a failed validation or a CUDA error: nothing goes on after it."""
    if "Validation failed:" in text or ("CUDA_ERROR_" in text and _CUDA.search(text)):
        return True
    return ("anic" in text or "ANIC" in text) and _PANIC.search(text) is not None


def tells_an_error(text: str) -> bool:
    """It says that something went wrong; not `0 errors`, `error_rate=`, nor how large an error of rounding is."""
    if ("Error: " in text or "Exception: " in text or text.startswith("Traceback")) and _RAISED.search(text):
        return True
    if "rror" not in text and "RROR" not in text:
        return False
    for found in _ERROR.finditer(text):
        start, end = found.span()
        if _NO_ERROR_BEFORE.search(text, max(0, start - 12), start) or _NO_ERROR_AFTER.match(text, end):
            continue
        if _MEASURED.search(text, max(0, start - 20), start) and _A_NUMBER.match(text, end):
            continue
        return True
    return False


@cache
def known_falsifiers() -> dict[str, tuple[str, str]]:
    """Severity and claim of the falsifiers that ship, by their identifiers: what a log of lines does not say."""
    return {
        each.id: (each.severity, each.claim)
        for name in ("predecessor", "smoke", "train")
        for each in parse_contract(builtin_contract(name), f"{name}.yaml").falsifiers
    }
