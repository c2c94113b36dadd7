"""Recipes: what is read, what is refused, and with which words."""

import math
import os
import shlex
import subprocess
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

from dualprune.errors import DualpruneError
from dualprune.recipe import load_recipe, parse_recipe
from dualprune.recipe_tables import AttackSpec
from dualprune.toml_text import dump_toml
from helpers import TINY_RECIPE

ROOT = Path(__file__).resolve().parent.parent

BASE = """
name = "small"
[model]
name = "digits-cnn"
[data]
name = "digits"
[training]
epochs = 3
lr = 0.05
[prune]
rate = 10
[methods.slr]
kind = "slr"
[methods.oneshot]
kind = "oneshot"
"""


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(DualpruneError) as caught:
        parse_recipe(text, overrides)
    return str(caught.value)


def test_defaults_and_types():
    recipe = parse_recipe(BASE)
    assert (recipe.seed, recipe.training.batch_size, recipe.prune.calibrate, recipe.dense) == (0, 128, 4096, None)
    assert recipe.patterns() is None
    assert recipe.epochs("slr") == 3 and recipe.epochs("oneshot") == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epoch=3", "[training] epoch: unknown key, did you mean 'epochs'?"),
        ("prune.sparsty=0.9", "[prune] sparsty: unknown key, did you mean 'sparsity'?"),
        ("trainig.lr=1", "trainig: unknown key, did you mean 'training'?"),
        ("training.schedule=cosin", "[training] schedule: 'cosin' is not one of cosine, constant, step, did you mean"),
        ("training.epochs=0", "[training] epochs: input should be greater than or equal to 1, got 0"),
        ("training.epochs=1.5", "[training] epochs"),
        ("training.lr=nan", "[training] lr"),
        ("training.lr=-0.1", "[training] lr"),
        ("training.momentum=1.0", "[training] momentum"),
        ("training.warmup_epochs=3", "[training]: warmup_epochs 3 leaves nothing of 3 epochs"),
        ("data.validation=1.0", "[data] validation"),
        (
            "prune.rate=0.5",
            "[prune] rate: rate says how many times fewer weights, a number from 1 up, got 0.5; did you",
        ),
        ("prune.rate=nan", "[prune] rate"),
        ("prune.sparsity=0.9", "[prune]: give rate (10) or sparsity (0.9), not both"),
        ("name=a/b", "name"),
        ("methods.slr.kind=slrr", "[methods.slr] kind: 'slrr' is not one of slr, admm, reweighted"),
        ("methods.slr.s00=1", "[methods.slr] unknown key 's00', did you mean 's0'?"),
        ("methods.slr.M=0.5", "[methods.slr] SLR expects M > 1 and r < 1, got M=0.5"),
        ("methods.slr.M=many", "[methods.slr] SLR(M) expects a positive finite number, got 'many'"),
        ("methods.slr.rho={start=0.1,stop=1}", "[methods.slr] rho: unknown key 'stop'"),
        (
            "methods.slr.rho={start=0.1}",
            "[methods.slr] rho: a schedule is { start = 0.01, end = 1.0, over = 0.8 }, got",
        ),
        ("methods.slr.rho={closing='yes'}", "[methods.slr] Closing(times) expects a positive finite number, got 'yes'"),
        ("methods.slr.rho={closing=1.0,end=2.0}", "[methods.slr] rho: unknown key 'closing'"),
        ("methods.oneshot.base=paper", "[methods.oneshot] base = 'paper' is for slr, admm, reweighted and safe"),
        ('prune.patterns={"conv2"="3:"}', "[prune.patterns]"),
        ('prune.patterns={"conv2"=90}', "did you mean 0.9?"),
        ('prune.patterns={"conv2"=[1]}', "expected a pattern"),
        ('prune.patterns={"conv2"={patern="2:4"}}', "unknown key, did you mean 'pattern'?"),
        ("name.x=1", "'name' is a value, not a table"),
        ("training.epochs", "--set takes key=value"),
        ("training.=3", "--set takes key=value"),
        ('prune.patterns."conv1.weight=0.9', "--set takes key=value"),
        ("methods.slr.M=inf", "[methods.slr] M: expected text, a boolean or a finite number, got inf"),
        ("methods.slr.trials=[{lr=0.1,s0=nan}]", "[methods.slr.trials] s0: expected"),
        (
            "model.options={since=2026-01-02}",
            "[model.options] since: expected text, a boolean or a finite number, got 2026-01-02",
        ),
        ("paper.when=12:30:00", "[paper] when: expected"),
    ],
)
def test_a_mistake_is_named_with_its_place(override, said):
    assert said in refused(BASE, override)


