"""Ultralytics: the model and the EMA that is validated and saved have the same exact zeros; a stopped run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dualprune
from dualprune import DualpruneError
from dualprune.integrations.ultralytics import DualpruneCallbacks

pytestmark = pytest.mark.filterwarnings("ignore")  # Ultralytics' own
EPOCHS, IMAGES, SIDE = 3, 8, 32


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight images of one bright box each, and a YOLOv8 of a sixteenth of the width."""
    top = tmp_path_factory.mktemp("yolo")
    os.environ |= {"YOLO_CONFIG_DIR": str(top), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    ultralytics = pytest.importorskip("ultralytics")
    from PIL import Image

    source = Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8.yaml"
    text = source.read_text().replace("[0.33, 0.25, 1024]", "[0.33, 0.0625, 1024]").replace("nc: 80", "nc: 2")
    (top / "yolov8n.yaml").write_text(text)
    draws = torch.Generator().manual_seed(0)
    for kind in ("images", "labels"):
        (top / kind).mkdir()
    for i in range(IMAGES):
        image = torch.randint(0, 60, (SIDE, SIDE, 3), generator=draws, dtype=torch.uint8)
        image[8:24, 8:24] = 255
        Image.fromarray(image.numpy()).save(top / f"images/{i}.png")
        (top / f"labels/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n")
    (top / "data.yaml").write_text(f"path: {top}\ntrain: images\nval: images\nnames: [even, odd]\n")
    return top


def yolo(model: Path) -> Any:
    from ultralytics import YOLO

    return YOLO(str(model), task="detect", verbose=False)


def fit(home: Path, folder: Path, model: Any, **options: Any) -> Any:
    options = {"epochs": EPOCHS, "warmup_epochs": 1, "nbs": 4} | options
    model.train(
        data=str(home / "data.yaml"), imgsz=SIDE, batch=2, workers=0, device="cpu", plots=False, verbose=False,
        project=str(folder), name="run", exist_ok=True, seed=0, optimizer="SGD", pretrained=False, **options,
    )  # fmt: skip
    return model.trainer


def zeros(module: torch.nn.Module, names: Any) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in module.state_dict().items() if name in names}


def saved(path: Path) -> torch.nn.Module:
    checkpoint = torch.load(path, weights_only=False)
    return checkpoint["ema"] or checkpoint["model"]


@pytest.mark.slow
def test_model_ema_and_files_have_the_same_zeros(home, tmp_path):
    model = yolo(home / "yolov8n.yaml")
    pruning = DualpruneCallbacks(dualprune.SLR(), rate=4).add_to(model)
    validated, going_on = [], []

    def dense(module: torch.nn.Module) -> int:
        return sum(int(z.sum()) for z in zeros(module, pruning.pruner.masks).values())

    model.add_callback("on_val_start", lambda validator: validated.append(dense(model.trainer.ema.ema)))
    model.add_callback("on_train_epoch_start", lambda trainer: going_on.append(dense(trainer.ema.ema)))
    trainer = fit(home, tmp_path, model)

    pruner = pruning.pruner
    assert pruner.finished and pruner.step_count == pruner.total_steps
    masks = pruner.masks
    for module in (trainer.model, trainer.ema.ema, saved(trainer.last)):
        found = zeros(module, masks)
        assert all(torch.equal(found[name], ~mask) for name, mask in masks.items())
    asked = sum(int((~mask).sum()) for mask in masks.values())
    assert sum(int(z.sum()) for z in zeros(saved(trainer.best), masks).values()) >= asked
    assert min(validated) == asked and going_on[:2] == [0, 0]
    assert all(row["loss"] > 0 for row in pruner.history)


