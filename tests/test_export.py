"""The sparse file: every bit comes back, sizes are in proportion, and no file can do more than raise FormatError."""

from __future__ import annotations

import binascii
import errno
import json
import os
import random
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dualprune import encodings, export
from dualprune.errors import DualpruneError, FormatError
from dualprune.export import describe, load_sparse, save_sparse
from dualprune.quantise import snap

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BIT_DTYPES = [dtype for dtype in encodings.DTYPES.values() if dtype is not torch.bool]
pytestmark = pytest.mark.filterwarnings("ignore:.*are −0.0")


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(INTEGER[tensor.dtype.itemsize]).numpy().tobytes()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random bits (NaNs with payloads and subnormals among them) where kept, zero elsewhere."""
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape))
    bits = generator.integers(1, 256, (count, dtype.itemsize), dtype=np.uint8)
    bits[generator.random(count) >= density] = 0
    if not count:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(bits.tobytes()), dtype=dtype).reshape(shape)


def roundtrip(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    assert save_sparse(state, path) == path.stat().st_size
    return load_sparse(path)


# --- round trips


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(BIT_DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.003, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_tensor_comes_back_bit_for_bit(tmp_path, dtype, shape, density, seed):
    state = {"w": sparse(shape, density, dtype, seed)}
    assert_same(roundtrip(state, tmp_path / "f.safetensors"), state)


@settings(max_examples=100, deadline=None)
@given(
    numel=st.integers(1, 3000),
    kept=st.integers(0, 3000),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    clustered=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_each_encoding_on_its_own(numel, kept, itemsize, clustered, seed):
    generator = np.random.default_rng(seed)
    where = np.arange(min(kept, numel)) if clustered else np.sort(generator.choice(numel, min(kept, numel), False))
    bits = np.zeros(numel, f"i{itemsize}" if itemsize > 1 else "u1")
    bits[where] = generator.integers(1, 100, where.size)
    dtype = encodings.DTYPE_NAMES[INTEGER[itemsize]]
    cut = encodings.Cut(bits, where)
    for name, encoding in encodings.ENCODINGS.items():
        if (fit := encoding.fit(cut)) is None:
            assert (name == "gaps" and 2 * where.size > numel) or "codes" in name
            continue
        data = bytearray(encoding.pack(cut, fit[1]).tobytes())
        assert len(data) == fit[0]
        layout = encodings.Layout(name, dtype, (numel,), numel if name == "dense" else where.size, fit[1])
        encoding.check(layout, len(data))
        assert (encoding.unpack(layout, data).numpy() == bits).all()


def test_negative_zero_and_nan_payloads_are_values(tmp_path):
    bits = torch.zeros(4096, dtype=torch.int32)
    bits[[5, 70, 71, 4095]] = torch.tensor([-(2**31), 0x7FC00001, 0x7F800001, 1], dtype=torch.int32)
    state = {"w": bits.view(torch.float32)}
    assert_same(roundtrip(state, tmp_path / "f"), state)
    assert describe(tmp_path / "f")[0]["kept"] == 4


@pytest.mark.filterwarnings("error")
def test_negative_zeros_left_by_a_mask_are_reported_and_can_be_dropped(tmp_path):
    weight = -torch.rand(100, 100) - 0.1
    mask = torch.rand(100, 100) < 0.1
    with pytest.warns(UserWarning, match="drop_negative_zeros"):
        wasteful = save_sparse({"w": weight * mask}, tmp_path / "a")
    lean = save_sparse({"w": weight * mask}, tmp_path / "b", drop_negative_zeros=True)
    assert lean == save_sparse({"w": torch.where(mask, weight, 0.0)}, tmp_path / "c") < wasteful / 5
    assert_same(load_sparse(tmp_path / "b"), load_sparse(tmp_path / "c"))


def test_memory_layouts_come_back_in_logical_order(tmp_path):
    image = sparse((8, 4, 5, 6), 0.1)
    image = torch.where(image.isnan(), 1.0, image)
    state = {
        "channels_last": image.to(memory_format=torch.channels_last),
        "transposed": image.reshape(32, 30).t(),
        "strided": image[:, ::2, 1:, ::3],
        "expanded": torch.tensor([0.0, 2.0]).expand(40, 2),
        "conjugate": sparse((50,), 0.2, torch.complex64).nan_to_num(1).conj(),
        "scalar": torch.tensor(3),
        "zero": torch.tensor(0.0),
        "empty": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "nothing": torch.zeros(500, 40),
        "full": torch.ones(70, 3, dtype=torch.float16),
        "flags": torch.arange(100) % 7 == 0,
    }
    got = roundtrip(state, tmp_path / "f")
    assert_same(got, {name: tensor.resolve_conj().clone() for name, tensor in state.items()})
    assert {row["name"]: row["encoding"] for row in describe(tmp_path / "f")}["nothing"] == "gaps"


@pytest.mark.parametrize("name", ["", "a b", 'quote"\\', "ünï–☃😀", "tab\tnul\0", "0", "w.bitmask", "x" * 5000])
def test_names(tmp_path, name):
    state = {name: sparse((1000,), 0.05), "other" + name: torch.ones(2)}
    assert_same(roundtrip(state, tmp_path / "f"), state)
    assert [row["name"] for row in describe(tmp_path / "f")] == list(state)
    assert load_file(tmp_path / "f").keys() == state.keys()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 20)
        self.head = nn.Linear(20, 50)
        self.norm = nn.BatchNorm1d(50)
        self.head.weight = self.embed.weight


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path):
    model = Tied()
    tied = save_sparse(model, tmp_path / "f")
    got = load_sparse(tmp_path / "f")
    assert got["embed.weight"] is got["head.weight"]
    assert_same(got, model.state_dict())
    separate = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tied < save_sparse(separate, tmp_path / "g") - 3900
    (row,) = (row for row in describe(tmp_path / "f") if row["encoding"] == "alias")
    assert (row["name"], row["alias_of"], row["bytes"]) == ("head.weight", "embed.weight", 0)
    fresh = Tied()
    fresh.load_state_dict(got)
    assert_same(fresh.state_dict(), model.state_dict())


def test_views_that_only_overlap_are_not_tied(tmp_path):
    base = torch.arange(24.0)
    state = {"a": base, "b": base[:12], "c": base.reshape(4, 6), "d": base.reshape(6, 4).t(), "e": base.view(torch.int32)}
    got = roundtrip(state, tmp_path / "f")
    assert_same(got, state)
    assert len({id(tensor) for tensor in got.values()}) == 5


# --- the file


GOLDEN_HEADER = (
    b'{"__metadata__":{"dualprune.format":"sparse","dualprune.version":"1","dualprune.tensors":"{\\"w\\":[\\"gaps\\",'
    b'\\"F32\\",[2,4,8],3,4],\\"t\\":[\\"alias\\",\\"w\\"]}","dualprune.crc32":"7dac69df"},"w":{"dtype":"U8",'
    b'"shape":[15],"data_offsets":[8,23]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     '
)
GOLDEN_DATA = bytes.fromhex("0000803f00000040 0000c03f000000c00000803e 2908 25")
GOLDEN = struct.pack("<Q", 296) + GOLDEN_HEADER + GOLDEN_DATA


def golden_state() -> dict[str, Tensor]:
    w = torch.zeros(2, 4, 8)
    w[0, 0, 3], w[0, 2, 4], w[1, 3, 7] = 1.5, -2.0, 0.25
    return {"w": w, "b": torch.tensor([1.0, 2.0]), "t": w}


def test_version_1_is_these_bytes(tmp_path):
    (tmp_path / "old").write_bytes(GOLDEN)
    assert_same(load_sparse(tmp_path / "old"), golden_state())
    save_sparse(golden_state(), tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == GOLDEN


def slow_read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """A reader by docs/file-format.md alone, one bit at a time: dtype, shape and bytes of every tensor."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__")
    data = {name: content[start:][slice(*entry["data_offsets"])] for name, entry in header.items()}
    checked = b"".join(f"{k}\0{v}\0".encode() for k, v in sorted(metadata.items()) if k != "dualprune.crc32")
    for name, entry in sorted(header.items()):
        checked += f"{name}\0{entry['dtype']}\0{','.join(map(str, entry['shape']))}\0".encode() + data[name]
    assert f"{binascii.crc32(checked):08x}" == metadata["dualprune.crc32"]
    table = json.loads(metadata["dualprune.tensors"])
    found = {name: (e["dtype"], e["shape"], data[name]) for name, e in header.items() if name not in table}
    for name, (encoding, *row) in sorted(table.items(), key=lambda item: item[1][0] == "alias"):
        found[name] = found[row[0]] if encoding == "alias" else (*row[:2], slow_decode(encoding, data[name], *row))
    return found