@pytest.mark.parametrize(("given", "meant"), [("90", "0.9"), ("75", "0.75"), ("-0.1", None), ("nan", None), ("101", None)])
def test_an_impossible_sparsity_is_explained(given, meant):
    said = refused(BASE.replace("rate = 10", f"sparsity = {given}"))
    assert "[prune] sparsity: sparsity is a fraction in [0, 1], got" in said
    assert (f"did you mean {meant}?" in said) if meant else ("did you mean" not in said)


def test_a_budget_is_needed():
    assert "nothing says how much to prune" in refused(BASE.replace("rate = 10", ""))


@pytest.mark.parametrize("table", ["model", "data", "training", "prune"])
def test_a_missing_table_is_named(table):
    lines, kept, inside = BASE.splitlines(), [], False
    for line in lines:
        inside = line == f"[{table}]" if line.startswith("[") else inside
        kept += [] if inside else [line]
    assert f"the table [{table}] is missing" in refused("\n".join(kept))


def test_every_mistake_is_listed_at_once():
    said = refused(BASE, "training.epoch=3", "model.nam=x")
    assert "[training] epoch" in said and "[model] nam" in said


def test_not_toml_and_not_there(tmp_path):
    assert "is not valid TOML" in refused("name = ")
    (tmp_path / "small.toml").write_text(BASE)
    with pytest.raises(DualpruneError, match=r"no recipe .*smal\.toml', did you mean 'small\.toml'\?"):
        load_recipe(tmp_path / "smal.toml")


def test_methods_are_built():
    from dualprune import ADMM, SLR, Closing, Geometric, GradualMagnitude, Magnitude

    text = (
        BASE
        + """
[methods.paper]
kind = "slr"
base = "paper"
s0 = 0.02
[methods.admm]
kind = "admm"
rho = { start = 0.01, end = 2.0 }
[methods.free]
kind = "slr"
cap = "none"
rho = 0.3
[methods.gradual]
kind = "gradual"
lr = 0.2
[methods.close]
kind = "admm"
rho = { closing = 2.0 }
[methods.slow]
kind = "slr"
rho = { closing = 2.0, filters = 3.0 }
"""
    )
    recipe = parse_recipe(text)
    assert recipe.method("slr").build() == SLR()
    assert recipe.method("oneshot").build() == Magnitude()
    assert recipe.method("gradual").build() == GradualMagnitude()
    assert recipe.method("paper").build() == SLR.paper(s0=0.02)
    assert recipe.method("admm").build() == ADMM(rho=Geometric(0.01, 2.0))
    assert recipe.method("close").build() == ADMM(rho=Closing(2.0))
    assert recipe.method("slow").build() == SLR(rho=Closing(2.0, filters=3.0))
    assert recipe.method("free").build() == SLR(rho=0.3, cap=None)
    assert (recipe.lr("gradual"), recipe.lr("slr")) == (0.2, 0.05)
    assert recipe.with_lr("slr", 0.3).lr("slr") == 0.3 and recipe.lr("slr") == 0.05
    with pytest.raises(DualpruneError, match="has no method 'gradul', did you mean 'gradual'"):
        recipe.method("gradul")