@pytest.mark.slow
def test_the_loss_of_a_step_is_that_of_all_its_batches(home, tmp_path):
    model = yolo(home / "yolov8n.yaml")
    pruning = DualpruneCallbacks(dualprune.SLR(), rate=4, every=1, total_steps=5).add_to(model)
    losses: list[float] = []
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss)))
    fit(home, tmp_path, model, epochs=3, warmup_epochs=0, nbs=6)  # four batches an epoch, three a step: they go across epochs
    wanted = [sum(losses[i : i + 3]) for i in (0, 3, 6)]
    assert [row["loss"] for row in pruning.pruner.history] == pytest.approx(wanted, rel=1e-5)


def test_losses_whose_gradients_were_thrown_away_are_not_observed(tmp_path):
    """AMP's scaler leaves out a step, or the trainer begins an epoch anew: the gradients are set to None."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = SimpleNamespace(model=model, optimizer=optimizer, start_epoch=0, wdir=tmp_path, loss=None)
    pruning = DualpruneCallbacks(dualprune.SLR(), rate=4, every=1, total_steps=8)
    pruning.on_train_start(trainer)
    losses = []
    for action in ("wait", "skip", "wait", "step", "step", "wait", "wait", "step"):
        pruning.callbacks["on_train_batch_start"](trainer)
        trainer.loss = model(torch.randn(4, 8)).square().sum()
        trainer.loss.backward()
        losses.append(float(trainer.loss))
        if action == "step":
            optimizer.step()
        if action != "wait":
            optimizer.zero_grad()
    wanted = [sum(losses[2:4]), losses[4], sum(losses[5:8])]
    assert [row["loss"] for row in pruning.pruner.history] == pytest.approx(wanted)


def test_it_follows_the_trainer_to_another_optimizer(tmp_path):
    """Some versions build it anew when a batch was too large for the memory."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    trainer = SimpleNamespace(model=model, start_epoch=0, wdir=tmp_path, loss=None)
    trainer.optimizer = first = torch.optim.SGD(model.parameters(), 0.01)
    pruning = DualpruneCallbacks(dualprune.SLR(), rate=4, every=1, total_steps=8)
    pruning.on_train_start(trainer)
    losses = []
    for optimizer in (first, torch.optim.AdamW(model.parameters(), 0.01)):
        trainer.optimizer = optimizer
        pruning.callbacks["on_train_batch_start"](trainer)
        trainer.loss = model(torch.randn(4, 8)).square().sum()
        trainer.loss.backward()
        losses.append(float(trainer.loss))
        optimizer.step()
        optimizer.zero_grad()
    assert [row["loss"] for row in pruning.pruner.history] == pytest.approx(losses)
    first.step()
    assert pruning.pruner.step_count == 2


@pytest.mark.slow
def test_a_stopped_run_goes_on(home, tmp_path):
    class Stopped(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise Stopped

    model = yolo(home / "yolov8n.yaml")
    first = DualpruneCallbacks(dualprune.SLR(), rate=4).add_to(model)
    model.add_callback("on_fit_epoch_end", stop)
    with pytest.raises(Stopped):
        fit(home, tmp_path, model)
    model = yolo(tmp_path / "run/weights/last.pt")
    second = DualpruneCallbacks(dualprune.SLR(), rate=4).add_to(model)
    model.train(resume=True)
    before, after = first.pruner, second.pruner
    assert after.history[: len(before.history)] == before.history
    assert after.finished and after.step_count == after.total_steps
    found = zeros(model.trainer.ema.ema, after.masks)
    assert all(torch.equal(found[name], ~mask) for name, mask in after.masks.items())


def test_a_run_limited_by_time_needs_the_number_of_steps(home, tmp_path):
    model = yolo(home / "yolov8n.yaml")
    DualpruneCallbacks(dualprune.SLR(), rate=4).add_to(model)
    with pytest.raises(DualpruneError, match="pass total_steps="):
        fit(home, tmp_path, model, time=0.001)


def test_events_before_the_start_are_refused():
    with pytest.raises(DualpruneError, match="add all of the callbacks"):
        DualpruneCallbacks(dualprune.SLR(), rate=4).on_model_save(None)
