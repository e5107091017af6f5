"""What durability costs is measured on steps that do the same."""

from __future__ import annotations

from typing import Any

import torch

from hvd_eurosat.config.schema import Config, Optim
from hvd_eurosat.data.batches import Batch
from hvd_eurosat.model.resnet import build
from hvd_eurosat.training.precision import Precision
from hvd_eurosat.training.state import TrainingState
from hvd_eurosat.training.step import Step
from tests.faults import cost
from tests.unit.test_keys import here

RATE = 1e-5  # that of cost.durable


def test_the_steps_of_the_cost_of_durability_train_alike() -> None:
    world = here()
    tree: Any = None
    config = Config(optim=Optim(lr=RATE))
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=drawn, dtype=torch.uint8)
    batch = Batch(torch.arange(2), images, torch.tensor([0, 2]), torch.ones(2), 2)

    def trained(work: Any) -> torch.Tensor:
        model = build("resnet18", 3, "head", seed=0)
        before = model.fc.weight.detach().clone()
        state = TrainingState(world, config, tree, model, Precision("fp32"))
        work(Step(state, world, config, class_weights=None))
        return model.fc.weight.detach() - before

    bare = trained(lambda step: cost.bare(step, batch))
    assert bare.abs().max() > 0
    assert torch.equal(bare, trained(lambda step: cost.durable(world, step, batch)))
