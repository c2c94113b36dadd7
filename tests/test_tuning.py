"""Trials of a recipe: what may be listed, how `tune` chooses among them, and that they are no part of a run's identity."""

from __future__ import annotations

import json
import shlex

import pytest
from safetensors.torch import save_file

from dualprune.compare import compare, comparison_table, tune, tuning_table
from dualprune.errors import DualpruneError, FormatError
from dualprune.recipe import load_recipe, parse_recipe
from dualprune.run_folder import RunError
from dualprune.tasks import build_task
from helpers import TINY_RECIPE

TRIALS = """
[methods.slr]
kind = "slr"
updates_per_epoch = 2
trials = [{ lr = 1e-5 }, { lr = 0.1, s0 = 0.3, rho = { start = 0.1, end = 2.0, over = 0.5 } }]
[methods.safe]
kind = "safe"
updates_per_epoch = 2
trials = [{ rho = 0.5, rho_sam = 0.05 }]
"""
HEAD = TINY_RECIPE.partition("[methods.slr]")[0]
ONESHOT = '[methods.oneshot]\nkind = "oneshot"\n'


def with_trials(trials, kind="slr"):
    return parse_recipe(f'{HEAD}[methods.x]\nkind = "{kind}"\ntrials = {trials}\n')


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ("[{lr=1},{lr=2},{lr=3},{lr=4},{lr=5},{lr=6},{lr=7}]", "at most 6 trials, got 7"),
        ("[{s0=0.1},{M=200},{lr=0.1, r=0.2}]", "lr and at most 2 parameters of the method, got M, r, s0"),
        ("[{epochs=9}]", "a trial cannot change epochs"),
        ("[{lr=0.1},{so=0.1}]", "trial 2: unknown key 'so', did you mean 's0'?"),
        ("[{s0=-1}]", "trial 1: SLR(s0) expects a positive finite number, got -1"),
        ('[{lr="0.1"}]', "trial 1: lr: expected a number, got '0.1'"),
        ("[{lr=true}]", "trial 1: lr: expected a number, got true"),
        ('[{s0="0.1"}]', "trial 1: "),
        ("[{lr=0}]", "trial 1: lr: input should be greater than 0, got 0"),
        ("[{lr=0.1, rho={start=1, ende=2}}]", "trial 1: rho: unknown key 'ende', did you mean 'end'?"),
        ("{lr=0.1}", "trials: input should be a valid list"),
    ],
)
def test_impossible_trials_are_explained_when_the_recipe_is_read(trials, said):
    with pytest.raises(DualpruneError) as error:
        with_trials(trials)
    assert said in str(error.value) and "methods.x" in str(error.value)


def test_trials_are_no_part_of_a_run_but_of_the_recipe():
    plain, listed = (parse_recipe(f'{HEAD}[methods.slr]\nkind = "slr"\n{t}\n') for t in ("", "trials = [{lr = 0.3, s0 = 0.2}]"))
    assert plain.fingerprint("slr", 0, "test") == listed.fingerprint("slr", 0, "test")
    assert parse_recipe(listed.to_toml()) == listed
    tried = listed.with_trial("slr", listed.method("slr").trials[0])
    assert (tried.lr("slr"), tried.method("slr").build().s0) == (0.3, 0.2)
    written = parse_recipe(f'{HEAD}[methods.slr]\nkind = "slr"\nlr = 0.3\ns0 = 0.2\n')
    assert tried.fingerprint("slr", 0, "test") == written.fingerprint("slr", 0, "test") != plain.fingerprint("slr", 0, "test")


