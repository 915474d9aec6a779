"""Speed of the parts, ours against what people use today, measured in one run.

    ast-benchmark features --json features.json
    ast-benchmark forward --workload mixed
    ast-benchmark lengths --plot lengths.png
    ast-benchmark cold
    ast-benchmark pipeline --clip_length_s 5 --hidden_size 192 --max_length 512
    ast-benchmark train
    ast-benchmark merging CHECKPOINT DATASET --plot merging.png

Cases alternate after a warm-up, so that a machine that gets busier slows all of them alike; the
table gives medians, the spread, and how many times faster each is than the first case.
"""

import argparse
import functools
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable
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

from feature_extraction import ASTFeatureExtractor, kaldi_fbank, load_audio
from modeling_ast import ASTConfig, ASTForAudioClassification

from .benchmarks.inference import add_cold, add_forward, add_lengths
from .benchmarks.timing import add_common_arguments, measure, native_config, report, status_kib
from .benchmarks.training import add_accuracy
from .common.arguments import run_command
from .data.batches import Collator
from .data.recordings import Recordings
from .data.sources import open_stream


def benchmark(arguments: list[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        prog="ast-benchmark", description="Speed of the parts, ours against what people use today."
    )
    subparsers = parser.add_subparsers(dest="benchmark", required=True)
    # A new benchmark: one function that adds its parser and sets `run`.
    for add_parser in (
        _add_features,
        add_forward,
        add_lengths,
        add_cold,
        _add_pipeline,
        _add_train,
        add_accuracy,
        _add_merging,
    ):
        add_parser(subparsers)
    options = parser.parse_args(arguments)
    if getattr(options, "repeats", 1) < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.run(options)


def main() -> None:
    run_command("ast-benchmark", benchmark)


def _add_features(subparsers) -> None:
    parser = subparsers.add_parser(
        "features", help="waveforms to input_values: ours, native's extractor, torchaudio"
    )
    parser.add_argument("--clips", type=int, default=8, help="clips in a batch")
    parser.add_argument("--gpu_clips", type=int, default=256, help="clips in a batch on a GPU")
    parser.add_argument("--clip_length_s", type=float, default=10.0)
    add_common_arguments(parser, repeats=15)
    parser.set_defaults(run=benchmark_features)


def benchmark_features(options: argparse.Namespace) -> None:
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
        print("torchaudio is not installed: native uses its numpy code, and no torchaudio case.")
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


def _add_pipeline(subparsers) -> None:
    parser = subparsers.add_parser(
        "pipeline", help='files to labels: pipeline("audio-classification"), stock and ours'
    )
    parser.add_argument("--folder", help="sounds to classify; default: made-up Ogg Vorbis clips")
    parser.add_argument("--clips", type=int, default=200, help="made-up clips")
    parser.add_argument("--clip_length_s", type=float, default=5.0)
    parser.add_argument("--sampling_rate", type=int, default=44100, help="of the made-up clips, Hz")
    parser.add_argument("--batch_size", type=int, default=8, help="clips in a batch, everywhere")
    parser.add_argument("--max_length", type=int, default=512, help="the model's, in frames")
    parser.add_argument("--hidden_size", type=int, default=192, help="64 per attention head")
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    add_common_arguments(parser, repeats=3)
    parser.set_defaults(run=benchmark_pipeline)


def benchmark_pipeline(options: argparse.Namespace) -> None:
    """The stock pipeline and ours on the same files, with the same (random) weights.

    The stock pipeline decodes with the ffmpeg program; where there is none it is given what
    `load_audio` decoded beforehand, whose time is not counted.
    """
    config = native.ASTConfig(
        hidden_size=options.hidden_size,
        num_attention_heads=max(options.hidden_size // 64, 1),
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        max_length=options.max_length,
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
        # Decoded alike, so that the models are compared and not the resamplers.
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


def _made_up_clips(folder: Path, options: argparse.Namespace) -> str:
    clips = folder / "clips"
    clips.mkdir()
    samples = round(options.clip_length_s * options.sampling_rate)
    random = np.random.default_rng(0)
    for number in range(options.clips):
        # Noise of a natural tilt, so that it encodes as recordings do.
        noise = np.cumsum(random.standard_normal(samples))
        noise -= np.linspace(noise[0], noise[-1], samples)
        noise *= 0.5 / np.abs(noise).max()
        soundfile.write(clips / f"{number:04d}.ogg", noise, options.sampling_rate, format="OGG")
    return str(clips)


def _add_train(subparsers) -> None:
    parser = subparsers.add_parser(
        "train", help="a training step: native AST, ours, ours with PaSST's patchout"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="clips in a step")
    parser.add_argument("--max_length", type=int, default=1024, help="frames of 10 ms in a clip")
    parser.add_argument("--hidden_size", type=int, default=192, help="64 per attention head")
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--time_patchout", type=int, default=40, help="columns dropped")
    parser.add_argument("--frequency_patchout", type=int, default=4, help="rows dropped")
    add_common_arguments(parser, repeats=5)
    parser.set_defaults(run=benchmark_train)


def benchmark_train(options: argparse.Namespace) -> None:
    """Time and peak memory of a step: forward, loss, backward and Adam, in float32.

    Times are taken in turns. Memory is that of a process of its own for each case: the highest
    resident size during two steps, above what Python and its modules take.
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


def _training_step(case: int, options: argparse.Namespace) -> Callable[[], object]:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=options.hidden_size,
        num_attention_heads=max(options.hidden_size // 64, 1),
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        max_length=options.max_length,
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


def _peak_memory_mib(case: int, options: argparse.Namespace) -> int | None:
    """MiB that two steps add to a fresh process; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    before = status_kib("VmRSS")
    step = _training_step(case, options)
    step()
    step()
    return round((status_kib("VmHWM") - before) / 1024)


def _add_merging(subparsers) -> None:
    parser = subparsers.add_parser(
        "merging", help="token merging: speed against accuracy on a dataset"
    )
    parser.add_argument("checkpoint", help="a fine-tuned model's folder or Hub name")
    parser.add_argument("dataset", help="labelled clips it was not trained on, as in ast-finetune")
    parser.add_argument("--split", default="train", help="the dataset's split")
    parser.add_argument("--merged", type=int, nargs="+", default=[0, 4, 8, 12, 16, 20])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="also draw accuracy against speed, to a PNG")
    add_common_arguments(parser, repeats=3)
    parser.set_defaults(run=benchmark_merging)


@torch.no_grad()
def benchmark_merging(options: argparse.Namespace) -> None:
    """Accuracy and time of a pass over all clips for each number of tokens merged per layer."""
    model = ASTForAudioClassification.from_pretrained(options.checkpoint).eval()
    extractor = ASTFeatureExtractor.from_pretrained(options.checkpoint)
    collate = Collator(extractor, model.config.num_labels)
    rows = list(open_stream(options.dataset, options.split))
    for row in rows:
        if isinstance(row["label"], str):
            row["label"] = model.config.label2id[row["label"]]
    batches = [
        collate(rows[start : start + options.batch_size])
        for start in range(0, len(rows), options.batch_size)
    ]

    def run(merged: int) -> float:
        model.config.merged_tokens_per_layer = merged
        correct = 0
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            correct += int((model(**inputs).logits.argmax(-1) == batch["labels"]).sum())
        return 100 * correct / len(rows)

    accuracy = {f"{merged} tokens merged per layer": run(merged) for merged in options.merged}
    seconds = measure(
        {
            name: functools.partial(run, merged)
            for name, merged in zip(accuracy, options.merged, strict=True)
        },
        options.repeats,
    )
    _, frames, mel_bins = batches[0]["input_values"].shape
    grid = model.config.grid_shape(frames, mel_bins)
    report(
        f"{len(rows)} clips of {frames} frames, {grid[0]} x {grid[1]} patches, "
        f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}",
        seconds,
        dict.fromkeys(accuracy, len(rows)),
        "clip",
        options.json,
        accuracy_in_percent=accuracy,
    )
    if options.plot:
        # The fastest run: other work on the machine only ever slows one down.
        speed = [len(rows) / min(runs) for runs in seconds.values()]
        _plot_merging(options.merged, speed, list(accuracy.values()), options.plot)


def _plot_merging(merged: list[int], speed: list[float], accuracy: list[float], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(speed, accuracy, "o")
    for count, x, y in zip(merged, speed, accuracy, strict=True):
        axis.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, 6))
    axis.set(xlabel="clips per second", ylabel="accuracy (%)", title="tokens merged per layer")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
