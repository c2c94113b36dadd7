"""Slow twins of the methods on lists of plain floats, written from the definitions and sharing no code with the library.

Every Lagrangian is evaluated whole, on copies of the weights of the update before. A layer is a flat list of floats; its
set is "at most `kept` nonzeros", ties kept by index.
"""

from __future__ import annotations

from math import inf, sqrt

Layers = list[list[float]]


def largest(values: list[float], kept: int) -> set[int]:
    """Return the indices of the `kept` largest magnitudes."""
    return set(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept])


def project(values: Layers, kept: list[int]) -> Layers:
    supports = [largest(v, k) for v, k in zip(values, kept, strict=True)]
    return [[x if i in s else 0.0 for i, x in enumerate(v)] for v, s in zip(values, supports, strict=True)]


def pairs(a: Layers, b: Layers) -> list[tuple[float, float]]:
    return [(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)]


def distance(a: Layers, b: Layers) -> float:
    return sqrt(sum((x - y) ** 2 for x, y in pairs(a, b)))


def axpy(a: float, x: Layers, y: Layers) -> Layers:
    """Return y + a·x."""
    return [[q + a * p for p, q in zip(u, v, strict=True)] for u, v in zip(x, y, strict=True)]


def difference(a: Layers, b: Layers) -> Layers:
    return axpy(-1.0, b, a)


def lagrangian(f: float, W: Layers, Z: Layers, lam: Layers, rho: float) -> float:
    """Return L_ρ(W, Z, Λ) = f(W) + ⟨Λ, W − Z⟩ + ρ/2 ‖W − Z‖² (eq. 4)."""
    gap = difference(W, Z)
    return f + sum(m * g for m, g in pairs(lam, gap)) + rho / 2 * sum(g * g for layer in gap for g in layer)


def cubic(progress: float, over: float) -> float:
    return 1.0 if not over or progress >= over else 1 - (1 - progress / over) ** 3


class Twin:
    """Z = Π(W), Λ = 0, and how many weights each layer keeps at each progress."""

    def __init__(self, W: Layers, sparsity: float, ramp: float) -> None:
        self.sparsity, self.ramp = sparsity, ramp
        self.Z = project(W, self.kept(W, 0.0))
        self.lam = [[0.0] * len(layer) for layer in W]

    def kept(self, W: Layers, progress: float) -> list[int]:
        asked = self.sparsity * cubic(progress, self.ramp)
        return [len(layer) - round(asked * len(layer)) for layer in W]


class SLRTwin(Twin):
    """Algorithm 1 of the 2024 paper; "as_printed" takes ‖Wᵏ⁻¹ − Zᵏ⁻¹‖ in both numerators."""

    def __init__(
        self, W: Layers, sparsity: float, s0: float, M: float, r: float,
        rule: str = "contraction", cap: float = inf, ramp: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(W, sparsity, ramp)
        self.s0, self.M, self.r, self.rule, self.cap = s0, M, r, rule, cap
        self.s, self.k, self.alpha = s0, 1, 1.0
        self.W_prev, self.f_prev = [list(layer) for layer in W], None
        self.g_last = distance(W, self.Z)

    def update(self, W: Layers, rho: float, progress: float, f: float | None = None) -> dict[str, object]:
        self.alpha = 1 - 1 / (self.M * self.k ** (1 - 1 / self.k**self.r))
        first = self.k == 1
        known = f is not None and (first or self.f_prev is not None)
        now, last = (f, inf if first else self.f_prev) if known else (0.0, 0.0)
        before = lagrangian(last, self.W_prev, self.Z, self.lam, rho)
        printed = distance(self.W_prev, self.Z)

        condition_w = lagrangian(now, W, self.Z, self.lam, rho) < before
        violation_before = distance(W, self.Z)
        if condition_w:
            self.ascend(W, rho, progress, printed)
        Z_old, self.Z = self.Z, project(axpy(1 / rho, self.lam, W), self.kept(W, progress))
        condition_z = lagrangian(now, W, self.Z, self.lam, rho) < lagrangian(now, W, Z_old, self.lam, rho)
        if condition_z:
            self.ascend(W, rho, progress, printed)
        self.W_prev, self.f_prev, self.k = [list(layer) for layer in W], f, self.k + 1
        return {
            "condition_w": condition_w, "condition_z": condition_z, "loss_known": known, "s": self.s,
            "violation_before": violation_before, "violation": distance(W, self.Z), "z_change": distance(self.Z, Z_old),
            "lagrangian": lagrangian(now, W, self.Z, self.lam, rho),
        }  # fmt: skip

    def ascend(self, W: Layers, rho: float, progress: float, printed: float) -> None:
        violation = distance(W, self.Z)
        numerator = self.g_last if self.rule == "contraction" else printed
        s = self.s0 if progress < self.ramp else self.alpha * self.s * numerator / violation
        self.s, self.g_last = min(s, self.cap * rho), violation
        self.lam = axpy(self.s, difference(W, self.Z), self.lam)


class ADMMTwin(Twin):
    """Z ← Π(W + Λ/ρ), Λ ← Λ + ρ(W − Z)."""

    def update(self, W: Layers, rho: float, progress: float) -> dict[str, object]:
        Z_old, before = self.Z, distance(W, self.Z)
        self.Z = project(axpy(1 / rho, self.lam, W), self.kept(W, progress))
        self.lam = axpy(rho, difference(W, self.Z), self.lam)
        return {
            "violation_before": before, "violation": distance(W, self.Z), "z_change": distance(self.Z, Z_old),
            "lagrangian": lagrangian(0.0, W, self.Z, self.lam, rho), "s": rho,
        }  # fmt: skip


class GradualTwin:
    """Zhu & Gupta 2018: keep the largest at a cubically rising sparsity."""

    def __init__(self, sparsity: float, over: float) -> None:
        self.sparsity, self.over = sparsity, over

    def update(self, W: Layers, progress: float) -> Layers:
        asked = self.sparsity * cubic(progress, self.over)
        return project(W, [len(layer) - round(asked * len(layer)) for layer in W])
