"""`ast-benchmark forward`, `lengths` and `cold`: the cost of running a model, ours and native."""

import copy
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor
from feature_extraction.fbank_ast import num_samples
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.export_ast import export_onnx
from modeling_ast.onnx_ast import OnnxModel

from ..common.timing import measure, report
from .conditions import on_threads, status_kib
from .options import ColdOptions, ForwardOptions, LengthsOptions, SizeOptions

_SECOND = 98  # frames in one second of sound: only whole ones count
_GEMM_SIZE = 2048


def _config(options: SizeOptions) -> ASTConfig:
    return ASTConfig(**options.config_fields, num_labels=527)


def _both_models(
    options: SizeOptions,
) -> tuple[torch.nn.Module, ASTForAudioClassification]:
    """Native's model and ours with the same random weights."""
    torch.manual_seed(0)
    ours = ASTForAudioClassification(_config(options)).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return native.ASTForAudioClassification.from_pretrained(folder).eval(), ours


@on_threads
@torch.inference_mode()
def benchmark_forward(options: ForwardOptions) -> None:
    """The same clips and weights through both models, float32, SDPA.

    Native has a fixed length: it gets every clip padded to `max_length`. Ours gets the clips sorted
    by length, each batch padded to its longest, with a mask. For reference, a third case measures
    what bounds both: how fast the machine multiplies matrices.
    """
    theirs, ours = _both_models(options)
    clips = options.clips or {"full": 1, "short": 8, "mixed": 32}[options.workload]
    generator = np.random.default_rng(0)
    lengths = {
        "full": [options.max_length] * clips,
        "short": [_SECOND] * clips,
        "mixed": sorted(int(100 * s) for s in generator.uniform(0.5, 10, clips)),
    }[options.workload]
    lengths = [min(length, options.max_length) for length in lengths]
    padded = torch.randn(clips, options.max_length, ours.config.num_mel_bins)
    starts = range(0, clips, options.batch_size)

    def run_native() -> None:
        for start in starts:
            theirs(padded[start : start + options.batch_size])

    # No mask if nothing is padded: that is exactly native's computation.
    batches: list[tuple[Tensor, Tensor | None]] = []
    for start in starts:
        part = torch.tensor(lengths[start : start + options.batch_size])
        spectrograms = padded[start : start + options.batch_size, : int(part.max())]
        mask = (torch.arange(int(part.max())) < part[:, None]).long()
        batches.append((spectrograms, None if mask.all() else mask))

    def run_ours() -> None:
        for spectrograms, mask in batches:
            ours(spectrograms, mask)

    square = torch.randn(_GEMM_SIZE, _GEMM_SIZE)
    cases: dict[str, Callable[[], object]] = {
        f"native, padded to {options.max_length} frames": run_native,
        "ours": run_ours,
    }
    if options.merged:
        config = copy.deepcopy(ours.config)
        config.merged_tokens_per_layer = options.merged
        merging = ASTForAudioClassification(config).eval()
        cases[f"ours, {options.merged} tokens merged per layer"] = lambda: [
            merging(spectrograms, mask) for spectrograms, mask in batches
        ]
    if options.int8:
        cases["ours, int8 with ONNX Runtime, features too"] = _int8_case(ours, batches)
    cases[f"matrix product of size {_GEMM_SIZE}"] = lambda: square @ square
    seconds = measure(cases, options.repeats)
    products = [2 * _GEMM_SIZE**3 / run / 1e9 for run in seconds.popitem()[1]]
    limit = float(np.median(products))
    work = sum(
        len(spectrograms) * multiplications(ours.config, spectrograms.shape[1])
        for spectrograms, _ in batches
    )
    rate = 2 * work / float(np.median(seconds["ours"])) / 1e9
    native_work = clips * multiplications(ours.config, options.max_length)
    least_work = sum(multiplications(ours.config, length) for length in lengths)
    report(
        f"{options.workload}: {clips} clips of {min(lengths)} to {max(lengths)} frames, width "
        f"{options.hidden_size}, {options.num_hidden_layers} layers",
        seconds,
        dict.fromkeys(seconds, clips),
        "clip",
        options.json,
        matrix_products_reach_GFLOP_per_s=round(limit, 1),
        ours_reaches_GFLOP_per_s=round(rate, 1),
        share_of_the_limit=round(rate / limit, 3),
        native_computes_times_as_much=round(native_work / work, 2),
        and_times_as_much_as_without_any_padding=round(native_work / least_work, 2),
    )


def _int8_case(
    model: ASTForAudioClassification, batches: list[tuple[Tensor, Tensor | None]]
) -> Callable[[], object]:
    """Noise as long as each batch's spectrograms, through the model's waveform-in int8 file.

    The filterbank in the file is a plain matrix product instead of `kaldi_fbank`'s FFT.
    """
    extractor = ASTFeatureExtractor(max_length=model.config.max_length, return_attention_mask=True)
    with tempfile.TemporaryDirectory() as folder:
        runtime = OnnxModel(export_onnx(model, extractor, folder, ["int8"])["int8"])
    waveforms: list[tuple[Tensor, Tensor | None]] = []
    for spectrograms, mask in batches:
        waveform = torch.randn(len(spectrograms), num_samples(spectrograms.shape[1])) / 10
        if mask is None:
            waveforms.append((waveform, None))
            continue
        samples = torch.tensor([num_samples(int(frames)) for frames in mask.sum(dim=1)])
        in_clip = torch.arange(waveform.shape[1]) < samples[:, None]
        waveforms.append((waveform, in_clip.long()))
    return lambda: [runtime(waveform, in_clip) for waveform, in_clip in waveforms]


