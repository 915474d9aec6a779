"""`ast-benchmark speed`: ways to run a checkpoint on this CPU, their speed and what they lose."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification
from modeling_ast.export_ast import errors_only, import_optional
from modeling_ast.onnx_file_ast import OnnxFile
from modeling_ast.speed_ast import (
    cache_folder,
    choose,
    files_in,
    lost_points,
    made_up_sound,
    processor,
    products_saturate,
    record_loss,
)

from ..common.checkpoints import resolve_checkpoint
from ..common.timing import measure, report
from ..data.labelled import open_labelled_audio
from .conditions import on_threads
from .options import SpeedOptions

_CALIBRATION = 16  # made-up sounds


@on_threads
@torch.inference_mode()
def benchmark_speed(options: SpeedOptions) -> None:
    """Accuracy on labelled clips and time for a clip, waveform to scores, one by one.

    What the ways that `--speed` chooses from lose is kept for it.
    """
    checkpoint = resolve_checkpoint(options.checkpoint)
    choose(checkpoint, "fast")  # exports the files
    folder = cache_folder(checkpoint)
    model = ASTForAudioClassification.from_pretrained(checkpoint).eval()
    extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
    clips, labels = _clips(model, extractor, options)
    with tempfile.TemporaryDirectory() as temporary:
        ways = _ways(model, extractor, folder, Path(temporary), options)
        accuracy, scores, best = {}, {}, {}
        for name, run in ways.items():
            answers = np.stack([run(clip) for clip in clips])
            best[name] = answers.argmax(axis=1)
            accuracy[name] = 100 * float((best[name] == labels).mean())
            scores[name] = [
                {str(label): odds for label, odds in enumerate(row)}
                for row in _odds(answers).tolist()
            ]
        cases: dict[str, Callable[[], object]] = {
            name: partial(_run_all, run, clips[: options.timed]) for name, run in ways.items()
        }
        seconds = measure(cases, options.repeats)
    exact = next(iter(ways))
    what = f"{len(clips)} clips of {Path(options.dataset).name or options.dataset}"
    report(
        f"{what}; {processor()}",
        seconds,
        dict.fromkeys(cases, min(options.timed, len(clips))),
        "clip",
        options.json,
        accuracy_in_percent={name: round(value, 2) for name, value in accuracy.items()},
        points_lost={name: round(accuracy[exact] - value, 2) for name, value in accuracy.items()},
        other_best_label_in_percent={
            name: round(100 * float(np.mean(best[name] != best[exact])), 2) for name in ways
        },
        points_lost_as_estimated={
            name: round(lost_points(scores[exact], of_way), 2) for name, of_way in scores.items()
        },
        products_of_8_bits_overflow_here=products_saturate(),
        medians_in_ms={
            name: round(1000 * statistics.median(runs) / min(options.timed, len(clips)), 1)
            for name, runs in seconds.items()
        },
    )
    lost = {
        way: accuracy[exact] - accuracy[name] for way, name in _NAMES.items() if name in accuracy
    }
    record_loss(checkpoint, lost, what)


_NAMES = {
    "onnx": "ONNX Runtime, float32",
    "int8": "ONNX Runtime, dynamic, 7-bit weights",
    "merged": "ONNX Runtime, the same, merged tokens",
}


def _clips(
    model: ASTForAudioClassification, extractor: ASTFeatureExtractor, options: SpeedOptions
) -> tuple[list[np.ndarray], np.ndarray]:
    """Waveforms of up to the model's length, and indices of their labels."""
    data = open_labelled_audio(options.dataset, options)
    names = {label: index for index, label in model.config.id2label.items()}
    longest = extractor.filterbank.num_samples(extractor.max_length)
    clips: list[np.ndarray] = []
    labels: list[int] = []
    for row in data.evaluation:
        name = data.label_names[row["label"]]
        if name not in names:
            raise ValueError(f"{options.dataset} has the label {name!r}, which the model lacks.")
        clips.append(extractor.load_audio(row["audio"])[:longest])
        labels.append(names[name])
        if len(clips) == options.clips:
            break
    return clips, np.array(labels)


def _run_all(run: Callable[[np.ndarray], np.ndarray], clips: list[np.ndarray]) -> None:
    for clip in clips:
        run(clip)


def _odds(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return odds


def _ways(
    model: ASTForAudioClassification,
    extractor: ASTFeatureExtractor,
    folder: Path,
    temporary: Path,
    options: SpeedOptions,
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Waveform (samples,) -> logits (labels,), by name; the first one is exact."""
    threads = torch.get_num_threads()
    padded = 0 if extractor.return_attention_mask else extractor.max_length

    def features(clip: np.ndarray) -> Any:
        return extractor(
            clip,
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            max_length=max(padded, model.config.patch_shape[1]),
            truncation=False,
            return_tensors="pt",
        )

    def exact(clip: np.ndarray) -> np.ndarray:
        logits: np.ndarray = model(**features(clip)).logits[0].numpy()
        return logits

    def of_file(path: Path) -> Callable[[np.ndarray], np.ndarray]:
        file = OnnxFile(path, threads)
        return lambda clip: file.run(clip[None].astype(np.float32))[0]

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"PyTorch": exact}
    if "compile" in options.ways:
        compiled = torch.compile(model)
        ways["PyTorch, torch.compile"] = lambda clip: compiled(**features(clip)).logits[0].numpy()
    ways.update((_NAMES[way], of_file(path)) for way, path in files_in(folder).items())
    for name, path in _quantised(folder / "model.onnx", temporary, extractor, options):
        ways[name] = of_file(path)
    if "openvino" in options.ways and importlib.util.find_spec("openvino"):
        import openvino

        for name, file in (("float32", "model.onnx"), ("8-bit file", "model_int8.onnx")):
            settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            network = openvino.Core().compile_model(str(folder / file), "CPU", settings)
            ways[f"OpenVINO, {name}"] = partial(_of_network, network)
    return ways


def _of_network(network: Any, clip: np.ndarray) -> np.ndarray:
    logits: np.ndarray = network({"waveform": clip[None].astype(np.float32)})["logits"][0]
    return logits


def _quantised(
    source: Path, temporary: Path, extractor: ASTFeatureExtractor, options: SpeedOptions
) -> Iterator[tuple[str, Path]]:
    quantization: Any = import_optional("onnxruntime.quantization")
    kinds = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
    if "dynamic8" in options.ways:
        path = temporary / "dynamic8.onnx"
        with errors_only():
            quantization.quantize_dynamic(source, path, **kinds)
        yield "ONNX Runtime, dynamic, 8-bit weights", path
    if "static" in options.ways:
        samples = extractor.filterbank.num_samples(extractor.max_length)

        class Sounds(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
            left = iter(range(_CALIBRATION))

            def get_next(self) -> dict[str, np.ndarray] | None:
                seed = next(self.left, None)
                return None if seed is None else {"waveform": made_up_sound(samples, seed)[None]}

        path = temporary / "static.onnx"
        with errors_only():
            quantization.quantize_static(source, path, Sounds(), **kinds)
        yield "ONNX Runtime, static, 8 bits", path
