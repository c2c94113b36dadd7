"""`[training] keep = "best"`: the epoch is chosen on images that are neither trained on nor measured on."""

import json

import pytest
import torch

from dualprune.errors import DualpruneError
from dualprune.loop import Interrupted
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.train import run
from helpers import TINY_RECIPE, fit
from test_train import KillAfter, assert_bit_identical, rows

# a learning rate that does not fall makes the last epoch no better than others
RESTLESS = ["training.keep=best", "training.epochs=6", "training.lr=1", "training.schedule=constant", "data.validation=0.3"]
ADMM = TINY_RECIPE + '[methods.admm]\nkind = "admm"\nupdates_per_epoch = 2\n'
ADVERSARIAL = "[training.adversarial]\neps = 0.1\nsteps = 2\n"


def restless(*overrides, text=ADMM):
    return parse_recipe(text, [*RESTLESS, *overrides])


def best_of(epochs, stage, first=0):
    """The last of the epochs of a stage that scored highest, from row `first` of the stage on."""
    candidates = [row for row in epochs if row["stage"] == stage][first:]
    return max(reversed(candidates), key=lambda row: row["held_out"])


@pytest.mark.parametrize(("label", "fixed_from"), [("slr", 4), ("gradual", 0), ("admm", 0)])
def test_the_best_epoch_is_cut_and_not_the_last(tmp_path, label, fixed_from):
    """SLR's masks are fixed after 0.8 of the run: earlier epochs are then none to go back to."""
    last = 0
    for seed in range(4):
        result = run(restless(), label, seed=seed, out=tmp_path)
        epochs = rows(tmp_path / "tiny" / f"{label}-seed{seed}" / "epochs.jsonl")
        best = best_of(epochs, "train", fixed_from)
        assert result["chosen_epochs"] == {"train": best["epoch"]}
        assert result["cut"] == best["accuracy_cut"]
        assert result["updates"] == len(rows(tmp_path / "tiny" / f"{label}-seed{seed}" / "history.jsonl")) > 1
        last += best["epoch"] == 6
    assert last < 4, "it was always the last epoch: nothing was shown"


def test_retraining_and_dense_training_choose_too(tmp_path):
    text = ADMM.replace("calibrate = 64", "calibrate = 64\nretrain_epochs = 5\nretrain_lr = 1.5")
    text += '[dense]\nepochs = 6\nlr = 1.5\nbatch_size = 256\nschedule = "constant"\n'
    result = run(restless(text=text), "slr", out=tmp_path)
    epochs = rows(tmp_path / "tiny" / "slr-seed0" / "epochs.jsonl")
    assert result["chosen_epochs"]["retrain"] == best_of(epochs, "retrain")["epoch"]
    assert result["retrained"] == best_of(epochs, "retrain")["accuracy_cut"]
    (dense,) = (tmp_path / "tiny").glob("dense-*")
    assert result["dense"] == best_of(rows(dense / "epochs.jsonl"), "train")["accuracy"]


def test_an_interrupted_run_chooses_as_one_that_was_not(tmp_path):
    text = ADMM.replace("calibrate = 64", "calibrate = 64\nretrain_epochs = 3\nretrain_lr = 1.5") + ADVERSARIAL
    run(restless(text=text), "slr", out=tmp_path / "whole")
    for steps in (9, 14, 4):
        with pytest.raises(Interrupted):
            run(restless(text=text), "slr", out=tmp_path / "broken", progress=KillAfter(steps))
    run(restless(text=text), "slr", out=tmp_path / "broken")
    whole, broken = (tmp_path / place / "tiny" / "slr-seed0" for place in ("whole", "broken"))
    assert_bit_identical(whole, broken)
    chosen = [json.loads((place / "result.json").read_text())["chosen_epochs"] for place in (whole, broken)]
    assert chosen[0] == chosen[1] and set(chosen[0]) == {"train", "retrain"}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_choosing_images_are_no_others(split):
    task = build_task(restless(), split)
    trained, measured, choosing = task.trained.x_train, task.data.x_test, task.trained.x_test
    assert len(trained) + len(choosing) == len(task.data.x_train)
    assert len(choosing) == pytest.approx(0.3 * len(task.data.x_train), abs=10)
    assert task.steps_per_epoch(256) == len(trained) // 256
    seen = [{image.numpy().tobytes() for image in part} for part in (trained, measured, choosing)]
    assert not seen[0] & seen[2] and not seen[1] & seen[2]
    plain = build_task(parse_recipe(TINY_RECIPE), split)
    assert plain.trained is plain.data


def test_the_score_is_under_the_attack_of_the_training():
    clean, attacked = (build_task(restless(text=text)) for text in (ADMM, ADMM + ADVERSARIAL))
    model = clean.model()
    fit(clean, model, batch_size=64, epochs=5)
    state = torch.get_rng_state()
    assert attacked.score(model) == attacked.score(model) < clean.score(model) - 5
    assert torch.equal(state, torch.get_rng_state()), "measuring draws from a generator of its own"


def test_only_the_best_has_a_fingerprint_of_its_own():
    plain, last, best = (parse_recipe(ADMM, o) for o in ([], ["training.keep=last"], ["training.keep=best"]))
    prints = [recipe.fingerprint("slr", 0, "test") for recipe in (plain, last, best)]
    assert prints[0] == prints[1] != prints[2]


def test_what_cannot_be_is_explained():
    with pytest.raises(DualpruneError, match=r"\[training\] keep"):
        parse_recipe(ADMM, ["training.keep=first"])
    with pytest.raises(DualpruneError, match=r"keep = 'best' is for task = 'classification', not for 'lanes'; leave it out"):
        parse_recipe(ADMM, ["training.keep=best", "task=lanes"])
