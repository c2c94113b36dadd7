"""The command line: what it prints, and the code it exits with."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from dualprune import train
from dualprune.cli import main
from helpers import TINY_RECIPE

TINY = TINY_RECIPE + "[paper]\nslr = 91.5\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "tiny.toml").write_text(TINY)
    return "tiny.toml"


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code or 0


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys\ntry:\n import dualprune.cli as c; c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'matplotlib')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("demo", "run", "compare", "tune", "report", "evaluate", "layerwise"):
        assert command in done.stdout


def test_run_reports_and_is_measured_again(recipe, tmp_path, capsys):
    assert call("run", recipe, "--method", "slr") == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "runs/tiny/slr-seed0/result.json").read_text())
    assert f"cut {result['cut']:.2f} %" in said and "runs/tiny/slr-seed0/report.html" in said
    assert "slr seed 0: epoch 1, loss" in said
    assert result["command"] == "dualprune run tiny.toml --method slr --seed 0"
    assert call("evaluate", recipe, "runs/tiny/slr-seed0/pruned.safetensors") == 0
    again = capsys.readouterr().out
    assert f"accuracy {result['cut']:.2f} %" in again
    assert f"{result['sizes']['sparse_bytes']:,}" in again
    report = tmp_path / "runs/tiny/slr-seed0/report.html"
    report.unlink()
    assert call("report", "runs/tiny/slr-seed0") == 0
    assert report.exists()


def test_set_is_in_the_command_and_in_the_recipe_as_run(recipe, tmp_path):
    assert call("run", recipe, "--method", "oneshot", "--set", "prune.rate=4", "--out", "elsewhere", "--seed", "3") == 0
    folder = tmp_path / "elsewhere/tiny/oneshot-seed3"
    assert json.loads((folder / "result.json").read_text())["command"].endswith("--seed 3 --set prune.rate=4")
    assert "rate = 4.0" in (folder / "recipe.toml").read_text()


def test_what_a_shell_would_take_apart_is_quoted_in_the_command(recipe, tmp_path):
    override = 'prune.patterns."fc2.weight"={ pattern = "2:4" }'
    assert call("compare", recipe, "--methods", "oneshot", "--seeds", "3", "--set", override, "--split", "validation") == 0
    command = json.loads((tmp_path / "runs/tiny/oneshot-seed3/result.json").read_text())["command"]
    assert command == f"dualprune run tiny.toml --method oneshot --seed 3 --set '{override}' --split validation"
    assert call(*shlex.split(command)[1:], "--out", "again") == 0
    one, other = (json.loads((tmp_path / out / "tiny/oneshot-seed3/result.json").read_text()) for out in ("runs", "again"))
    assert one["cut"] == other["cut"] and one["recipe_sha256"] == other["recipe_sha256"] and one["command"] == other["command"]


def test_dry_run_shows_the_layers_and_leaves_nothing(recipe, tmp_path, capsys):
    assert call("run", recipe, "--dry-run") == 0
    assert "fc2.weight" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_compare_prints_one_table_beside_the_paper(recipe, tmp_path, capsys):
    assert call("compare", recipe, "--methods", "slr,oneshot", "--seeds", "0,2") == 0
    said = capsys.readouterr().out
    table = json.loads((tmp_path / "runs/tiny/compare.json").read_text())
    slr, oneshot = table["rows"]
    assert (slr["n"], slr["seeds"], slr["epochs"], slr["paper"]) == (2, [0, 2], 2, 91.5)
    assert slr["mean"] == pytest.approx(sum(slr["cut"]) / 2) and slr["std"] > 0
    assert (oneshot["epochs"], oneshot["steps"], oneshot["paper"]) == (0, 0, None)
    assert f"{slr['mean']:.2f} ± {slr['std']:.2f}" in said and "91.50" in said
    assert (tmp_path / "runs/tiny/compare.html").exists()


def test_compare_refuses_unequal_budgets_unless_told(recipe, capsys):
    arguments = ["compare", recipe, "--methods", "slr,gradual", "--set", "methods.gradual.epochs=1"]
    assert call(*arguments) == 2
    assert "unequal budgets in epochs (slr 2, gradual 1)" in capsys.readouterr().err
    assert call(*arguments, "--unequal") == 0


def test_tuned_rates_are_chosen_on_held_out_images_and_used(recipe, tmp_path, capsys):
    assert call("compare", recipe, "--methods", "gradual", "--tuned") == 2
    assert "run 'dualprune tune' first" in capsys.readouterr().err
    assert call("tune", recipe, "--methods", "gradual,oneshot", "--lr", "0.0001,0.1") == 0
    table = json.loads((tmp_path / "runs/tiny/tune.json").read_text())
    assert table["split"] == "validation" and list(table["methods"]) == ["gradual"]
    assert table["methods"]["gradual"]["lr"] == 0.1
    assert {len(scores) for scores in table["methods"]["gradual"]["scores"].values()} == {1}
    assert call("compare", recipe, "--methods", "gradual,oneshot", "--tuned") == 0
    assert json.loads((tmp_path / "runs/tiny/compare.json").read_text())["rows"][0]["lr"] == 0.1
    capsys.readouterr()
    assert call("compare", recipe, "--methods", "slr", "--tuned") == 2
    assert "has no 'slr', only gradual" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "tiny.tml"], "no recipe 'tiny.tml', did you mean 'tiny.toml'?"),
        (["run", "tiny.toml", "--method", "slrr"], "has no method 'slrr', did you mean 'slr'?"),
        (["run", "tiny.toml", "--set", "training.epoch=1"], "[training] epoch: unknown key, did you mean 'epochs'?"),
        (["run", "tiny.toml", "--set", "prune.rate=0.9"], "did you mean sparsity = 0.9?"),
        (["run", "tiny.toml", "--split", "valid"], "split is one of test, validation, got 'valid', did you mean 'validation'?"),
        (["run", "tiny.toml", "--device", "gpu"], "--device"),
        (["run", "tiny.toml", "--set", "model.name=mlpp"], "did you mean 'mlp'?"),
        (["run", "tiny.toml", "--set", 'prune.patterns={"fc9*"=0.5}'], "'fc9*' matches no parameter"),
        (["run", "tiny.toml", "--out", "tiny.toml"], "cannot write the run folder"),
        (["compare", "tiny.toml", "--seeds", "0,x"], "--seeds takes comma-separated numbers, got '0,x'"),
        (["compare", "tiny.toml", "--seeds=0,-1"], "from 0 to 2**63 - 1, got -1"),
        (["run", "tiny.toml", "--set", "training.epochs=true"], "[training] epochs: expected a number, got true"),
        (["run", "tiny.toml", "--set", f"seed={2**63}"], "seed: input should be less than 9223372036854775808"),
        (["compare", "tiny.toml", "--methods", "slr,gradul"], "did you mean 'gradual'?"),
        (["tune", "tiny.toml", "--lr", "0,1"], "a grid of learning rates above 0 is needed"),
        (["report", "nowhere"], "no run folder 'nowhere'"),
        (["evaluate", "tiny.toml", "no.safetensors"], "no weights file 'no.safetensors'"),
        (["evaluate", "tiny.toml", "tiny.toml"], "tiny.toml"),
    ],
)
def test_wrong_input_is_one_clean_message_and_exit_code_2(recipe, capsys, arguments, said):
    assert call(*arguments) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith("error: ") and said in caught.err
    assert "Traceback" not in caught.err


def test_an_unknown_option_is_2_as_well(recipe, capsys):
    assert call("run", recipe, "--methd", "slr") == 2
    assert "--method" in capsys.readouterr().err


def test_a_run_that_fails_is_1(recipe, capsys):
    assert call("run", recipe, "--method", "gradual", "--set", "training.lr=1e30") == 1
    assert "try a lower lr" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_disk_that_fills_up_is_1(recipe):
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
    code = limit + "from dualprune.cli import main; main(['run', 'tiny.toml', '--method', 'slr'])"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    *_, said = done.stderr.splitlines()
    assert said.startswith("error: cannot write to 'runs/tiny/slr-seed0'") and "nothing was saved yet" in said


def test_ctrl_c_is_130_and_the_same_command_continues(recipe, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dualprune", "run", recipe, "--method", "slr", "--set", "training.epochs=400"]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if "epoch 2," in line:
            running.send_signal(signal.SIGINT)
            break
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130, error
    assert "interrupted and saved at" in error and "the same command continues" in error
    assert "Traceback" not in error
    # the checkpoint is there, and a call with other settings says so instead of overwriting it
    done = subprocess.run(command[:-2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--fresh" in done.stderr


def test_ctrl_c_outside_of_training_is_130_too_and_says_so(recipe, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert call("run", recipe) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues from the last checkpoint\n"


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "dualprune", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "demo" in done.stdout


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_none_is_2(recipe, capsys, seed):
    assert call("run", recipe, f"--seed={seed}") == 2
    assert "--seed" in capsys.readouterr().err


def test_what_tune_says_next_is_the_whole_command(recipe, tmp_path, capsys):
    override = 'prune.patterns."fc2.weight"={ pattern = "2:4" }'
    arguments = ["--methods", "gradual", "--out", "else where", "--set", override, "--set", "training.epochs=1"]
    assert call("tune", recipe, "--lr", "0.05", *arguments) == 0
    said = capsys.readouterr().out.rpartition("use it with: ")[2]
    assert shlex.split(said) == ["dualprune", "compare", recipe, "--tuned", *arguments]
    assert call(*shlex.split(said)[1:]) == 0


def test_ctrl_c_of_a_fresh_command_says_to_leave_fresh_out(recipe, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert call("run", recipe, "--fresh") == 130
    assert "the same command without --fresh continues" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_1(recipe, tmp_path, capsys):
    assert call("run", recipe, "--method", "oneshot") == 0
    page = tmp_path / "runs/tiny/oneshot-seed0/report.html"
    page.unlink()
    page.mkdir()
    (page / "in the way").write_text("")
    assert call("report", str(page.parent)) == 1
    assert "cannot write to" in capsys.readouterr().err
