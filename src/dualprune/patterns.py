"""Sparsity sets as frozen values, and the Euclidean projection onto each.

The words for axes are defined here, once, for a weight of shape (F, C, h, w) or (F, C):

| pattern        | one unit, kept or dropped as a whole      | units           |
|----------------|-------------------------------------------|-----------------|
| `Unstructured` | one weight                                | F·C·h·w         |
| `NM(n, m)`     | one weight, n kept of every m along axis  | F·C·h·w         |
| `Filter`       | an output slice W[f]        (dim 0)       | F               |
| `Channel`      | an input slice W[:, c]      (dim 1)       | C               |
| `Column`       | one position (c, h, w) over all filters   | C·h·w           |
| `Kernel`       | one slice W[f, c]                         | F·C             |
| `Block(a, b)`  | an a×b tile of W as a matrix (F, C·h·w)   | F/a · C·h·w/b   |
| `KernelPattern`| one 3×3 kernel, 4 of 9 positions kept, or none | F·C        |

Projecting onto "at most k units nonzero" keeps the k units of largest ℓ2 norm: dropping a set D of units costs
Σ_{u∈D} ‖W_u‖², which is least for the smallest norms. Ties are kept by row-major index of the unit.
Axes are those of the stored parameter: a transposed convolution stores (in, out, h, w), so its output slices are `Channel`.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dualprune.errors import DualpruneError, NonFiniteError, suggest
from dualprune.kernel_pattern import KernelPattern
from dualprune.pattern import Pattern, Shape, energy


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight on its own."""

    def units(self, shape: Shape) -> int:  # noqa: D102
        return math.prod(shape)

    def check(self, shape: Shape) -> None:  # noqa: D102
        pass

    def scores(self, w: Tensor) -> Tensor:  # noqa: D102
        return w

    def expand(self, keep: Tensor, shape: Shape) -> Tensor:  # noqa: D102
        return keep

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM(Pattern):
    """At most n of every m consecutive weights along `axis` (1: input features or channels, as sparse tensor cores want).

    Its sparsity is 1 − n/m whatever is asked; while a schedule passes through lower ones, more than n of m are kept.
    """

    n: int
    m: int
    axis: int = 1
    alone = True

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.n, self.m, self.axis))
        if not (whole and 0 <= self.n <= self.m and self.m > 0):
            raise DualpruneError(
                f"NM(n, m, axis) keeps n of every m weights along axis: expected whole numbers with 0 <= n <= m and "
                f"0 < m, got n={self.n}, m={self.m}, axis={self.axis}"
            )

    def units(self, shape: Shape) -> int:  # noqa: D102
        return math.prod(shape)

    def check(self, shape: Shape) -> None:  # noqa: D102
        if not -len(shape) <= self.axis < len(shape):
            raise DualpruneError(f"{self} needs a weight with axis {self.axis}, got shape {shape}")
        if shape[self.axis] % self.m:
            raise DualpruneError(
                f"{self} needs axis {self.axis} to be a multiple of {self.m}, got shape {shape}: "
                "ignore this parameter, or give another pattern or axis"
            )

    def kept(self, shape: Shape, sparsity: float) -> int:  # noqa: D102
        return math.prod(shape) // self.m * self._of_m(sparsity)

    def _of_m(self, sparsity: float) -> int:
        return max(self.n, self.m - math.floor(sparsity * self.m + 1e-9))

    def snap(self, sparsity: float) -> float:  # noqa: D102
        return 1 - self.n / self.m

    def scores(self, w: Tensor) -> Tensor:  # noqa: D102
        return w

    def expand(self, keep: Tensor, shape: Shape) -> Tensor:  # noqa: D102
        return keep

    def mask(self, w: Tensor, sparsity: float) -> Tensor:  # noqa: D102
        self.check(tuple(w.shape))
        rows = w.detach().movedim(self.axis, -1)
        groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // self.m, self.m).abs()
        order = groups.argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self._of_m(sparsity)], True)
        return keep.reshape(rows.shape).movedim(-1, self.axis)

    def contains(self, w: Tensor, sparsity: float) -> bool:  # noqa: D102
        self.check(tuple(w.shape))
        rows = (w != 0).movedim(self.axis, -1)
        counts = rows.reshape(-1, self.m).sum(-1)
        return w.numel() == 0 or int(counts.max()) <= self._of_m(sparsity)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f" axis {self.axis}" if self.axis != 1 else "")


class _Grouped(Pattern):
    """Units are equal-sized groups of weights; subclasses say how a weight's dims split into (units, members)."""

    least_dims = 2

    def check(self, shape: Shape) -> None:
        if len(shape) < self.least_dims:
            raise DualpruneError(f"{self} needs a weight of at least {self.least_dims} dimensions, got shape {shape}")

    @abstractmethod
    def unit_shape(self, shape: Shape) -> Shape:
        """Return the shape of the unit mask, broadcastable to `shape`."""

    def units(self, shape: Shape) -> int:
        return math.prod(self.unit_shape(shape))

    def scores(self, w: Tensor) -> Tensor:
        unit = self.unit_shape(tuple(w.shape))
        dims = [d for d, (u, size) in enumerate(zip(unit, w.shape, strict=True)) if u != size]
        squares = energy(w)
        return (squares.sum(dims) if dims else squares).reshape(-1)

    def expand(self, keep: Tensor, shape: Shape) -> Tensor:
        return keep.view(self.unit_shape(shape))

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Filter(_Grouped):
    """Whole output slices W[f] (dim 0)."""

    def unit_shape(self, shape: Shape) -> Shape:  # noqa: D102
        return (shape[0], *(1,) * (len(shape) - 1))

    __str__ = _Grouped.__str__


