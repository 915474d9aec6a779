"""Write an AST checkpoint as ONNX files that take a waveform and give probabilities.

    ast-export-onnx CHECKPOINT --output onnx/
    ast-export-onnx CHECKPOINT --output onnx/ --check DATASET --fold-column fold --fold 5

Every file is compared with PyTorch on sound from 0.1 s to 20 s. `--check` also measures accuracy
and speed on labelled clips: a dataset's split, one fold of it, or the fifth of it that
`ast-finetune-accelerate` holds out.
"""

import argparse
import logging as python_logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification
from modeling_ast.export_ast import VARIANTS, export_onnx, import_optional
from modeling_ast.onnx_ast import OnnxModel

from .benchmarks.timing import measure, report
from .common.arguments import run_command
from .data.labelled import open_labelled_audio
from .data.options import LabelledOptions

TOLERANCE = 1e-4  # of the logits in fp32
COMPARED_SECONDS = (0.1, 0.5, 2.0, 5.0, 10.0, 20.0)


@torch.no_grad()
def largest_difference(
    onnx_model: OnnxModel, model: ASTForAudioClassification, extractor: ASTFeatureExtractor
) -> float:
    """Between ONNX Runtime's and PyTorch's logits, over noise of all `COMPARED_SECONDS`."""
    random = np.random.default_rng(0)
    largest = 0.0
    for seconds in COMPARED_SECONDS:
        samples = random.standard_normal(int(seconds * extractor.sampling_rate))
        waveform = (0.1 * samples).astype(np.float32)
        features = features_of(extractor, waveform, model.config.patch_size)
        expected = model(**features).logits
        inputs: dict[str, Any] = features
        if onnx_model.input_name == "waveform":
            inputs = {"input_values": torch.from_numpy(waveform)[None]}
        found = onnx_model(**inputs).logits
        largest = max(largest, float((found - expected).abs().max()))
    return largest


def features_of(extractor: ASTFeatureExtractor, waveform: np.ndarray, patch_size: int) -> Any:
    """A clip of any length as the checkpoint was trained: padded, or masked."""
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
    repeats: int,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Print and return accuracy and speed of the files, and of PyTorch, on labelled clips.

    Clips are classified one by one, from waveform to label; the cases take turns.

    Returns:
        {"accuracy": {case: per cent}, "seconds_per_clip": {case: fastest pass}}.
    """
    data = open_labelled_audio(dataset, LabelledOptions(**options))
    names = {label: index for index, label in model.config.id2label.items()}
    unknown = [name for name in data.label_names if name not in names]
    if unknown:
        raise ValueError(f"{dataset} has labels that the model lacks: {', '.join(unknown[:5])}.")
    longest = extractor.max_length / 100 + 0.015  # the model's length in seconds
    rate = extractor.sampling_rate
    waveforms, labels = [], []
    for row in data.evaluation:
        waveforms.append(extractor.load_audio(row["audio"])[: int(longest * rate)])
        labels.append(names[data.label_names[row["label"]]])

    def run_onnx(onnx_model: OnnxModel) -> list[int]:
        return [
            int(onnx_model(torch.from_numpy(waveform)[None]).logits.argmax())
            for waveform in waveforms
        ]

    def run_pytorch() -> list[int]:
        features = (features_of(extractor, w, model.config.patch_size) for w in waveforms)
        return [int(model(**clip).logits.argmax()) for clip in features]

    cases: dict[str, Any] = {"PyTorch": run_pytorch}
    for variant, file in files.items():
        if variant != "spectrogram":
            cases[f"ONNX {variant}"] = partial(run_onnx, OnnxModel(file))
    accuracy = {
        name: 100 * float(np.mean(np.array(run()) == np.array(labels)))
        for name, run in cases.items()
    }
    seconds = measure(cases, repeats)
    report(
        f"{len(labels)} clips of {dataset}, one by one, from waveform to label",
        seconds,
        dict.fromkeys(cases, len(labels)),
        "clip",
        None,
        accuracy_in_percent={name: round(value, 2) for name, value in accuracy.items()},
    )
    if {"ONNX fp32", "ONNX int8"} <= set(cases):
        drop = accuracy["ONNX fp32"] - accuracy["ONNX int8"]
        fastest = {name: min(runs) for name, runs in seconds.items()}
        print(
            f"int8 against fp32: accuracy drops by {drop:.2f} points, "
            f"{fastest['ONNX fp32'] / fastest['ONNX int8']:.2f} x as fast (fastest passes)"
        )
    return {
        "accuracy": accuracy,
        "seconds_per_clip": {name: min(runs) / len(labels) for name, runs in seconds.items()},
    }


def export(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="ast-export-onnx", description="Write an AST checkpoint as ONNX files."
    )
    parser.add_argument("checkpoint", help="checkpoint folder or Hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument(
        "--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="default: all"
    )
    checks = parser.add_argument_group("accuracy and speed on labelled clips")
    checks.add_argument("--check", metavar="DATASET", help="a dataset as ast-finetune takes it")
    checks.add_argument("--split", help="its split for evaluation")
    checks.add_argument("--fold-column", help="or: its column with the fold")
    checks.add_argument("--fold", help="the fold for evaluation")
    checks.add_argument("--audio-column", default="audio", help="(%(default)s)")
    checks.add_argument("--label-column", default="label", help="(%(default)s)")
    checks.add_argument("--repeats", type=int, default=3, help="timed passes (%(default)s)")
    checks.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    args = parser.parse_args(argv)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(package)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.checkpoint.startswith((".", "/", "~")) and not Path(args.checkpoint).is_dir():
        raise ValueError(f"No such checkpoint folder: {args.checkpoint}")

    model = ASTForAudioClassification.from_pretrained(args.checkpoint).eval()
    extractor = ASTFeatureExtractor.from_pretrained(args.checkpoint)
    # The exporter tells of operators that this graph has none of.
    warnings.filterwarnings("ignore", category=FutureWarning)
    python_logging.getLogger("torch.onnx").setLevel(python_logging.ERROR)
    print(f"Exporting {', '.join(args.variants)}: this takes a minute or more.", flush=True)
    files = export_onnx(model, extractor, args.output, args.variants)
    print(f"{'file':40}{'MB':>8}   largest difference of a logit to PyTorch's, 0.1 s to 20 s")
    for variant, file in files.items():
        difference = largest_difference(OnnxModel(file), model, extractor)
        print(f"{file!s:40}{file.stat().st_size / 1e6:8.1f}   {difference:.1e}")
        if variant in ("fp32", "spectrogram") and difference > TOLERANCE:
            raise ValueError(
                f"{file} differs from PyTorch by {difference:.1e}, more than {TOLERANCE:g}: do not "
                "use it, and please report this."
            )
    if args.check:
        columns = {"audio_column": args.audio_column, "label_column": args.label_column}
        part = {
            "evaluation_split": args.split,
            "fold_column": args.fold_column,
            "evaluation_fold": args.fold,
        }
        check(files, model, extractor, args.check, args.repeats, **columns, **part)


def main() -> None:
    logging.disable_progress_bar()
    run_command("ast-export-onnx", export)


if __name__ == "__main__":
    main()
