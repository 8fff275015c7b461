"""Makes `builtin:teacher` and its tokenizer anew, and prints what its model card quotes.

    python bench/builtin_teacher.py tokenizer            # engine/assets/*/tokenizer.json, from the standard library
    kdconsole --headless train engine/assets/teacher/recipe.yaml
    python bench/builtin_teacher.py install RUN_DIR      # the run's model/ into engine/assets/teacher
    python bench/builtin_teacher.py evaluate             # held-out cross-entropy of what ships, in float32

The tokenizer is a byte-level BPE of 2,048 entries, trained on the files that are not held out, and the same every
time for the same Python version.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.config import Data, load_config
from engine.data import load_corpus, split_documents

ASSETS = Path(__file__).resolve().parent.parent / "engine" / "assets"
ENTRIES = 2_048
END_OF_TEXT = "<|endoftext|>"
# Words with one leading mark or space, single digits, runs of punctuation, line ends, and indentation as one piece.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer() -> None:
    """Trains the tokenizer and writes it beside teacher and student."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (
        path.read_text(encoding="utf-8", errors="replace") for path in split_documents(Data(path="builtin:stdlib"))[0]
    )
    made.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    for name in ("teacher", "student"):
        made.save(str(ASSETS / name / "tokenizer.json"))
        (ASSETS / name / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{made.get_vocab_size():,} entries")


def install(run_dir: Path) -> None:
    """Puts a finished run's weights in place."""
    for name in ("generation_config.json", "model.safetensors"):
        shutil.copyfile(run_dir / "model" / name, ASSETS / "teacher" / name)
    size = sum(path.stat().st_size for name in ("teacher", "student") for path in (ASSETS / name).iterdir())
    print(f"installed; teacher and student are {size:,} bytes in all")


def evaluate() -> None:
    """Held-out cross-entropy in nats a token: the windows that the recipe takes, then all."""
    import numpy as np
    import torch

    from engine.config import Teacher
    from engine.models import load_teacher
    from engine.windows import Windows

    config = load_config(ASSETS / "teacher" / "recipe.yaml")
    model = load_teacher(Teacher(path="builtin:teacher"), torch.device("cpu"), torch.float32)
    corpus = load_corpus(config.data, ASSETS / "teacher", sequence=config.train.sequence, rows=model.vocab)
    for label, count in (("recipe's windows", config.data.heldout_windows), ("all windows", len(corpus.heldout))):
        total, tokens = 0.0, 0
        for windows in torch.from_numpy(corpus.heldout_batch(count)).split(16):
            with torch.no_grad():
                logits = model.logits(windows[:, :-1]).flatten(0, 1)
            labels = windows[:, 1:].reshape(-1)
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += labels.numel()
        print(f"held-out, {label}: {total / tokens:.4f} nats a token over {tokens:,} tokens")
    for label, tables in (("code page tables in encodings/", True), ("everything else", False)):
        files = [path for path in split_documents(config.data)[1] if ("encodings" in path.parts) == tables]
        total, tokens = 0.0, 0
        encoder = Tokenizer.from_file(str(ASSETS / "teacher" / "tokenizer.json"))
        for path in files:
            ids = encoder.encode(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
            windows = Windows([np.asarray(ids)], config.train.sequence)
            for start in range(0, len(windows), 16):
                rows = torch.from_numpy(windows.stack(range(start, min(start + 16, len(windows)))))
                with torch.no_grad():
                    logits = model.logits(rows[:, :-1]).flatten(0, 1)
                labels = rows[:, 1:].reshape(-1)
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                tokens += labels.numel()
        print(f"held-out, {label}: {total / tokens:.4f} nats a token over {tokens:,} tokens of {len(files)} files")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tokenizer"]:
            tokenizer()
        case ["install", directory]:
            install(Path(directory))
        case ["evaluate"]:
            evaluate()
        case _:
            sys.exit(__doc__)
