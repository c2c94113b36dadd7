"""One linear layer, pruned so that its outputs stay: min ½‖X(W − W₀)ᵀ‖² over W in a sparsity set, by six methods.

With H = XᵀX over calibration inputs X the objective is ½ tr (W − W₀) H (W − W₀)ᵀ, so X itself is not needed. Everything
here happens in the coordinates W·diag(H)^½, in which H has a unit diagonal and plain magnitude is |w|·‖x‖: one ρ suits all
layers (Meng et al. 2024, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dualprune.errors import DualpruneError, NonFiniteError, suggest
from dualprune.pattern import Pattern
from dualprune.patterns import NM, Unstructured
from dualprune.problem import Problem, Target
from dualprune.schedules import Geometric
from dualprune.selection import keep_largest
from dualprune.solvers import ADMM, SLR
from dualprune.solvers.base import Clock, DualMethod, Store

UPDATES = 100  # dual updates of SLR and ADMM
LAYER_SLR = SLR(rho=Geometric(0.02, 0.5, over=0.9), s0=0.02, cap=1.0, ramp=0.0, hold=0.0, pull="everywhere")
LAYER_ADMM = ADMM(rho=Geometric(0.02, 0.5, over=0.9))


@dataclass(frozen=True)
class Quadratic:
    """½ tr (W − W₀) H (W − W₀)ᵀ over W in a set, where H has a unit diagonal.

    Attributes:
        W0: dense weights in these coordinates, (out, in).
        H: damped second moments of the inputs, (in, in).
        scale: (in,); W·scale are these coordinates, W/scale the layer's own.
        norms: ‖x‖ of every input without damping, (in,).
        pattern, sparsity: the set.
    """

    W0: Tensor
    H: Tensor
    scale: Tensor
    norms: Tensor
    pattern: Pattern
    sparsity: float

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float, damping: float = 0.01) -> Quadratic:
        """State the problem of a layer.

        Args:
            weight: (out, in).
            gram: XᵀX, (in, in).
            pattern: of the set, along the axes of `weight`.
            sparsity: of the set.
            damping: multiple of H's mean diagonal that is added to its diagonal, as SparseGPT does.

        Raises:
            NonFiniteError: a weight or an input is NaN or infinite.
        """
        for what, tensor in (("a weight", weight), ("an input", gram)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{what} is NaN or infinite")
        H = gram.clone()
        energy = H.diagonal().clone()
        H.diagonal().add_(damping * energy.mean())
        H.diagonal().masked_fill_(H.diagonal() == 0, 1.0)
        scale = H.diagonal().sqrt()
        return cls(weight * scale, H / scale / scale[:, None], scale, energy.sqrt(), pattern, sparsity)

    def objective(self, W: Tensor) -> float:
        """Return ½ tr (W − W₀) H (W − W₀)ᵀ, where weights that never see an input cost nothing."""
        gap = (W - self.W0) * (self.norms > 0)
        return float(((gap @ self.H) * gap).sum(dtype=torch.float64)) / 2

    def error(self, W: Tensor) -> float:
        """Return the objective as a fraction of what pruning everything costs."""
        return self.objective(W) / (self.objective(torch.zeros_like(W)) or 1.0)

    def seen(self) -> Quadratic:
        """Return the problem with W₀ zero for inputs that are never there, so that their weights go first."""
        return replace(self, W0=self.W0 * (self.norms > 0))

    def project(self, W: Tensor) -> Tensor:
        """Return the nearest point of the set in these coordinates."""
        return self.pattern.project(W, self.sparsity)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        values, Q = torch.linalg.eigh(self.H)
        return values.clamp_min_(0), Q, self.W0 @ Q

    def nearest(self, rho: float, Z: Tensor, lam: Tensor) -> tuple[Tensor, float]:
        """Return argmin_W f(W) + ⟨Λ, W − Z⟩ + ρ/2 ‖W − Z‖² and f there, by one eigendecomposition of H for every ρ.

        W (H + ρI) = W₀H + ρZ − Λ, and with H = Q diag(h) Qᵀ the matrix to invert is diagonal.
        """
        h, Q, start = self._spectrum
        turned = (start * h + (rho * Z - lam) @ Q) / (h + rho)
        return turned @ Q.T, float(((turned - start).square_() @ h).sum(dtype=torch.float64)) / 2


def magnitude(q: Quadratic) -> Tensor:
    """Keep the largest |w|, whatever the inputs."""
    return torch.where(q.pattern.mask(q.W0 / q.scale, q.sparsity), q.W0, 0)


def wanda(q: Quadratic) -> Tensor:
    """Keep the largest |w|·‖x‖ of every output, or of every group of a pattern (Sun et al. 2023, eq. 1)."""
    score, inputs = q.W0 / q.scale * q.norms, q.W0.shape[1]
    per_row = isinstance(q.pattern, Unstructured)
    kept = NM(inputs - round(q.sparsity * inputs), inputs) if per_row else q.pattern
    return torch.where(kept.mask(score, 1.0 if per_row else q.sparsity), q.W0, 0)


def sparsegpt(q: Quadratic, block: int = 128) -> Tensor:
    """Go through the columns, prune the least w²/[U_jj]² and let the later ones make up for it (Frantar & Alistarh 2023).

    U is the upper Cholesky factor of H⁻¹: its row j is the optimal-brain-surgeon update after columns < j are settled.
    The mask of a block of columns (of a group of m) is chosen when its first column is reached (Algorithm 1).
    """
    q = q.seen()
    W, U, group = q.W0.clone(), _inverse_factor(q.H), q.pattern.m if isinstance(q.pattern, NM) else 0
    rows, columns = W.shape
    block = block // (group or 1) * (group or 1) or group
    keep = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(W[:, start:stop])
        for j in range(start, stop):
            if (j - start) % (group or block) == 0:
                chosen = slice(j, min(j + (group or block), stop))
                keep[:, chosen] = _cheapest(q, W[:, chosen] / U.diagonal()[chosen], rows * chosen.start, rows * chosen.stop)
            errors[:, j - start] = torch.where(keep[:, j], 0, W[:, j]) / U[j, j]
            W[:, j:stop] -= errors[:, j - start, None] * U[j, j:stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return torch.where(keep, W, 0)


def _cheapest(q: Quadratic, score: Tensor, before: int, after: int) -> Tensor:
    """Return the mask of a block of columns, so that the counts of all blocks add up to the layer's."""
    if isinstance(q.pattern, NM):
        return q.pattern.mask(score, q.sparsity)
    kept = after - before - (round(q.sparsity * after) - round(q.sparsity * before))
    return keep_largest([score], kept)[0]