def test_patterns_take_a_pattern_a_sparsity_or_both():
    from dualprune import NM, Filter

    patterns = '\n[prune.patterns]\n"conv2*" = "2:4"\nconv3 = 0.5\nconv4 = { pattern = "filter", sparsity = 0.25 }\n'
    recipe = parse_recipe(BASE.replace("[methods.slr]", f"{patterns}[methods.slr]"))
    assert recipe.patterns() == {"conv2*": NM(2, 4), "conv3": 0.5, "conv4": (Filter(), 0.25)}


def test_toml_round_trip():
    text = BASE.replace('[methods.slr]\nkind = "slr"', '[methods.slr]\nkind = "slr"\nrho = { start = 0.1, end = 1.5 }')
    recipe = parse_recipe(text, ['prune.patterns={"layer*.conv?"="2:4"}', "prune.ignore=[]", 'paper={"a b"=1.5}'])
    assert parse_recipe(recipe.to_toml()) == recipe


def test_toml_of_awkward_strings():
    import tomllib

    table = {
        "a b": 'quote " and \\ back',
        "é": "line\nbreak\x7f",
        "inf": math.inf,
        "list": [1, {"x": "y"}],
        "t": {"u": {}},
    }
    assert tomllib.loads(dump_toml(table)) == table


def test_overrides_are_toml_values_or_bare_words():
    recipe = parse_recipe(BASE, ["training.lr=0.2", "model.name=resnet20", "data.augment=false", 'name="x"'])
    assert (recipe.training.lr, recipe.model.name, recipe.data.augment, recipe.name) == (0.2, "resnet20", False, "x")


def test_an_override_names_keys_with_dots_in_quotes():
    overrides = ['prune.patterns."conv1.weight"=0.9', "prune.patterns.'a=b.*'=\"2:4\"", "prune . patterns . c*=0.5"]
    patterns = parse_recipe(BASE, overrides).prune.patterns
    assert {glob: layer.sparsity or layer.pattern for glob, layer in patterns.items()} == {
        "conv1.weight": 0.9, "a=b.*": "2:4", "c*": 0.5,
    }  # fmt: skip


def test_a_warm_up_leaves_something_of_every_method():
    text = BASE.replace("epochs = 3", "epochs = 3\nwarmup_epochs = 2")
    assert "[methods.slr] epochs: [training] warmup_epochs 2 leaves nothing of its 2 epochs" in refused(
        text, "methods.slr.epochs=2"
    )
    assert parse_recipe(text, ["methods.slr.epochs=4"]).epochs("oneshot") == 0, "a one-shot cut warms nothing up"


def test_the_command_makes_that_very_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my recipes" / "small.toml"
    path.parent.mkdir()
    path.write_text(BASE)
    given = ['prune.patterns={"conv2"="2:4"}', "training.epochs=7"]
    trial = {"lr": 0.25, "rho": {"start": 0.1, "end": 2.0, "over": 0.5}, "cap": "none"}
    recipe = load_recipe(path, given).with_trial("slr", trial)
    _, run, file, *rest = words = shlex.split(recipe.command("slr", 3, "validation"))
    assert (run, file, words[-2:]) == ("run", "my recipes/small.toml", ["--split", "validation"])
    assert rest[:4] == ["--method", "slr", "--seed", "3"]
    again = load_recipe(file, [value for key, value in pairwise(rest) if key == "--set"])
    assert again == recipe
    assert again.fingerprint("slr", 3, "validation") == recipe.fingerprint("slr", 3, "validation")
    relative = load_recipe("my recipes/small.toml")
    assert (
        relative.command("slr", 0)
        == "dualprune run 'my recipes/small.toml' --method slr --seed 0"
        == load_recipe(path).command("slr", 0)
    )
    monkeypatch.chdir(path.parent)
    assert load_recipe("../my recipes/small.toml").command("slr", 0).split("'")[1] == "../my recipes/small.toml"
    # of text alone, the folder's recipe.toml is the file, and it has what was set
    alone = parse_recipe(BASE, given)
    assert (
        alone.command("slr", 0) == "dualprune run recipe.toml --method slr --seed 0" and parse_recipe(alone.to_toml()) == alone
    )


