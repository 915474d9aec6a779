"""`ast-benchmark features`: waveforms to input_values, ours, native's extractor, torchaudio."""

from collections.abc import Callable

import numpy as np
import torch
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)

from feature_extraction import ASTFeatureExtractor, kaldi_fbank

from ..common.timing import measure, report
from .conditions import on_threads
from .options import FeaturesOptions


@on_threads
def benchmark_features(options: FeaturesOptions) -> None:
    """Our extractor against native's and, where importable, torchaudio's filterbank alone."""
    rate = 16000
    generator = np.random.default_rng(0)
    samples = int(options.clip_length_s * rate)
    clips = list(generator.uniform(-0.5, 0.5, (options.clips, samples)).astype(np.float32))
    ours, theirs = ASTFeatureExtractor(), native_features.ASTFeatureExtractor()

    cases: dict[str, Callable[[], object]] = {
        "native ASTFeatureExtractor": lambda: theirs(clips, rate, return_tensors="pt"),
        "ours": lambda: ours(clips, rate, return_tensors="pt"),
        "ours, filterbank alone": lambda: kaldi_fbank(torch.from_numpy(np.stack(clips)), rate),
    }
    if native_features.is_speech_available():
        import torchaudio.compliance.kaldi as torchaudio_kaldi

        cases["torchaudio filterbank, clip by clip"] = lambda: [
            torchaudio_kaldi.fbank(
                torch.from_numpy(clip)[None], window_type="hanning", num_mel_bins=128
            )
            for clip in clips
        ]
    else:
        print("Without torchaudio: native uses its numpy code, and there is no torchaudio case.")
    units = dict.fromkeys(cases, options.clips)

    extra = {}
    if torch.cuda.is_available():
        batch = torch.from_numpy(
            generator.uniform(-0.5, 0.5, (options.gpu_clips, samples)).astype(np.float32)
        ).cuda()
        name = f"ours on the GPU, {options.gpu_clips} clips"
        cases[name] = lambda: ours(batch, rate, return_tensors="pt")
        units[name] = options.gpu_clips
        on_cpu = ours(batch[:8].cpu(), rate, return_tensors="pt")["input_values"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        on_gpu = ours(batch, rate, return_tensors="pt")["input_values"]
        size = on_gpu.numel() * on_gpu.element_size()
        peak = torch.cuda.max_memory_allocated() - before - size
        extra["gpu_extra_memory_in_outputs"] = round(peak / size, 2)
        extra["largest_cpu_gpu_difference"] = float((on_gpu[:8].cpu() - on_cpu).abs().max())

    seconds = measure(cases, options.repeats)
    title = f"{options.clips} clips of {options.clip_length_s:g} s"
    report(title, seconds, units, "clip", options.json, **extra)
