"""The penalty of reweighting on one layer, λ Σ_g P_g R(W_g): its units, their weights P and its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from dualprune.chunks import chunks
from dualprune.patterns import Block, Channel, Column, Filter, Kernel, Pattern

Grouped = Filter | Channel | Column | Kernel | Block


@dataclass(frozen=True)
class Penalty:
    """λ Σ_g P_g R(W_g) of one layer; P is kept as ε·P_g = ε / (R + ε), in (0, 1], which no dtype overflows."""

    pattern: Pattern
    squared: bool
    eps: float

    def measure(self, norms: Tensor) -> Tensor:
        """Return R of units of these ‖W_g‖."""
        return norms.square() if self.squared else norms

    def reweigh(self, norms: Tensor) -> Tensor:
        """Return ε·P_g = ε / (R(W_g) + ε)."""
        return self.eps / (self.measure(norms) + self.eps)

    def pull_(
        self, grad: Tensor, w: Tensor, P: Tensor, lam: float, scale: Tensor | None = None, steepest: float = math.inf
    ) -> None:
        """Add λ P_g ∂R(W_g), times `scale`; ∂R is 2W_g for the square, W_g / max(‖W_g‖, δ) for the rounded norm.

        As λP_g ≤ λ/ε, no weight is pulled by more than `steepest` times itself where δ = max(ε, λ/(ε·steepest)); for the
        square, P is bounded instead.
        """
        delta = max(self.eps, lam / self.eps / steepest)
        slope = 2 * lam / self.eps if self.squared else lam / self.eps / delta
        if grouped(self.pattern):
            P = P.clamp(max=steepest / slope) if self.squared else P * (delta / unit_norms(w, self.pattern)).clamp_(max=1)
            _add_by_unit_(grad, w, P if scale is None else P * scale, self.pattern, slope)
            return
        for g, v, p in chunks((grad,), (w,), (P,)):
            p, v = (p.clamp(max=steepest / slope), v) if self.squared else (p, v.clamp(-delta, delta))
            g.addcmul_(v, p if scale is None else p * scale, value=slope)

    def strength(self, norms: Tensor, P: Tensor) -> float:
        """Return ‖P_g ∂R(W_g)‖² over the layer: how hard λ = 1 would pull."""
        length = 2 * norms if self.squared else (norms / self.eps).clamp_(max=1)
        return float((P.to(norms.device) / self.eps * length).double().square().sum())


def grouped(pattern: Pattern) -> TypeGuard[Grouped]:
    """Tell whether a unit of this pattern is a group of weights, not one weight."""
    return isinstance(pattern, Grouped)


def unit_norms(w: Tensor, pattern: Pattern) -> Tensor:
    """Return ‖W_g‖ of every unit, row-major, in single precision or better; |w| in w's shape where a unit is one weight."""
    wide = torch.promote_types(w.dtype, torch.float32)
    if not grouped(pattern):
        return w.to(wide).abs()
    unit, shape = pattern.unit_shape(tuple(w.shape)), tuple(w.shape)
    if isinstance(pattern, Block):
        unit, shape = (unit[0], 1, unit[1], 1), (unit[0], pattern.rows, unit[1], pattern.columns)
    dims = [d for d, (u, size) in enumerate(zip(unit, shape, strict=True)) if u != size]
    tiles = w.reshape(shape)
    return (torch.linalg.vector_norm(tiles, dim=dims, dtype=wide) if dims else tiles.to(wide).abs()).reshape(-1)


def _add_by_unit_(grad: Tensor, w: Tensor, factor: Tensor, pattern: Pattern, value: float) -> None:
    """Add value·factor_g·W_g to the gradient, without memory of W's size."""
    shape = tuple(w.shape)
    if isinstance(pattern, Block) and w.is_contiguous() and grad.is_contiguous():
        r, c = pattern.unit_shape(shape)
        tiles = (r, pattern.rows, c, pattern.columns)
        grad.view(tiles).addcmul_(w.view(tiles), factor.view(r, 1, c, 1), value=value)
    else:  # tiles of a channels-last weight are no view: `expand` spells the factors out
        grad.addcmul_(w, pattern.expand(factor, shape), value=value)