def test_weights_are_hashed_once_for_as_long_as_they_stay(tmp_path, monkeypatch):
    import hashlib

    recipe = parse_recipe(BASE, [f"model.weights={tmp_path / 'w'}"])
    (tmp_path / "w").write_bytes(b"one")
    assert parse_recipe(BASE).weights_sha256() is None
    first = recipe.weights_sha256()
    assert first == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as unread:
        unread.setattr(hashlib, "file_digest", None)
        assert recipe.weights_sha256() == first
    (tmp_path / "w").write_bytes(b"another")
    assert recipe.weights_sha256() == hashlib.sha256(b"another").hexdigest()


def test_fingerprints_are_those_of_the_finished_runs():
    recipe = parse_recipe(BASE)
    assert recipe.fingerprint("slr", 0, "test") == "5a73b34874fc6ca4f43800f129ac12b99b7441c498fcfa1f18a66f586a275389"
    assert recipe.fingerprint("oneshot", 1, "validation") == "ed0857d7c0656814caff243cadbf36cede24f410e1ffec2b1ef8f56c99c750a6"


def test_a_choice_of_settings_is_for_one_recipe():
    def of(*overrides, chosen=("lr", "s0")):
        return parse_recipe(BASE, overrides).tuning_fingerprint("slr", chosen)

    same = [
        "methods.slr.lr=0.2",
        "methods.slr.s0=0.3",
        "training.lr=0.1",
        "methods.slr.trials=[{lr=1.0}]",
        "methods.oneshot.lr=1.0",
    ]
    assert {of(override) for override in same} == {of()}
    others = ["methods.slr.r=0.2", "prune.rate=11", "training.epochs=4", "data.validation=0.2", "methods.slr.epochs=2"]
    assert len({of(override) for override in others} | {of(), of("methods.slr.s0=0.3", chosen=["lr"])}) == 7


def test_fingerprint_follows_what_decides_the_numbers():
    one = parse_recipe(BASE)
    same = parse_recipe(BASE, ["paper.slr=1.0", "methods.oneshot.lr=1.0", "data.root=/x", "training.checkpoint_minutes=1"])
    assert one.fingerprint("slr", 0, "test") == same.fingerprint("slr", 0, "test")
    prints = {
        one.fingerprint(label, seed, split) for label in one.methods for seed in (0, 1) for split in ("test", "validation")
    }
    changed = [
        parse_recipe(BASE, [override]) for override in ("training.lr=0.1", "prune.rate=11", "methods.slr.s0=0.2", "seed=3")
    ]
    prints |= {other.fingerprint("slr", 0, "test") for other in changed}
    assert len(prints) == 12


