"""Exports AST to ONNX: one graph from waveform (or spectrogram) to probabilities.

    waveform        (B, samples)    at the extractor's rate, full scale is -1..1
    log-mel         (B, T, F)       the filterbank as one convolution and one matrix
    input_values    (B, T, F)       normalised, padded as the checkpoint was trained
    logits          (B, labels)
    probabilities   (B, labels)     sigmoid or softmax, as `config.problem_type` says

For a frame model, the last two are (B, columns, labels).

B, samples and T are free at run time. Each file's metadata tell its user:

    labels                  JSON list of the label names, in order
    sampling_rate           of the waveform, in Hz
    window_samples          length of the model's windows
    frame_shift             samples from one frame to the next: a shorter rest is no window
    config                  the checkpoint's config.json
    preprocessor_config     the checkpoint's preprocessor_config.json

`onnx_ast.py` runs these files. Writing them needs the packages onnx, onnxscript and, for int8,
onnxruntime: `pip install '.[export]'` in this project's folder.
"""

import contextlib
import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from feature_extraction import ASTFeatureExtractor

from .configuration_ast import ASTConfig
from .modeling_ast import ASTForAudioClassification
from .onnx_file_ast import import_optional
from .scores_ast import scores_from_logits

# What can be written, and the file names.
VARIANTS = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    "spectrogram": "model_spectrogram.onnx",
}


