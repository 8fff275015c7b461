"""What a GGUF file says of itself, read by the `gguf` package: architecture, licence, quantisation, vocabulary.

Neither torch nor transformers is imported. The file is untrusted: whoever calls this does it in a process of its own
with a limit on its memory and time (`engine.import_stage`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.errors import ModelError
from engine.sniff import DOWNLOAD, say

if TYPE_CHECKING:
    from gguf import GGUFReader

INSTALL: Final = "pip install 'kdconsole[import]'"
EXACT_IN_BF16: Final = frozenset({"BF16"})
FLOATS: Final = frozenset({"F16", "F32", "F64"})
_NO_SCALING = ("", "none")
# What the package raises for a file that ends early or lies about its sizes is not one class.
_BROKEN = (ArithmeticError, LookupError, MemoryError, OSError, TypeError, UnicodeError, ValueError)


class GgufFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the header of a GGUF file states; texts are as they stand there and not cleaned."""

    architecture: str
    name: str = ""
    licence: str = ""
    organization: str = ""
    types: dict[str, int] = {}
    """Tensors by ggml type, such as `Q4_1: 210`."""
    values: int = 0
    """Elements over all tensors."""
    matrices_are_floats: bool = False
    """Whether some matrix is stored as float16 or float32, and none in blocks: bfloat16 would lose bits of it."""
    vocabulary: int = 0
    tokenizer: str = ""
    """`tokenizer.ggml.model`: the algorithm."""
    splitting: str = ""
    """`tokenizer.ggml.pre`: how text is cut into words before it, by name; empty where the file does not say."""
    bos: int | None = None
    eos: int | None = None


def read_facts(path: Path) -> GgufFacts:
    """Read a GGUF file's header and table of tensors; of the tensors' bytes only the extent is checked.

    Raises:
        ModelError: it is damaged or cut short, is a part of a model or no model, has no tokenizer, or stretches its
            positions in a way that is lost on import; or the `gguf` package is missing.
    """
    reader = open_gguf(path)
    try:
        facts = _facts(reader)
    except _BROKEN as error:
        raise _damaged(path, error) from error
    _refuse_unusable(path, reader)
    if not facts.vocabulary:
        raise ModelError(
            f"{say(path)}: has no tokenizer in it (tokenizer.ggml.tokens)",
            expected="the model's vocabulary beside its weights",
            do="take a GGUF file that was made for generating text",
        )
    return facts


def read_tokens(path: Path) -> list[str]:
    """The vocabulary in the order of its ids.

    Raises:
        ModelError: as `read_facts`.
    """
    reader = open_gguf(path)
    try:
        return [str(token) for token in _value(reader, "tokenizer.ggml.tokens") or ()]
    except _BROKEN as error:
        raise _damaged(path, error) from error


def open_gguf(path: Path) -> GGUFReader:
    """The `gguf` package's reader of a file, which is mapped and not read into memory.

    Raises:
        ModelError: the file is damaged or cut short, or the package is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{say(path)}: reading GGUF needs a package that is not installed ({error.name or 'gguf'})",
            do=INSTALL,
        ) from error

    class Bounded(GGUFReader):  # type: ignore[misc, unused-ignore]
        """The package reads past the end as if nothing were there, and counts on for as long as a header says."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            array = super()._get(offset, dtype, count, override_order)
            if len(array) != int(count):
                raise ValueError(f"{len(self.data):,} bytes, and its header promises more")
            return array

    try:
        return Bounded(path)
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _facts(reader: GGUFReader) -> GgufFacts:
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return GgufFacts(
        architecture=_text(reader, "general.architecture"),
        name=_text(reader, "general.name"),
        licence=_text(reader, "general.license"),
        organization=_text(reader, "general.organization"),
        types=dict(types.most_common()),
        values=sum(int(tensor.n_elements) for tensor in reader.tensors),
        matrices_are_floats=bool(matrices & FLOATS) and matrices <= FLOATS | EXACT_IN_BF16,
        vocabulary=_length(reader, "tokenizer.ggml.tokens"),
        tokenizer=_text(reader, "tokenizer.ggml.model"),
        splitting=_text(reader, "tokenizer.ggml.pre"),
        bos=_number(reader, "tokenizer.ggml.bos_token_id"),
        eos=_number(reader, "tokenizer.ggml.eos_token_id"),
    )


def _refuse_unusable(path: Path, reader: GGUFReader) -> None:
    architecture = _text(reader, "general.architecture")
    if not architecture:
        raise ModelError(f"{say(path)}: does not say what it is (general.architecture)", do=DOWNLOAD)
    if (kind := _text(reader, "general.type")) not in ("", "model"):
        raise ModelError(
            f"{say(path)}: a GGUF file of another kind: {say(kind)}",
            expected="a whole language model",
            do="take the model's own file",
        )
    if (parts := _number(reader, "split.count") or 0) > 1:
        raise ModelError(
            f"{say(path)}: one of the {parts} parts of a model",
            expected="the whole model in one file",
            do="join the parts first: llama-gguf-split --merge FIRST_PART WHOLE",
        )
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    if scaling not in _NO_SCALING or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ModelError(
            f"{say(path)}: stretches its positions ({say(scaling or 'rope_freqs.weight')})",
            expected="a model without scaled rotary positions: transformers drops the scaling of a GGUF file, and the "
            "model would not be the same",
            do="import the model's Hugging Face directory (safetensors) instead",
        )


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _text(reader: GGUFReader, key: str) -> str:
    value = _value(reader, key)
    return value if isinstance(value, str) else ""


def _number(reader: GGUFReader, key: str) -> int | None:
    value = _value(reader, key)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _length(reader: GGUFReader, key: str) -> int:
    field = reader.fields.get(key)
    return 0 if field is None else len(field.data)


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{say(path)}: begins as a GGUF file and is cut short or damaged ({say(error)[:200]})",
        expected="a whole GGUF file",
        do=DOWNLOAD,
    )
