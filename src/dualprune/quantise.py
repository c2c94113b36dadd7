"""Weights on a grid of b bits: the best scale for a tensor, rounding to it, and finding the grid a tensor is on.

The grid of b bits and scale Δ is Δ·{−T, …, −1, 0, 1, …, T} with T = 2^(b−1) − 1: symmetric, zero in it, one Δ a tensor.
A level q·Δ is formed in float32 and then rounded to the tensor's dtype; Δ is a float32, chosen with 17 significant bits
so that in float32 and float64 no level is rounded at all. See docs/quantisation.md for the projection and its proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualprune.errors import DualpruneError
from dualprune.selection import BITS as INTEGERS

LEAST_BITS, MOST_BITS = 2, 8
_EXACT = 1 << 17  # values × levels up to which every possible choice of codes is tried
_BINS = 1 << 16
_SCAN = 64
_GLANCE = 4096


@dataclass(frozen=True)
class Grid:
    """A scale Δ and the largest code in use, T: the levels Δ·{−T, …, T}."""

    scale: float
    top: int

    @property
    def bits(self) -> int:
        """The least bits b with T ≤ 2^(b−1) − 1."""
        return self.top.bit_length() + 1


@dataclass
class Held:
    """A weight that stays on its grid while an optimizer goes on stepping: W = Q(V), rounded to the levels of a fixed Δ."""

    latent: Tensor  # V
    scale: float
    bits: int

    @property
    def levels(self) -> Tensor:
        """Q(V)."""
        return nearest(self.latent, self.scale, self.bits)

    def restore_(self, w: Tensor) -> None:
        """W ← V, for a V that is on the grid."""
        w.copy_(self.latent)

    def follow_(self, w: Tensor) -> None:
        """V ← V + (W − Q(V)), W ← Q(V): the step made from the level moves V (straight-through, Courbariaux et al. 2015)."""
        self.latent.add_(w - self.levels)
        w.copy_(self.levels)


def check_bits(value: Any, what: str = "bits") -> int:
    """Return `value` if it is a whole number from 2 to 8.

    Raises:
        DualpruneError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not LEAST_BITS <= value <= MOST_BITS:
        hint = "; one bit has no zero among its levels" if value == 1 else ""
        raise DualpruneError(f"{what} is a whole number from {LEAST_BITS} to {MOST_BITS}, got {value!r}{hint}")
    return value


def top_code(bits: int) -> int:
    """Return T = 2^(b−1) − 1, the largest code of a grid of `bits` bits."""
    return 2 ** (bits - 1) - 1


@torch.no_grad()
def snap(w: Tensor, bits: int) -> Tensor:
    """Return the nearest tensor to `w` on a grid of `bits` bits, the scale chosen for it; zeros stay zero.

    Together with "keep the k largest magnitudes" this is the projection onto "at most k nonzeros, each on the grid".

    Args:
        w: finite floats of 16, 32 or 64 bits, any shape; unchanged. A tensor on such a grid comes back bit for
            bit (in 16 bits nearly always: its scale has to be found anew).
        bits: 2 to 8.
    """
    return nearest(w, fit_scale(w, bits), bits)


def nearest(w: Tensor, scale: float, bits: int) -> Tensor:
    """Round every element to the nearest of the levels scale·{−T, …, T}; no −0.0 comes out."""
    wide = w if w.dtype == torch.float64 else w.float()
    codes = (wide / scale).round_().clamp_(-top_code(bits), top_code(bits))
    return codes.float().mul_(scale).add_(0.0).to(w.dtype)


@torch.no_grad()
def fit_scale(w: Tensor, bits: int) -> float:
    """Return the Δ that (nearly) minimises the squared error of rounding `w` to the grid; its zeros do not count.

    The scale of a tensor that is on a grid already is found exactly. Otherwise, for given codes q the best scale is
    ⟨|w|, q⟩/⟨q, q⟩ and removes ⟨|w|, q⟩²/⟨q, q⟩ of ‖w‖². As Δ falls from infinity the codes rise one by one, so up to 2^17
    values × levels all choices are tried and the answer is the best there is; above, the values are counted in at most
    2^16 bins and Δ is scanned in two rounds of 64.

    Returns:
        A float32 as a Python float; 1.0 where there is nothing but zeros.
    """
    x = w[w != 0].abs()
    if not x.numel():
        return 1.0
    if (grid := find_grid(x, bits)) is not None:
        return grid.scale
    x = x if x.dtype == torch.float64 else x.float()
    top = top_code(bits)
    if x.numel() * top <= _EXACT:
        scale = _best_of_all(x.double().cpu(), top)
    else:
        scale = _refit(x, _best_of_scan(*_histogram(x), top), top)
    limits = torch.finfo(w.dtype), torch.finfo(torch.float32)
    most = min(f.max for f in limits) / top * (1 - 2**-16)  # the largest level must not become infinite
    return _short(min(max(scale, limits[1].tiny), most))