def test_weights_are_looked_for_beside_the_recipe_here_and_in_the_environment(tmp_path, monkeypatch):
    path, store = tmp_path / "recipes" / "small.toml", tmp_path / "store"
    path.parent.mkdir()
    store.mkdir()
    path.write_text(BASE.replace('name = "digits-cnn"', 'name = "digits-cnn"\nweights = "w.safetensors"'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALPRUNE_WEIGHTS", str(store))
    recipe = load_recipe(path)
    with pytest.raises(DualpruneError, match="DUALPRUNE_WEIGHTS"):
        recipe.weights_path()
    for folder in (store, Path(), path.parent):
        (folder / "w.safetensors").write_bytes(b"")
        assert recipe.weights_path() == folder / "w.safetensors"


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_the_learning_rate_is_a_function_of_the_step(schedule):
    recipe = parse_recipe(BASE, [f"training.schedule={schedule}", "training.warmup_epochs=1"])
    lrs = [recipe.training.lr_at(step, 30, 10) for step in range(30)]
    assert lrs[:10] == pytest.approx([0.05 * (i + 1) / 11 for i in range(10)])
    assert lrs[10] == 0.05 and max(lrs) == 0.05
    expected = {"cosine": 0.025, "constant": 0.05, "step": 0.005}[schedule]
    assert lrs[20] == pytest.approx(expected)
    assert all(lr > 0 for lr in lrs)


def test_the_embedded_demo_is_a_valid_recipe():
    text = resources.files("dualprune").joinpath("recipes/digits-demo.toml").read_text(encoding="utf-8")
    recipe = parse_recipe(text)
    assert list(recipe.methods) == ["oneshot", "gradual", "admm-published", "admm", "slr"]
    assert len({recipe.epochs(label) for label in recipe.methods} - {0}) == 1


ADVERSARIAL = (
    BASE
    + """
[training.adversarial]
eps = "8/255"
[robust]
"""
)


def test_attacks_are_parsed():
    text = ADVERSARIAL + 'attacks = ["training", "fgsm", "pgd-10", "pgd-50x5", "square", "square-200"]\nimages = 500'
    recipe = parse_recipe(text)
    adversarial, eps = recipe.training.adversarial, 8 / 255
    assert adversarial.spec == AttackSpec("pgd", eps, step=2 / 255, steps=10)
    assert recipe.attacks() == {
        "training": adversarial.spec,
        "fgsm": AttackSpec("fgsm", eps),
        "pgd-10": AttackSpec("pgd", eps, step=2 / 255, steps=10),
        "pgd-50x5": AttackSpec("pgd", eps, step=2.5 * eps / 50, steps=50, restarts=5),
        "square": AttackSpec("square", eps, queries=1000),
        "square-200": AttackSpec("square", eps, queries=200),
    }
    assert list(parse_recipe(ADVERSARIAL).attacks()) == ["pgd-10", "pgd-50x5", "square-1000"]
    assert parse_recipe(BASE).attacks() == {}
    assert parse_recipe(recipe.to_toml()) == recipe


def test_an_attack_has_its_own_distances():
    recipe = parse_recipe(ADVERSARIAL, ["robust.eps=0.3", "robust.step=0.01", 'training.adversarial.step="0.5/255"'])
    assert {(spec.eps, spec.step) for spec in recipe.attacks().values() if spec.kind == "pgd"} == {(0.3, 0.01)}
    assert recipe.training.adversarial.spec.step == 0.5 / 255
    one = parse_recipe(ADVERSARIAL, ["training.adversarial.steps=1", "training.adversarial.random_start=false"])
    assert one.training.adversarial.spec == AttackSpec("pgd", 8 / 255, step=8 / 255, steps=1, random_start=False)
    fgsm = parse_recipe(ADVERSARIAL, ["training.adversarial.attack=fgsm", "training.adversarial.crafting=train"])
    assert fgsm.training.adversarial.spec == AttackSpec("fgsm", 8 / 255, crafting="train")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.adversarial.epz=0.1", "[training.adversarial] epz: unknown key, did you mean 'eps'?"),
        ("training.adversarial={steps=3}", "[training.adversarial] eps: missing"),
        ("training.adversarial.eps=8", "[training.adversarial] eps: a distance between pixels in [0, 1] is above 0 and at"),
        ("training.adversarial.eps=8", 'got 8; did you mean "8/255"?'),
        ("training.adversarial.eps=0", "got 0"),
        ("training.adversarial.eps=nan", "got nan"),
        ('training.adversarial.eps="8/0"', "expected a number or a ratio such as \"8/255\", got '8/0'"),
        ("training.adversarial.eps=small", "[training.adversarial] eps: input should be a valid number"),
        ("training.adversarial.attack=pdg", "'pdg' is not one of pgd, fgsm, did you mean 'pgd'?"),
        (
            "training.adversarial={eps=0.1,attack='fgsm',steps=4}",
            "[training.adversarial]: fgsm is one step of eps and has no steps",
        ),
        ("training.adversarial.steps=0", "[training.adversarial] steps"),
        ("robust.attack=1", "[robust] attack: unknown key, did you mean 'attacks'?"),
        ("robust.attacks=[]", "[robust] attacks"),
        ("robust.attacks=['pgdd-10']", "[robust] attacks: no attack 'pgdd-10', did you mean 'pgd-10'?; there are training,"),
        ("robust.attacks=['squar-10']", "no attack 'squar-10', did you mean 'square'?"),
        ("robust.attacks=['pgd']", "no attack 'pgd', did you mean 'pgd-10'?"),
        ("robust.attacks=['pgd-10x0']", "no attack 'pgd-10x0'"),
        ("robust.attacks=['fgsm','fgsm']", "an attack is named twice"),
        ("robust.images=0", "[robust] images"),
        ("task=lanes", "[robust] attacks are for task = 'classification', not for 'lanes'; leave them out"),
    ],
)
def test_an_impossible_attack_is_explained(override, said):
    assert said in refused(ADVERSARIAL, override)


