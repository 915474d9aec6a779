"""A state of sharded weights: saved, and distributed again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from .conftest import REPOSITORY, tiny_model


@pytest.mark.slow
def test_sharded_state(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.test_sharded_state", str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("model", "optimizer", "random-0", "random-1")
    assert names == {f"{kind}.safetensors" for kind in kinds}


def train(seed: int) -> tuple:
    """A model sharded over the processes, its optimizer and schedule, after two steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = tiny_model().train()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.audio_spectrogram_transformer.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 * seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(2 * seed):
        model(torch.randn(2, 128, 64), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def gathered(model, optimizer) -> tuple[dict, dict]:
    options = StateDictOptions(full_state_dict=True)
    return (
        get_model_state_dict(model, options=options),
        get_optimizer_state_dict(model, optimizer, options=options)["state"],
    )


def main(folder: Path) -> None:
    from scripts.training.state import TrainingState

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, optimizer, scheduler = train(1)
    TrainingState(model, None, rank, is_sharded=True).save(folder, optimizer, scheduler)
    drawn = torch.rand(3)
    distributed.barrier()
    other, other_optimizer, other_scheduler = train(2)
    state = TrainingState(other, None, rank, is_sharded=True)
    state.load_weights(folder)
    state.load_optimizer(folder, other_optimizer, other_scheduler)
    state.load_random(folder)
    assert torch.equal(torch.rand(3), drawn)
    assert other_scheduler.last_epoch == 2
    for saved, loaded in zip(
        gathered(model, optimizer), gathered(other, other_optimizer), strict=True
    ):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
