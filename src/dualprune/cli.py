"""The command line; no logic. Nothing heavy is imported before a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualprune.errors import DualpruneError

if TYPE_CHECKING:
    from dualprune.progress import Progress
    from dualprune.recipe import Recipe

app = typer.Typer(
    help="Make trained PyTorch models many times smaller: SLR, ADMM, reweighting and magnitude pruning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML); docs/recipes.md has every key.")]
Out = Annotated[Path, typer.Option(help="Folder for results; a run lies in OUT/<recipe>/<method>-seed<seed>.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: training.epochs=2.")]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start again instead of continuing or reusing what is there; the dense model is kept."),
]
Split = Annotated[str, typer.Option(help="Measure on 'test', or on 'validation' held out of training.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU if there is one by default.")]
Methods = Annotated[str | None, typer.Option(help="Comma-separated labels of the recipe's methods; all by default.")]
Seeds = Annotated[str | None, typer.Option(help="Comma-separated seeds; the recipe's by default.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    fresh: Fresh = False,
) -> None:
    """Prune a small network on embedded real data by every method, in under three minutes."""
    _alone("demo")
    from dualprune.compare import compare as run_all
    from dualprune.recipe import parse_recipe

    # the network is tiny: more threads would only wait for each other. Set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    text = resources.files("dualprune").joinpath("recipes/digits-demo.toml").read_text(encoding="utf-8")
    table = run_all(parse_recipe(text), folder=out, resume=not fresh, progress=_progress(), device="cpu")
    _show_comparison(table, out)


@app.command()
def run(
    recipe: RecipeFile,
    method: Annotated[str | None, typer.Option(help="A label of the recipe's methods; the first by default.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the data's order; the recipe's by default.", min=0, max=2**63 - 1)
    ] = None,
    out: Out = Path("runs"),
    split: Split = "test",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which layers get what, and stop.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    fresh: Fresh = False,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Prune one model by one method; broken off, the same command continues."""
    loaded = _load(recipe, set_)
    label = method or next(iter(loaded.methods))
    loaded.method(label)
    from dualprune import train

    speaks = os.environ.get("RANK", "0") == "0"  # of what torchrun starts, one process prints
    if dry_run:
        if speaks:
            print(train.dry_run(loaded, label))
        return
    settings: dict[str, Any] = {"out": out, "split": split, "resume": not fresh, "progress": _progress()}
    result = train.run(loaded, label, seed=seed, tensorboard=tensorboard, device=device, **settings)
    place = out / loaded.name / f"{label}-seed{result['seed']}"
    retrained = "" if result["retrained"] is None else f", retrained {result['retrained']:.2f} %"
    size = f"{result['rate']:.2f}× in {result['total']:,} weights"
    if not speaks:
        return
    print(f"{label}: dense {result['dense']:.2f} %, cut {result['cut']:.2f} %{retrained}, {size}")
    print(f"report: {place / 'report.html'}   weights: {place / 'pruned.safetensors'}")


@app.command()
def compare(
    recipe: RecipeFile,
    methods: Methods = None,
    seeds: Seeds = None,
    out: Out = Path("runs"),
    split: Split = "test",
    tuned: Annotated[bool, typer.Option("--tuned", help="Settings chosen by 'dualprune tune'.")] = False,
    unequal: Annotated[bool, typer.Option("--unequal", help="Allow different numbers of epochs.")] = False,
    fresh: Fresh = False,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Run methods at one budget and several seeds, and print one table."""
    _alone("compare")
    loaded = _load(recipe, set_)
    from dualprune.compare import compare as run_all

    settings: dict[str, Any] = {
        "out": out,
        "split": split,
        "tuned": tuned,
        "unequal": unequal,
        "resume": not fresh,
        "device": device,
    }
    table = run_all(loaded, _words(methods), _numbers(seeds, "--seeds", int), progress=_progress(), **settings)
    _show_comparison(table, out / loaded.name)


@app.command()
def tune(
    recipe: RecipeFile,
    lr: Annotated[str | None, typer.Option(help="Comma-separated learning rates for all; else the recipe's trials.")] = None,
    methods: Methods = None,
    seeds: Seeds = None,
    out: Out = Path("runs"),
    fresh: Fresh = False,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Choose each method's settings on a validation split held out of training."""
    _alone("tune")
    loaded = _load(recipe, set_)
    from rich.console import Console

    from dualprune.compare import tune as choose
    from dualprune.compare import tuning_table

    grid = _numbers(lr, "--lr", float)
    settings: dict[str, Any] = {"out": out, "resume": not fresh, "progress": _progress(), "device": device}
    table = choose(loaded, _words(methods), grid or (), _numbers(seeds, "--seeds", int), **settings)
    Console().print(tuning_table(table))
    again = ["dualprune", "compare", str(recipe), "--tuned", *(["--methods", methods] if methods else [])]
    again += ["--out", str(out)] if out != Path("runs") else []
    again += [part for override in set_ or () for part in ("--set", override)]
    print(f"written to {out / loaded.name / 'tune.json'}; use it with: {shlex.join(again)}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a recipe's with compare.json.")],
) -> None:
    """Write the HTML page of a run or of a comparison again."""
    if not folder.is_dir():
        raise DualpruneError(f"no run folder {str(folder)!r}; it is the folder that 'dualprune run' printed")
    from dualprune.report import render_comparison, render_run
    from dualprune.run_folder import saving

    with saving(folder, "what the page is made of is untouched"):
        print((render_comparison if (folder / "compare.json").exists() else render_run)(folder))


