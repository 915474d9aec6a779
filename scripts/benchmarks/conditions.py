"""What several benchmarks need: the number of threads, the memory, native AST's config."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from transformers.models.audio_spectrogram_transformer import (
    configuration_audio_spectrogram_transformer as native,
)

from modeling_ast import ASTConfig


class _HasThreads(Protocol):
    threads: int | None


O = TypeVar("O", bound=_HasThreads)  # noqa: E741


def on_threads(run: Callable[[O], None]) -> Callable[[O], None]:
    """A benchmark with the number of CPU threads in its options."""

    @functools.wraps(run)
    def run_on_threads(options: O) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run(options)

    return run_on_threads


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def native_config(config: ASTConfig) -> native.ASTConfig:
    """The same config for native AST, which ignores our own fields."""
    return native.ASTConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
