"""`python -P -m engine.import_stage look | write | check`: the parts of an import that read what came from outside.

Each is a process of its own, started by `engine.import_model`: it takes one JSON object on standard input and answers
with JSON lines on standard output: `{"tell": TEXT}` any number of times, then `{"done": {…}}` or `{"error": TEXT}`.
What it writes stands below the directory that it was given, whose owner is the process that started it.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.errors import ExitCode, KdError, ModelError
from engine.gguf_file import INSTALL, GgufFacts, read_facts, read_tokens
from engine.sniff import say
from engine.text import clean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOOK_BYTES: Final = 2 << 30
"""Most memory of a process that reads a header: a file that lies about its lengths ends there."""
SOURCE_LINK: Final = ".source"
REFERENCE: Final = ".reference.safetensors"
_WRONG_TOKENS: Final = 0.01
_ROUND_TRIPS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Naïve café, 12,345.67 °C – “quoted”",
    "日本語 and Ελληνικά",
)

Tell = Callable[[str], None]


def look(asked: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The facts of a GGUF file; asked: `source`."""
    resource.setrlimit(resource.RLIMIT_DATA, (LOOK_BYTES, LOOK_BYTES))
    facts: dict[str, Any] = msgspec.to_builtins(read_facts(Path(asked["source"])))
    return facts


