"""Fixtures of the loop tests; the functions behind them are in helpers.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import helpers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # on tensors this small threads only wait for each other


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test a repetition of its last run."""
    torch.manual_seed(0)


@pytest.fixture
def net() -> nn.Sequential:
    """A tiny convolutional network, the same in every test."""
    return helpers.tiny_net()


@pytest.fixture
def optimizer(net: nn.Module) -> Optimizer:
    """SGD with momentum on `net`."""
    return helpers.sgd(net)


@pytest.fixture
def calibration() -> list[Tensor]:
    """Batches to re-estimate batch norm with."""
    return list(helpers.digits()[0][:512].split(128))


@pytest.fixture(scope="session")
def trained() -> Callable[[], nn.Sequential]:
    """Give copies of the tiny network after 150 steps, 90 % and more right."""
    model = helpers.tiny_net()
    helpers.train(model, helpers.sgd(model), range(1000, 1150))
    state = helpers.snapshot(model)

    def fresh() -> nn.Sequential:
        copy = helpers.tiny_net()
        copy.load_state_dict(state)
        return copy

    return fresh


@pytest.fixture(autouse=True)
def _rng() -> None:
    torch.manual_seed(0)
