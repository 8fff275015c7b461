"""The reader of APR files: hand-made ones of every dtype are read, every doctored one is refused by its message."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apr_rig import Apr, Entry, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.apr import AprFile, mapped, read_apr, require_whole
from engine.apr_values import Values, converted, values_of
from engine.apr_writer import write_apr
from engine.errors import KdError, ModelError

BLOCK = [float(n - 8) for n in range(16)] * 2


def whole(path: Path) -> AprFile:
    apr = read_apr(path)
    require_whole(path)
    return apr


def q4_block(scale: float, nibbles: list[int]) -> bytes:
    pairs = zip(nibbles[0::2], nibbles[1::2], strict=True)
    return struct.pack("<e", scale) + bytes(low | high << 4 for low, high in pairs)


# What each dtype is as bytes, and the values that a reader must make of them.
DTYPES: list[tuple[str, int, tuple[int, ...], bytes, list[float]]] = [
    ("F32", 0, (2, 2), struct.pack("<4f", 1.5, -2, 3e38, -0.0), [1.5, -2, float(np.float32(3e38)), -0.0]),
    ("F16", 1, (3,), struct.pack("<3e", 1.5, -2, 65504), [1.5, -2, 65504]),
    ("BF16", 2, (2,), struct.pack("<2H", 0x3FC0, 0xC000), [1.5, -2]),
    ("BF16", 30, (2,), struct.pack("<2H", 0x3FC0, 0xC000), [1.5, -2]),
    ("F64", 3, (2,), struct.pack("<2d", 0.1, -7), [0.1, -7]),
    ("Q8", 9, (2, 2), struct.pack("<f4b", 0.5, -127, 0, 1, 127), [-63.5, 0, 0.5, 63.5]),
    ("Q8", 129, (1,), struct.pack("<fb", 2, -3), [-6]),
    ("Q4", 8, (2, 16), q4_block(0.25, [*range(16)] * 2), [value * 0.25 for value in BLOCK]),
    ("Q4", 128, (3,), q4_block(2, [8, 9, 0] + [8] * 29), [0, 2, -16]),
    ("Q4", 8, (33,), q4_block(1, [9] * 32) + q4_block(4, [7] + [8] * 31), [1.0] * 32 + [-4]),
]


@pytest.mark.parametrize(("dtype", "number", "shape", "data", "values"), DTYPES)
def test_a_hand_made_tensor_of_each_dtype_has_the_values_that_its_bytes_mean(
    tmp_path: Path, dtype: str, number: int, shape: tuple[int, ...], data: bytes, values: list[float]
) -> None:
    apr = whole(Apr([Entry(b"t", number, shape, data)]).write(tmp_path / "x.apr"))
    assert apr.tensors["t"].dtype == dtype
    found = values_of(apr, "t", mapped(apr))
    assert found.array.shape == shape
    assert found.dtype == (dtype if dtype in ("F32", "F16", "BF16", "F64") else "F32")
    wide = found if found.dtype == "F64" else converted(found, "F32")
    assert wide.array.reshape(-1).tolist() == values


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K"])
def test_k_quants_are_dequantised_as_the_gguf_package_has_them(tmp_path: Path, dtype: str) -> None:
    gguf = pytest.importorskip("gguf")
    number, size = {"Q4_K": (12, 144), "Q6_K": (14, 210)}[dtype]
    blocks = np.random.default_rng(1).integers(0, 256, (6, size), np.uint8)
    # Scales as float16 that are finite: at the block's beginning (Q4_K: two), or at its end (Q6_K).
    scales = np.array([0.5, 0.125], "<f2").view(np.uint8)
    if dtype == "Q4_K":
        blocks[:, :4] = scales
    else:
        blocks[:, -2:] = scales[:2]
    apr = whole(Apr([Entry(b"t", number, (3, 512), blocks.tobytes())]).write(tmp_path / "x.apr"))
    found = values_of(apr, "t", mapped(apr))
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])
    assert found.array.shape == (3, 512)
    assert np.array_equal(found.array.reshape(-1), wanted.reshape(-1))
    assert np.abs(found.array).max() > 0


def test_without_the_gguf_package_k_quants_name_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    apr = whole(Apr([Entry(b"t", 12, (256,), bytes(144))]).write(tmp_path / "x.apr"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"Q4_K weights need a package.*kdconsole\[import\]"):
        values_of(apr, "t", mapped(apr))


@pytest.mark.parametrize(("number", "name", "size"), [(4, "I32", 4), (5, "I64", 8), (6, "I8", 1), (7, "U8", 1)])
def test_integers_are_read_and_are_no_weights(tmp_path: Path, number: int, name: str, size: int) -> None:
    apr = whole(Apr([Entry(b"t", number, (2,), bytes(2 * size))]).write(tmp_path / "x.apr"))
    assert apr.tensors["t"].dtype == name
    with pytest.raises(ModelError, match=f"tensor t is {name}: integers"):
        values_of(apr, "t", mapped(apr))


def test_of_a_metadata_key_that_stands_twice_the_last_counts(tmp_path: Path) -> None:
    made = small()
    made.metadata = b'{"hidden_size": 1, "rms_norm_eps": null, "rms_norm_eps": 1e-5, "hidden_size": 7}'
    assert whole(made.write(tmp_path / "x.apr")).metadata == {"hidden_size": 7, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize("flags", [0, 8, 32, 128, 256, 512, 1024, 1024 | 32 | 8])
def test_flags_that_change_nothing_of_how_tensors_are_read_are_taken(tmp_path: Path, flags: int) -> None:
    made = small()
    made.flags = flags
    assert whole(made.write(tmp_path / "x.apr")).flags == flags


def test_a_tensor_of_no_values_and_one_of_no_dimensions_are_read(tmp_path: Path) -> None:
    entries = [Entry(b"empty", 0, (0, 4), b""), Entry(b"scalar", 0, (), struct.pack("<f", 3))]
    apr = whole(Apr(entries).write(tmp_path / "x.apr"))
    assert values_of(apr, "empty", mapped(apr)).array.shape == (0, 4)
    assert values_of(apr, "scalar", mapped(apr)).array.tolist() == 3.0


def change(**fields: Any) -> Callable[[], bytes]:
    def made() -> bytes:
        apr = small()
        for name, value in fields.items():
            setattr(apr, name, value)
        return apr.bytes()

    return made


def entry(**fields: Any) -> Callable[[], bytes]:
    """The second tensor of the small file doctored."""

    def made() -> bytes:
        apr = small()
        for name, value in fields.items():
            setattr(apr.entries[1], name, value)
        return apr.bytes()

    return made


def names(*given: bytes) -> Callable[[], bytes]:
    return lambda: Apr([Entry(name, 0, (1,), bytes(4)) for name in given]).bytes()


def flip(at: int) -> Callable[[], bytes]:
    def made() -> bytes:
        raw = bytearray(small().bytes())
        raw[at] ^= 1
        return bytes(raw)

    return made


def cut(length: int) -> Callable[[], bytes]:
    return lambda: small().bytes()[:length]


HUGE = 2**63
DOCTORED: list[tuple[str, Callable[[], bytes], str]] = [
    ("an older magic", change(magic=b"APR1"), "another kind: it begins with APR1"),
    ("the magic APRN", change(magic=b"APRN"), "another kind: it begins with APRN"),
    ("the magic APR2", change(magic=b"APR2"), "another kind: it begins with APR2"),
    ("a GGUF file", change(magic=b"GGUF"), "a GGUF file"),
    ("a zip archive", lambda: b"PK\x03\x04" + bytes(200), "a zip archive"),
    ("a safetensors file", lambda: (64).to_bytes(8, "little") + b"{" + bytes(200), "a safetensors file"),
    ("an empty file", lambda: b"", "an empty file"),
    ("nothing known", lambda: b"\x93NUMPY" + bytes(100), "of no known model format"),
    ("version 1", change(version=(1, 0)), "of version 1.0"),
    ("version 3", change(version=(3, 1)), "of version 3.1"),
    ("a wrong header CRC", change(header_crc=1), "the header says CRC-32 00000001"),
    ("a flipped bit in the header", flip(9), "the header says CRC-32"),
    ("a wrong footer CRC", change(footer_crc=1), "its last four bytes say CRC-32 00000001"),
    ("a flipped bit in a tensor", flip(-10), "all bytes before them have"),
    ("LZ4", change(flags=1), "flag LZ4 (1) is set"),
    ("Zstd", change(flags=2), "flag Zstd (2) is set"),
    ("encrypted", change(flags=4 | 1024), "flag encrypted (4) is set"),
    ("sharded", change(flags=16), "flag sharded (16) is set"),
    ("a filterbank", change(flags=64), "flag filterbank (64) is set"),
    ("column-major", change(flags=2048), "flag column-major (2048) is set"),
    ("an unknown flag", change(flags=4096), "unknown flag 4096 is set"),
    ("metadata of 17 MiB", change(header={"metadata_size": 17 << 20}), "metadata of 17,825,792 bytes"),
    ("metadata within the header", change(header={"metadata_offset": 60}), "the metadata begins at byte 60"),
    ("metadata past the end", change(header={"metadata_offset": HUGE}), "truncated: the metadata should go to"),
    ("metadata over the index", change(header={"metadata_size": 400}), "its parts overlap"),
    ("metadata that is no JSON", change(metadata=b"{'a': 1}"), "its metadata is not JSON"),
    ("metadata that is not UTF-8", change(metadata=b'{"a": "\xff"}'), "its metadata is not JSON"),
    ("metadata nested without end", change(metadata=b"[" * 100_000), "its metadata is not JSON"),
    ("metadata that is no object", change(metadata=b"[1]"), "JSON, but not an object"),
    ("an index past the end", change(header={"index_offset": HUGE}), "truncated: the tensor index should go to"),
    ("an index within the header", change(header={"index_offset": 8}), "the tensor index begins at byte 8"),
    ("data before the index", change(header={"data_offset": 64}), "its parts overlap"),
    ("data past the end", change(header={"data_offset": HUGE}), "truncated: the tensor data should go to"),
    ("data that is not aligned", change(between=32), "the tensor data begins at byte"),
    ("no tensor", change(entries=[]), "names no tensor"),
    ("4 billion tensors", change(count=2**32 - 1), "4,294,967,295 tensors; read are"),
    ("more tensors than the index holds", change(count=60_000), "60,000 tensors in an index of 128 bytes"),
    ("one tensor too many", change(count=3), "a name of 0 bytes"),
    ("a name of 300 bytes", names(b"n" * 300), "has a name of 300 bytes"),
    ("a name of no bytes", names(b""), "has a name of 0 bytes"),
    ("a name that is not UTF-8", names(b"\xff\xfe"), "is not UTF-8"),
    ("a name that stands twice", names(b"a", b"a"), "tensor a stands twice"),
    ("names that are not sorted", names(b"b", b"a"), "tensor a stands after b: the index is not sorted"),
    ("an unknown dtype", entry(dtype=99), "tensor b has the unknown dtype 99"),
    ("nine dimensions", entry(shape=(1,) * 9), "tensor b has 9 dimensions"),
    ("255 dimensions", entry(ndim=255), "tensor b has 255 dimensions"),
    ("a dimension of 2^63", entry(shape=(HUGE,)), "more values than any file"),
    ("dimensions whose product overflows", entry(shape=(2**40, 2**40)), "more values than any file"),
    ("dimensions that wrap to the right size", entry(shape=(2**63, 2, 3)), "more values than any file"),
    ("a size that is not the shape's", entry(size=8), "8 bytes stored, F16 of shape [3] takes 6"),
    ("blocks that are no whole number", entry(dtype=12), "is no whole number of blocks"),
    ("a size of 2^64 - 1", entry(size=2**64 - 1), "bytes stored"),
    ("a tensor that is not aligned", entry(offset=32), "which is no multiple of 64"),
    ("a tensor over another", entry(offset=0), "tensor a begins at byte 512, within tensor b"),
    ("a tensor outside of the file", entry(offset=2**20), "truncated: tensor b should go to"),
    ("a tensor past all numbers", entry(offset=2**64 - 64), "truncated: tensor b should go to"),
    ("a tensor over the footer", entry(dtype=7, shape=(66,), size=66), "truncated: tensor b should go to"),
    ("ten bytes", cut(10), "truncated: the file has 10 bytes"),
    ("the header alone", cut(64), "truncated: the file has 64 bytes"),
    ("cut within the metadata", cut(100), "truncated: the metadata should go to"),
    ("cut within the index", cut(64 + 320 + 30), "truncated:"),
    ("cut within the tensors", cut(-80), "truncated: tensor b"),
    ("cut within the last padding", cut(-10), "its last four bytes say"),
]


@pytest.mark.parametrize(("made", "said"), [case[1:] for case in DOCTORED], ids=[case[0] for case in DOCTORED])
def test_a_doctored_file_is_refused_in_a_tenth_of_a_second_by_its_own_message(
    tmp_path: Path, made: Callable[[], bytes], said: str
) -> None:
    path = tmp_path / "x.apr"
    path.write_bytes(made())
    seconds = []
    for _ in range(3):  # of three, for a machine that is busy
        before = time.perf_counter()
        with pytest.raises(ModelError) as error:
            whole(path)
        seconds.append(time.perf_counter() - before)
    text = str(error.value)
    assert said in text
    assert text.startswith(str(path))
    assert "; expected " in text
    assert min(seconds) < 0.1


def test_each_doctored_file_has_a_message_of_its_own(tmp_path: Path) -> None:
    told: dict[str, str] = {}
    for what, made, _ in DOCTORED:
        path = tmp_path / "x.apr"
        path.write_bytes(made())
        with pytest.raises(ModelError) as error:
            whole(path)
        told[what] = str(error.value)
    assert len(set(told.values())) == len(told)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a regular file"):
        read_apr(tmp_path)


def test_a_bidirectional_name_is_cleaned_before_it_is_told(tmp_path: Path) -> None:
    path = Apr([Entry("\u202eevil\x1b[2J".encode(), 99, (1,), bytes(4))]).write(tmp_path / "x.apr")
    with pytest.raises(ModelError) as error:
        read_apr(path)
    assert "\x1b" not in str(error.value)
    assert "\u202e" not in str(error.value)


def contents(path: Path) -> tuple[Any, ...]:
    apr = whole(path)
    view = mapped(apr)
    tensors = {name: (t.dtype, t.shape, values_of(apr, name, view).array.tobytes()) for name, t in apr.tensors.items()}
    return apr.metadata, tensors


def base() -> bytes:
    made = small()
    made.entries.append(Entry(b"c", 9, (4,), struct.pack("<f4b", 1, 1, 2, 3, 4)))
    made.entries.append(Entry(b"d", 8, (32,), q4_block(1, [3] * 32)))
    return made.bytes()


@given(
    flips=st.lists(st.tuples(st.integers(0, len(base()) - 1), st.integers(1, 255)), max_size=4),
    length=st.none() | st.integers(0, len(base())),
    mended=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_and_cut_files_are_refused_or_read_as_they_stand_and_cost_no_memory(
    tmp_path: Path, flips: list[tuple[int, int]], length: int | None, mended: bool
) -> None:
    raw = bytearray(base())
    for at, bits in flips:
        raw[at] ^= bits
    if length is not None:
        del raw[length:]
    if mended and len(raw) >= 68:  # as somebody would who wants it to be believed
        import zlib

        raw[40:44] = struct.pack("<I", zlib.crc32(raw[44:64], zlib.crc32(raw[:40])))
        raw[-4:] = struct.pack("<I", zlib.crc32(raw[:-4]))
    path = tmp_path / "x.apr"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        found = contents(path)
    except KdError:
        found = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    if found is not None and not mended:
        assert bytes(raw) == base()


BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    made = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6, unique=True)):
        try:
            if len(name.encode()) > 256:
                continue
        except UnicodeEncodeError:
            continue
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(BITS[dtype]).itemsize
        made[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return made or {"a": ("F32", (1,), struct.pack("<I", 0x7FC00001))}


@given(made=tensors(), key=st.text(max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_writer_writes_the_reader_reads_bit_for_bit(
    tmp_path: Path, made: dict[str, tuple[str, tuple[int, ...], bytes]], key: str
) -> None:
    path = tmp_path / "x.apr"
    path.unlink(missing_ok=True)
    metadata = {"key": key.encode("utf-8", "replace").decode(), "number": 1}
    outlines = {name: (dtype, shape) for name, (dtype, shape, _) in made.items()}
    write_apr(path, metadata, outlines, lambda name: made[name][2])
    apr = whole(path)
    assert apr.metadata == metadata
    view = mapped(apr)
    assert {n: (t.dtype, t.shape, bytes(view[t.begin : t.end])) for n, t in apr.tensors.items()} == made
    for name, tensor in apr.tensors.items():
        assert tensor.begin % 64 == 0
        found = values_of(apr, name, view)
        assert (found.dtype, found.array.shape, found.array.tobytes()) == made[name]


def test_nan_patterns_and_infinities_survive_writing_and_reading(tmp_path: Path) -> None:
    patterns = {
        "F32": struct.pack("<5I", 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x00000001),
        "F16": struct.pack("<5H", 0x7E00, 0x7C01, 0xFFFF, 0xFC00, 0x0001),
        "BF16": struct.pack("<5H", 0x7FC0, 0x7F81, 0xFFFF, 0xFF80, 0x0001),
    }
    path = tmp_path / "x.apr"
    write_apr(path, {}, {name: (name, (5,)) for name in patterns}, lambda name: patterns[name])
    apr = whole(path)
    assert {name: values_of(apr, name, mapped(apr)).array.tobytes() for name in patterns} == patterns


def test_the_writer_refuses_what_the_container_cannot_hold(tmp_path: Path) -> None:
    def write(outlines: dict[str, Any], data: bytes = bytes(4)) -> None:
        path = tmp_path / "x.apr"
        path.unlink(missing_ok=True)
        write_apr(path, {}, outlines, lambda name: data)

    for outlines, said in (
        ({}, "0 tensors"),
        ({"n" * 257: ("F32", (1,))}, "a name of 257 bytes"),
        ({"a\ud800": ("F32", (1,))}, r"a\\ud800: a name that is no UTF-8"),
        ({"a": ("F32", (1,) * 9)}, "9 dimensions; expected at most 8"),
        ({"a": ("I8", (4,))}, "I8 is not written"),
        ({"a": ("F32", (2,))}, "4 bytes; expected 8"),
    ):
        with pytest.raises(ModelError, match=said):
            write(outlines)


def test_float32_becomes_bfloat16_as_torch_rounds_it() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    bits[:4] = 0x3F808000, 0x3F818000, 0x00008000, 0x80000001  # ties, and subnormals
    wide = bits.view(np.float32)
    wanted = torch.from_numpy(wide.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    overflows = np.isfinite(wide) & ((wanted & 0x7FFF) == 0x7F80)
    numbers = ~np.isnan(wide) & ~overflows
    assert np.array_equal(converted(Values("F32", wide[numbers]), "BF16").array, wanted[numbers])
    nans = converted(Values("F32", wide[np.isnan(wide)]), "BF16")
    assert len(nans.array) > 100
    assert bool(np.isnan(converted(nans, "F32").array).all())
    with pytest.raises(ModelError, match="too large for BF16"):
        converted(Values("F32", np.array([3.4e38], np.float32)), "BF16")


def test_a_value_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ModelError, match="too large for F16"):
        converted(Values("F32", np.array([70000.0], np.float32)), "F16")


def test_the_metadata_is_json_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.apr"
    write_apr(path, {"b": 1, "a": "ü"}, {"t": ("F32", (1,))}, lambda name: bytes(4))
    raw = path.read_bytes()
    offset, size = struct.unpack_from("<QI", raw, 12)
    assert json.loads(raw[offset : offset + size]) == {"a": "ü", "b": 1}
    assert struct.unpack_from("<H", raw, 6)[0] == 0
