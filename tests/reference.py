"""Slow twins of the methods on lists of plain floats, written from the definitions and sharing no code with the library.

Every Lagrangian is evaluated whole, on copies of the weights of the update before. A layer is a flat list of floats; its
set is "at most `kept` nonzeros", ties kept by index.
"""

from __future__ import annotations

from math import exp, inf, log, sqrt

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


def asked(sparsity: float, progress: float, over: float, curve: str = "cubic") -> float:
    """What is asked for on the way to `sparsity`."""
    if not over or progress >= over:
        return sparsity
    t = progress / over
    if curve == "cubic":
        return sparsity * (1 - (1 - t) ** 3)
    return 1 - (1 - sparsity) ** (2 * t - t * t)


class Twin:
    """Z = Π(W), Λ = 0, and how many weights each layer keeps at each progress."""

    def __init__(self, W: Layers, sparsity: float, ramp: float, curve: str = "cubic") -> None:
        self.sparsity, self.ramp, self.curve = sparsity, ramp, curve
        self.Z = project(W, self.kept(W, 0.0))
        self.lam = [[0.0] * len(layer) for layer in W]

    def kept(self, W: Layers, progress: float) -> list[int]:
        now = asked(self.sparsity, progress, self.ramp, self.curve)
        return [len(layer) - round(now * len(layer)) for layer in W]


class SLRTwin(Twin):
    """Algorithm 1 of the 2024 paper; "as_printed" takes ‖Wᵏ⁻¹ − Zᵏ⁻¹‖ in both numerators."""

    def __init__(
        self, W: Layers, sparsity: float, s0: float, M: float, r: float,
        rule: str = "contraction", cap: float = inf, ramp: float = 0.0, follows: bool = False, curve: str = "cubic",
    ) -> None:  # fmt: skip
        super().__init__(W, sparsity, ramp, curve)
        self.follows = follows
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
        if self.follows:
            shifted = axpy(1 / rho, self.lam, W)
            self.Z = [[v if z else 0.0 for v, z in zip(a, b, strict=True)] for a, b in zip(shifted, self.Z, strict=True)]
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
    """Keep the largest at a rising sparsity, along Zhu & Gupta's cubic or a geometric curve."""

    def __init__(self, sparsity: float, over: float, curve: str = "cubic") -> None:
        self.sparsity, self.over, self.curve = sparsity, over, curve

    def update(self, W: Layers, progress: float) -> Layers:
        now = asked(self.sparsity, progress, self.over, self.curve)
        return project(W, [len(layer) - round(now * len(layer)) for layer in W])


