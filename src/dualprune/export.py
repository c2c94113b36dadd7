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
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from dualprune.distributed import local, whole, writes
from dualprune.encodings import DTYPE_NAMES, DTYPES, ENCODINGS, INTEGERS, Array, Cut, Layout
from dualprune.errors import DualpruneError, FormatError, suggest, within
from dualprune.files import atomic_write

VERSION = 1
MAX_ELEMENTS = 2**30

_FORMAT_KEY, _VERSION_KEY, _CRC_KEY, _TABLE_KEY = _KEYS = tuple(
    f"dualprune.{key}" for key in ("format", "version", "crc32", "tensors")
)
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_SIZE_LIMIT = 2**56  # elements of one tensor: byte counts and strides stay inside int64
_RANK_LIMIT = 64
_SIGNED_ZERO = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # −0.0 is the sign bit alone

Stored = tuple[str, list[int], Array]  # dtype, shape and bytes of one safetensors part


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
    if tensor.dtype not in DTYPE_NAMES:
        raise DualpruneError(f"tensor {name!r} is {tensor.dtype}, which is none of {', '.join(DTYPES)}; convert it")
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
    return flat.view(INTEGERS[flat.dtype.itemsize]).numpy()


def _encode(name: str, tensor: Tensor, bits: Array) -> tuple[Layout, Array]:
    """The smallest encoding of one tensor, what it costs in the header included."""
    cut = Cut(bits, np.flatnonzero(bits), tensor.dtype)
    dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
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
    order = sorted(parts, key=lambda name: -DTYPES[parts[name][0]].itemsize)
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
    with within(os.fspath(path)), Path(path).open("rb") as file:
        contents = _contents(file)
        _refuse_bomb(contents, max_elements)
        checksum, tensors = _checksum(contents.metadata), dict.fromkeys(contents.parts, torch.empty(0))
        for name, part in sorted(contents.parts.items()):
            with within(f"tensor {_show(name)}"):
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
    with within(os.fspath(path)), Path(path).open("rb") as file:
        contents = _contents(file)
    holders = {name: name for name in contents.parts} | contents.aliases
    return [_describe(contents, name, holder) for name, holder in holders.items()]


def _describe(contents: _Contents, name: str, holder: str) -> dict[str, Any]:
    layout, alias = contents.layouts[holder], name in contents.aliases
    return {
        "name": name,
        "shape": list(layout.shape),
        "dtype": str(DTYPES[layout.dtype]).removeprefix("torch."),
        "encoding": "alias" if alias else layout.encoding,
        "kept": layout.kept,
        "value_bits": layout.params[-1] if layout.encoding.endswith("codes") else 8 * layout.itemsize,
        "bytes": 0 if alias else contents.parts[holder].size,
        "alias_of": holder if alias else None,
    }


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
        with within(f"tensor {_show(name)}"):
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
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"dtype is one of {', '.join(DTYPES)}; got {_show(dtype)}")
    rank_fits = isinstance(shape, list) and len(shape) <= _RANK_LIMIT
    if not rank_fits or not all(_is_count(length, _SIZE_LIMIT) for length in shape):
        raise FormatError(f"shape is a list of at most {_RANK_LIMIT} lengths, got {_show(shape)}")
    if math.prod(max(length, 1) for length in shape) > _SIZE_LIMIT:
        raise FormatError(f"shape {_show(shape)} has more than {_SIZE_LIMIT} elements")
    return dtype, tuple(shape)


def _part(name: str, entry: Any, start: int) -> _Part:
    with within(f"tensor {_show(name)}"):
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"expected dtype, shape and data_offsets, got {_show(entry)}")
        dtype, shape = _check_tensor(entry["dtype"], entry["shape"])
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise FormatError(f"data_offsets is [begin, end], got {_show(offsets)}")
        size = math.prod(shape) * DTYPES[dtype].itemsize
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
        with within(f"tensor {_show(name)}"):
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
