"""The sparse file: a state dict in which a zero costs a bit or less, stored as a valid safetensors file.

The layout (format "sparse", version 1) is described byte by byte in docs/file-format.md. In short: a tensor that gains
nothing is stored as safetensors does; any other is one U8 part, its values first (as codes of a few bits where they are on
a grid) and then where they stand, and its real dtype and shape are in the header. Reading trusts nothing in the file and
never unpickles.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dualprune.distributed import local, whole, writes
from dualprune.errors import DualpruneError, FormatError, suggest
from dualprune.files import atomic_write
from dualprune.quantise import find_grid

VERSION = 1
MAX_ELEMENTS = 2**30

_FORMAT_KEY, _VERSION_KEY, _CRC_KEY, _TABLE_KEY = _KEYS = tuple(
    f"dualprune.{key}" for key in ("format", "version", "crc32", "tensors")
)
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_SIZE_LIMIT = 2**56  # elements of one tensor: byte counts and strides stay inside int64
_RANK_LIMIT = 64
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SIGNED_ZERO = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # −0.0 is the sign bit alone
_GRID_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SCALE_BYTES = 4
_TOP = 127  # the largest level, in units of Δ
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = npt.NDArray[Any]
Params = tuple[int, ...]
Stored = tuple[str, list[int], Array]  # dtype, shape and bytes of one safetensors part


@dataclass(frozen=True)
class Layout:
    """What the header says of one tensor; checked before anything of that size is allocated."""

    encoding: str
    dtype: str
    shape: tuple[int, ...]
    kept: int
    params: Params = ()

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _DTYPES[self.dtype].itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of the kept values."""
        return self.kept * self.itemsize


@dataclass(frozen=True)
class Cut:
    """A tensor's bits in row-major order, as integers of its element size, and where they are not all zero."""

    bits: Array
    where: npt.NDArray[np.int64]
    dtype: torch.dtype | None = None  # None: integers, whatever the bits may mean

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """The bytes of the elements at `where`, in order."""
        return self.bits[self.where].view(np.uint8)

    @cached_property
    def grid(self) -> tuple[float, npt.NDArray[np.uint8]] | None:
        """The scale Δ and, for the elements at `where`, their codes (see docs/file-format.md), if they are on a grid."""
        if self.dtype not in _GRID_DTYPES or not self.where.size:
            return None
        values = torch.from_numpy(self.bits[self.where]).view(self.dtype)
        if not values.all() or (found := find_grid(values)) is None:  # a stored zero is −0.0, which is no level
            return None
        levels = (values.double() / found.scale).round().numpy().astype(np.int64)
        return found.scale, (2 * np.abs(levels) - (levels < 0) - 1).astype(np.uint8)


@dataclass(frozen=True)
class Encoding:
    """One way to store a tensor. A new one is a new row of `ENCODINGS`; the file names it, the reader looks it up.

    Attributes:
        fit: size in bytes and parameters for this tensor, or None if it cannot be stored so.
        pack: the part's bytes.
        check: refuse (FormatError) a layout that cannot be right for a part of this many bytes.
        unpack: the part's bytes → tensor of `layout.numel` elements; refuses (FormatError) what does not add up.
    """

    fit: Callable[[Cut], tuple[int, Params] | None]
    pack: Callable[[Cut, Params], Array]
    check: Callable[[Layout, int], None]
    unpack: Callable[[Layout, bytearray], Tensor]