def write(asked: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Write weights, config and tokenizer; asked: `source`, `partial`, `dtype` (bf16 or fp32), `gguf` (true or false).

    Also written is the reference that `check` compares with: the tensors that the architecture has, and logits.
    """
    source, partial, gguf = Path(asked["source"]), Path(asked["partial"]), bool(asked["gguf"])
    tell("starting PyTorch and transformers")
    from engine.export import DTYPES

    dtype: torch.dtype = DTYPES[asked["dtype"]]
    _silence()
    tell("dequantising the weights" if gguf else "loading the weights")
    model = _from_gguf(source, partial, dtype) if gguf else _from_directory(source, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tell(f"writing {parameters:,} parameters")
    for key in ("_name_or_path", "_model_name_or_path"):  # of another machine, or what a stranger's header says
        vars(model.config).pop(key, None)
    model.config.name_or_path = ""
    model.save_pretrained(partial)
    config = partial / "config.json"
    document = json.loads(config.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path"):
        document.pop(key, None)
    document["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_tokenizer(source, partial, gguf)
    tell("computing what it says, to be compared with the files")
    _write_reference(model, partial, asked["dtype"])
    return {
        "parameters": parameters,
        "model": type(model).__name__,
        "vocabulary": int(model.get_input_embeddings().weight.shape[0]),
    }


def check(asked: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Read back what `write` left, as a run would; asked: `partial`, `source`, `untrained`, `facts` (null: no GGUF).

    Raises:
        ModelError: it is not the model that it should be.
    """
    partial = Path(asked["partial"])
    facts = None if asked["facts"] is None else msgspec.convert(asked["facts"], GgufFacts)
    tell("reading back: files, tensors, logits")
    import torch

    from engine.config import Teacher
    from engine.export import LIMITS, Exported
    from engine.language_check import check_language
    from engine.models import load_teacher
    from engine.stream import Measure
    from engine.verify_export import verify

    _silence()
    findings = verify(partial, partial / REFERENCE)
    measures = [Measure(name=name, value=findings[name][0], detail=findings[name][1]) for name in LIMITS]
    problems = Exported(partial, measures).problems
    if problems:
        raise _not_it("what was written is not what was read: " + "; ".join(problems))
    remarks, tokenizer = _check_tokenizer(partial, Path(asked["source"]), facts)
    tell("reading plain text with it")
    teacher = load_teacher(Teacher(path=str(partial)), "cpu", torch.float32)
    language = check_language(teacher.model, lambda text: tokenizer(text)["input_ids"], teacher.vocab)
    if language.problem and not asked["untrained"]:
        raise _not_it(language.problem, do="for a model that was never trained, or on other texts: --untrained")
    if language.problem:
        remarks.append(language.problem)
    return {
        "remarks": remarks,
        "checks": {name: findings[name][0] for name in LIMITS},
        "nats_per_token": {
            **language.texts,
            "chance": language.chance,
            **{f"control: {name}": value for name, value in language.controls.items()},
        },
    }


def _from_gguf(source: Path, partial: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, every tensor of the file used and every tensor of the model given."""
    import transformers

    for package in ("accelerate", "gguf"):
        try:
            __import__(package)
        except ImportError as error:
            raise ModelError(
                f"{say(source)}: reading GGUF needs the package {package}, which is not installed", do=INSTALL
            ) from error
    # Beside the file may stand a config or an adapter of something else, which transformers would read too.
    place = partial / SOURCE_LINK
    place.mkdir()
    (place / "model.gguf").symlink_to(source)
    options: dict[str, Any] = {"dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # else it has no way yet to keep weights packed, and unpacks them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(place),
            gguf_file="model.gguf",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(place), gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
        )
        tokenizer.init_kwargs.pop("name_or_path", None)
        tokenizer.save_pretrained(str(partial))
    except Exception as error:  # what transformers raises for a file that it cannot use is not one class
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"{say(source)}: transformers cannot make a model of it: {type(error).__name__}: {clean(lines[0], 300)}",
            expected="an architecture whose GGUF files transformers reads, such as llama, qwen2 or qwen3",
            do="import the model's Hugging Face directory (safetensors) instead",
        ) from error
    finally:
        shutil.rmtree(place)
    wrong = [f"{kind.removesuffix('_keys')}: {_some(report[kind])}" for kind in _REPORTS if report.get(kind)]
    if wrong:
        raise ModelError(
            f"{say(source)}: its tensors are not those of {type(model).__name__}: {'; '.join(wrong)}",
            expected="every tensor of the architecture, with its shape",
            do="import the model's Hugging Face directory (safetensors) instead",
        )
    stored, taken = read_facts(source).values, sum(parameter.numel() for parameter in model.parameters())
    if stored != taken:
        raise ModelError(
            f"{say(source)}: {stored:,} values in the file, and {type(model).__name__} has {taken:,} parameters",
            expected="every value of the file in the model",
            do="import the model's Hugging Face directory (safetensors) instead",
        )
    return model


_REPORTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _from_directory(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    from engine.config import Teacher
    from engine.models import load_teacher

    return load_teacher(Teacher(path=str(source)), "cpu", dtype).model


def _write_tokenizer(source: Path, partial: Path, gguf: bool) -> None:
    from transformers import AutoTokenizer

    from engine.export import TOKENIZER_FILES

    if not gguf:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if not (partial / "tokenizer.json").is_file():
            try:
                AutoTokenizer.from_pretrained(
                    str(source), local_files_only=True, trust_remote_code=False
                ).save_pretrained(str(partial))
            except Exception as error:  # as above
                lines = str(error).strip().splitlines() or [""]
                raise ModelError(f"{say(source)}: its tokenizer does not load: {clean(lines[0], 300)}") from error
    if not (partial / "tokenizer.json").is_file():
        raise ModelError(
            f"{say(source)}: has no tokenizer that can be written as tokenizer.json",
            expected="a fast tokenizer, which counts and cuts text as the run will",
            do="put the model's tokenizer.json into the directory",
        )
    strange = _without_strangers(partial / "tokenizer.json", len(read_tokens(source))) if gguf else set()
    settings = partial / "tokenizer_config.json"
    if settings.is_file():
        document = json.loads(settings.read_text(encoding="utf-8"))
        # Where it was loaded from is this machine's business; code of a model is never run.
        for key in ("name_or_path", "is_local", "local_files_only", "auto_map", "gguf_file"):
            document.pop(key, None)
        document = {key: value for key, value in document.items() if not (isinstance(value, str) and value in strange)}
        settings.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_strangers(file: Path, size: int) -> set[str]:
    """Take out what transformers adds by itself (GPT-2's `<|endoftext|>`): ids for which the model has no rows."""
    document = json.loads(file.read_text(encoding="utf-8"))
    added = document.get("added_tokens") or []
    strange = {token["content"] for token in added if token["id"] >= size}
    if strange:
        document["added_tokens"] = [token for token in added if token["id"] < size]
        file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return strange


def _write_reference(model: PreTrainedModel, partial: Path, dtype: str) -> None:
    """What `engine.verify_export` compares with: names and shapes from the architecture, logits from this process."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.export import DTYPES, PROBE_TEXT, probe_logits, unique_state

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(partial), local_files_only=True))
    size = DTYPES[dtype].itemsize
    expected = {
        name: [list(tensor.shape), tensor.numel() * (size if tensor.is_floating_point() else tensor.dtype.itemsize)]
        for name, tensor in unique_state(bare).items()
    }
    model.float().eval()  # the dtype in which it is read back
    rows = int(model.get_input_embeddings().weight.shape[0])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 32
    ids = torch.arange(min(32, longest)) * 7919 % rows
    logits = probe_logits(model, ids)
    tokens = list(Tokenizer.from_file(str(partial / "tokenizer.json")).encode(PROBE_TEXT, add_special_tokens=False).ids)
    save_file(
        {"ids": ids, "trained": logits, "rounded": logits.clone()},
        partial / REFERENCE,
        metadata={
            "expected": json.dumps(expected),
            "initial": "",
            "dtype": dtype,
            "tokens": json.dumps(tokens),
        },
    )


def _check_tokenizer(partial: Path, source: Path, facts: GgufFacts | None) -> tuple[list[str], Any]:
    """Hold the written tokenizer against texts and against the GGUF file's vocabulary; remarks, and the tokenizer."""
    from transformers import AutoTokenizer

    from engine.vocabulary import read_vocabulary

    remarks = []
    tokenizer = AutoTokenizer.from_pretrained(str(partial), local_files_only=True, trust_remote_code=False)
    lost = []
    for text in _ROUND_TRIPS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            lost.append(f"{clean(text, 40)!r} comes back as {clean(back, 40)!r}")
    if lost and facts is not None:
        raise _not_it(f"its tokenizer does not give texts back: {lost[0]}")
    if lost:
        remarks.append(f"its tokenizer does not give {len(lost)} of {len(_ROUND_TRIPS)} texts back: {lost[0]}")
    if facts is None:
        return remarks, tokenizer
    ours, theirs = read_vocabulary(partial).tokens, read_tokens(source)
    if len(ours) != len(theirs) or sorted(ours) != list(range(len(theirs))):
        raise _not_it(f"its tokenizer has {len(ours):,} tokens, the GGUF file {len(theirs):,}")
    different = sum(ours[id_] != token for id_, token in enumerate(theirs))
    if different > _WRONG_TOKENS * len(theirs):
        raise _not_it(f"{different:,} of {len(theirs):,} tokens are spelled otherwise than in the GGUF file")
    if different:
        remarks.append(f"{different:,} of {len(theirs):,} tokens are spelled otherwise than in the GGUF file")
    if facts.eos is not None and tokenizer.eos_token_id != facts.eos:
        raise _not_it(f"its tokenizer ends texts with id {tokenizer.eos_token_id}, the GGUF file with {facts.eos}")
    if facts.splitting and facts.tokenizer == "gpt2" and not _known_splitting(facts.splitting, theirs):
        remarks.append(
            f"the file cuts text into words by the rules {clean(facts.splitting, 60)!r}, which transformers does not "
            "know: GPT-2's are taken, and some texts become other tokens than the model was trained on"
        )
    return remarks, tokenizer


def _known_splitting(name: str, tokens: list[str]) -> bool:
    """Whether transformers cuts text as these rules do, or so that the same tokens come of it."""
    if name in ("gpt-2", "gpt2", "default"):
        return True
    if name == "smollm":  # GPT-2's, and every digit a word: the same where no token but a single digit holds one
        return not any(len(token) > 1 and set(token) & set("0123456789") for token in tokens)
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return False
    return name in GGUF_PRE_TOKENIZER_SPLITS


def _silence() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _not_it(why: str, do: str | None = None) -> ModelError:
    return ModelError(why, do=do or "nothing was kept; take another source of this model")


def _some(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    rest = f" and {len(listed) - 3:,} more" if len(listed) > 3 else ""
    return ", ".join(clean(name, 100) for name in listed[:3]) + rest


STAGES: Final[dict[str, Callable[[dict[str, Any], Tell], dict[str, Any]]]] = {
    "look": look,
    "write": write,
    "check": check,
}


def main(argv: list[str]) -> int:
    """Runs one stage."""
    if len(argv) != 1 or argv[0] not in STAGES:
        print(f"usage: python -P -m engine.import_stage {' | '.join(STAGES)} < JSON", file=sys.stderr)
        return ExitCode.USAGE

    def say_line(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    try:
        say_line({"done": STAGES[argv[0]](json.load(sys.stdin), lambda text: say_line({"tell": text}))})
    except KdError as error:
        say_line({"error": str(error)})
        return error.exit_code
    except MemoryError:
        say_line({"error": "there is not enough memory for it"})
        return ExitCode.USAGE
    except OSError as error:
        say_line({"error": f"{say(error.filename or 'writing')}: {error.strerror or error}"})
        return ExitCode.USAGE
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
