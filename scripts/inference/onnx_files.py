"""Exports a checkpoint to ONNX and compares it with PyTorch: logits, accuracy, speed."""

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForAudioClassification

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification, ASTFrameConfig
from modeling_ast.export_ast import export_onnx, import_optional
from modeling_ast.onnx_ast import OnnxModel

from ..common.checkpoints import resolve_checkpoint
from ..common.timing import measure, report
from ..data.labelled import open_labelled_audio
from .options import ExportOptions
from .web import write_web

TOLERANCE = 1e-4  # of the logits in fp32
COMPARED_SECONDS = (0.1, 0.5, 2.0, 5.0, 10.0, 20.0)


class Measured(NamedTuple):
    """What `check` measured for each case: "PyTorch", "ONNX fp32" …"""

    accuracy: dict[str, float]  # per cent
    seconds_per_clip: dict[str, float]  # in the fastest pass


def export_and_check(options: ExportOptions) -> None:
    """Write the files, compare each with PyTorch, and optionally measure accuracy and speed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(package)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = resolve_checkpoint(options.checkpoint)
    # Our classifier or detector, whatever code comes with the folder.
    model = AutoModelForAudioClassification.from_pretrained(
        checkpoint, trust_remote_code=False
    ).eval()
    if model.config.model_type == ASTFrameConfig.model_type and (options.check or options.web):
        raise ValueError(
            f"{options.checkpoint} is a detector: --check and --web are for classifiers."
        )
    extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
    # The exporter speaks of what the next versions will lack.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.web is not None:
        _write_page(model, extractor, options)
        return
    print(f"Exporting {', '.join(options.variants)}: this takes a minute or more.", flush=True)
    files = export_onnx(model, extractor, options.output, options.variants)
    print(f"{'file':40}{'MB':>8}   largest logit difference to PyTorch, 0.1 s to 20 s")
    for variant, file in files.items():
        difference = largest_difference(OnnxModel(file), model, extractor)
        print(f"{file!s:40}{file.stat().st_size / 1e6:8.1f}   {difference:.1e}")
        if variant in ("fp32", "spectrogram") and difference > TOLERANCE:
            raise ValueError(
                f"{file} differs from PyTorch by {difference:.1e}, more than {TOLERANCE:g}: do not "
                "use it, and please report this."
            )
    if options.check:
        check(files, model, extractor, options.check, options)


def _write_page(
    model: ASTForAudioClassification, extractor: ASTFeatureExtractor, options: ExportOptions
) -> None:
    assert options.web is not None
    print("Exporting the model for the page: this takes a minute or more.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(model, extractor, folder, ["int8"])["int8"]
        name = Path(options.checkpoint).resolve().name
        write_web(file, options.web, name, options.web_runtime)
    size = sum(path.stat().st_size for path in options.web.rglob("*") if path.is_file())
    print(
        f"Wrote {options.web}, {size / 1e6:.1f} MB. Any static host can serve it; to try it: "
        f"python -m http.server --bind 127.0.0.1 --directory {options.web}"
    )


@torch.no_grad()
def largest_difference(
    onnx_model: OnnxModel, model: ASTForAudioClassification, extractor: ASTFeatureExtractor
) -> float:
    """Largest difference between ONNX Runtime's and PyTorch's logits, on noise of all
    `COMPARED_SECONDS`."""
    random = np.random.default_rng(0)
    largest = 0.0
    for seconds in COMPARED_SECONDS:
        samples = random.standard_normal(int(seconds * extractor.sampling_rate))
        waveform = (0.1 * samples).astype(np.float32)
        features = features_of(extractor, waveform, model.config.patch_shape[1])
        expected = model(**features).logits
        inputs: dict[str, Any] = features
        if onnx_model.input_name == "waveform":
            inputs = {"input_values": torch.from_numpy(waveform)[None]}
        found = onnx_model(**inputs).logits
        largest = max(largest, float((found - expected).abs().max()))
    return largest


def features_of(extractor: ASTFeatureExtractor, waveform: np.ndarray, patch_size: int) -> Any:
    """A clip of any length, padded or masked as in the checkpoint's training."""
    return extractor(
        waveform,
        sampling_rate=extractor.sampling_rate,
        padding="max_length",
        max_length=patch_size if extractor.return_attention_mask else extractor.max_length,
        truncation=False,
        return_tensors="pt",
    )


@torch.no_grad()
def check(
    files: dict[str, Path],
    model: ASTForAudioClassification,
    extractor: ASTFeatureExtractor,
    dataset: str,
    options: ExportOptions,
) -> Measured:
    """Print and return accuracy and speed of the files, and of PyTorch, on labelled clips.

    Clips are classified one by one, from waveform to label, with the cases alternating.
    """
    data = open_labelled_audio(dataset, options)
    names = {label: index for index, label in model.config.id2label.items()}
    unknown = [name for name in data.label_names if name not in names]
    if unknown:
        raise ValueError(f"{dataset} has labels that the model lacks: {', '.join(unknown[:5])}.")
    longest = extractor.filterbank.num_samples(extractor.max_length)  # the model's length
    waveforms, labels = [], []
    for row in data.evaluation:
        waveforms.append(extractor.load_audio(row["audio"])[:longest])
        labels.append(names[data.label_names[row["label"]]])

    def run_onnx(onnx_model: OnnxModel) -> list[int]:
        return [
            int(onnx_model(torch.from_numpy(waveform)[None]).logits.argmax())
            for waveform in waveforms
        ]

    def run_pytorch() -> list[int]:
        features = (features_of(extractor, w, model.config.patch_shape[1]) for w in waveforms)
        return [int(model(**clip).logits.argmax()) for clip in features]

    cases: dict[str, Callable[[], object]] = {"PyTorch": run_pytorch}
    for variant, file in files.items():
        if variant != "spectrogram":
            cases[f"ONNX {variant}"] = partial(run_onnx, OnnxModel(file))
    accuracy = {
        name: 100 * float(np.mean(np.array(run()) == np.array(labels)))
        for name, run in cases.items()
    }
    seconds = measure(cases, options.repeats)
    report(
        f"{len(labels)} clips of {dataset}, one by one, from waveform to label",
        seconds,
        dict.fromkeys(cases, len(labels)),
        "clip",
        None,
        accuracy_in_percent={name: round(value, 2) for name, value in accuracy.items()},
    )
    fastest = {name: min(runs) for name, runs in seconds.items()}
    if {"ONNX fp32", "ONNX int8"} <= set(cases):
        drop = accuracy["ONNX fp32"] - accuracy["ONNX int8"]
        print(
            f"int8 vs fp32: accuracy drops by {drop:.2f} points, "
            f"{fastest['ONNX fp32'] / fastest['ONNX int8']:.2f} x as fast (fastest passes)"
        )
    return Measured(accuracy, {name: time / len(labels) for name, time in fastest.items()})
