"""SLR, SLR as printed and ADMM on problems whose every answer is known: cardinality-constrained least squares.

    python benchmarks/least_squares.py --json results/least-squares.json

    min ½‖Aw − b‖²  over w ∈ R¹⁴ with at most 4 nonzeros

The best of the 1,001 supports is found by enumeration, the optimizer's part is the exact minimiser over W, and Λ, Z and
s move by the library's own updates. Two families of instances: "dense", b = Aw with a dense w, as a trained network;
"planted", b = Aw + noise with a w of 4 nonzeros. Nothing is tuned: the table has every ρ of one grid for both methods, SLR
with s₀ = ρ/5. SLR ascends up to twice an update, so ADMM is also given twice the updates. An objective is a multiple of
the optimum: as cut, W ← Π(W) and nothing else, and after least squares on the support that was found.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import dualprune
from dualprune.files import write_json
from dualprune.scope import build_problem
from dualprune.solvers import ADMM, SLR
from dualprune.solvers.base import Clock, DualMethod, Store

UNKNOWNS, KEPT, EQUATIONS = 14, 4, 28
FAMILIES = ("dense", "planted")
RHOS = (0.5, 0.7, 1.0, 1.4, 2.0)
GROWING = dualprune.Geometric(0.1, 2.0, over=0.8)
PLOTTED = ("SLR, rho 1.0", "SLR as printed, rho 1.0", "ADMM, rho 1.0")  # violation over updates goes into the JSON
DIVERGED = 1e6  # ‖W − Z‖ beyond which a run counts as diverged
ABANDONED = 1e12  # … and is left


@dataclass(frozen=True)
class Instance:
    """½‖Aw − b‖² as its normal equations: G = AᵀA, c = Aᵀb, b² = bᵀb; and the best objective on every support."""

    G: Tensor
    c: Tensor
    b2: float
    by_support: Tensor

    def objective(self, w: Tensor) -> float:
        """Return ½‖Aw − b‖²."""
        return float(w @ self.G @ w / 2 - self.c @ w + self.b2 / 2)

    def minimiser(self, rho: float = 0.0, pull: Tensor | float = 0.0) -> Tensor:
        """Return argmin ½‖Aw − b‖² + ρ/2 ‖w‖² − ⟨pull, w⟩."""
        return torch.linalg.solve(self.G + rho * torch.eye(UNKNOWNS, dtype=torch.float64), self.c + pull)


@dataclass(frozen=True)
class Outcome:
    """How one run ended; objectives are multiples of the optimum, the trace is ‖W − Z‖ after each update."""

    best_support: bool
    cut: float
    refit: float
    trace: list[float]
    ascents: int

    @property
    def diverged(self) -> bool:
        """Whether the violation ever went beyond DIVERGED."""
        return max(self.trace) > DIVERGED


@cache
def supports() -> Tensor:
    """Return all supports, one row of indices each."""
    return torch.tensor(list(combinations(range(UNKNOWNS), KEPT)))


@cache
def instance(family: str, seed: int) -> Instance:
    """Return one random instance; A has columns of norm about 1, so that the curvature to be met by ρ is about 1."""
    random = torch.Generator().manual_seed(seed)
    A, w, noise = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((EQUATIONS, UNKNOWNS), (UNKNOWNS,), (EQUATIONS,))
    )
    if family == "planted":
        w[torch.randperm(UNKNOWNS, generator=random)[KEPT:]] = 0
    b = A @ w + (noise / 2 if family == "planted" else 0)
    A, b = A / math.sqrt(EQUATIONS), b / math.sqrt(EQUATIONS)
    G, c, S = A.T @ A, A.T @ b, supports()
    fits = torch.linalg.solve(G[S[:, :, None], S[:, None, :]], c[S])
    return Instance(G, c, float(b @ b), (b @ b - (c[S] * fits).sum(1)) / 2)


def run(problem: Instance, method: DualMethod, updates: int) -> Outcome:
    """Start from the least-squares solution; alternate the exact minimiser over W with the library's dual update."""
    layer = nn.Linear(UNKNOWNS, 1, bias=False, dtype=torch.float64)
    weight = layer.weight.detach()
    weight.copy_(problem.minimiser())
    sparse = build_problem(layer, sparsity=1 - KEPT / UNKNOWNS, ignore=())
    solver = method.start(sparse, Store())
    trace, ascents = [], 0
    for update in range(updates):
        rho, Z, lam = solver.scalars["rho"], solver.tensors["Z"][0][0], solver.tensors["lam"][0][0]
        weight.copy_(problem.minimiser(rho, rho * Z - lam))
        row = solver.update(Clock(problem.objective(weight[0]), update / updates))
        ascents += 1 if row["condition_w"] is None else row["condition_w"] + row["condition_z"]
        trace.append(row["violation"])
        if not row["violation"] < ABANDONED:
            return Outcome(False, math.inf, math.inf, trace, ascents)
    mask = sparse.masks(sparse.weights)[0][0]
    found = int((supports() == mask.nonzero().flatten()).all(1).nonzero())
    best = float(problem.by_support.min())
    cut = problem.objective(torch.where(mask, weight[0], 0)) / best
    refit = float(problem.by_support[found]) / best
    return Outcome(found == int(problem.by_support.argmin()), cut, refit, trace, ascents)