@dataclass(frozen=True)
class Channel(_Grouped):
    """Whole input slices W[:, c] (dim 1)."""

    def unit_shape(self, shape: Shape) -> Shape:  # noqa: D102
        return (1, shape[1], *(1,) * (len(shape) - 2))

    __str__ = _Grouped.__str__


@dataclass(frozen=True)
class Column(_Grouped):
    """One position (c, h, w) over all filters; also called filter shape."""

    def unit_shape(self, shape: Shape) -> Shape:  # noqa: D102
        return (1, *shape[1:])

    __str__ = _Grouped.__str__


@dataclass(frozen=True)
class Kernel(_Grouped):
    """One spatial slice W[f, c]; pruning them is also called connectivity pruning."""

    least_dims = 3

    def unit_shape(self, shape: Shape) -> Shape:  # noqa: D102
        return (*shape[:2], *(1,) * (len(shape) - 2))

    __str__ = _Grouped.__str__


@dataclass(frozen=True)
class Block(_Grouped):
    """A rows × columns tile of the weight seen as a matrix (F, C·h·w)."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in (self.rows, self.columns)):
            raise DualpruneError(f"Block(rows, columns) expects positive integers, got {self.rows!r}, {self.columns!r}")

    def check(self, shape: Shape) -> None:  # noqa: D102
        super().check(shape)
        matrix = (shape[0], math.prod(shape[1:]))
        if matrix[0] % self.rows or matrix[1] % self.columns:
            raise DualpruneError(
                f"{self} does not tile a weight of shape {shape}, seen as a {matrix[0]}×{matrix[1]} matrix: "
                "choose divisors of both sides, or ignore this parameter"
            )

    def unit_shape(self, shape: Shape) -> Shape:  # noqa: D102
        return (shape[0] // self.rows, math.prod(shape[1:]) // self.columns)

    def scores(self, w: Tensor) -> Tensor:  # noqa: D102
        r, c = self.unit_shape(tuple(w.shape))
        return energy(w).reshape(r, self.rows, c, self.columns).sum((1, 3)).reshape(-1)

    def expand(self, keep: Tensor, shape: Shape) -> Tensor:  # noqa: D102
        r, c = self.unit_shape(shape)
        tiles = keep.view(r, 1, c, 1).expand(r, self.rows, c, self.columns)
        return tiles.reshape(shape)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"


_WORDS: dict[str, Pattern] = {str(p): p for p in (Unstructured(), Filter(), Channel(), Column(), Kernel())}


def parse_pattern(text: str | Pattern) -> Pattern:
    """Turn "unstructured", "2:4", "block:4x1", "filter", "channel", "column", "kernel" or "pattern:4x8" into its value.

    "pattern:4" is KernelPattern(4), "pattern:4[0134,1245]" has its set in it.

    Raises:
        DualpruneError: the text names no pattern.
    """
    if isinstance(text, Pattern):
        return text
    word = str(text).strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    if found := re.fullmatch(r"(\d+):(\d+)(?: axis (-?\d+))?", word):
        return NM(int(found[1]), int(found[2]), int(found[3] or 1))
    if found := re.fullmatch(r"block:(\d+)x(\d+)", word):
        return Block(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"pattern:(\d+)(?:x(\d+)|\[([\d,]+)\])?", word):
        listed = found[3] and tuple(tuple(map(int, p)) for p in found[3].split(","))
        return KernelPattern(int(found[1]), listed or int(found[2] or 8))
    known = [*_WORDS, "2:4", "block:4x1", "pattern:4x8"]
    raise DualpruneError(f"expected a pattern, one of {', '.join(known)}; got {text!r}{suggest(word, known)}")


def check_sparsity(value: float, what: str = "sparsity") -> float:
    """Return `value` if it is a fraction in [0, 1]; otherwise say what was probably meant."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DualpruneError(f"{what} is a fraction in [0, 1], got {value!r} ({type(value).__name__})")
    if not 0 <= value <= 1:  # also refuses NaN
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise DualpruneError(f"{what} is a fraction in [0, 1], got {value:g}{hint}")
    return float(value)


def project(tensor: Tensor, pattern: str | Pattern = "unstructured", sparsity: float | None = None) -> Tensor:
    """Return the Euclidean projection of `tensor` onto a sparsity set, for loops of your own.

    Args:
        tensor: a floating tensor of any shape that the pattern fits.
        pattern: a pattern value or its text, such as "2:4" or "filter".
        sparsity: fraction of units dropped, in [0, 1]; not needed for n:m and kernel patterns.

    Raises:
        DualpruneError: the sparsity is no fraction, or the pattern does not fit the shape.
        NonFiniteError: there is a NaN (infinities are kept first).
    """
    pattern = parse_pattern(pattern)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.itemsize < 2:
        raise DualpruneError(
            f"project expects a tensor of 16-, 32- or 64-bit floats, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    if bool(tensor.isnan().any()):
        raise NonFiniteError("project got a tensor with NaN, which has no magnitude to rank by")
    if sparsity is None and not pattern.alone:
        raise DualpruneError(f"project onto {pattern} needs sparsity=, a fraction in [0, 1]")
    return pattern.project(tensor, pattern.snap(0.0) if sparsity is None else check_sparsity(sparsity))
