"""Kernel patterns: which few of the nine positions of a 3×3 kernel are kept, and which kernels at all.

A kernel is a row of nine numbers, its positions counted row by row. What PatDNN (Niu et al. 2020) and PConv (Ma et al.
2020) do by hand and by counting is one rule here, a pure function of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from dualprune.errors import DualpruneError
from dualprune.pattern import Pattern, Shape, energy
from dualprune.selection import keep_largest

POSITIONS = 9
Positions = tuple[int, ...]


@cache
def candidates(entries: int) -> list[Positions]:
    """Return every choice of `entries` of the nine positions, in lexicographic order."""
    return list(combinations(range(POSITIONS), entries))


def learn_patterns(kernels: Iterable[Tensor], entries: int, count: int) -> list[Positions]:
    """Return the at most `count` patterns that hold the natural positions of the most kernels.

    A kernel's natural positions are those of its `entries` largest magnitudes, zeros excluded, ties to the earlier
    position. Again and again the pattern is taken that holds those of the most kernels not held yet, ties to the
    lexicographically first; so where no kernel has exact zeros these are simply the most frequent natural patterns.

    Args:
        kernels: tensors (n, 9) of energies or magnitudes.
        entries: positions a pattern keeps.
        count: how many patterns at most; fewer if fewer hold all kernels.
    """
    votes = sum((_votes(k, entries) for k in kernels), torch.zeros(1 << POSITIONS, dtype=torch.int64, device="cpu"))
    codes = torch.tensor([sum(1 << p for p in chosen) for chosen in candidates(entries)], device="cpu")
    holds = (torch.arange(1 << POSITIONS, device="cpu") & ~codes[:, None]) == 0
    votes[0] = 0  # a kernel of zeros fits everywhere
    found: list[int] = []
    while not found or (len(found) < count and bool(votes.any())):
        best = int((holds * votes).sum(1).argmax())
        found.append(best)
        votes[holds[best]] = 0
    return sorted(candidates(entries)[i] for i in found)


def best_patterns(squares: Tensor, patterns: Sequence[Positions]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row of `squares` (n, 9) its pattern of least loss, as a mask (n, 9), what it keeps and what it loses.

    Losses are compared rather than what is kept, because a loss of nothing is exact; ties go to the earlier pattern.
    """
    lost = torch.stack([squares[:, [i for i in range(POSITIONS) if i not in p]].sum(1) for p in patterns], 1)
    least, best = lost.min(1)
    table = torch.zeros(len(patterns), POSITIONS, dtype=torch.bool, device="cpu")
    for row, pattern in zip(table, patterns, strict=True):
        row[list(pattern)] = True
    mask = table.to(squares.device)[best]
    return mask, squares.masked_fill(~mask, 0).sum(1), least