class ReweightedTwin:
    """P_g = 1/(R_g + ε) of the last refresh, and a λ per budget by what its log-odds of energy outside have to fall.

    `groups` are each layer's units as lists of indices; R is Σw² or its root. The root's corner is rounded below ε, or
    wherever a unit would be pulled by more than half of itself in a step of `lr`. With `spare` P_g is 0 for what was
    kept at the last refresh. Layers have a budget each, or, `pooled`
    (for units of one weight), one in common.
    """

    def __init__(
        self, W: Layers, groups: list[list[list[int]]], sparsity: float, squared: bool, eps: float,
        refreshes: int, target: float, end: float, lam: float | None = None, pooled: bool = False, spare: bool = False,
    ) -> None:  # fmt: skip
        self.spare = spare
        self.groups, self.sparsity, self.squared = groups, sparsity, squared
        self.refreshes, self.target, self.end = refreshes, target, end
        layers = list(range(len(W)))
        self.budgets = [layers] if pooled else [[i] for i in layers]
        self.lam, self.searched, self.count, self.lr = [lam for _ in self.budgets], lam is None, 0, None
        self.eps = [eps * sum(R) / len(R) for R in self.sizes(W)]
        self.P = self.weights(W)
        self.last, self.progress, self.kept = self.odds(W), 0.0, self.support(W)

    def sizes(self, W: Layers) -> Layers:
        power = 1 if self.squared else 0.5
        return [[sum(w[i] ** 2 for i in g) ** power for g in units] for w, units in zip(W, self.groups, strict=True)]

    def weights(self, W: Layers) -> Layers:
        kept = self.support(W) if self.spare else [set() for _ in W]
        layers = zip(self.sizes(W), self.eps, self.groups, kept, strict=True)
        return [[0.0 if g[0] in k else 1 / (r + e) for r, g in zip(R, units, strict=True)] for R, e, units, k in layers]

    def gradient(self, W: Layers, own: Layers) -> Layers:
        """Return the loss's own gradient plus the penalty's; the first one sets λ, to be as long."""
        if None in self.lam:
            pull = self.pull(W, [1.0 for _ in self.budgets], rounded=False)
            self.lam = [
                sqrt(sum(g * g for i in b for g in own[i]) / sum(g * g for i in b for g in pull[i])) for b in self.budgets
            ]
            self.most = [1e4 * lam for lam in self.lam]
        return axpy(1.0, self.pull(W, self.lam), own)

    def pull(self, W: Layers, lams: list[float], rounded: bool = True) -> Layers:
        most = 0.5 / self.lr if self.lr and rounded else inf
        result, sizes = [[0.0] * len(w) for w in W], self.sizes(W)
        for members, lam in zip(self.budgets, lams, strict=True):
            for layer in members:
                e = self.eps[layer]
                for g, p, r in zip(self.groups[layer], self.P[layer], sizes[layer], strict=True):
                    slope = min(2 * lam * p, most) if self.squared else lam * p / max(r, e, lam / e / most)
                    for i in g:
                        result[layer][i] = slope * W[layer][i]
        return result

    def support(self, W: Layers) -> list[set[int]]:
        if len(self.budgets) == 1:
            flat = [(x, layer, i) for layer, w in enumerate(W) for i, x in enumerate(w)]
            best = largest([x for x, _, _ in flat], len(flat) - round(self.sparsity * len(flat)))
            return [{i for j in best if flat[j][1] == layer for i in [flat[j][2]]} for layer in range(len(W))]
        supports = []
        for w, units in zip(W, self.groups, strict=True):
            energies = [sum(w[i] ** 2 for i in g) for g in units]
            best = largest(energies, len(units) - round(self.sparsity * len(units)))
            supports.append({i for u in best for i in units[u]})
        return supports

    def odds(self, W: Layers) -> list[float]:
        supports = self.support(W)
        inside = [sum(w[i] ** 2 for i in s) for w, s in zip(W, supports, strict=True)]
        outside = [sum(x * x for i, x in enumerate(w) if i not in s) for w, s in zip(W, supports, strict=True)]
        self.outside = sum(outside)
        return [log(sum(outside[i] for i in b) / sum(inside[i] for i in b)) for b in self.budgets]

    def update(self, W: Layers, progress: float, lr: float) -> dict[str, object]:
        odds, kept, before = self.odds(W), self.support(W), list(self.lam)
        due = min(int(progress / self.end * (self.refreshes + 1) + 1e-9), self.refreshes)
        if refreshed := due > self.count:
            self.P, self.count = self.weights(W), due
        dead = [
            sum(len(g) for g, r in zip(units, R, strict=True) if r <= e)
            for units, R, e in zip(self.groups, self.sizes(W), self.eps, strict=True)
        ]
        passed = progress - self.progress
        for b, members in enumerate(self.budgets if self.searched else []):
            need, fell = (odds[b] - log(self.target)) / max(self.end - progress, passed), (self.last[b] - odds[b]) / passed
            factor = 0.5 if need <= 0 else 2.0 if fell <= 0 else min(2.0, max(0.5, need / fell))
            if sum(dead[i] for i in members) > (1 + self.sparsity) / 2 * sum(len(W[i]) for i in members):
                factor = 0.5
            self.lam[b] = min(self.lam[b] * factor, self.most[b])
        flips = sum(len(a ^ b) for a, b in zip(kept, self.kept, strict=True)) / sum(map(len, W))
        self.last, self.progress, self.kept, self.lr = odds, progress, kept, lr
        return {
            "lam": exp(sum(map(log, before)) / len(before)), "violation": sqrt(self.outside),
            "dead": sum(dead) / sum(map(len, W)), "support_change": flips, "refreshed": refreshed,
        }  # fmt: skip