def test_the_best_trial_is_chosen_on_held_out_images_and_used(tmp_path):
    recipe = parse_recipe(HEAD + TRIALS + ONESHOT)
    table = tune(recipe, out=tmp_path)
    assert list(table["methods"]) == ["slr", "safe"] and json.loads((tmp_path / "tiny/tune.json").read_text()) == table
    slr, safe = table["methods"]["slr"], table["methods"]["safe"]
    low, high = (values[0] for values in slr["scores"].values())
    assert high > low and slr["settings"] == recipe.method("slr").trials[1] and slr["lr"] == 0.1
    assert safe["settings"] == {"lr": 0.05, "rho": 0.5, "rho_sam": 0.05}, "a trial without lr has the recipe's"
    assert tuning_table(table).row_count == 3

    rows = {row["label"]: row for row in compare(recipe, out=tmp_path, tuned=True)["rows"]}
    assert "s0=0.3" in rows["slr"]["method"] and "end=2.0, over=0.5" in rows["slr"]["method"] and rows["slr"]["lr"] == 0.1
    assert "rho_sam=0.05" in rows["safe"]["method"]
    assert rows["safe"]["steps"] == 2 * (rows["slr"]["steps"] // 2 // 2), "two gradients a step, half the steps"
    assert rows["safe"]["epochs"] == rows["slr"]["epochs"]
    assert all(row["peak_memory_mb"] > 0 for row in rows.values())


def test_a_judge_of_ones_own_chooses(tmp_path):
    recipe = parse_recipe(HEAD + TRIALS, ["training.epochs=1"])
    settings = {"seeds": [1, 2], "out": tmp_path}
    low = tune(recipe, ["slr"], judge=lambda place: float("lr1e-05" in str(place)), **settings)["methods"]["slr"]
    assert low["settings"] == {"lr": 1e-5} and list(low["scores"].values()) == [[1.0, 1.0], [0.0, 0.0]]
    asked = []
    tune(recipe, ["slr"], judge=lambda place: asked.append(place.name) or 0.0, **settings)
    assert asked == ["slr-seed1", "slr-seed2"] * 2, "finished trials are asked about too"


def test_a_choice_is_for_the_recipe_it_was_made_for(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["training.epochs=1"])
    tune(recipe, ["slr", "gradual"], [0.05], out=tmp_path)
    again = tune(recipe, ["slr"], [0.05], out=tmp_path)
    assert list(again["methods"]) == ["slr", "gradual"], "what was chosen for other methods stays"
    compare(parse_recipe(TINY_RECIPE, ["training.epochs=1", "training.lr=0.3"]), ["slr"], out=tmp_path, tuned=True)
    other = parse_recipe(TINY_RECIPE, ["training.epochs=1", "prune.rate=6"])
    with pytest.raises(DualpruneError, match=r"tune\.json: 'slr' was tuned under other settings; run 'dualprune tune' again"):
        compare(other, ["slr"], out=tmp_path, tuned=True)
    assert list(tune(other, ["slr"], [0.05], out=tmp_path, resume=False)["methods"]) == ["slr"], "that of gradual is dropped"


def test_a_seed_named_twice_is_one_run(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["training.epochs=1"])
    row = compare(recipe, ["gradual"], [3, 3], out=tmp_path)["rows"][0]
    assert (row["n"], row["seeds"], row["std"]) == (1, [3], None)
    assert [
        len(scores)
        for scores in tune(recipe, ["gradual"], [0.05], [1, 1], out=tmp_path)["methods"]["gradual"]["scores"].values()
    ] == [1]


def test_the_command_of_a_tuned_run_makes_that_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(HEAD + TRIALS)
    recipe = load_recipe("tiny.toml", ["training.epochs=1", 'prune.patterns."fc2.weight"=0.75'])
    tune(recipe, ["slr"])
    compare(recipe, ["slr"], [2], tuned=True)
    result = json.loads((tmp_path / "runs/tiny/slr-seed2/result.json").read_text())
    words = shlex.split(result["command"])
    assert words[:7] == ["dualprune", "run", "tiny.toml", "--method", "slr", "--seed", "2"]
    again = load_recipe("tiny.toml", words[8::2])
    assert set(words[7::2]) == {"--set"} and again.fingerprint("slr", 2, "test") == result["recipe_sha256"]
    trial = json.loads(next((tmp_path / "runs/tiny/tune").glob("*/slr-seed0/result.json")).read_text())
    assert trial["command"].endswith(" --split validation")


def test_a_trial_ends_at_the_cut(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["training.epochs=1", "prune.retrain_epochs=2"])
    tune(recipe, ["slr"], [0.05], out=tmp_path)
    trial = json.loads(next((tmp_path / "tiny/tune").glob("*/slr-seed0/result.json")).read_text())
    assert trial["cut"] is not None and trial["retrained"] is None and trial["retrain_epochs"] == 0
    (row,) = compare(recipe, ["slr"], out=tmp_path, tuned=True)["rows"]
    assert row["retrained"] is not None, "what was chosen is retrained"


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    recipe = parse_recipe(TINY_RECIPE)
    (tmp_path / "tiny").mkdir()
    old = {"recipe": "tiny", "split": "validation", "held_out": 0.1, "seeds": [0], "grid": [0.02, 0.07]}
    old["methods"] = {"gradual": {"lr": 0.07, "scores": {"0.02": [50.0], "0.07": [60.0]}}}
    (tmp_path / "tiny/tune.json").write_text(json.dumps(old))
    assert compare(recipe, ["gradual"], out=tmp_path, tuned=True)["rows"][0]["lr"] == 0.07
    assert tuning_table(old).row_count == 2


def test_nothing_to_try_is_an_error(tmp_path):
    with pytest.raises(DualpruneError, match=r"nothing to try for 'slr': give --lr 0.02,0.05, or trials in \[methods.slr\]"):
        tune(parse_recipe(TINY_RECIPE), out=tmp_path)


def test_retraining_has_a_spread_over_seeds(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["prune.retrain_epochs=1", "training.epochs=1"])
    row = compare(recipe, ["gradual"], [0, 1], out=tmp_path)["rows"][0]
    assert row["retrained_std"] > 0 and row["n"] == 2
    comparison_table({"recipe": "tiny", "split": "test", "rows": [row]})


# --- what diverges, and what a choice was made for -----------------------------------------------------------------------


def test_a_trial_that_diverges_is_noted_and_the_others_go_on(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["training.epochs=1"])
    table = tune(recipe, ["gradual"], [1e30, 0.05], out=tmp_path)
    choice = table["methods"]["gradual"]
    assert choice["scores"]["1e+30"] == [None] and choice["lr"] == 0.05
    assert json.loads((tmp_path / "tiny/tune.json").read_text()) == table
    assert "diverged" in list(tuning_table(table).columns[2].cells)
    with pytest.raises(RunError, match=r"every trial of 'gradual' diverged \(1e\+30; 1e\+29\)"):
        tune(recipe, ["gradual"], [1e30, 1e29], out=tmp_path)


def test_a_method_that_diverges_has_its_row_and_the_others_theirs(tmp_path):
    recipe = parse_recipe(TINY_RECIPE, ["training.epochs=1", "methods.gradual.lr=1e30"])
    table = compare(recipe, ["gradual", "slr"], out=tmp_path)
    gradual, slr = table["rows"]
    assert (gradual["mean"], gradual["n"], gradual["diverged"]) == (None, 0, [0])
    assert slr["n"] == 1 and slr["diverged"] == [] and slr["mean"] > 0
    assert next(iter(comparison_table(table).columns[1].cells)) == "diverged"
    page = (tmp_path / "tiny/compare.html").read_text()
    assert ">diverged<" in page


def test_runs_that_were_not_compared_are_left_out_of_the_page(tmp_path):
    compare(parse_recipe(TINY_RECIPE, ["training.epochs=1", "training.lr=0.1"]), ["gradual"], [0, 1], out=tmp_path)
    compare(parse_recipe(TINY_RECIPE, ["training.epochs=1"]), ["slr"], out=tmp_path)
    page = (tmp_path / "tiny/compare.html").read_text()
    assert "gradual-seed1 is not among the runs that were compared" in page
    assert "is first of" not in page and ">gradual<" not in page


def test_a_choice_is_for_its_weights_its_data_and_its_trials(tmp_path):
    weights, first = tmp_path / "w.safetensors", build_task(parse_recipe(TINY_RECIPE)).model()
    text = HEAD + '[methods.gradual]\nkind = "gradual"\ntrials = [{ lr = 0.05 }, { lr = %s }]\n'

    def recipe(rate="0.1"):
        return parse_recipe(text % rate, [f"model.weights={weights}", "training.epochs=1"])

    def write(scale):
        save_file({name: scale * value for name, value in first.state_dict().items()}, weights)

    write(1.0)
    tune(recipe(), out=tmp_path)
    compare(recipe(), out=tmp_path, tuned=True)
    with pytest.raises(DualpruneError, match="'gradual' was tuned among other trials"):
        compare(recipe("0.2"), out=tmp_path, tuned=True)
    write(2.0)
    with pytest.raises(DualpruneError, match="'gradual' was tuned from other starting weights"):
        compare(recipe(), out=tmp_path, tuned=True)
    write(1.0)
    path = tmp_path / "tiny/tune.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table).replace(table["methods"]["gradual"]["data_sha256"], "ab" * 32))
    with pytest.raises(DualpruneError, match="'gradual' was tuned on other data"):
        compare(recipe(), out=tmp_path, tuned=True)
    for key in ("data_sha256", "weights_sha256", "trials"):
        del table["methods"]["gradual"][key]
    path.write_text(json.dumps(table))
    compare(recipe("0.2"), out=tmp_path, tuned=True)  # one of an earlier version does not say


@pytest.mark.parametrize(("content", "said"), [('{"methods": {', "not JSON"), ("[]", "JSON object"), ("{}", "is missing")])
def test_a_damaged_file_of_choices_is_named(tmp_path, content, said):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/tune.json").write_text(content)
    with pytest.raises(FormatError, match=rf"tune\.json.*{said}"):
        compare(parse_recipe(TINY_RECIPE), ["gradual"], out=tmp_path, tuned=True)


def test_a_table_that_cannot_be_written_is_one_clear_error(tmp_path):
    recipe = parse_recipe(TINY_RECIPE)
    (tmp_path / "tiny/compare.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot write to .*tiny'.*the finished runs are kept"):
        compare(recipe, ["oneshot"], out=tmp_path)


def test_a_boolean_is_no_number_of_a_paper(tmp_path):
    rows = compare(parse_recipe(TINY_RECIPE + "[paper]\noneshot = true\n"), ["oneshot"], out=tmp_path)["rows"]
    assert rows[0]["paper"] is None