def _inverse_factor(H: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except torch.linalg.LinAlgError:
        raise DualpruneError("H is singular, so SparseGPT cannot invert it: raise damping, or give more data") from None


def dual(q: Quadratic, method: DualMethod, updates: int = UPDATES) -> Tensor:
    """Alternate the exact minimiser over W with the library's own update of Z, Λ, s and ρ; then W ← Π(W)."""
    q = q.seen()
    weight = nn.Parameter(q.W0.clone(), requires_grad=False)
    solver = method.start(Problem([Target("weight", weight, q.pattern, q.sparsity)]), Store())
    (Z,), (lam,) = solver.tensors["Z"], solver.tensors["lam"]
    for update in range(updates):
        W, f = q.nearest(solver.scalars["rho"], Z, lam)
        weight.copy_(W)
        solver.update(Clock(f, update / updates))
    return q.project(weight.detach())


def alps(q: Quadratic, rho: float = 0.1, iterations: int = 300, check: int = 3) -> Tensor:
    """ADMM whose ρ grows with how much of the support still moves, until none does (Meng et al. 2024, Algorithm 1).

    Every third iteration ρ grows by 1.3, 1.2 or 1.1 as at least a tenth, 0.5 % or any of the kept weights are others.
    """
    q = q.seen()
    Z, lam = q.project(q.W0), torch.zeros_like(q.W0)
    W, support = q.W0, Z != 0
    kept = int(support.sum())
    for iteration in range(1, iterations + 1):
        W, _ = q.nearest(rho, Z, lam)
        Z = q.project(W + lam / rho)
        lam += rho * (W - Z)
        if iteration % check == 0:
            changed = int(((Z != 0) ^ support).sum())
            if not changed:
                break
            rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
            support = Z != 0
    return q.project(W)


def refit(q: Quadratic, W: Tensor, iterations: int = 32) -> Tensor:
    """Return the least-squares weights on the support of `W`, by conjugate gradients on all rows at once.

    Every row is a system of its own, with a step of its own (Meng et al. 2024, Algorithm 2, has one for all); the diagonal
    of H being one, they are preconditioned. The objective never rises by more than rounding.
    """
    support, least = W != 0, torch.finfo(W.dtype)
    R = (q.W0 - W) @ q.H * support
    P, square = R, R.square().sum(1, keepdim=True)
    first = square
    for _ in range(iterations):
        HP = P @ q.H * support
        bend = (P * HP).sum(1, keepdim=True)
        # of a row that is done, and along which a singular H is flat, rounding is all that is left
        open_ = (square > least.eps**2 * first) & (bend > 8 * least.eps * P.square().sum(1, keepdim=True))
        step = torch.where(open_, square / bend.clamp_min(least.tiny), 0)
        W, R = W + step * P, R - step * HP
        last, square = square, R.square().sum(1, keepdim=True)
        if float(square.sum()) <= 1e-10 * float(first.sum()):
            break
        P = R + square / last.clamp_min(least.tiny) * P
    return torch.where(support, W, 0)


_PLAIN: dict[str, Callable[[Quadratic], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
}
_DUAL: dict[str, DualMethod] = {"admm": LAYER_ADMM, "slr": LAYER_SLR}
METHODS = (*_PLAIN, *_DUAL)


@dataclass(frozen=True)
class LayerMethod:
    """A method for one layer: its name, its function, and whether least squares on the support follow."""

    name: str
    solve: Callable[[Quadratic], Tensor]
    refit: bool

    def __call__(self, q: Quadratic) -> Tensor:
        """Return the pruned weights in the coordinates of `q`."""
        W = self.solve(q)
        return refit(q, W) if self.refit else W


def layer_method(method: str | DualMethod, pattern: Pattern, refit: bool | None = None) -> LayerMethod:
    """Return the method of a name, or of SLR(…) or ADMM(…) with constants of one's own.

    Args:
        method: one of METHODS, or a value.
        pattern: what it is to keep.
        refit: whether least squares on the support follow; None: as published (after admm, alps and slr).

    Raises:
        DualpruneError: there is no such method, or it cannot do the pattern.
    """
    if method == "sparsegpt" and not (
        isinstance(pattern, Unstructured) or (isinstance(pattern, NM) and pattern.axis in (1, -1))
    ):
        raise DualpruneError(f"sparsegpt settles one column after the other and cannot do {pattern}; use slr, admm or alps")
    if isinstance(method, DualMethod):
        # the exact minimiser over W knows the penalty with Z at rest
        given = replace(method, pull="everywhere") if isinstance(method, SLR | ADMM) else method
        return LayerMethod(type(method).__name__.lower(), lambda q: dual(q, given), refit is not False)
    if method in _DUAL:
        chosen = _DUAL[method]
        return LayerMethod(method, lambda q: dual(q, chosen), refit is not False)
    if method not in _PLAIN:
        near = suggest(str(method), METHODS)
        raise DualpruneError(f"method is one of {', '.join(METHODS)}, or a value such as SLR(…); got {method!r}{near}")
    return LayerMethod(method, _PLAIN[method], method == "alps" if refit is None else refit)