def test_attacks_need_an_eps_and_training_an_attack():
    assert "[robust] needs eps" in refused(BASE + "[robust]\n")
    assert "which is not there" in refused(BASE + '[robust]\neps = 0.1\nattacks = ["training"]\n')
    lanes = refused(BASE + "[training.adversarial]\neps = 0.1\n", "task=lanes")
    assert "[training.adversarial] attacks are for task = 'classification'" in lanes


def test_fingerprint_knows_attacks():
    attacked = (
        ADVERSARIAL,
        ADVERSARIAL.replace("[robust]", ""),
        ADVERSARIAL + "images = 10\n",
        BASE + "[robust]\neps = 0.1\n",
    )
    assert len({parse_recipe(text).fingerprint("slr", 0, "test") for text in (BASE, *attacked)}) == 5


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.toml")), ids=lambda path: path.stem)
def test_the_recipes_are_recipes(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert len({recipe.epochs(label) for label in recipe.methods} - {0}) == 1, "every method has the same budget"


def test_importing_recipes_does_not_import_torch():
    code = "import sys, dualprune.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_distillation_is_parsed_and_part_of_the_fingerprint():
    plain, taught = parse_recipe(BASE), parse_recipe(BASE, ["training.distill={}"])
    assert plain.training.distill is None
    assert (taught.training.distill.weight, taught.training.distill.temperature) == (0.9, 4.0)
    assert parse_recipe(taught.to_toml()) == taught
    assert plain.fingerprint("slr", 0, "test") != taught.fingerprint("slr", 0, "test")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.distill={weight=0}", "[training.distill] weight"),
        ("training.distill={weight=1.1}", "[training.distill] weight"),
        ("training.distill={temperature=0}", "[training.distill] temperature"),
        ("training.distill={temprature=2}", "unknown key, did you mean 'temperature'?"),
    ],
)
def test_impossible_distillation_is_explained(override, said):
    assert said in refused(BASE, override)


def test_distillation_needs_labelled_images():
    assert "[training.distill] is for task = 'classification'" in refused(BASE + "[training.distill]\n", "task=lanes")


def test_labels_are_not_trimmed():
    """Two labels that differ in a space would be one method, the second one."""
    with pytest.raises(DualpruneError, match="methods"):
        parse_recipe(TINY_RECIPE + '[methods." gradual"]\nkind = "slr"\n')


def test_a_file_name_that_results_cannot_have_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"r\xe9cipe.toml")
    try:
        path.write_text(TINY_RECIPE)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(DualpruneError, match="not UTF-8"):
        load_recipe(path)
