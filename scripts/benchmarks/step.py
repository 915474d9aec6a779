"""`ast-benchmark train`: a training step, native AST, ours, ours with PaSST's patchout."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from modeling_ast import ASTConfig, ASTForAudioClassification

from ..common.timing import measure, report
from .conditions import native_config, on_threads, status_kib
from .options import TrainOptions


@on_threads
def benchmark_train(options: TrainOptions) -> None:
    """Time and peak memory of a step: forward, loss, backward and Adam, in float32.

    Cases are timed in turn. For memory, each case has its own process: the highest resident size
    during two steps, beyond what Python and its modules take.
    """
    names = [
        "native AST",
        "ours, no patchout",
        f"ours, patchout {options.frequency_patchout} rows {options.time_patchout} columns",
    ]
    memory: dict[str, int | None] = {}
    for index, name in enumerate(names):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(_peak_memory_mib, (index, options))
    cases = {name: _training_step(index, options) for index, name in enumerate(names)}
    seconds = measure(cases, options.repeats)
    title = (
        f"training step of {options.batch_size} clips of {options.max_length} frames, "
        f"width {options.hidden_size}, {options.num_hidden_layers} layers"
    )
    report(
        title,
        seconds,
        dict.fromkeys(cases, 1),
        "step",
        options.json,
        peak_memory_in_MiB=memory,
    )


def _training_step(case: int, options: TrainOptions) -> Callable[[], object]:
    torch.manual_seed(0)
    config = ASTConfig(
        **options.config_fields,
        time_patchout=options.time_patchout if case == 2 else 0,
        frequency_patchout=options.frequency_patchout if case == 2 else 0,
        num_labels=10,
    )
    model: torch.nn.Module
    if case == 0:
        model = native.ASTForAudioClassification(native_config(config))
    else:
        model = ASTForAudioClassification(config)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    spectrograms = torch.randn(options.batch_size, options.max_length, config.num_mel_bins)
    labels = torch.arange(options.batch_size) % 10

    def step() -> None:
        model(spectrograms, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak_memory_mib(case: int, options: TrainOptions) -> int | None:
    """MiB that two steps add to a fresh process; None if the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    before = status_kib("VmRSS")
    step = _training_step(case, options)
    step()
    step()
    return round((status_kib("VmHWM") - before) / 1024)
