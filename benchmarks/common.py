"""What the benchmarks share: alternating timing of several things in one process, ratios with their spread, a report."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import dualprune
from dualprune.files import write_json

Seconds = dict[str, list[float]]


def arguments(description: str, **files: str) -> argparse.Namespace:
    """Parse --json and --quick, what every benchmark has beside them, and the `files` that one takes (name: help)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it works, not how fast")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (torch's default)")
    for name, text in files.items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def alternate(things: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> Seconds:
    """Time all things once a round, in turn, so that a busy machine disturbs them alike; one round more to warm up."""
    seconds: Seconds = {name: [] for name in things}
    for round_ in range(rounds + 1):
        names = list(things) if round_ % 2 else list(reversed(things))  # nobody always comes after the same one
        for name in names:
            _wait(device)
            start = time.perf_counter()
            things[name]()
            _wait(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Seconds, base: str, repeats: int = 1) -> dict[str, dict[str, float]]:
    """Return, for each thing, time over the base's of the same round (the base done `repeats` times): median, least, most."""
    rounds = {name: zip(times, seconds[base], strict=True) for name, times in seconds.items() if name != base}
    return {name: _spread([repeats * t / b for t, b in pairs]) for name, pairs in rounds.items()}


def report(args: argparse.Namespace, name: str, figures: Mapping[str, Any]) -> None:
    """Print the figures with their provenance and write them to --json."""
    result = {"benchmark": name, "quick": args.quick, **_provenance(args), **figures}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print ratios as a table."""
    print(f"{title:<44}{'median':>9}{'min':>9}{'max':>9}")
    for name, row in rows.items():
        print(f"  {name:<42}{row['median']:>9.3f}{row['min']:>9.3f}{row['max']:>9.3f}")
    print()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    return {
        "dualprune": dualprune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": gpu or platform.processor() or platform.machine(),
        "threads": args.threads,
    }
