"""What the key and value cache is worth: tokens a second with it and without, the same tokens both times.

    python bench/generation.py [DIR] [--batch 8] [--prompt 128] [--tokens 128] [--repeats 3] [--threads N]

DIR is a model directory with its tokenizer; the built-in teacher where none is given. Greedy, float32 on the CPU, no
text stops a row and every row makes as many tokens. The two take turns, so that whatever else the machine does falls on
both; what is shown is the median. The ratio is of CPU seconds, which a busy machine stretches less than those of the
clock. Without the cache, each token computes everything before it again. The command fails where the tokens differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine has it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from engine.config import Student
from engine.formats import resolve_builtin
from engine.generate import Generator, Sampling, _Rows
from engine.language_check import ENGLISH, PYTHON
from engine.models import CausalLM, load_student


def cached(made: Generator, prompts: Tensor) -> Tensor:
    """The new tokens as the engine makes them, shape [rows, max_new_tokens]; nothing ends a row before."""
    rows = _Rows(made._tokenizer, prompts.tolist(), frozenset(), (), lambda ended: None)
    with made._as_evaluated(0):
        made._generate(rows, made.sampling.max_new_tokens)
    return torch.tensor(rows._new)


def recomputed(model: CausalLM, prompts: Tensor, count: int) -> Tensor:
    """The same tokens, everything computed again for each."""
    ids = prompts
    with torch.no_grad():
        for _ in range(count):
            newest = model.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, newest[:, None]], 1)
    return ids[:, prompts.shape[1] :]


def asked(made: Generator, rows: int, length: int) -> Tensor:
    """Prompts of as many tokens, each from another place of a text, shape [rows, length]."""
    ids = made._tokenizer.encode((ENGLISH + PYTHON) * 20, add_special_tokens=False).ids
    return torch.tensor([ids[17 * row : 17 * row + length] for row in range(rows)])


def main() -> None:
    """Prints one line for each way, and how they compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", default="builtin:teacher")
    for name, value in (("batch", 8), ("prompt", 128), ("tokens", 128), ("repeats", 3), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_student(Student(path=options.directory, init="pretrained"), "cpu", 0)
    model.model.eval()
    made = Generator(model, resolve_builtin(options.directory), Sampling(0.0, 1.0, options.tokens, 0))
    prompts = asked(made, options.batch, options.prompt)
    seconds: dict[str, list[tuple[float, float]]] = {"with the cache": [], "computed again": []}
    for _ in range(options.repeats):
        found = []
        for name, times in seconds.items():
            started, busy = time.monotonic(), time.process_time()
            again = name == "computed again"
            found.append(recomputed(model, prompts, options.tokens) if again else cached(made, prompts))
            times.append((time.monotonic() - started, time.process_time() - busy))
        if not torch.equal(*found):
            sys.exit("the two ways do not say the same tokens")
    total = options.batch * options.tokens
    print(f"{options.directory}: {options.batch} rows, {options.prompt} tokens each and {options.tokens} new ones")
    cpu = {}
    for name, times in seconds.items():
        clock, cpu[name] = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name}: {total / clock:,.1f} tokens/s, {cpu[name]:.2f} CPU s")
    print(f"ratio: {cpu['computed again'] / cpu['with the cache']:.1f}")


if __name__ == "__main__":
    main()