@dataclass(frozen=True)
class KernelPattern(Pattern):
    """3×3 kernels that keep `entries` of nine positions, chosen from a few patterns, with whole kernels dropped on top.

    The pattern alone makes 1 − entries/9 of the weights zero (5/9). A higher sparsity drops whole kernels (connectivity
    pruning) until it is reached; while a schedule passes through lower ones, the kernels that lose least are patterned
    first and the others are whole. Each kernel takes the pattern that keeps most of its energy, and the kernels whose
    pattern keeps most stay: for an explicit set this is the exact Euclidean projection.

    Args:
        entries: positions kept of the nine, 1 to 8.
        patterns: how many patterns, learnt from the very tensor that is projected (`kernel_pattern.learn_patterns`), so
            that a solver's Z has its set re-learnt at every update; or an explicit tuple of patterns, each a tuple of
            positions 0 to 8 counted row by row, such as `KernelPattern.learn(weights)` gives.

    Raises:
        DualpruneError: a number is out of range, or a pattern is no choice of `entries` positions.

    Sources: PatDNN (Niu et al. 2020), PConv (Ma et al. 2020): natural patterns by frequency, then connectivity.
    """

    entries: int = 4
    patterns: int | tuple[Positions, ...] = 8
    alone = True

    def __post_init__(self) -> None:
        if not _is_whole(self.entries) or not 1 <= self.entries < POSITIONS:
            raise DualpruneError(f"KernelPattern(entries) is how many of 9 positions are kept, 1 to 8, got {self.entries!r}")
        possible = len(candidates(self.entries))
        if _is_whole(self.patterns):
            if not 1 <= self.patterns <= possible:  # type: ignore[operator]
                raise DualpruneError(
                    f"KernelPattern(patterns) is how many patterns of {self.entries} positions, 1 to {possible}, "
                    f"got {self.patterns}"
                )
        else:
            object.__setattr__(self, "patterns", self._explicit(self.patterns))

    def _explicit(self, given: object) -> tuple[Positions, ...]:
        try:
            found = sorted({tuple(sorted(p)) for p in given})  # type: ignore[attr-defined]
        except TypeError:
            found = []
        if not found or any(p not in candidates(self.entries) for p in found):
            raise DualpruneError(
                f"KernelPattern(patterns) is a number, or a tuple of tuples of {self.entries} different positions from "
                f"0 to 8 (row by row), such as ({tuple(range(self.entries))},), got {given!r}"
            )
        return tuple(found)

    @classmethod
    def learn(cls, weights: Tensor | Iterable[Tensor], entries: int = 4, patterns: int = 8) -> KernelPattern:
        """Return a pattern with an explicit set: the most frequent natural patterns over all kernels of `weights`.

        Args:
            weights: one weight (F, C, 3, 3) or several, which then share the set.
            entries: positions kept of the nine.
            patterns: how many patterns at most.

        Raises:
            DualpruneError: there are no weights, or one has kernels that are not 3×3.
        """
        open_set = cls(entries, patterns)
        given = [weights] if isinstance(weights, Tensor) else list(weights)
        if not given:
            raise DualpruneError("KernelPattern.learn got no weights: pass those of the 3×3 convolutions")
        for w in given:
            open_set.check(tuple(w.shape))
        return cls(entries, tuple(learn_patterns([_kernels(w).abs() for w in given], entries, patterns)))

    def units(self, shape: Shape) -> int:  # noqa: D102
        return math.prod(shape[:2])

    def check(self, shape: Shape) -> None:  # noqa: D102
        if len(shape) != 4 or tuple(shape[2:]) != (3, 3):
            raise DualpruneError(
                f"{self} needs 3×3 kernels, got shape {shape}: put a rule that names this parameter before the glob that "
                f'reached it, such as "{"kernel" if len(shape) > 2 else "unstructured"}", or ignore it'
            )

    def snap(self, sparsity: float) -> float:  # noqa: D102
        return max(sparsity, 1 - self.entries / POSITIONS)

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return the number of kernels kept, patterned or, below the pattern's own sparsity, whole."""
        return self._kernels_kept(self.units(shape), sparsity)

    def weights_per_unit(self, shape: Shape) -> float:
        """Return how many weights a kept kernel holds."""
        return float(self.entries)

    def _kernels_kept(self, kernels: int, sparsity: float) -> int:
        return min(kernels, round((1 - sparsity) * kernels * POSITIONS / self.entries))

    def _kernels_whole(self, kernels: int, sparsity: float) -> int:
        return max(0, kernels - round(sparsity * kernels * POSITIONS / (POSITIONS - self.entries)))

    def scores(self, w: Tensor) -> Tensor:
        """Return the energy that each kernel's pattern keeps."""
        return self._best(w)[1]

    def expand(self, keep: Tensor, shape: Shape) -> Tensor:
        """Turn a mask over kernels into one over whole kernels; `mask` has the patterns in it."""
        return keep.view(*shape[:2], 1, 1)

    def _best(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = energy(_kernels(w))
        return best_patterns(squares, self._set([squares]))

    def _set(self, kernels: Sequence[Tensor]) -> Sequence[Positions]:
        return learn_patterns(kernels, self.entries, self.patterns) if isinstance(self.patterns, int) else self.patterns

    def mask(self, w: Tensor, sparsity: float) -> Tensor:  # noqa: D102
        self.check(tuple(w.shape))
        return self.masks([w], sparsity)[0]

    def masks(self, values: Sequence[Tensor], sparsity: float, *, all_alive: bool = False) -> list[Tensor]:
        """Return the masks of several weights that share one threshold; each learns its own set, where none is given.

        Args:
            values: weights (F, C, 3, 3).
            sparsity: of all weights together.
            all_alive: keep the strongest kernel of each, so that no layer cuts the network.
        """
        masks = self._masks(values, sparsity, all_alive)
        while isinstance(self.patterns, int):  # exact zeros among the kept can make the projection vote for another set
            kept = [torch.where(m, v, 0) for m, v in zip(masks, values, strict=True)]
            if not any(_has_gaps(z, self.entries) for z in kept):
                break
            again = self._masks(kept, sparsity, all_alive)
            if not any(bool(((z != 0) & ~m).any()) for z, m in zip(kept, again, strict=True)):
                break
            masks = [m & a for m, a in zip(masks, again, strict=True)]
        return masks

    def _masks(self, values: Sequence[Tensor], sparsity: float, all_alive: bool) -> list[Tensor]:
        best, kept, lost = zip(*(self._best(v.detach()) for v in values), strict=True)
        total = sum(len(b) for b in best)
        if sparsity < 1 - self.entries / POSITIONS - 1e-9:
            whole = keep_largest(lost, self._kernels_whole(total, sparsity))
            rows = [b | k[:, None] for b, k in zip(best, whole, strict=True)]
        else:
            count = self._kernels_kept(total, sparsity)
            if all_alive:
                count = max(count, len(kept))
                for strength in kept:
                    strength[strength.argmax()] = math.inf
            rows = [b & k[:, None] for b, k in zip(best, keep_largest(kept, count), strict=True)]
        return [m.view(v.shape) for m, v in zip(rows, values, strict=True)]

    def contains(self, w: Tensor, sparsity: float) -> bool:
        """Tell whether few enough kernels are nonzero and all fit a pattern, of the set given or of that learnt from `w`."""
        self.check(tuple(w.shape))
        _, _, outside = best_patterns((_kernels(w) != 0).float(), self._set([_kernels(w).abs()]))
        misfits, kernels = int(torch.count_nonzero(outside)), len(outside)
        if sparsity < 1 - self.entries / POSITIONS - 1e-9:
            return misfits <= self._kernels_whole(kernels, sparsity)
        return not misfits and int((_kernels(w) != 0).any(1).sum()) <= self._kernels_kept(kernels, sparsity)

    def __str__(self) -> str:
        if isinstance(self.patterns, int):
            return f"pattern:{self.entries}x{self.patterns}"
        return f"pattern:{self.entries}[{','.join(''.join(map(str, p)) for p in self.patterns)}]"


def _votes(kernels: Tensor, entries: int) -> Tensor:
    """Count the kernels (n, 9) by their natural positions, written as nine bits; returns (512) on the CPU."""
    order = kernels.abs().argsort(dim=1, descending=True, stable=True)[:, :entries]
    bits = (kernels.gather(1, order) != 0).long() << order
    return torch.bincount(bits.sum(1).cpu(), minlength=1 << POSITIONS)


def _kernels(w: Tensor) -> Tensor:
    return w.detach().reshape(-1, POSITIONS)


def _has_gaps(z: Tensor, entries: int) -> bool:
    """Tell whether a kernel that is kept has fewer nonzeros than its pattern has positions."""
    nonzeros = (_kernels(z) != 0).sum(1)
    return bool(((nonzeros > 0) & (nonzeros < entries)).any())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