def export_onnx(
    model: ASTForAudioClassification,
    feature_extractor: ASTFeatureExtractor,
    folder: str | Path,
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Path]:
    """Write a model as ONNX files.

    Args:
        model: any AST classifier; it is not changed.
        feature_extractor: the checkpoint's. With `return_attention_mask` the model was trained
            without padding and gets clips unpadded; otherwise shorter clips are padded to
            `max_length` frames, as all published checkpoints expect.
        folder: where the files go; created if missing.
        variants: any of
            fp32: waveform in, float32;
            fp16: waveform in, weights and activations in half precision (filterbank, inputs and
                outputs stay in float32): half the size, for GPUs;
            int8: waveform in, matrices in 8 bits, activations quantised dynamically: a quarter of
                the size, and faster on CPUs;
            spectrogram: `input_values` (B, T, F) from `feature_extractor` in, float32.

    Returns:
        The files by variant. Inputs are `waveform` or `input_values`; outputs are `probabilities`
        and `logits` (for regression, `probabilities` are the logits).

    Raises:
        ValueError: for an unknown variant or a missing package.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"Unknown variant {variant!r}; expected {', '.join(VARIANTS)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {variant: folder / VARIANTS[variant] for variant in variants}
    metadata = _metadata(model.config, feature_extractor)
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")  # the plainest graph
    if "spectrogram" in files:
        _write_graph(SpectrogramClassifier(model), files["spectrogram"], metadata)
    if "fp32" in files:
        _write_graph(WaveformClassifier(model, feature_extractor), files["fp32"], metadata)
    if "int8" in files:
        source = files.get("fp32", folder / "unquantized.onnx")
        if "fp32" not in files:
            _write_graph(WaveformClassifier(model, feature_extractor), source, metadata)
        _quantize(source, files["int8"])
        if "fp32" not in files:
            source.unlink()
    if "fp16" in files:
        _write_graph(WaveformClassifier(model.half(), feature_extractor), files["fp16"], metadata)
    return files


class SpectrogramClassifier(nn.Module):
    """Spectrograms (B, T, F) -> probabilities (B, labels), logits (B, labels), float32."""

    def __init__(self, model: ASTForAudioClassification):
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_values).logits.float()
        return scores_from_logits(logits, self.model.config.problem_type), logits


class WaveformClassifier(nn.Module):
    """Waveforms (B, samples) -> probabilities (B, labels), logits (B, labels), float32.

    Feature extractor and model in one, in operations that every runtime has.
    """

    spectrum: Tensor
    mel_filters: Tensor
    bin_scale: Tensor
    bin_offset: Tensor

    def __init__(self, model: ASTForAudioClassification, feature_extractor: ASTFeatureExtractor):
        super().__init__()
        self.classifier = SpectrogramClassifier(model)
        self.filterbank = feature_extractor.filterbank
        spectrum, mel_filters = self.filterbank.matrices()
        # Kernels (out, in, width). Quantisation changes matrices; as a convolution, the mel filters
        # stay exact.
        self.register_buffer("spectrum", spectrum.T[:, None].contiguous())
        self.register_buffer("mel_filters", mel_filters.T[:, :, None].contiguous())
        self.removes_mean = feature_extractor.remove_mean
        self.mean, self.scale = 0.0, 1.0
        if feature_extractor.do_normalize:
            self.mean, self.scale = feature_extractor.mean, 2 * feature_extractor.std
        self.has_bins = feature_extractor.bin_scale is not None
        if self.has_bins:
            self.register_buffer("bin_scale", torch.tensor(feature_extractor.bin_scale))
            self.register_buffer("bin_offset", torch.tensor(feature_extractor.bin_offset))
        # A clip shorter than one patch: a model trained without padding sees silence there.
        self.is_masked = feature_extractor.return_attention_mask
        self.shortest = feature_extractor.max_length
        self.padding_value = feature_extractor.padding_value
        if self.is_masked:
            self.shortest = model.config.patch_shape[1]

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        bank = self.filterbank
        if self.removes_mean:
            waveform = waveform - waveform.mean(dim=1, keepdim=True)
        missing = torch.sym_max(bank.shortest - waveform.shape[1], 0)
        waveform = pad(waveform, (0, missing))[:, None]  # (B, 1, samples)
        if bank.center:
            if bank.preemphasis:
                waveform = waveform[..., 1:] - bank.preemphasis * waveform[..., :-1]
            waveform = pad(waveform, bank.reflected, mode="reflect")
        parts = conv1d(waveform, self.spectrum, stride=bank.frame_shift)
        real, imaginary = parts.chunk(2, dim=1)  # (B, FFT bins, T)
        mel = conv1d(real.square() + imaginary.square(), self.mel_filters)  # (B, F, T)
        log_mel = self._compress(mel).transpose(1, 2)
        if self.is_masked:
            return self.classifier(self._padded(self._normalize(log_mel), 0.0))
        return self.classifier(self._normalize(self._padded(log_mel, self.padding_value)))

    def _compress(self, mel: Tensor) -> Tensor:
        bank = self.filterbank
        if bank.compression == "log_offset":
            return (mel + bank.mel_floor).log()
        log_mel = mel.clamp(min=bank.mel_floor).log()
        if bank.compression == "log":
            return log_mel
        log_mel = log_mel * (10 / math.log(10))
        if bank.dynamic_range is None:
            return log_mel
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        return torch.maximum(log_mel, loudest - bank.dynamic_range)

    def _normalize(self, log_mel: Tensor) -> Tensor:
        if self.has_bins:
            return log_mel * self.bin_scale + self.bin_offset
        return (log_mel - self.mean) / self.scale

    def _padded(self, features: Tensor, value: float) -> Tensor:
        missing = torch.sym_max(self.shortest - features.shape[1], 0)
        return pad(features, (0, 0, 0, missing), value=value)


def _metadata(config: ASTConfig, feature_extractor: ASTFeatureExtractor) -> dict[str, str]:
    labels = [config.id2label[index] for index in range(config.num_labels)]
    return {
        "labels": json.dumps(labels, ensure_ascii=False),
        "sampling_rate": str(feature_extractor.sampling_rate),
        "window_samples": str(feature_extractor.filterbank.num_samples(config.max_length)),
        "frame_shift": str(feature_extractor.filterbank.frame_shift),
        "config": config.to_json_string(),
        "preprocessor_config": feature_extractor.to_json_string(),
    }


def _write_graph(classifier: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    for package in ("onnx", "onnxscript"):
        import_optional(package)
    batch = torch.export.Dim("batch", min=1)
    if isinstance(classifier, WaveformClassifier):
        name, example, axis = (
            "waveform",
            torch.zeros(2, 2 * classifier.filterbank.shortest),
            "samples",
        )
    else:
        config: Any = classifier.model.config  # type: ignore[union-attr]
        name, axis = "input_values", "frames"
        example = torch.zeros(2, config.max_length + 1, config.num_mel_bins)
    # The exporter tells of torchvision's operators, and of what torch's next version will lack.
    with torch.no_grad(), errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec")
        program: Any = torch.onnx.export(
            classifier.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes={name: {0: batch, 1: torch.export.Dim(axis, min=1)}},
            input_names=[name],
            output_names=["probabilities", "logits"],
        )
    program.model.metadata_props.update(metadata)
    program.save(path)


@contextlib.contextmanager
def errors_only(logger_name: str | None = None) -> Iterator[None]:
    """Let a library's logger, or the root logger, speak of errors only; afterwards as before."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _quantize(source: Path, target: Path) -> None:
    quantization = import_optional("onnxruntime.quantization")
    with errors_only():  # it recommends a step that this graph has had
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # 7 bits: products of 8 bits overflow in the instructions of CPUs without VNNI.
            reduce_range=True,
        )