@torch.no_grad()
def find_grid(values: Tensor, bits: int = MOST_BITS) -> Grid | None:
    """Return the grid of the fewest levels that has every one of `values` bit for bit; None where there is none.

    Args:
        values: floats of 16, 32 or 64 bits, any shape; NaN and infinities are on no grid, nothing but zeros on none either.
        bits: the grid may have at most so many.
    """
    flat, top = values.detach().reshape(-1), top_code(bits)
    for part in (flat[:_GLANCE], flat):  # most tensors are refused at a glance
        magnitudes = part.abs().unique()
        magnitudes = magnitudes[magnitudes != 0].cpu()
        if len(magnitudes) > top:
            return None
    if not len(magnitudes) or not bool(magnitudes.isfinite().all()):
        return None
    m = magnitudes.double()
    tops = torch.arange(1, top + 1, dtype=torch.float64, device="cpu")
    codes = (m / m[-1] * tops[:, None]).round()  # one row for every code the largest magnitude can have
    for _ in range(2):  # in 16 bits the largest is rounded itself, the mean over all is nearer to the scale
        codes = (m / _least_squares(m, codes)[:, None]).round()
    scales = _candidates(magnitudes, codes)  # (candidates, tops): one of them fits if any does
    levels = (codes.float() * scales[..., None]).to(values.dtype)
    fits = (levels == magnitudes).all(-1) & (scales > 0) & (codes[:, -1] <= top)
    if not bool(fits.any()):
        return None
    row = int(torch.where(fits.any(0), codes[:, -1], math.inf).argmin())
    return Grid(float(scales[int(fits[:, row].nonzero()[0]), row]), int(codes[row, -1]))


def _candidates(magnitudes: Tensor, codes: Tensor) -> Tensor:
    """For every row of codes: the least-squares scale, and the ends of the scales whose levels round to the magnitudes."""
    m, q = magnitudes.double(), codes.clamp_min(1)
    bits = magnitudes.view(INTEGERS[magnitudes.itemsize])
    below, above = ((m + (bits + step).view(magnitudes.dtype).double()) / 2 for step in (-1, 1))
    low, high = (below / q).amax(1), (above / q).amin(1)
    ends = torch.stack([low, high]).float()
    near = [torch.nextafter(ends, torch.full_like(ends, towards)) for towards in (0.0, math.inf)]
    return torch.cat([_least_squares(m, codes).float()[None], ends, *near])


def _least_squares(m: Tensor, codes: Tensor) -> Tensor:
    return (m * codes).sum(1) / codes.square().sum(1)


def _best_of_all(x: Tensor, top: int) -> float:
    """Return the best Δ for magnitudes `x` (float64): Δ falls past x/(q − ½), the code of x rises to q."""
    codes = torch.arange(1, top + 1, dtype=torch.float64, device=x.device)
    order = (x[:, None] / (codes - 0.5)).reshape(-1).argsort(descending=True, stable=True)
    inner = x.repeat_interleave(top)[order].cumsum(0)  # ⟨x, q⟩
    square = (2 * codes - 1).repeat(len(x))[order].cumsum(0)  # ⟨q, q⟩
    best = (inner.square() / square).argmax()
    return float(inner[best] / square[best])


def _histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middles (float64) and counts of equal bins from 0 to the largest magnitude."""
    width = float(x.max()) / _BINS
    counts = torch.bincount((x / width).int().clamp_(0, _BINS - 1), minlength=_BINS).cpu()
    return (torch.arange(_BINS, dtype=torch.float64, device="cpu") + 0.5) * width, counts.double()


def _best_of_scan(points: Tensor, counts: Tensor, top: int) -> float:
    """Return the best of two rounds of scales: from half the mean over T to the largest, then around the best of these."""
    codes = torch.arange(1, top + 1, dtype=torch.float64, device=points.device)
    number = torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])  # of values from a point upwards
    total = torch.cat([(counts * points).flip(0).cumsum(0).flip(0), counts.new_zeros(1)])
    low, high = float(total[0] / number[0]) / (2 * top), float(points[-1])
    for _ in range(2):
        ends = math.log(low), math.log(high)
        scales = torch.logspace(*ends, _SCAN, base=math.e, dtype=torch.float64, device=points.device)
        above = torch.searchsorted(points, scales[:, None] * (codes - 0.5))  # from here upwards the code is at least q
        inner, square = total[above].sum(1), (number[above] * (2 * codes - 1)).sum(1)
        best = int((inner.square() / square).nan_to_num().argmax())
        low, high = float(scales[max(best - 1, 0)]), float(scales[min(best + 1, _SCAN - 1)])
    return float(inner[best] / square[best])


def _refit(x: Tensor, scale: float, top: int) -> float:
    """Return ⟨x, q⟩/⟨q, q⟩ over all values, for the codes they have at `scale`."""
    codes = (x / scale).round_().clamp_(max=top)
    inner, square = (x * codes).sum(dtype=torch.float64), codes.square_().sum(dtype=torch.float64)
    return float(inner / square) if float(square) else scale


def _short(scale: float) -> float:
    """Round to 17 significant bits: a product with a code of 7 bits is then exact in float32."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(math.ldexp(mantissa, 17)), exponent - 17)
