"""Least squares with 14 unknowns of which 4 may be nonzero; every support enumerated. The set-up is the benchmark's."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch

from dualprune import ADMM

SEEDS = range(1000, 1040)
UPDATES = 200
RHOS = (0.7, 1.0, 1.4)  # around 1, the curvature of the instances


@cache
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "least_squares.py"
    spec = spec_from_file_location("least_squares", path)
    module = module_from_spec(spec)
    sys.modules["least_squares"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def outcomes(method: str, family: str, rho: float) -> list:
    b = bench()
    made = {"slr": b.slr(rho, rho / 5), "printed": b.slr(rho, rho / 5, "as_printed"), "admm": ADMM(rho=rho)}[method]
    return b.run_all(family, SEEDS, made, UPDATES)


def best(method: str, family: str) -> list:
    """Return the outcomes at the ρ where the method finds most."""
    return max((outcomes(method, family, rho) for rho in RHOS), key=bench().hits)


FAMILIES = [pytest.param("dense"), pytest.param("planted", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", FAMILIES)
def test_slr_never_diverges(family: str) -> None:
    for rho in RHOS:
        assert all(max(o.trace) < 10 for o in outcomes("slr", family, rho)), "the weights themselves have a norm near 4"


@pytest.mark.parametrize("family", FAMILIES)
def test_slr_finds_the_best_support_at_least_as_often_as_admm(family: str) -> None:
    """Each at its best ρ of the same three, and with as many updates."""
    slr, admm = (bench().hits(best(method, family)) for method in ("slr", "admm"))
    assert slr >= admm
    assert slr >= len(SEEDS) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_slr_ends_near_the_optimum(family: str) -> None:
    """Within 5 % in the median, both right after cutting and with the best weights on the support that was found."""
    ended = best("slr", family)
    assert all(o.refit >= 1 - 1e-9 and o.cut >= o.refit - 1e-9 for o in ended)
    assert median(o.cut for o in ended) < 1.05
    assert median(o.refit for o in ended) < 1.05


def test_as_printed_diverges_where_the_contraction_does_not() -> None:
    printed, contracting = outcomes("printed", "dense", 1.0), outcomes("slr", "dense", 1.0)
    assert sum(o.diverged for o in printed) >= len(SEEDS) / 2
    assert max(max(o.trace) for o in printed) > 1e6
    assert not any(o.diverged for o in contracting)


def test_the_optimum_is_that_of_every_support() -> None:
    b = bench()
    problem, support = b.instance("dense", 7), b.supports()[123]
    assert len(problem.by_support) == 1001
    w = torch.zeros(14, dtype=torch.float64)
    w[support] = torch.linalg.solve(problem.G[support][:, support], problem.c[support])
    assert problem.objective(w) == pytest.approx(float(problem.by_support[123]), rel=1e-9)
    free = problem.minimiser()
    assert problem.objective(free) == pytest.approx(0, abs=1e-12), "a dense instance is fitted exactly"
    nudged = problem.objective(problem.minimiser(0.5, 0.1) + 1e-3)
    assert nudged > 0


def test_the_benchmark_prints_its_table_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["least_squares.py", "--json", str(out), "--instances", "1", "--updates", "5"])
    threads = torch.get_num_threads()
    try:
        bench().main()
    finally:
        torch.set_num_threads(threads)
    saved = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in saved["rows"])
    assert {row["family"] for row in saved["rows"]} == {"dense", "planted"}
    assert {t["label"] for t in saved["traces"]} == set(bench().PLOTTED)
    assert {len(trace) for t in saved["traces"] for trace in t["violation"]} == {5}
    assert saved["setting"] == {
        "unknowns": 14, "kept": 4, "equations": 28, "updates": 5, "first_seed": 1000, "instances": 1
    }  # fmt: skip