def run_all(family: str, seeds: Iterable[int], method: DualMethod, updates: int) -> list[Outcome]:
    """Return the outcome on every instance."""
    return [run(instance(family, seed), method, updates) for seed in seeds]


def hits(outcomes: Sequence[Outcome]) -> int:
    """Return on how many instances the best support was found."""
    return sum(o.best_support for o in outcomes)


def slr(rho: float | dualprune.Geometric, s0: float, step_rule: str = "contraction", cap: float | None = None) -> SLR:
    """Return SLR without the library's ramp and hold, and by default without its cap: as in the papers."""
    return SLR(rho=rho, s0=s0, cap=cap, ramp=0.0, hold=0.0, pull="everywhere", step_rule=step_rule)


def contestants(updates: int) -> list[tuple[str, DualMethod, int]]:
    """Return (label, method, updates) of all that is compared."""
    constant = [
        entry
        for rho in RHOS
        for entry in (
            (f"SLR, rho {rho}", slr(rho, rho / 5), updates),
            (f"ADMM, rho {rho}", ADMM(rho=rho), updates),
            (f"ADMM, rho {rho}, 2x updates", ADMM(rho=rho), 2 * updates),
        )
    ]
    return [
        *constant,
        ("SLR as printed, rho 1.0", slr(1.0, 0.2, "as_printed"), updates),
        ("SLR, rho 0.1 to 2", slr(GROWING, 0.1), updates),
        ("SLR, rho 0.1 to 2, cap 1", slr(GROWING, 0.1, cap=1.0), updates),
        ("ADMM, rho 0.1 to 2", ADMM(rho=GROWING), updates),
    ]


def table_row(family: str, label: str, method: DualMethod, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Summarise the outcomes; a median that is infinite (most runs diverged) is null."""
    finite = {
        name: value if math.isfinite(value := median(getattr(o, name) for o in outcomes)) else None for name in ("cut", "refit")
    }
    return {
        "family": family,
        "label": label,
        "method": repr(method),
        "instances": len(outcomes),
        "best_support": hits(outcomes),
        "median_cut": finite["cut"],
        "median_refit": finite["refit"],
        "largest_violation": max(max(o.trace) for o in outcomes),
        "diverged": sum(o.diverged for o in outcomes),
        "median_ascents": median(o.ascents for o in outcomes),
    }


def show(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    cut, refit = (f"{row[k]:.3f}" if row[k] is not None else "-" for k in ("median_cut", "median_refit"))
    found = f"{row['best_support']}/{row['instances']}"
    numbers = f"{found:>9}{cut:>9}{refit:>9}{row['largest_violation']:>11.2g}{row['diverged']:>10}{row['median_ascents']:>9g}"
    return f"{row['family']:<9}{row['label']:<29}{numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--instances", type=int, default=80, help="instances of each family")
    parser.add_argument("--updates", type=int, default=200, help="dual updates of a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1000, 1000 + options.instances)
    rows, traces = [], []
    heads = f"{'found':>9}{'cut':>9}{'refit':>9}{'violation':>11}{'diverged':>10}{'ascents':>9}"
    print(f"{'family':<9}{'method':<29}{heads}")
    for family in FAMILIES:
        for label, method, updates in contestants(options.updates):
            outcomes = run_all(family, seeds, method, updates)
            rows.append(table_row(family, label, method, outcomes))
            print(show(rows[-1]), flush=True)
            if label in PLOTTED:
                kept = [[float(f"{v:.4g}") for v in o.trace] for o in outcomes[:4]]
                traces.append({"family": family, "label": label, "seeds": list(seeds[:4]), "violation": kept})
    print("found: best support; cut, refit: median objective over the optimum; ascents: multiplier updates, median")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "dualprune": dualprune.__version__}
    setting = {"unknowns": UNKNOWNS, "kept": KEPT, "equations": EQUATIONS, "updates": options.updates}
    setting |= {"first_seed": seeds.start, "instances": options.instances}
    if options.json:
        write_json(options.json, {"setting": setting, "versions": versions, "rows": rows, "traces": traces})
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