def slow_decode(encoding: str, data: bytes, dtype: str, shape: list[int], kept: int, *params: int) -> bytes:
    kind, size, numel = encodings.DTYPES[dtype], encodings.DTYPES[dtype].itemsize, int(np.prod(shape))
    index, _, codes = encoding.rpartition("+")
    if codes == "codes":
        width, count = params[-1], kept if index else numel
        (scale,), start = struct.unpack("<f", data[:4]), 4 + -(-width * count // 8)
        packed = slow_bits(data[4:start])
        numbers = [sum(packed[j * count + i] << j for j in range(width)) for i in range(count)]
        levels = [0, *(sign * q for q in range(1, 129) for sign in (-1, 1))]
        coded = [np.float32(levels[n + bool(index)]) * np.float32(scale) for n in numbers]
        values = [raw(torch.tensor(v).to(kind)) for v in coded]
        if not index:
            return b"".join(values)
    else:
        index, start, params = encoding, size * kept, (*params, 0)
        values = [data[size * j : size * (j + 1)] for j in range(kept)]
    bits = slow_bits(data[start:])
    if index == "bitmask":
        places = [i for i, bit in enumerate(bits) if bit]
    else:
        k = params[0]
        unary, places, at = iter(bits[-(-k * kept // 8) * 8 :]), [], -1
        for j in range(kept):
            low = sum(bits[plane * kept + j] << plane for plane in range(k))
            at += 1 + low + (sum(1 for _ in iter(lambda: next(unary), 1)) << k)
            places.append(at)
    dense = [bytes(size)] * numel
    for place, value in zip(places, values, strict=True):
        dense[place] = value
    return b"".join(dense)


def slow_bits(data: bytes) -> list[int]:
    return [data[i // 8] >> i % 8 & 1 for i in range(8 * len(data))]


def test_a_reader_written_from_the_docs_agrees(tmp_path):
    state = {f"{d}{str(dtype)[6:]}": sparse((7, 300), d, dtype) for d in (0.01, 0.1, 0.6) for dtype in BIT_DTYPES}
    state |= {**golden_state(), "zeros": torch.zeros(999)}
    state |= {f"q{d}{dtype}": quantised((9, 100), d, 2 + i, dtype) for d in (0.05, 0.4, 1) for i, dtype in enumerate(FLOATS)}
    save_sparse(state, tmp_path / "f", metadata={"ä": "ö", "z": ""})
    assert {row["encoding"] for row in describe(tmp_path / "f")} == {*encodings.ENCODINGS, "alias"}
    got = slow_read(tmp_path / "f")
    assert got == {n: (encodings.DTYPE_NAMES[t.dtype], list(t.shape), raw(t)) for n, t in state.items()}


def test_the_bitmask_is_these_bytes():
    bits = np.array([7, 0, 9, 0, 0, 0, 0, 0, 0, 1], np.uint8)
    cut = encodings.Cut(bits, np.flatnonzero(bits))
    assert encodings.ENCODINGS["bitmask"].pack(cut, ()).tobytes() == bytes([7, 9, 1, 0b00000101, 0b00000010])


def test_other_tools_open_the_file(tmp_path):
    state = {"w": sparse((64, 64), 0.1), "b": torch.arange(5.0), "half": torch.ones(3, dtype=torch.float16)}
    save_sparse(state, tmp_path / "f", metadata={"recipe": "größe 1", "": ""})
    plain = load_file(tmp_path / "f")
    assert plain.keys() == state.keys() and plain["b"].equal(state["b"]) and plain["w"].dtype is torch.uint8
    with safe_open(tmp_path / "f", "pt") as file:
        metadata = file.metadata()
    assert metadata["recipe"] == "größe 1" and metadata["dualprune.format"] == "sparse"
    save_file(plain, tmp_path / "again", metadata)  # order and header change, the checksum holds
    assert_same(load_sparse(tmp_path / "again"), state)


def test_a_plain_safetensors_file_loads(tmp_path):
    state = {"a": torch.randn(3, 4), "m": torch.tensor([True, False]), "n": torch.tensor(7), "e": torch.empty(0, 2)}
    save_file(state, tmp_path / "f", {"format": "pt"})
    assert_same(load_sparse(tmp_path / "f"), state)
    assert {row["encoding"] for row in describe(tmp_path / "f")} == {"dense"}
    save_file({}, tmp_path / "f")
    assert load_sparse(tmp_path / "f") == {} == roundtrip({}, tmp_path / "g")


def test_describe_is_json_and_adds_up(tmp_path):
    state = {"w": sparse((100, 10), 0.1), "b": torch.ones(10, dtype=torch.bfloat16)}
    size = save_sparse(state, tmp_path / "f")
    rows = json.loads(json.dumps(describe(tmp_path / "f")))
    kept = int(state["w"].view(torch.int32).count_nonzero())
    assert [(r["name"], r["shape"], r["dtype"], r["kept"]) for r in rows] == [
        ("w", [100, 10], "float32", kept),
        ("b", [10], "bfloat16", 10),
    ]
    assert sum(row["bytes"] for row in rows) + 8 + len(header_bytes(tmp_path / "f")) == size


def header_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize(
    ("density", "dtype", "most"),
    [(0.9, torch.float32, 4.15), (0.5, torch.float32, 4.26), (0.1, torch.float32, 4.62), (0.01, torch.float32, 5.1),
     (0.1, torch.float16, 2.62), (0.1, torch.int8, 1.62), (1 / 630, torch.float32, 5.6)],
)  # fmt: skip
def test_bytes_per_kept_weight(tmp_path, density, dtype, most):
    """Within 3 % of the entropy of independent positions, the header included (200 to 400 bytes)."""
    tensor = sparse((512, 512), density, dtype)
    size = save_sparse({"w": tensor}, tmp_path / "f")
    kept = describe(tmp_path / "f")[0]["kept"]
    assert (size - 400) / kept <= most
    index_bits = 8 * (describe(tmp_path / "f")[0]["bytes"] / kept - dtype.itemsize)
    p = kept / tensor.numel()
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    assert index_bits < max(1.03 * entropy, 1 / p) + 0.05 and (p > 0.4 or index_bits < 1.03 * entropy + 0.05)


def test_lenet5_at_630x_takes_a_few_kilobytes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape, kept in [
        ("conv1", (20, 1, 5, 5), 60), ("conv2", (50, 20, 5, 5), 150), ("fc1", (500, 800), 350), ("fc2", (10, 500), 123)
    ]:  # fmt: skip
        weight = torch.zeros(int(np.prod(shape)))
        weight[torch.randperm(weight.numel(), generator=generator)[:kept]] = torch.randn(kept, generator=generator)
        state |= {f"{name}.weight": weight.reshape(shape), f"{name}.bias": torch.randn(shape[0], generator=generator)}
    assert save_sparse(state, tmp_path / "f") < 7_000  # 2,732 of values, 2,320 of dense biases


# --- values on a grid

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def quantised(
    shape: tuple[int, ...], density: float, bits: int, dtype: torch.dtype = torch.float32, scale: float = 0.037, seed: int = 0
) -> Tensor:
    """All levels of the grid but zero, evenly, where kept."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(1, top + 1, shape, generator=generator) * (2 * torch.randint(2, shape, generator=generator) - 1)
    values = (codes.float() * scale).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < density, values, torch.zeros((), dtype=dtype))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(FLOATS),
    bits=st.integers(2, 8),
    density=st.sampled_from([0.003, 0.03, 0.3, 0.9, 1.0]),
    scale=st.floats(2.0**-20, 2.0**8, width=32),
    seed=st.integers(0, 2**31),
)
def test_quantised_tensors_come_back_bit_for_bit_and_small(tmp_path, dtype, bits, density, scale, seed):
    state = {"w": quantised((40, 50), density, bits, dtype, scale, seed)}
    assert_same(roundtrip(state, tmp_path / "f"), state)
    (row,) = describe(tmp_path / "f")
    if row["kept"] > 50 and dtype not in (torch.float16, torch.bfloat16):  # halves of few bits may be on a smaller grid
        assert "codes" in row["encoding"] and row["value_bits"] <= bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("density", [0.02, 0.35, 1.0])
def test_the_size_is_that_of_index_and_codes(tmp_path, bits, density):
    weight = quantised((200, 300), density, bits)
    save_sparse({"w": weight}, tmp_path / "f")
    (row,) = describe(tmp_path / "f")
    kept = int(weight.count_nonzero())
    assert (row["kept"], row["dtype"]) == (kept, "float32")
    width = bits if bits > 2 or density == 1 else 1  # two levels beside the zero are told apart by one bit
    assert row["value_bits"] == width
    save_sparse({"w": torch.where(weight != 0, torch.rand(200, 300) + 0.5, 0)}, tmp_path / "raw")
    (other,) = describe(tmp_path / "raw")
    index = {"codes": 0, "bitmask+codes": 7500, "gaps+codes": other["bytes"] - 4 * kept}[row["encoding"]]
    values = weight.numel() if row["encoding"] == "codes" else kept
    assert row["bytes"] == 4 + -(-width * values // 8) + index


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_that_quantise_makes_is_stored_as_codes(tmp_path, bits):
    torch.manual_seed(bits)
    state = {str(d): snap(torch.where(torch.rand(9000) < d, torch.randn(9000), 0), bits).to(torch.float32) for d in (0.1, 1)}
    state |= {str(dtype): snap(torch.randn(3000).to(dtype), bits) for dtype in FLOATS}
    assert_same(roundtrip(state, tmp_path / "f"), state)
    assert {row["value_bits"] <= bits for row in describe(tmp_path / "f")} == {True}


def test_a_negative_zero_is_on_no_grid(tmp_path):
    weight = quantised((2000,), 0.1, 4)
    weight[3] = -0.0
    assert_same(roundtrip({"w": weight}, tmp_path / "f"), {"w": weight})
    assert describe(tmp_path / "f")[0]["encoding"] == "gaps"
    save_sparse({"w": weight}, tmp_path / "f", drop_negative_zeros=True)
    assert describe(tmp_path / "f")[0]["encoding"] == "gaps+codes"


def test_the_codes_are_these_bytes():
    values = torch.tensor([0.5, 0, -1.0, 0, 0, 0, 0, 0, 0, 1.5])
    cut = encodings.Cut(export._bits(values), np.array([0, 2, 9]), torch.float32)
    scale = struct.pack("<f", 0.5)
    assert cut.grid[1].tolist() == [1, 2, 5]
    # bit 0: 1 0 1, bit 1: 0 1 0, bit 2: 0 0 1; then the bit mask
    assert encodings.ENCODINGS["bitmask+codes"].pack(cut, (3,)).tobytes() == scale + bytes([0b00010101, 1, 5, 2])
    # one more: 2, 3, 6 in three planes of ten
    planes = sum(1 << p for p in (9 * 0 + 2, 10, 12, 19, 29))
    assert encodings.ENCODINGS["codes"].pack(cut, (3,)).tobytes() == scale + planes.to_bytes(4, "little")


# --- refusals on the way out


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"norm._extra_state": {"step": 1}}, "'norm._extra_state' is a dict.*isinstance"),
        ({"none": None}, "NoneType"),
        ({3: torch.ones(1)}, "name is valid text.*3"),
        ({"__metadata__": torch.ones(1)}, "rename"),
        ({"\ud800": torch.ones(1)}, "valid text"),
        ({"m": torch.ones(1, device="meta")}, "'m'.*meta"),
        ({"s": torch.eye(3).to_sparse()}, "'s'.*sparse_coo"),
        ({"c": torch.ones(1, dtype=torch.complex128)}, "'c' is torch.complex128.*convert"),
        ({"deep": torch.ones([1] * 65)}, "65 dimensions"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, entry, what):
    (tmp_path / "f").write_text("old")
    with pytest.raises(DualpruneError, match=what):
        save_sparse({"fine": torch.ones(2), **entry}, tmp_path / "f")
    assert [file.name for file in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"dualprune.version": "2"}, {"a": "\udfff"}])
def test_metadata_that_cannot_be_stored(tmp_path, metadata):
    with pytest.raises(DualpruneError, match="metadata"):
        save_sparse({}, tmp_path / "f", metadata=metadata)


def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch):
    state = {"w": sparse((64, 64), 0.1)}
    save_sparse(state, tmp_path / "f")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_sparse({"w": torch.ones(9)}, tmp_path / "f")
    assert_same(load_sparse(tmp_path / "f"), state)
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="file size limits are POSIX")
def test_a_write_cut_short_leaves_the_previous_file(tmp_path):
    import resource

    state = {"w": torch.arange(10.0)}
    save_sparse(state, tmp_path / "f")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError):
            save_sparse({"w": torch.rand(100_000)}, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(load_sparse(tmp_path / "f"), state)
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_header_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_HEADER_LIMIT", 1000)
    with pytest.raises(DualpruneError, match="a header holds 1000"):
        save_sparse({"w" * 1000: torch.ones(1)}, tmp_path / "f")
    assert not any(tmp_path.iterdir())


# --- refusals on the way in


def forge(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sparse_header(table: object, parts: dict[str, object], **metadata: str) -> dict[str, object]:
    text = table if isinstance(table, str) else json.dumps(table)
    ours = {"format": "sparse", "version": "1", "crc32": "00000000", "tensors": text, **metadata}
    return {"__metadata__": {f"dualprune.{key}": value for key, value in ours.items()}, **parts}


def part(size: int, begin: int = 0, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [size] if shape is None else shape, "data_offsets": [begin, begin + size]}


ONE = {"w": part(3)}
HALF = struct.pack("<f", 0.5)


def codes_header(row: list[object]) -> dict[str, object]:
    return sparse_header({"w": row}, {"w": part(9)})


BAD_HEADERS = {
    "garbage": (b"\x80\x04garbage", b"", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not JSON"),
    "deep": (b"[" * 200_000, b"", "not JSON"),
    "huge number": (b'{"w": ' + b"9" * 10_000 + b"}", b"", "not JSON"),
    "a list": (b"[1]", b"", "JSON object"),
    "twice": (b'{"w": 1, "w": 2}', b"", "'w' stands twice"),
    "surrogate": (b'{"\\ud800": 1}', b"", "no valid text"),
    "metadata surrogate": ({"__metadata__": {"a": "\ud800"}}, b"", "__metadata__ maps text to valid text"),
    "metadata list": ({"__metadata__": []}, b"", "__metadata__"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "entry": ({"w": [1]}, b"", "'w': expected dtype"),
    "entry keys": ({"w": {**part(1), "x": 1}}, b"1", "'w': expected dtype"),
    "dtype": ({"w": part(4, dtype="F31")}, b"1234", "'w': dtype is one of"),
    "dtype list": ({"w": part(4, dtype=["F32"])}, b"1234", "'w': dtype"),
    "negative": ({"w": part(4, shape=[-2, -2])}, b"1234", "'w': shape"),
    "float": ({"w": part(4, shape=[4.0])}, b"1234", "'w': shape"),
    "bool": ({"w": part(1, shape=[True])}, b"1", "'w': shape"),
    "shape text": ({"w": part(4, shape="4")}, b"1234", "'w': shape"),
    "overflow": ({"w": part(0, shape=[2**40, 2**40])}, b"", "more than"),
    "overflow by zero": ({"w": part(0, shape=[0, 2**50, 2**50])}, b"", "more than"),
    "length": ({"w": part(0, shape=[2**64])}, b"", "'w': shape"),
    "rank": ({"w": part(1, shape=[1] * 100)}, b"1", "at most 64"),
    "too few bytes": ({"w": part(3, shape=[1], dtype="F32")}, b"123", "needs 4 bytes"),
    "offsets": ({"w": {**part(3), "data_offsets": [0]}}, b"123", "data_offsets"),
    "offsets back": ({"w": {**part(3), "data_offsets": [3, 0]}}, b"123", "needs 3 bytes"),
    "offsets negative": ({"w": {**part(3), "data_offsets": [-3, 0]}}, b"123", "data_offsets"),
    "past the end": ({"w": part(100)}, b"123", "truncated"),
    "far past the end": ({"w": part(2**50)}, b"123", "truncated"),
    "left over": ({"w": part(3)}, b"1234", "too long"),
    "hole": ({"w": part(3, 1)}, b"1234", "'w': its data begin"),
    "overlap": ({"v": part(3), "w": part(3, 1)}, b"1234", "'w': its data begin"),
    "not a bool": ({"w": part(3, dtype="BOOL")}, b"\0\1\2", "BOOL is 0 or 1"),
    "format": (sparse_header({}, {}, format="dense"), b"", "format is 'sparse'"),
    "newer": (sparse_header({}, {}, version="2"), b"", "newer dualprune: upgrade"),
    "no version": (sparse_header({}, {}, version="one"), b"", "not a version"),
    "unicode version": (sparse_header({}, {}, version="²"), b"", "not a version"),
    "extra key": (sparse_header({}, {}, other=""), b"", "has the keys"),
    "only one key": ({"__metadata__": {"dualprune.tensors": "{}"}}, b"", "format"),
    "table": (sparse_header("{", {}), b"", "dualprune.tensors is not JSON"),
    "table deep": (sparse_header("[" * 100_000, {}), b"", "not JSON"),
    "table list": (sparse_header([], {}), b"", "JSON object"),
    "table twice": (sparse_header('{"w": [], "w": []}', {}), b"", "'w' stands twice"),
    "row": (sparse_header({"w": 1}, ONE), b"123", "'w': its table entry"),
    "row empty": (sparse_header({"w": []}, ONE), b"123", "'w': its table entry"),
    "row short": (sparse_header({"w": ["gaps", "U8", [9]]}, ONE), b"123", "'w': expected"),
    "row float": (sparse_header({"w": ["gaps", "U8", [9], 1.0, 1]}, ONE), b"123", "'w': expected"),
    "row negative": (sparse_header({"w": ["gaps", "U8", [9], -1, 1]}, ONE), b"123", "'w': expected"),
    "row dtype": (sparse_header({"w": ["gaps", "X", [9], 1, 1]}, ONE), b"123", "'w': dtype"),
    "row bool": (sparse_header({"w": ["gaps", "BOOL", [9], 1, 1]}, ONE), b"123", "'w'.*BOOL"),
    "row shape": (sparse_header({"w": ["gaps", "U8", [2**99], 1, 1]}, ONE), b"123", "'w': shape"),
    "encoding": (sparse_header({"w": ["bitmsk", "U8", [9], 1]}, ONE), b"123", "'bitmask'.*upgrade"),
    "encoding dense": (sparse_header({"w": ["dense", "U8", [3], 3]}, ONE), b"123", "unknown encoding"),
    "missing": (sparse_header({"v": ["gaps", "U8", [9], 1, 1]}, ONE), b"123", "'v'.*no data"),
    "part dtype": (
        sparse_header({"w": ["gaps", "U8", [9], 1, 1]}, {"w": part(3, dtype="I8")}), b"123", "'w'.*are U8",
    ),
    "part shape": (
        sparse_header({"w": ["gaps", "U8", [9], 1, 1]}, {"w": part(3, shape=[1, 3])}), b"123", "'w'.*one dimension",
    ),
    "alias nowhere": (sparse_header({"a": ["alias", "b"]}, ONE), b"123", "'a': an alias names"),
    "alias self": (sparse_header({"a": ["alias", "a"]}, ONE), b"123", "'a': an alias names"),
    "alias chain": (sparse_header({"a": ["alias", "w"], "b": ["alias", "a"]}, ONE), b"123", "'b': an alias names"),
    "alias row": (sparse_header({"a": ["alias", "w", 1]}, ONE), b"123", "'a': an alias names"),
    "alias and data": (sparse_header({"w": ["alias", "w"]}, ONE), b"123", "'w': is an alias"),
    "kept too many": (sparse_header({"w": ["bitmask", "U8", [8], 9]}, {"w": part(10)}), b"1" * 10, "9 kept of 8"),
    "mask size": (sparse_header({"w": ["bitmask", "U8", [8], 1]}, ONE), b"123", "'w': 1 of 8 elements need 2"),
    "mask params": (sparse_header({"w": ["bitmask", "U8", [8], 2, 0]}, ONE), b"123", "no parameters"),
    "mask count": (sparse_header({"w": ["bitmask", "U8", [8], 2]}, ONE), b"12\7", "mask keeps 3.*says 2"),
    "mask padding": (sparse_header({"w": ["bitmask", "U8", [7], 2]}, ONE), b"12\x81", "past the end"),
    "gaps k": (sparse_header({"w": ["gaps", "U8", [64], 1, 0]}, ONE), b"123", "one parameter k"),
    "gaps k large": (sparse_header({"w": ["gaps", "U8", [64], 1, 7]}, ONE), b"123", "one parameter k"),
    "gaps k huge": (sparse_header({"w": ["gaps", "U8", [64], 0, 2**62]}, {"w": part(0)}), b"", "one parameter k"),
    "gaps params": (sparse_header({"w": ["gaps", "U8", [64], 1, 1, 1]}, ONE), b"123", "one parameter k"),
    "gaps short": (sparse_header({"w": ["gaps", "U8", [64], 2, 1]}, ONE), b"123", "at least 4"),
    "gaps of none": (sparse_header({"w": ["gaps", "U8", [64], 0, 1]}, ONE), b"123", "at least 0"),
    "gaps too few": (sparse_header({"w": ["gaps", "U8", [64], 1, 1]}, ONE), b"1\0\0", "place 0 values.*says 1"),
    "gaps too many": (sparse_header({"w": ["gaps", "U8", [64], 1, 1]}, ONE), b"1\0\3", "place 2 values.*says 1"),
    "gaps left over": (sparse_header({"w": ["gaps", "U8", [64], 1, 1]}, {"w": part(4)}), b"1\0\1\0", "left over"),
    "gaps padding": (sparse_header({"w": ["gaps", "U8", [64], 1, 1]}, ONE), b"1\2\1", "past the end"),
    "gaps outside": (sparse_header({"w": ["gaps", "U8", [14], 1, 1]}, ONE), b"1\0\x80", "element 14, it has 14"),
    "gaps far outside": (sparse_header({"w": ["gaps", "U8", [4], 1, 2]}, ONE), b"1\0\x80", "past its 4 elements"),
    "codes width": (codes_header(["codes", "F32", [4], 4, 9]), b"1" * 9, "'w': codes are 1 to 8 bits"),
    "codes width 0": (codes_header(["codes", "F32", [4], 4, 0]), b"1" * 9, "'w': codes are 1 to 8 bits"),
    "codes no width": (codes_header(["gaps+codes", "F32", [4], 4]), b"1" * 9, "'w': codes are 1 to 8 bits"),
    "codes of ints": (codes_header(["codes", "I32", [4], 4, 2]), b"1" * 9, "'w'.*stand for floats"),
    "codes size": (codes_header(["codes", "F32", [40], 4, 2]), b"1" * 9, "'w': 40 codes need 14 bytes"),
    "codes params": (codes_header(["codes", "F32", [20], 4, 1, 2]), b"1" * 9, "one parameter"),
    "codes count": (codes_header(["codes", "F32", [20], 4, 2]), HALF + b"\1\0\0\0\0", "1 codes are not zero.*says 4"),
    "codes padding": (codes_header(["codes", "F32", [19], 1, 2]), HALF + b"\1\0\0\0\x80", "past the end"),
    "codes scale 0": (codes_header(["codes", "F32", [20], 1, 2]), b"\0\0\0\0\1\0\0\0\0", "scale.*positive"),
    "codes scale nan": (codes_header(["codes", "F32", [20], 1, 2]), b"\0\0\xc0\x7f\1\0\0\0\0", "scale.*positive"),
    "codes scale inf": (codes_header(["codes", "F32", [20], 1, 2]), b"\0\0\x80\x7f\1\0\0\0\0", "scale.*positive"),
    "codes scale negative": (codes_header(["codes", "F32", [20], 1, 2]), b"\0\0\0\xbf\1\0\0\0\0", "scale.*positive"),
    "codes overflow": (codes_header(["codes", "F16", [20], 1, 2]), b"\0\0\x80\x4f\1\0\0\0\0", "out of the range"),
    "codes 255": (codes_header(["codes", "F32", [5], 5, 8]), HALF + b"\xff" * 5, "largest code is 255"),
    "mask codes size": (codes_header(["bitmask+codes", "F32", [9], 4, 8]), HALF + b"1" * 5, "index.* 9 elements need 6"),
    "mask codes top": (codes_header(["bitmask+codes", "F32", [32], 1, 8]), HALF + b"\xfe\1\0\0\0", "largest code is 254"),
    "mask codes short": (codes_header(["bitmask+codes", "F32", [99], 60, 2]), b"1" * 9, "60 codes need at least 19"),
    "mask codes index": (codes_header(["bitmask+codes", "F32", [25], 3, 2]), HALF + b"\0\1\0\0\0", "mask keeps 1.*says 3"),
    "gaps codes k": (codes_header(["gaps+codes", "F32", [64], 1, 2]), b"1" * 9, "index.*one parameter k"),
    "gaps codes outside": (
        codes_header(["gaps+codes", "F32", [14], 1, 1, 2]), HALF + b"\0\0\0\0\x80", "element 78|left over|place|past",
    ),
    "codes bomb": (codes_header(["gaps+codes", "F64", [2**50], 0, 1, 1]), HALF + b"12345", "at least|max_elements"),
    "bomb": (sparse_header({"w": ["gaps", "F64", [2**50], 0, 1]}, {"w": part(0)}), b"", "max_elements"),
    "checksum": (sparse_header({}, ONE), b"123", "damaged: its CRC-32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_malicious_file_is_a_format_error(tmp_path, case):
    header, data, what = BAD_HEADERS[case]
    path = forge(tmp_path / "evil.safetensors", header, data)
    with pytest.raises(FormatError, match=f"evil.safetensors: .*{what}") as caught:
        load_sparse(path)
    assert len(str(caught.value)) < 1000


def test_the_forged_frame_is_sound(tmp_path):
    """The cases above fail for their own reason: with nothing wrong in it, the same frame is read up to its checksum."""
    gaps = sparse_header({"w": ["gaps", "U8", [64], 1, 1]}, ONE)
    mask = sparse_header({"w": ["bitmask", "U8", [8], 2]}, ONE)
    codes = codes_header(["codes", "F32", [20], 1, 2])
    masked = codes_header(["bitmask+codes", "F32", [32], 1, 8])
    for header, data, kept in [
        (gaps, b"1\1\1", 1), (mask, b"12\3", 2), (codes, HALF + b"\1\0\0\0\0", 1), (masked, HALF + b"\xfd\1\0\0\0", 1)
    ]:  # fmt: skip
        assert describe(forge(tmp_path / "f", header, data))[0]["kept"] == kept
        with pytest.raises(FormatError, match="damaged"):
            load_sparse(tmp_path / "f")


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 3) + b"{}", b"PK\3\4" * 9])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    for read in (load_sparse, describe):
        with pytest.raises(FormatError, match="f: truncated or not a safetensors file"):
            read(tmp_path / "f")


def test_names_in_messages_are_cut_short(tmp_path):
    path = forge(tmp_path / "f", {"x" * 100_000: {"y" * 100_000: ["z" * 100_000] * 100}})
    with pytest.raises(FormatError) as caught:
        load_sparse(path)
    assert len(str(caught.value)) < 1000


def test_a_bomb_is_read_only_on_request(tmp_path):
    save_sparse({"w": torch.zeros(3000)}, tmp_path / "f")
    with pytest.raises(FormatError, match=r"3000 elements, more than max_elements=2999.*max_elements=3000"):
        load_sparse(tmp_path / "f", max_elements=2999)
    assert load_sparse(tmp_path / "f", max_elements=3000)["w"].shape == (3000,)
    save_sparse({"w": torch.rand(3000)}, tmp_path / "f")
    assert len(load_sparse(tmp_path / "f", max_elements=0)["w"]) == 3000  # dense data are as large as the file


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "none")


# --- fuzz


def fuzz_state() -> dict[str, Tensor]:
    grids = {f"q{d}": quantised((400,), d, 4) for d in (0.1, 0.4, 1.0)}
    return golden_state() | {"m": sparse((500,), 0.5, torch.uint8), "g": torch.tensor([True, False])} | grids


def test_any_flipped_bit_or_lost_byte_is_noticed(tmp_path):
    """A damaged file loads exactly as written (a blank in the header's padding) or is a FormatError."""
    path, state, exact = tmp_path / "f", fuzz_state(), 0
    save_sparse(state, path)
    content = path.read_bytes()
    flips = random.Random(0).sample(range(8 * len(content)), 400)
    damaged = [content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :] for at, bit in (divmod(f, 8) for f in flips)]
    for bad in damaged + [content[:length] for length in range(0, len(content), 7)] + [content + b"\0"]:
        path.write_bytes(bad)
        try:
            got = load_sparse(path, max_elements=10**6)
        except FormatError:
            continue
        assert_same(got, state)
        exact += 1
    assert exact < 10


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 3),
)
def test_damage_under_a_checksum_that_fits_is_read_or_refused(tmp_path, monkeypatch, edits, cut):
    """A forger can fit the checksum; the checks beneath it still leave only FormatError."""
    monkeypatch.setattr(export.zlib, "crc32", lambda *_: 0)
    path = tmp_path / "f"
    save_sparse(fuzz_state(), path)
    content = bytearray(path.read_bytes())
    for where, byte in edits:
        content[int(where * len(content))] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        got = load_sparse(path, max_elements=10**6)
    except FormatError:
        return
    assert all(tensor.numel() <= 10**6 for tensor in got.values())


def test_files_are_read_whatever_the_default_device(tmp_path):
    torch.manual_seed(0)
    sparse, dense = torch.randn(50, 40), torch.randn(7)
    sparse[sparse.abs() < 1.5] = 0
    state = {"sparse": sparse, "dense": dense, "empty": torch.zeros(0), "grid": snap(sparse, 4)}
    save_sparse(state, tmp_path / "w.safetensors")
    with torch.device("meta"):
        found = load_sparse(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
