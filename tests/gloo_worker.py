"""One process of `test_distributed.py`: a step's gradient, written by the first process."""

import json
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from training_runs import config_for

from flashvec.training.distributed import World
from flashvec.training.model import LoraTrainable, load_model
from flashvec.training.run import OBJECTIVES
from flashvec.training.shards import Shards


def step_gradient(name: str, folder: Path, values: dict) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step, summed over all processes."""
    config = config_for(name, folder, dtype="float32", **values)
    world = World()
    model = load_model(config, wants_head=name == "mntp", world=world)
    assert isinstance(model.trainable, LoraTrainable)
    generator = torch.Generator().manual_seed(5)
    for _, _, b in model.trainable.lora.matrices():
        b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    objective = OBJECTIVES[type(config)](model, config, world)
    loss = objective.step(1)["loss"]
    leaves = list(model.trainable.parameters().values())
    world.sum_gradients(leaves)
    world.check_equal(leaves, 1)
    gradient = torch.cat([x.grad.flatten() for x in leaves if x.grad is not None])
    rank, size = world.rank, world.size
    world.close()
    if rank == 0:
        layers = model.decoder.layers
        held = sum(x.nbytes for layer in layers for x in vars(layer).values() if x is not None and not x.is_meta)
        if isinstance(model.decoder.parts, Shards):
            held += model.decoder.parts.held_bytes()
        found = {"loss": torch.tensor(loss), "gradient": gradient, "held": torch.tensor(held)}
        save_file(found, folder / f"{name}-{size}.safetensors")
    return loss, gradient


def close_for_good(world: World) -> None:
    """Close the group that `world` opened; nothing may hold it, or its threads may abort the process as it ends."""
    group = weakref.ref(dist.group.WORLD)
    world.close()
    assert group() is None, "something still holds the group"


if __name__ == "__main__":
    whole = World()  # held throughout: a group that is opened again may meet the store of the one before
    for name, values in json.loads(sys.argv[2]).items():
        step_gradient(name, Path(sys.argv[1]), values)
    close_for_good(whole)