def multiplications(config: ASTConfig, frames: int) -> int:
    """Multiply-adds of one clip's forward pass: patches, projections, attention, MLP."""
    rows, columns = config.grid_shape(frames, config.num_mel_bins)
    tokens, width = rows * columns + 2, config.hidden_size
    projections = 4 * width**2 + 2 * width * config.intermediate_size
    layer = tokens * projections + 2 * tokens**2 * width
    return config.num_hidden_layers * layer + rows * columns * config.patch_size**2 * width


@on_threads
@torch.inference_mode()
def benchmark_lengths(options: LengthsOptions) -> None:
    """One sound as a whole, with attention over all of it, and in windows of the model's length.

    Memory is what a separate process needs beyond its modules and weights.
    """
    model = ASTForAudioClassification(_config(options)).eval()
    cases: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    for length in options.seconds:
        for whole in (True, False):
            name = f"{length} s, {'whole' if whole else 'in windows'}"
            cases[name] = _long_sound(model, length, whole)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[name] = pool.apply(_length_memory_mib, (options, length, whole))
    seconds = measure(cases, options.repeats)
    report(
        f"sounds of {min(options.seconds)} to {max(options.seconds)} s, width "
        f"{options.hidden_size}, {options.num_hidden_layers} layers",
        seconds,
        dict.fromkeys(cases, 1),
        "sound",
        options.json,
        memory_in_MiB=memory,
    )
    if options.plot:
        best = {name: min(runs) for name, runs in seconds.items()}
        _plot_lengths(options.seconds, best, memory, options.plot)


def _long_sound(
    model: ASTForAudioClassification, seconds: int, whole: bool
) -> Callable[[], object]:
    spectrogram = torch.randn(1, seconds * 100 - 2, model.config.num_mel_bins)
    windows = [spectrogram] if whole else spectrogram.split(model.config.max_length, dim=1)
    # A rest shorter than a patch has no column.
    windows = [window for window in windows if window.shape[1] >= model.config.patch_size]

    @torch.inference_mode()
    def run() -> None:
        for window in windows:
            model(window)

    return run


def _length_memory_mib(options: LengthsOptions, seconds: int, whole: bool) -> int | None:
    if not Path("/proc/self/status").exists():
        return None
    run = _long_sound(ASTForAudioClassification(_config(options)).eval(), seconds, whole)
    before = status_kib("VmRSS")
    run()
    return round((status_kib("VmHWM") - before) / 1024)


def _plot_lengths(
    lengths: list[int], seconds: dict[str, float], memory: dict[str, int | None], path: Path
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values, title in (
        (axes[0], seconds, "time (s)"),
        (axes[1], memory, "memory (MiB)"),
    ):
        for kind in ("whole", "in windows"):
            axis.plot(lengths, [values[f"{length} s, {kind}"] for length in lengths], "o-",
                      label=kind)  # fmt: skip
        axis.set(xlabel="length of the sound (s)", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


_COLD = """
import sys
{imports}from transformers import pipeline
classifier = pipeline("audio-classification", model=sys.argv[1], device="cpu")
print(classifier({source}, top_k=1)[0]["label"])
"""
# A command, and its peak memory in KiB as the last line of stderr. The kernel's account of a child
# (`ru_maxrss`) begins with the memory of the process that started it.
_WITH_PEAK = """
import atexit, runpy, sys
@atexit.register
def tell():
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Without ffmpeg, the stock pipeline cannot read files: it gets what soundfile decodes.
_DECODED = '__import__("soundfile").read(sys.argv[2], dtype="float32")[0]'


@on_threads
def benchmark_cold(options: ColdOptions) -> None:
    """A new Python for each run: `pipeline(...)` on a 5 s WAV file at 16 kHz."""
    import shutil

    import soundfile

    from feature_extraction import ASTFeatureExtractor

    has_ffmpeg = shutil.which("ffmpeg") is not None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, sound = Path(folder) / "checkpoint", Path(folder) / "sound.wav"
        ASTForAudioClassification(_config(options)).save_pretrained(checkpoint)
        ASTFeatureExtractor(max_length=options.max_length).save_pretrained(checkpoint)
        waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 80_000).astype(np.float32)
        soundfile.write(sound, waveform, 16000)

        def run(imports: str, source: str) -> None:
            program = _COLD.format(imports=imports, source=source)
            command = [sys.executable, "-c", program, str(checkpoint), str(sound)]
            subprocess.run(command, check=True, capture_output=True)

        peak_mib: dict[str, int] = {}

        def classify(name: str, model: Path) -> None:
            package = __package__.rpartition(".")[0]
            words = [f"{package}.classify", str(sound), "--model", str(model)]
            done = subprocess.run(
                [sys.executable, "-c", _WITH_PEAK, *words],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} failed: {done.stderr}")
            peak_mib[name] = round(int(done.stderr.split()[-1]) / 1024)

        cases: dict[str, Callable[[], object]] = {
            "stock pipeline": lambda: run("", "sys.argv[2]" if has_ffmpeg else _DECODED),
            "ours": lambda: run("import modeling_ast\n", "sys.argv[2]"),
            "ast-classify": lambda: classify("ast-classify", checkpoint),
        }
        if options.onnx is not None:
            onnx_file = options.onnx
            cases["ast-classify, ONNX file"] = lambda: classify("ast-classify, ONNX", onnx_file)
        seconds = measure(cases, options.repeats)
    report(
        "first label in a new process",
        seconds,
        dict.fromkeys(cases, 1),
        "run",
        options.json,
        peak_memory_in_MiB=peak_mib,
        stock_pipeline_reads=("the file, by ffmpeg" if has_ffmpeg else "samples (no ffmpeg here)"),
    )
