"""`ast-benchmark descendants`: AST's and its descendants' published checkpoints, from sound on."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification

from ..common.bundled import hub_configs_folder
from ..common.timing import report
from .conditions import status_kib
from .options import DescendantsOptions


def benchmark_descendants(options: DescendantsOptions) -> None:
    """CPU time and peak memory from a waveform to logits, in float32, with random weights.

    Seconds of sound per second of CPU time equal hours of sound per core-hour. Each model runs in
    its own process; memory is what the model and a clip add to it.
    """
    for name in options.models:
        if not (hub_configs_folder() / name / "config.json").is_file():
            raise ValueError(f"{name} is not a folder in hub_configs.")
    if sys.platform != "linux":
        raise ValueError("Peak memory is read as Linux tells it; this system is another.")
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    torch.set_num_threads(options.threads or 1)
    for name in options.models:
        # An executor: a Pool would wait forever for a process that was killed for its memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
            seconds[name], memory[name] = executor.submit(_measure, name, options).result()
    report(
        f"CPU time for clips of {options.clip_length_s:g} s, one at a time, waveform to logits",
        seconds,
        dict.fromkeys(seconds, options.clip_length_s),
        "second",
        options.json,
        peak_memory_in_MiB=memory,
    )


def _measure(name: str, options: DescendantsOptions) -> tuple[list[float], int]:
    """Seconds of CPU time per clip, MiB."""
    before = status_kib("VmRSS")
    torch.manual_seed(0)
    folder = hub_configs_folder() / name
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    model = ASTForAudioClassification(ASTConfig.from_pretrained(folder)).eval()
    rate = extractor.sampling_rate
    waveform = torch.randn(round(options.clip_length_s * rate)) / 10
    padding = "longest" if extractor.return_attention_mask else "max_length"
    seconds = []
    for _ in range(1 + options.repeats):
        start = time.process_time()
        with torch.inference_mode():
            model(**extractor(waveform, rate, padding=padding, return_tensors="pt"))
        seconds.append(time.process_time() - start)
    return seconds[1:], round((status_kib("VmHWM") - before) / 1024)  # the first warms up
