"""A run's folder: made, checked, written and wiped. Every file in it is either whole or not there."""

from __future__ import annotations

import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import dualprune
from dualprune.errors import DualpruneError, FormatError
from dualprune.files import atomic_write, read_json
from dualprune.report import render_run

CHECKPOINT_VERSION = 1
HEATMAP_SIDE = 256


class RunError(DualpruneError):
    """A run that began could not go on: a diverged loss, a full disk. Its last good checkpoint is kept."""


class Diverged(RunError):
    """A run's loss, weights or figures are NaN or infinite: its settings are at fault, and other runs can go on."""


def make_folder(place: Path) -> None:
    """Create the run folder and prove that it can be written, before any time is spent."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with atomic_write(place / ".writable") as temporary:
            temporary.write_bytes(b"ok")
        (place / ".writable").unlink(missing_ok=True)  # another run, started at the same time, was quicker
    except OSError as error:
        reason = f"{error.strerror or error}; choose another with --out"
        raise DualpruneError(f"cannot write the run folder {str(place)!r}: {reason}") from error


_OTHER = {"method": "another method", "weights_sha256": "other starting weights", "data_sha256": "other data"}


def earlier_result(
    place: Path,
    identity: str,
    made_of: Mapping[str, str | None],
    data_sha256: Callable[[], str | None] | None = None,
) -> dict[str, Any] | None:
    """The result of a finished run of the same settings; another run in the folder, finished or not, is an error.

    Args:
        place: The run's folder.
        identity: The fingerprint of the recipe; it holds what a recipe says, not what that means today.
        made_of: Therefore also compared, where the earlier run has them: ``method`` as built, and ``weights_sha256``.
        data_sha256: Reads the data and says what they are; asked only where the earlier run noted its own.
    """
    found = read_json(place / "result.json")
    there = found or read_checkpoint(place / "checkpoint.pt") or {}
    hashed = there.get("recipe_sha256" if found else "identity", identity)
    if hashed != identity:
        raise _other_run(place, f"of other settings (hash {hashed[:12]}, this recipe has {identity[:12]})")
    if there.get("data_sha256") and data_sha256 is not None:
        made_of = {**made_of, "data_sha256": data_sha256()}
    for key, here in made_of.items():
        if (earlier := there.get(key, here)) != here and not (earlier and here and _alike(earlier, here)):
            raise _other_run(place, f"of {_OTHER[key]}, though of the same recipe ({key} {earlier} there, {here} here)")
    return found


def _other_run(place: Path, what: str) -> DualpruneError:
    return DualpruneError(f"{str(place)!r} holds a run {what}; choose another --out, or --fresh to start again")


def _alike(one: str, other: str) -> bool:
    """Whether two methods' texts differ in nothing but fields that are younger than many a finished run."""

    def older(text: str) -> str:
        curve = r", curve='\w+'" if "ramp=0.0" in text else ", curve='cubic'"  # without a ramp no curve is followed
        return re.sub(curve + "|spare=False, ", "", text.replace("pull='everywhere', ", ""))

    return older(one) == older(other)


def wipe(place: Path) -> None:
    """Forget an earlier run; result.json goes first, so that a half-wiped folder is not taken for finished."""
    names = ("result.json", "report.html", "checkpoint.pt", "history.jsonl", "epochs.jsonl", "pruned.safetensors")
    for name in (*names, "heatmaps.safetensors", "recipe.toml"):
        (place / name).unlink(missing_ok=True)
    # the temporary files are of runs that were killed while they wrote
    for left in (*place.glob("pictures/*.png"), *place.glob("pictures/.*.tmp"), *place.glob(".*.tmp")):
        left.unlink()
    if (place / "tensorboard").exists():
        shutil.rmtree(place / "tensorboard")


def what_is_kept(checkpoint: Path) -> str:
    """Say whether a checkpoint survives, for error messages."""
    if checkpoint.exists():
        return f"the last good checkpoint is kept ({checkpoint})"
    return "nothing was saved yet"


@contextmanager
def saving(place: Path, kept: str | None = None) -> Iterator[None]:
    """Turn what Python, torch and safetensors raise for a full disk or a lost folder into one clear error.

    Args:
        place: What is written to.
        kept: What is not lost, for the message; the checkpoint in `place` by default.
    """
    try:
        yield
    except Exception as error:
        torch_failed = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if not (isinstance(error, OSError | SafetensorError) or torch_failed):
            raise
        reason = getattr(error, "strerror", None) or "the file was not written whole; is the disk full?"
        kept = kept or what_is_kept(place / "checkpoint.pt")
        raise RunError(f"cannot write to {str(place)!r}: {reason}; {kept}") from error


def read_checkpoint(path: Path, remedy: str = "start again with --fresh") -> dict[str, Any] | None:
    """The checkpoint at `path`, or None if there is none.

    Raises:
        FormatError: it is damaged, or of another version; the message ends in the `remedy`.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # what torch raises for a damaged file has many types
        raise FormatError(f"the checkpoint {path} cannot be read ({error}); {remedy}") from error
    if version != CHECKPOINT_VERSION:
        versions = f"version {version}, this dualprune reads {CHECKPOINT_VERSION}"
        raise FormatError(f"the checkpoint {path} has {versions}; {remedy}")
    return state


def write_heatmaps(path: Path, layers: list[dict[str, Any]], before: dict[str, Tensor], model: nn.Module) -> None:
    """The first and the last pruned layer as matrices, before and after; large ones by their top left corner."""

    def matrix(weight: Tensor) -> Tensor:
        return weight.detach().float().cpu().flatten(1)[:HEATMAP_SIDE, :HEATMAP_SIDE].contiguous()

    sources: dict[str, Mapping[str, Tensor]] = {"before": before, "after": dict(model.named_parameters())}
    names = dict.fromkeys(layer["name"] for layer in layers[:1] + layers[-1:])
    maps = {f"{when}.{name}": matrix(weights[name]) for name in names for when, weights in sources.items()}
    with atomic_write(path) as temporary:
        save_file(maps, temporary)


def write_pictures(place: Path, when: str, pictures: list[tuple[str, Any]]) -> None:
    """Keep (title, uint8 image) pairs as ``pictures/NN-<when>.png``, the title inside the file, for the report."""
    if not pictures:
        return
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    folder = place / "pictures"
    folder.mkdir(exist_ok=True)
    for number, (title, pixels) in enumerate(pictures):
        words = PngInfo()
        words.add_itxt("Title", title)
        with atomic_write(folder / f"{number:02}-{when}.png") as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=words)


def render(place: Path) -> None:
    """The HTML report, unless it is there and no older than the result: one of a run under way says "not finished"."""
    page, result = place / "report.html", place / "result.json"
    if not page.exists() or page.stat().st_mtime_ns < result.stat().st_mtime_ns:
        render_run(place)


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "dualprune": dualprune.__version__}


def device_name(device: torch.device) -> str:
    """Name the GPU, or the kind of processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on, where the system can: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # elsewhere, or not allowed: the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak in MiB since `reset_peak_memory`: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) / 2**10
    # kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
