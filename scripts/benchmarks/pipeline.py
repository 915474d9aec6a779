"""`ast-benchmark pipeline`: files to labels, the stock pipeline and ours."""

import functools
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import AudioClassificationPipeline, pipeline
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import load_audio

from ..common.timing import measure, report
from ..data.recordings import Recordings
from .conditions import on_threads
from .options import PipelineOptions


@on_threads
def benchmark_pipeline(options: PipelineOptions) -> None:
    """The stock pipeline and ours on the same files, with the same (random) weights.

    The stock pipeline decodes with the ffmpeg program; without it, it gets what `load_audio`
    decoded beforehand, and that time is not counted.
    """
    config = native.ASTConfig(
        **options.config_fields,
        num_labels=527,
        id2label={index: f"class {index}" for index in range(527)},
    )
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "checkpoint"
        torch.manual_seed(0)
        theirs = native.ASTForAudioClassification(config).eval()
        theirs.save_pretrained(checkpoint)
        extractor = native_features.ASTFeatureExtractor(max_length=options.max_length)
        extractor.save_pretrained(checkpoint)
        files = Recordings([options.folder or _made_up_clips(Path(name), options)]).files

        device = "cuda" if torch.cuda.is_available() else "cpu"
        ours = pipeline("audio-classification", model=str(checkpoint), device=device)
        masked = pipeline("audio-classification", model=str(checkpoint), device=device)
        masked.feature_extractor.return_attention_mask = True
        stock = AudioClassificationPipeline(
            model=theirs, feature_extractor=extractor, device=device
        )
        inputs: list = files
        stock_name = "stock pipeline, ffmpeg"
        if shutil.which("ffmpeg") is None:
            inputs = [load_audio(file) for file in files]
            stock_name = "stock pipeline, decoded beforehand"

        how = {"batch_size": options.batch_size, "top_k": 5}
        cases = {
            stock_name: lambda: stock(inputs, **how),
            "ours": lambda: ours(files, **how),
            "ours, padding masked": lambda: masked(files, **how),
        }
        seconds = measure(cases, options.repeats)
        hours = sum(len(load_audio(file)) for file in files) / 16000 / 3600
        # Decoded the same way, to compare the models and not the resamplers.
        arrays = [load_audio(file) for file in files[:8]]
        scores = [
            [{label["label"]: label["score"] for label in labels} for labels in classify(arrays)]
            for classify in (
                functools.partial(ours, top_k=None),
                functools.partial(stock, top_k=None),
            )
        ]
        difference = max(
            abs(found[label] - expected[label])
            for found, expected in zip(*scores, strict=True)
            for label in expected
        )
    report(
        f"{len(files)} files, {hours:.3f} h of sound, batches of {options.batch_size}, "
        f"width {options.hidden_size}, {options.num_hidden_layers} layers, "
        f"{options.max_length} frames",
        seconds,
        dict.fromkeys(cases, len(files)),
        "file",
        options.json,
        largest_score_difference=difference,
        hours_of_sound_per_hour={
            name: round(hours * 3600 / statistics.median(runs), 1) for name, runs in seconds.items()
        },
    )


def _made_up_clips(folder: Path, options: PipelineOptions) -> str:
    clips = folder / "clips"
    clips.mkdir()
    samples = round(options.clip_length_s * options.sampling_rate)
    random = np.random.default_rng(0)
    for number in range(options.clips):
        # Noise with a natural spectral tilt, so that it encodes like recordings.
        noise = np.cumsum(random.standard_normal(samples))
        noise -= np.linspace(noise[0], noise[-1], samples)
        noise *= 0.5 / np.abs(noise).max()
        soundfile.write(clips / f"{number:04d}.ogg", noise, options.sampling_rate, format="OGG")
    return str(clips)
