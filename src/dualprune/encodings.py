"""How one tensor is stored in a sparse file: dense, bit mask, gaps, codes; each with its size, writer, check and reader.

The bytes of each are described in docs/file-format.md, the file around them is `export`'s. Nothing that is read is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualprune.errors import FormatError, within
from dualprune.quantise import find_grid

DTYPES: dict[str, torch.dtype] = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a tensor's bits, by the bytes of an element
_GRID_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SCALE_BYTES = 4
_TOP = 127  # the largest level, in units of Δ

Array = npt.NDArray[Any]
Params = tuple[int, ...]


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
        return DTYPES[self.dtype].itemsize

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
    dense = torch.zeros(layout.numel, dtype=DTYPES[layout.dtype], device="cpu")
    bits = dense.view(INTEGERS[layout.itemsize]).numpy()
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
    dtype = DTYPES[layout.dtype]
    if not data:
        return torch.empty(0, dtype=dtype, device="cpu")
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
    with within("its index, with one byte a value"):
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
    if not 1 <= width <= 8 or DTYPES[layout.dtype] not in _GRID_DTYPES:
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
    used = torch.arange(int(codes.max(initial=0)) + 1, device="cpu")
    levels = torch.where(used % 2 == 1, -(used + 1 >> 1), used >> 1).float().mul(scale).to(DTYPES[layout.dtype])
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
