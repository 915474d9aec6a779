"""A run's state on disk, to resume from: only numbers and names, nothing that could hold code.

    model.safetensors           the weights in training
    optimizer.safetensors       its moments; settings, schedule and loss scale in the header
    average.safetensors         the averaged weights, if any
    random-RANK.safetensors     the generators of Python, NumPy and torch, of each process

Weights sharded over processes (FSDP) are gathered into the same files, and sharded again.
"""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

Tensors = dict[str, Tensor]
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_DEALT_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class TrainingState:
    """What changes in training, apart from the progress: `save` saves it, the others restore it.

    Args:
        model: without wrappers, unless it is sharded.
        average: the averaged copy, if there is one.
        rank: of this process.
        is_sharded: whether weights and moments are sharded over processes.
    """

    def __init__(
        self, model: nn.Module, average: AveragedModel | None, rank: int, is_sharded: bool = False
    ):
        self.model, self.average = model, average
        self.rank, self.is_sharded = rank, is_sharded

    def save(self, folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
        """Write this process's files of a state; every process must call it."""
        _write(folder / f"random-{self.rank}.safetensors", *_random_state())
        weights: Any
        moments: Any
        if self.is_sharded:
            weights = get_model_state_dict(self.model, options=_GATHERED)
            moments = get_optimizer_state_dict(self.model, _plain(optimizer), options=_GATHERED)
        else:
            weights, moments = self.model.state_dict(), optimizer.state_dict()
        if self.rank:
            return
        _write(folder / "model.safetensors", weights)
        settings = {
            "groups": moments["param_groups"],
            "schedule": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
            "scale": None if scaler is None else scaler.state_dict(),
        }
        tensors = {
            f"{parameter}/{name}": torch.as_tensor(value)
            for parameter, values in moments["state"].items()
            for name, value in values.items()
        }
        _write(folder / "optimizer.safetensors", tensors, settings)
        if self.average is not None:
            _write(folder / "average.safetensors", self.average.state_dict())

    def load_weights(self, folder: Path) -> None:
        """Restore the model and the average.

        Raises:
            ValueError: for a file that `save` did not write; likewise below.
        """
        with _reading(folder / "model.safetensors") as (weights, _):
            if self.is_sharded:
                set_model_state_dict(self.model, dict(weights), options=_DEALT_OUT)
            else:
                self.model.load_state_dict(weights)
        if self.average is not None:
            with _reading(folder / "average.safetensors") as (weights, _):
                self.average.load_state_dict(weights)

    def load_optimizer(
        self, folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None
    ) -> None:
        """Restore the optimizer's moments, the learning-rate schedule and the loss scale."""
        with _reading(folder / "optimizer.safetensors") as (tensors, settings):
            moments: dict[Any, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                parameter, _, name = key.rpartition("/")
                moments.setdefault(parameter if self.is_sharded else int(parameter), {})[name] = (
                    value
                )
            state: Any = {"state": moments, "param_groups": settings["groups"]}
            if self.is_sharded:
                set_optimizer_state_dict(
                    self.model, _plain(optimizer), optim_state_dict=state, options=_DEALT_OUT
                )
            else:
                optimizer.load_state_dict(state)
            scheduler.load_state_dict({**settings["schedule"], "lr_lambdas": [None] * len(
                settings["groups"])})  # fmt: skip
            if scaler is not None:
                scaler.load_state_dict(settings["scale"])

    def load_random(self, folder: Path) -> None:
        """Restore this process's generators."""
        with _reading(folder / f"random-{self.rank}.safetensors") as (tensors, settings):
            version, gauss = settings["python"]
            random.setstate((version, tuple(tensors["python"].tolist()), gauss))
            kind, position, has_gauss, cached = settings["numpy"]
            keys = tensors["numpy"].numpy().astype(np.uint32)
            np.random.set_state((kind, keys, position, has_gauss, cached))
            torch.set_rng_state(tensors["torch"])
            if "cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["cuda"])


def _random_state() -> tuple[Tensors, dict[str, Any]]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    settings = {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}
    return tensors, settings


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it


def _write(path: Path, tensors: Tensors, settings: Any = None) -> None:
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, path, {"settings": json.dumps(settings)})


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[tuple[Tensors, Any]]:
    """A file's tensors and settings; any error while using them is blamed on the file."""
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield tensors, settings
    except (
        OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise ValueError(f"Cannot resume from {path}: {reason[:300]}") from error