def _packed(bits: int) -> int:
    """Bytes that hold this many bits."""
    return -(-bits // 8)


def _read_bits(data: Array, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` bits of `data`, least significant first; the rest of the last byte must be zero."""
    bits = np.unpackbits(data, bitorder="little")
    if bits[count:].any():
        raise FormatError("bits are set past the end of its index")
    return bits[:count]


def _pack_planes(numbers: Array, width: int) -> npt.NDArray[np.uint8]:
    """Numbers of `width` bits as a bit string: bit 0 of all of them, then bit 1 of all, and so on."""
    planes = [(numbers >> j & 1).astype(np.uint8) for j in range(width)]
    return np.packbits(np.concatenate(planes), bitorder="little")


def _read_planes(data: Array, width: int, count: int) -> npt.NDArray[np.int64]:
    """The `count` numbers that `_pack_planes` wrote."""
    numbers = np.zeros(count, np.int64)
    for j, plane in enumerate(_read_bits(data, width * count).reshape(width, count)):
        numbers |= plane.astype(np.int64) << j
    return numbers


def _scatter(layout: Layout, data: Array, where: Array) -> Tensor:
    """Zeros, with the values at the start of `data` put at `where`."""
    dense = torch.zeros(layout.numel, dtype=_DTYPES[layout.dtype])
    bits = dense.view(_BITS[layout.itemsize]).numpy()
    bits[where] = data[: layout.value_bytes].view(bits.dtype)
    return dense


# --- dense: every element


def _dense_fit(cut: Cut) -> tuple[int, Params]:
    return cut.bits.nbytes, ()


def _dense_pack(cut: Cut, params: Params) -> Array:
    return cut.bits.view(np.uint8)


def _dense_check(layout: Layout, size: int) -> None:
    if size != layout.numel * layout.itemsize:
        raise FormatError(
            f"{layout.dtype} of shape {list(layout.shape)} needs {layout.numel * layout.itemsize} bytes, "
            f"the header gives it {size}"
        )


def _dense_unpack(layout: Layout, data: bytearray) -> Tensor:
    dtype = _DTYPES[layout.dtype]
    if not data:
        return torch.empty(0, dtype=dtype)
    if dtype is torch.bool and (largest := np.frombuffer(data, np.uint8).max()) > 1:
        raise FormatError(f"a BOOL is 0 or 1, got {largest}")
    return torch.frombuffer(data, dtype=dtype)


# --- bitmask: values, then one bit an element


def _bitmask_fit(cut: Cut) -> tuple[int, Params]:
    return cut.where.size * cut.bits.itemsize + _packed(cut.bits.size), ()


def _bitmask_pack(cut: Cut, params: Params) -> Array:
    return np.concatenate([cut.values, np.packbits(cut.bits != 0, bitorder="little")])


def _bitmask_check(layout: Layout, size: int) -> None:
    expected = layout.value_bytes + _packed(layout.numel)
    if layout.params or size != expected:
        raise FormatError(
            f"{layout.kept} of {layout.numel} elements need {expected} bytes and no parameters, "
            f"the header gives {size} bytes and {list(layout.params)}"
        )


def _bitmask_unpack(layout: Layout, data: bytearray) -> Tensor:
    array = np.frombuffer(data, np.uint8)
    where = np.flatnonzero(_read_bits(array[layout.value_bytes :], layout.numel))
    if where.size != layout.kept:
        raise FormatError(f"the bit mask keeps {where.size} elements, the header says {layout.kept}")
    return _scatter(layout, array, where)


# --- gaps: values, then the number of zeros before each one, Rice coded (Rice & Plaut, IEEE Trans. Comm. 19, 1971).
# The k low bits of all gaps stand together as k bit planes, the high parts follow in unary: so that both are decoded
# without a loop over elements. With k = 0 the unary stream *is* the bit mask, hence k ≥ 1 here.


def _gaps(where: Array) -> npt.NDArray[np.int64]:
    return np.diff(where, prepend=-1) - 1


def _gaps_fit(cut: Cut) -> tuple[int, Params] | None:
    kept, gaps = cut.where.size, _gaps(cut.where)
    if kept << 1 > cut.bits.size:
        return None
    largest = (cut.bits.size // kept).bit_length() - 1 if kept else 1
    sizes = [_packed(k * kept) + _packed(int((gaps >> k).sum()) + kept) for k in range(1, largest + 1)]
    k = int(np.argmin(sizes))
    return kept * cut.bits.itemsize + sizes[k], (k + 1,)


def _gaps_pack(cut: Cut, params: Params) -> Array:
    (k,), gaps = params, _gaps(cut.where)
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(ends[-1] + 1 if ends.size else 0, np.uint8)
    unary[ends] = 1
    return np.concatenate([cut.values, _pack_planes(gaps, k), np.packbits(unary, bitorder="little")])


def _gaps_check(layout: Layout, size: int) -> None:
    k = layout.params[0] if len(layout.params) == 1 else 0
    if not 1 <= k < 64 or layout.kept << k > layout.numel:
        raise FormatError(
            f"gaps need one parameter k, at least 1, with kept · 2^k within the {layout.numel} elements; "
            f"got {list(layout.params)} for {layout.kept} kept"
        )
    least = layout.value_bytes + _packed(k * layout.kept) + _packed(layout.kept)
    if size < least or (size > least and not layout.kept):
        raise FormatError(f"{layout.kept} values and their gaps need at least {least} bytes, the header gives {size}")


def _gaps_unpack(layout: Layout, data: bytearray) -> Tensor:
    (k,), kept, array = layout.params, layout.kept, np.frombuffer(data, np.uint8)
    low, unary = np.split(array[layout.value_bytes :], [_packed(k * kept)])
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if ends.size != kept:
        raise FormatError(f"the gaps place {ends.size} values, the header says {kept}")
    if not kept:
        return _scatter(layout, array, ends)
    if _packed(int(ends[-1]) + 1) != unary.size:
        raise FormatError(f"{unary.size - _packed(int(ends[-1]) + 1)} bytes are left over after its last gap")
    if (int(ends[-1]) + 1 - kept) << k > layout.numel:  # before the sum below: it cannot overflow from here on
        raise FormatError(f"the gaps lead past its {layout.numel} elements")
    where = np.cumsum((_gaps(ends) << k) + _read_planes(low, k, kept) + 1) - 1
    if where[-1] >= layout.numel:
        raise FormatError(f"the gaps lead to element {where[-1]}, it has {layout.numel}")
    return _scatter(layout, array, where)


# --- codes: values on a grid, as Δ and a few bits each; with an index (zeros have none) or for every element. The index
# is that of the encodings above, written and read by them: the codes' bytes come before it in place of the values'.


def _width(codes: Array) -> int:
    return max(int(codes.max(initial=0)).bit_length(), 1)


def _code_bytes(width: int, count: int) -> int:
    return _SCALE_BYTES + _packed(width * count)


def _codes_fit(cut: Cut) -> tuple[int, Params] | None:
    if cut.grid is None:
        return None
    width = _width(cut.grid[1] + np.uint8(1))
    return _code_bytes(width, cut.bits.size), (width,)


def _codes_pack(cut: Cut, params: Params) -> Array:
    assert cut.grid is not None  # or it would not fit
    scale, codes = cut.grid
    every = np.zeros(cut.bits.size, np.uint8)
    every[cut.where] = codes + 1  # 0 is the zero
    return _pack_codes(scale, every, params[0])


def _codes_check(layout: Layout, size: int) -> None:
    _check_width(layout)
    expected = _code_bytes(layout.params[-1], layout.numel)
    if len(layout.params) != 1 or size != expected:
        raise FormatError(f"{layout.numel} codes need {expected} bytes and one parameter, the header gives {size} bytes")


def _codes_unpack(layout: Layout, data: bytearray) -> Tensor:
    scale, codes = _read_codes(np.frombuffer(data, np.uint8), layout.params[-1], layout.numel, 2 * _TOP)
    if (stored := int(np.count_nonzero(codes))) != layout.kept:
        raise FormatError(f"{stored} codes are not zero, the header says {layout.kept}")
    return _levels(layout, scale, codes)


def _indexed_fit(index: str, cut: Cut) -> tuple[int, Params] | None:
    if cut.grid is None or (fit := ENCODINGS[index].fit(cut)) is None:
        return None
    width = _width(cut.grid[1])
    return fit[0] - cut.values.size + _code_bytes(width, cut.where.size), (*fit[1], width)


def _indexed_pack(index: str, cut: Cut, params: Params) -> Array:
    assert cut.grid is not None  # or it would not fit
    scale, codes = cut.grid
    return np.concatenate([_pack_codes(scale, codes, params[-1]), ENCODINGS[index].pack(cut, params[:-1])[cut.values.size :]])


def _indexed_check(index: str, layout: Layout, size: int) -> None:
    _check_width(layout)
    least = _code_bytes(layout.params[-1], layout.kept)
    if size < least:
        raise FormatError(f"{layout.kept} codes need at least {least} bytes, the header gives {size}")
    with _within("its index, with one byte a value"):
        ENCODINGS[index].check(_as_bytes(layout), size - least + layout.kept)


def _indexed_unpack(index: str, layout: Layout, data: bytearray) -> Tensor:
    """The codes in place: the index is read as if each value were the byte of its code."""
    size = _code_bytes(layout.params[-1], layout.kept)
    scale, codes = _read_codes(np.frombuffer(data, np.uint8)[:size], layout.params[-1], layout.kept, 2 * _TOP - 1)
    placed = ENCODINGS[index].unpack(_as_bytes(layout), bytearray((codes + 1).astype(np.uint8).tobytes()) + data[size:])
    return _levels(layout, scale, placed.numpy())


def _as_bytes(layout: Layout) -> Layout:
    return replace(layout, dtype="U8", params=layout.params[:-1])


def _check_width(layout: Layout) -> None:
    width = layout.params[-1] if layout.params else 0
    if not 1 <= width <= 8 or _DTYPES[layout.dtype] not in _GRID_DTYPES:
        raise FormatError(f"codes are 1 to 8 bits wide and stand for floats, got {list(layout.params)} for {layout.dtype}")


def _pack_codes(scale: float, codes: Array, width: int) -> npt.NDArray[np.uint8]:
    return np.concatenate([np.array([scale], "<f4").view(np.uint8), _pack_planes(codes, width)])


def _read_codes(data: Array, width: int, count: int, most: int) -> tuple[float, npt.NDArray[np.int64]]:
    scale, codes = float(data[:_SCALE_BYTES].view("<f4")[0]), _read_planes(data[_SCALE_BYTES:], width, count)
    if not 0 < scale < math.inf:
        raise FormatError(f"the scale of its grid is a positive number, got {scale}")
    if count and codes.max() > most:
        raise FormatError(f"its largest code is {codes.max()}, levels end at ±{_TOP} with {most}")
    return scale, codes


def _levels(layout: Layout, scale: float, codes: Array) -> Tensor:
    """0, −1, 1, −2, 2, … times Δ for the codes 0, 1, 2, 3, 4, …: a product in float32, rounded to the dtype."""
    used = torch.arange(int(codes.max(initial=0)) + 1)
    levels = torch.where(used % 2 == 1, -(used + 1 >> 1), used >> 1).float().mul(scale).to(_DTYPES[layout.dtype])
    if not bool(levels.isfinite().all()):
        raise FormatError(f"with the scale {scale} its grid leads out of the range of {layout.dtype}")
    return levels.index_select(0, torch.from_numpy(codes).int())


ENCODINGS: dict[str, Encoding] = {
    "dense": Encoding(_dense_fit, _dense_pack, _dense_check, _dense_unpack),
    "bitmask": Encoding(_bitmask_fit, _bitmask_pack, _bitmask_check, _bitmask_unpack),
    "gaps": Encoding(_gaps_fit, _gaps_pack, _gaps_check, _gaps_unpack),
    "codes": Encoding(_codes_fit, _codes_pack, _codes_check, _codes_unpack),
    **{
        f"{index}+codes": Encoding(
            partial(_indexed_fit, index),
            partial(_indexed_pack, index),
            partial(_indexed_check, index),
            partial(_indexed_unpack, index),
        )
        for index in ("bitmask", "gaps")
    },
}


# --- writing


def save_sparse(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    drop_negative_zeros: bool = False,
) -> int:
    """Write every tensor of a model or state dict to `path`, each in whichever encoding is smallest.

    Values come back bit for bit (an element is zero only if all its bits are: −0.0 and NaN payloads survive), names,
    dtypes and shapes too; memory layout (channels_last, strides) and device do not. Names that share one tensor store
    it once. The file is written atomically: on any error an existing `path` is left as it was.

    Args:
        model_or_state_dict: plain tensors by name, on any device; or DTensors, then every rank calls this: each tensor is
            put together in its turn, and rank 0 alone writes.
        path: the file; its folder is made if need be.
        metadata: text of your own for the header, read back by `safetensors.safe_open(path, "pt").metadata()`.
        drop_negative_zeros: write −0.0 as 0. Multiplying a weight with a mask leaves a −0.0 where it was negative, and
            each costs as much as a kept value; a UserWarning says so if that is more than a tenth of what is stored.

    Returns:
        The size of the file in bytes; 0 on ranks that do not write.

    Raises:
        DualpruneError: an entry is not a plain tensor of a dtype that safetensors knows, or a name cannot be stored.
        OSError: the folder cannot be written or the disk is full.
    """
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    own = _own_metadata(metadata or {})
    tensors = {name: _plain(name, value) for name, value in state.items()}
    first: dict[object, str] = {}
    parts: dict[str, Stored] = {}
    table: dict[str, list[Any]] = {}
    stored = wasted = 0
    writer = writes(tensors.values())
    for name, part in tensors.items():
        tensor = whole(part)
        if not writer:
            continue
        if (twin := first.setdefault(_identity(name, local(part)), name)) != name:
            table[name] = ["alias", twin]
            continue
        bits = _bits(tensor)
        if tensor.dtype in _SIGNED_ZERO:
            negative = bits == np.iinfo(bits.dtype).min
            bits = np.where(negative, bits.dtype.type(0), bits) if drop_negative_zeros else bits
            stored, wasted = stored + int(np.count_nonzero(bits)), wasted + int(np.count_nonzero(negative))
        layout, data = _encode(name, tensor, bits)
        if layout.encoding == "dense":
            parts[name] = (layout.dtype, list(layout.shape), data)
        else:
            parts[name] = ("U8", [data.size], data)
            table[name] = _row(layout)
    if not writer:
        return 0
    if 10 * wasted > stored and not drop_negative_zeros:
        warnings.warn(
            f"{wasted} of {stored} values stored are −0.0 and cost as much as kept ones; cut weights with masked_fill or "
            "torch.where instead of multiplying with a mask, or pass save_sparse(…, drop_negative_zeros=True)",
            stacklevel=2,
        )
    blocks = _blocks(parts, {**own, _FORMAT_KEY: "sparse", _VERSION_KEY: str(VERSION), _TABLE_KEY: _json(table)})
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        return sum(file.write(block) for block in blocks)


def _own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The caller's metadata, if it is text and leaves our keys alone."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and _is_unicode(key + value)):
            raise DualpruneError(f"metadata maps text to text, got {key!r}: {value!r}; turn the value into a string")
        if key.startswith("dualprune."):
            raise DualpruneError(f"metadata key {key!r}: the prefix 'dualprune.' is the format's own; use another")
    return dict(metadata)


def _plain(name: Any, value: Any) -> Tensor:
    """The entry as a detached strided tensor, or a DualpruneError that says why it is none."""
    if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
        raise DualpruneError(f"a tensor's name is valid text other than '__metadata__', got {name!r}; rename it")
    if not isinstance(value, Tensor):
        raise DualpruneError(
            f"entry {name!r} is a {type(value).__name__}; a sparse file holds tensors only. Save it elsewhere and pass "
            "{k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}"
        )
    tensor = value.detach()
    if type(local(tensor)) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise DualpruneError(
            f"tensor {name!r} is a {type(tensor).__name__} ({tensor.layout}, {tensor.dtype}, on {tensor.device}), "
            "expected a plain strided tensor with data; gather, densify or materialise it first"
        )
    if tensor.dtype not in _DTYPE_NAMES:
        raise DualpruneError(f"tensor {name!r} is {tensor.dtype}, which is none of {', '.join(_DTYPES)}; convert it")
    if tensor.dim() > _RANK_LIMIT:
        raise DualpruneError(f"tensor {name!r} has {tensor.dim()} dimensions, the format holds {_RANK_LIMIT}")
    return tensor


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(name: str, tensor: Tensor) -> object:
    """Equal for two names of the same memory seen the same way (a state dict holds tied weights as such twins)."""
    if not tensor.numel():
        return name
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (str(tensor.device), tensor.data_ptr(), view)


def _bits(tensor: Tensor) -> Array:
    """The tensor's bits in row-major order, as integers of its element size; its own memory where that is possible."""
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(_BITS[flat.dtype.itemsize]).numpy()


def _encode(name: str, tensor: Tensor, bits: Array) -> tuple[Layout, Array]:
    """The smallest encoding of one tensor, what it costs in the header included."""
    cut = Cut(bits, np.flatnonzero(bits), tensor.dtype)
    dtype, shape = _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    best, cost = Layout("dense", dtype, shape, bits.size), bits.nbytes
    for encoding, row in ENCODINGS.items():
        if encoding == "dense" or tensor.dtype is torch.bool or (fit := row.fit(cut)) is None:
            continue
        layout = Layout(encoding, dtype, shape, cut.where.size, fit[1])
        total = fit[0] + len(_json(_json({name: _row(layout)})).encode())
        if total < cost:
            best, cost = layout, total
    return best, ENCODINGS[best.encoding].pack(cut, best.params)


def _row(layout: Layout) -> list[Any]:
    """The tensor's entry in the header's table."""
    return [layout.encoding, layout.dtype, list(layout.shape), layout.kept, *layout.params]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _blocks(parts: Mapping[str, Stored], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The file: header length, header, then the data, larger elements first so that all are aligned."""
    order = sorted(parts, key=lambda name: -_DTYPES[parts[name][0]].itemsize)
    ends = dict(zip(order, accumulate(parts[name][2].size for name in order), strict=True))
    checksum = _checksum(metadata)
    for name in sorted(parts):
        dtype, shape, data = parts[name]
        checksum = zlib.crc32(data.data, _part_checksum(checksum, name, dtype, shape))
    header: dict[str, Any] = {"__metadata__": {**metadata, _CRC_KEY: f"{checksum:08x}"}}
    for name, (dtype, shape, data) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [ends[name] - data.size, ends[name]]}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise DualpruneError(f"the names, shapes and metadata take {len(text)} bytes, a header holds {_HEADER_LIMIT}")
    return [len(text).to_bytes(8, "little"), text, *(parts[name][2].data for name in order)]


def _checksum(metadata: Mapping[str, str]) -> int:
    """CRC-32 of the metadata in the order of its keys; the parts are added to it in the order of their names."""
    pairs = sorted((key, value) for key, value in metadata.items() if key != _CRC_KEY)
    return zlib.crc32("".join(f"{key}\0{value}\0" for key, value in pairs).encode())


def _part_checksum(checksum: int, name: str, dtype: str, shape: list[int] | tuple[int, ...]) -> int:
    """The checksum with what precedes the part's bytes."""
    return zlib.crc32(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode(), checksum)


# --- reading


@dataclass(frozen=True)
class _Part:
    """A checked entry of the safetensors header; `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class _Contents:
    """A checked header: every number in it has been compared with the others and with the size of the file."""

    metadata: dict[str, str]
    parts: dict[str, _Part]
    layouts: dict[str, Layout]
    aliases: dict[str, str]


def load_sparse(path: str | os.PathLike[str], *, max_elements: int = MAX_ELEMENTS) -> dict[str, Tensor]:
    """Read a file written by `save_sparse`, or any plain safetensors file, into dense CPU tensors.

    Names that shared one tensor share one again. The result fits `model.load_state_dict`.

    Args:
        path: the file.
        max_elements: refuse a file whose sparse tensors unfold into more elements than this in all, because a few
            bytes can ask for any number of zeros. The default, 2**30, is 4 GiB of float32.

    Raises:
        FormatError: the file is truncated, damaged, malicious, or written by a newer dualprune; the message names the
            file, the tensor and what is wrong.
        OSError: the file cannot be read.
    """
    with _within(os.fspath(path)), Path(path).open("rb") as file:
        contents = _contents(file)
        _refuse_bomb(contents, max_elements)
        checksum, tensors = _checksum(contents.metadata), dict.fromkeys(contents.parts, torch.empty(0))
        for name, part in sorted(contents.parts.items()):
            with _within(f"tensor {_show(name)}"):
                data, layout = _read(file, part), contents.layouts[name]
                checksum = zlib.crc32(data, _part_checksum(checksum, name, part.dtype, part.shape))
                tensors[name] = ENCODINGS[layout.encoding].unpack(layout, data).reshape(layout.shape)
        stated = contents.metadata.get(_CRC_KEY, f"{checksum:08x}")  # a plain safetensors file has none
        if stated != f"{checksum:08x}":
            raise FormatError(f"damaged: its CRC-32 is {checksum:08x}, the header says {_show(stated)}")
    return tensors | {name: tensors[twin] for name, twin in contents.aliases.items()}


def describe(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a file holds, from its header alone: no value is read, nothing of a tensor's size is allocated.

    Returns:
        One JSON-able row per name: `name`, `shape`, `dtype` ("float32", …), `encoding` ("dense", "bitmask", "gaps", "codes",
        "bitmask+codes", "gaps+codes", "alias"), `kept` (values stored; all of them if dense), `value_bits` (that each takes),
        `bytes` (in the file, values and index; 0 for an alias) and `alias_of` (the name that holds an alias's data, else None).

    Raises:
        FormatError: as `load_sparse`, as far as the header shows.
        OSError: the file cannot be read.
    """
    with _within(os.fspath(path)), Path(path).open("rb") as file:
        contents = _contents(file)
    holders = {name: name for name in contents.parts} | contents.aliases
    return [_describe(contents, name, holder) for name, holder in holders.items()]


def _describe(contents: _Contents, name: str, holder: str) -> dict[str, Any]:
    layout, alias = contents.layouts[holder], name in contents.aliases
    return {
        "name": name,
        "shape": list(layout.shape),
        "dtype": str(_DTYPES[layout.dtype]).removeprefix("torch."),
        "encoding": "alias" if alias else layout.encoding,
        "kept": layout.kept,
        "value_bits": layout.params[-1] if layout.encoding.endswith("codes") else 8 * layout.itemsize,
        "bytes": 0 if alias else contents.parts[holder].size,
        "alias_of": holder if alias else None,
    }


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Say where, in front of what is wrong."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from None


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlevel = 120, 2


def _show(value: Any) -> str:
    """What came, short enough for a message whatever the file says."""
    text = _SHORT.repr(value)
    return text if len(text) <= 250 else text[:250] + "…"


def _refuse_bomb(contents: _Contents, max_elements: int) -> None:
    asked = sum(layout.numel for layout in contents.layouts.values() if layout.encoding != "dense")
    if asked > max_elements:
        raise FormatError(
            f"its sparse tensors unfold into {asked} elements, more than max_elements={max_elements}; "
            f"if you trust the file, pass load_sparse(…, max_elements={asked})"
        )


def _read(file: BinaryIO, part: _Part) -> bytearray:
    """The part's bytes; `part.size` is within the file's size by now."""
    data = bytearray(part.size)
    file.seek(part.begin)
    if (got := file.readinto(data)) != part.size:  # type: ignore[attr-defined]
        raise FormatError(f"truncated: {got} of {part.size} bytes could be read")
    return data


def _contents(file: BinaryIO) -> _Contents:
    """Read and check the header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise FormatError(f"truncated or not a safetensors file: of {size} bytes, {length} would be its header")
    header = _parse(file.read(length), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _is_unicode(v) for v in metadata.values()):
        raise FormatError(f"__metadata__ maps text to valid text, got {_show(metadata)}")
    parts = {name: _part(name, entry, 8 + length) for name, entry in header.items()}
    _check_tiling(parts, 8 + length, size)
    layouts, aliases = _table(metadata, parts)
    for name, layout in layouts.items():
        with _within(f"tensor {_show(name)}"):
            ENCODINGS[layout.encoding].check(layout, parts[name].size)
    return _Contents(metadata, parts, layouts, aliases)


def _parse(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON ({_show(str(error))})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is a JSON object, got {_show(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value or not _is_unicode(key):
            raise FormatError(f"the name {_show(key)} stands twice or is no valid text")
        value[key] = item
    return value


def _is_count(value: Any, limit: int = 2**63 - 1) -> bool:
    return type(value) is int and 0 <= value <= limit


def _check_tensor(dtype: Any, shape: Any) -> tuple[str, tuple[int, ...]]:
    """A dtype and a shape that a tensor can have."""
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"dtype is one of {', '.join(_DTYPES)}; got {_show(dtype)}")
    rank_fits = isinstance(shape, list) and len(shape) <= _RANK_LIMIT
    if not rank_fits or not all(_is_count(length, _SIZE_LIMIT) for length in shape):
        raise FormatError(f"shape is a list of at most {_RANK_LIMIT} lengths, got {_show(shape)}")
    if math.prod(max(length, 1) for length in shape) > _SIZE_LIMIT:
        raise FormatError(f"shape {_show(shape)} has more than {_SIZE_LIMIT} elements")
    return dtype, tuple(shape)


def _part(name: str, entry: Any, start: int) -> _Part:
    with _within(f"tensor {_show(name)}"):
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"expected dtype, shape and data_offsets, got {_show(entry)}")
        dtype, shape = _check_tensor(entry["dtype"], entry["shape"])
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise FormatError(f"data_offsets is [begin, end], got {_show(offsets)}")
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            raise FormatError(f"{dtype} of shape {list(shape)} needs {size} bytes, its data_offsets are {offsets}")
    return _Part(dtype, shape, start + offsets[0], size)


def _check_tiling(parts: Mapping[str, _Part], start: int, size: int) -> None:
    """The parts cover the data exactly: no overlap, no hole, nothing left over, nothing past the end of the file."""
    for name, part in sorted(parts.items(), key=lambda item: (item[1].begin, item[1].size)):
        if part.begin != start:
            raise FormatError(f"tensor {_show(name)}: its data begin at byte {part.begin}, expected {start}")
        start += part.size
    if start != size:
        kind = "truncated" if start > size else "too long"
        raise FormatError(f"{kind}: its tensors end at byte {start}, the file at {size}")


def _table(metadata: Mapping[str, str], parts: Mapping[str, _Part]) -> tuple[dict[str, Layout], dict[str, str]]:
    """Every part's layout, and the aliases. A plain safetensors file is one whose parts are all dense."""
    layouts = {name: Layout("dense", part.dtype, part.shape, math.prod(part.shape)) for name, part in parts.items()}
    if not (keys := {key for key in metadata if key.startswith("dualprune.")}):
        return layouts, {}
    _check_version(metadata, keys)
    aliases: dict[str, str] = {}
    for name, row in _parse(metadata[_TABLE_KEY], _TABLE_KEY).items():
        with _within(f"tensor {_show(name)}"):
            if not isinstance(row, list) or not row or not isinstance(row[0], str):
                raise FormatError(f"its table entry is a list that starts with an encoding, got {_show(row)}")
            if row[0] == "alias":
                aliases[name] = _alias(name, row, parts)
            else:
                layouts[name] = _layout(row, parts.get(name))
    return layouts, aliases


def _check_version(metadata: Mapping[str, str], keys: set[str]) -> None:
    kind, version = metadata.get(_FORMAT_KEY), metadata.get(_VERSION_KEY, "")
    if kind != "sparse":
        raise FormatError(f"{_FORMAT_KEY} is 'sparse', got {_show(kind)}")
    if version != str(VERSION):
        newer = version.isascii() and version.isdigit() and len(version) < 10 and int(version) > VERSION
        advice = "written by a newer dualprune: upgrade" if newer else "not a version there is"
        raise FormatError(f"format version {_show(version)}, this dualprune reads {VERSION}: {advice}")
    if keys != set(_KEYS):
        raise FormatError(f"version {VERSION} has the keys {', '.join(sorted(_KEYS))}; got {_show(sorted(keys))}")


def _alias(name: str, row: list[Any], parts: Mapping[str, _Part]) -> str:
    if name in parts or name == "__metadata__":
        raise FormatError("is an alias and has data of its own")
    if len(row) != 2 or not isinstance(row[1], str) or row[1] not in parts:
        raise FormatError(f"an alias names one tensor that has data, got {_show(row[1:])}")
    return row[1]


def _layout(row: list[Any], part: _Part | None) -> Layout:
    encoding = row[0]
    if encoding not in ENCODINGS or encoding == "dense":
        raise FormatError(
            f"unknown encoding {_show(encoding)}{suggest(encoding[:99], ENCODINGS)}; "
            "if it was written by a newer dualprune: upgrade"
        )
    if part is None:
        raise FormatError("is in the table, but the file has no data for it")
    if part.dtype != "U8" or len(part.shape) != 1:
        raise FormatError(f"{encoding} data are U8 of one dimension, got {part.dtype} of shape {list(part.shape)}")
    if len(row) < 4 or not all(_is_count(number) for number in row[3:]):
        raise FormatError(f"expected [encoding, dtype, shape, kept, parameters…], got {_show(row)}")
    dtype, shape = _check_tensor(row[1], row[2])
    if dtype == "BOOL" or row[3] > math.prod(shape):
        raise FormatError(f"{_show(row[3])} kept of {math.prod(shape)} {dtype}: more than there are, or BOOL not dense")
    return Layout(encoding, dtype, shape, row[3], tuple(row[4:]))