@app.command()
def evaluate(
    recipe: RecipeFile,
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A sparse or dense safetensors file.")],
    device: Device = None,
    set_: Set = None,
) -> None:
    """Measure a weights file on the recipe's test set."""
    loaded = _load(recipe, set_)
    if not weights.is_file():
        raise DualpruneError(f"no weights file {str(weights)!r}")
    from dualprune.train import evaluate as measure

    found = measure(loaded, weights, device=device)
    print(found["report"])
    print(f"accuracy {found['accuracy']:.2f} %")
    print(f"kept     {found['kept']:,} of {found['total']:,} weights ({found['rate']:.2f}×)")
    print(f"bytes    {found['bytes']:,}")


@app.command()
def layerwise(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name of the Hugging Face hub.")],
    data: Annotated[
        Path, typer.Option(help="A text file: its first nine tenths calibrate, perplexity is measured on the rest.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pruned model; from_pretrained reads it.")],
    sparsity: Annotated[float | None, typer.Option(help="Fraction of each layer's weights that go.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, 2:4, …")] = "unstructured",
    method: Annotated[str, typer.Option(help="slr, admm, alps, sparsegpt, wanda or magnitude.")] = "slr",
    blocks: Annotated[str | None, typer.Option(help="Glob of the blocks, model.layers.*; found by itself by default.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Glob of weights that stay as they are; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[int | None, typer.Option(help="Tokens in a window; what the model sees by default.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    device: Device = None,
) -> None:
    """Prune a Hugging Face model layer by layer from a text, without training."""
    from dualprune.language import prune_pretrained
    from dualprune.train import pick_device

    settings: dict[str, Any] = {"method": method, "sparsity": sparsity, "pattern": pattern, "blocks": blocks, "seed": seed}
    settings |= {"ignore": ignore or ()}
    result = prune_pretrained(model, data, out, samples=samples, length=length, device=pick_device(device), **settings)
    print(f"kept       {result['kept']:,} of {result['total']:,} weights in {len(result['layers'])} layers")
    if result["perplexity_dense"] is not None:
        print(f"perplexity {result['perplexity_dense']:.3f} dense, {result['perplexity_pruned']:.3f} pruned")
    print(f"written to {out}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the run failed, 2 wrong input, 130 interrupted."""
    try:
        app(args=arguments, prog_name="dualprune")
    except DualpruneError as error:
        print(f"{_name(error)}: {error}", file=sys.stderr)
        sys.exit(_exit_code(error))
    except SystemExit as end:
        if end.code == 130:  # Typer's answer to Ctrl-C, without a word
            given = sys.argv[1:] if arguments is None else arguments
            without = " without --fresh" if "--fresh" in given else ""
            print(f"interrupted; the same command{without} continues from the last checkpoint", file=sys.stderr)
        raise


def _exit_code(error: DualpruneError) -> int:
    # the types live in modules that import torch: if they were never imported, the error is none of them
    loop, run_folder = (sys.modules.get(f"dualprune.{name}") for name in ("loop", "run_folder"))
    if loop is not None and isinstance(error, loop.Interrupted):
        return 130
    return 1 if run_folder is not None and isinstance(error, run_folder.RunError) else 2


def _name(error: DualpruneError) -> str:
    return "stopped" if _exit_code(error) == 130 else "error"


def _alone(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DualpruneError(f"torchrun works with 'dualprune run', not with '{command}': start its runs one by one")


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    from dualprune.recipe import load_recipe

    return load_recipe(path, overrides or ())


def _progress() -> Progress:
    from dualprune.progress import Bars, Lines

    return Bars() if sys.stdout.isatty() else Lines()


def _show_comparison(table: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from dualprune.compare import comparison_table

    Console().print(comparison_table(table))
    print(f"report: {folder / 'compare.html'}   numbers: {folder / 'compare.json'}")


def _words(text: str | None) -> list[str] | None:
    return [word.strip() for word in text.split(",") if word.strip()] if text is not None else None


def _numbers(text: str | None, option: str, kind: type) -> list[Any] | None:
    try:
        return [kind(word) for word in _words(text) or ()] or None
    except ValueError:
        raise DualpruneError(f"{option} takes comma-separated numbers, got {text!r}") from None
