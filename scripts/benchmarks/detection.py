"""`ast-benchmark detection`: a frame model and a window classifier with `find_events`, compared.

    labelled clips with folds -> soundscapes  -> frame model    strong labels of columns
                                 the same     -> window model   labels of windows cut out of them
    held-out fold             -> PSDS, event F1, segment F1, clip mAP, onsets, of both

With `--trained head` the encoder is frozen, see `detection_heads`. Else both are fine-tuned:

Both start from the same checkpoint and learn from the same recordings, in equally many steps with
equally many windows. A window gets the labels of events that it contains at least half of, or half
a second.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, List, Value

from feature_extraction import ASTFeatureExtractor, load_audio
from modeling_ast import ASTConfig

from ..common.checkpoints import resolve_checkpoint
from ..common.timing import machine
from ..data.annotated import open_annotated_audio
from ..data.batches import Collator
from ..data.mixtures import mix_clips
from ..data.options import MixOptions
from ..evaluation.detection import DETECTION_METRICS, draw_onset_errors
from ..evaluation.options import EvaluateOptions
from ..evaluation.scoring import evaluate_checkpoints
from ..training.options import FinetuneOptions
from ..training.run_folder import finished_result
from ..training.with_accelerate import finetune
from .cached import claim_folder
from .conditions import on_threads
from .detection_heads import POOLING, compare_heads, labels_of_window
from .options import DetectionOptions

_FOLDS: dict[str, Any] = {"fold_column": "fold", "label_column": "labels"}


@on_threads
def benchmark_detection(options: DetectionOptions) -> None:
    """Train whatever is not yet trained in `--output`, and measure both."""
    scenes = options.output / "soundscapes"
    settings: dict[str, Any] = {
        "dataset": options.dataset,
        "soundscape_s": options.soundscape_s,
        "mixtures_per_fold": options.mixtures_per_fold,
        "max_clips": options.max_clips,
        "seed": options.seed,
    }
    claim_folder(scenes, settings)
    if not (scenes / "events.csv").is_file():
        mix_clips(MixOptions(output=str(scenes), **settings))
    folds: dict[str, dict[str, Any]] = {}
    if options.trained == "head":
        folds[f"{', '.join(options.evaluation_folds)} in turn"] = compare_heads(options, scenes)
    for fold in options.evaluation_folds if options.trained == "all" else ():
        of_fold = folds.setdefault(fold, {})
        for kind in options.models:
            seconds = _train(kind, options, fold, scenes)
            of_fold[kind] = {**_measure(kind, options, fold, scenes), "training_s": seconds}
    _print(folds, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "folds": folds}, indent=2))
    if options.plot:
        draw_onset_errors(_onset_errors(folds), options.plot)


def _train(kind: str, options: DetectionOptions, fold: str, scenes: Path) -> float:
    """Train a model, or resume an earlier run; returns the seconds it took.

    Raises:
        ValueError: if the folder holds a run with other options.
    """
    folder = options.output / f"without_fold{fold}"
    run = folder / kind
    settings: dict[str, Any] = {
        "model": options.model,
        "learning_rate": options.learning_rate,
        "layer_decay": options.layer_decay,
        "frequency_patchout": options.frequency_patchout,
        "time_mask": 24,
        "frequency_mask": 16,
        "num_workers": 0,
        "seed": options.seed,
        "evaluation_fold": fold,
        "output": str(run),
        **_FOLDS,
    }
    if kind == "frames":
        wanted = FinetuneOptions(
            dataset=str(scenes),
            annotations=str(scenes / "events.csv"),
            num_epochs=options.num_epochs,
            windows_per_clip=options.windows_per_clip,
            batch_size=1,
            **settings,
        )
    else:
        cut = folder / "windows_of_soundscapes"
        claim_folder(
            cut,
            {
                "model": options.model,
                "windows_per_clip": options.windows_per_clip,
                "num_epochs": options.num_epochs,
            },
        )
        windows = cut / "windows.parquet"
        if not windows.is_file():
            _cut_windows(options, fold, scenes, windows)
        wanted = FinetuneOptions(
            dataset=str(windows),
            num_epochs=1,  # the windows already cover all epochs
            batch_size=options.windows_per_clip,
            **settings,
        )
    if finished_result(wanted) is None:
        finetune(wanted)
    records = (run / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(records[-1])["seconds"])


def _cut_windows(options: DetectionOptions, held_out: str, scenes: Path, path: Path) -> None:
    """As many random windows of each recording as the frame model gets in all epochs."""
    name = resolve_checkpoint(options.model)
    window_s = Collator(ASTFeatureExtractor.from_pretrained(name), 0).window_s
    config = ASTConfig.from_pretrained(name)
    data = open_annotated_audio(
        str(scenes),
        str(scenes / "events.csv"),
        FinetuneOptions(evaluation_fold=held_out, **_FOLDS),
    )
    # In the start's order, if it has them all, so that its head can be kept.
    known = [config.id2label[index] for index in range(config.num_labels)]
    names = known if set(known) == set(data.label_names) else data.label_names
    random = np.random.default_rng(options.seed)
    rate = 16000

    def rows() -> Iterator[dict[str, Any]]:
        for part, is_held_out in ((data.train, False), (data.evaluation, True)):
            count = 1 if is_held_out else options.windows_per_clip * options.num_epochs
            for row in part:
                waveform = load_audio(row["audio"], rate)
                for start in random.uniform(0, len(waveform) / rate - window_s, size=count):
                    first = round(start * rate)
                    sound = io.BytesIO()
                    window = waveform[first : first + round(window_s * rate)]
                    soundfile.write(sound, window, rate, format="FLAC")
                    heard = labels_of_window(row["events"], start, start + window_s)
                    yield {
                        "audio": {"bytes": sound.getvalue(), "path": f"{start:.2f}-{row['name']}"},
                        "labels": sorted(names.index(data.label_names[i]) for i in heard),
                        "fold": held_out if is_held_out else "others",
                    }

    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "labels": List(ClassLabel(names=names)),
            "fold": Value("string"),
        }
    )
    Dataset.from_list(list(rows()), features=features).to_parquet(path)


def _measure(kind: str, options: DetectionOptions, fold: str, scenes: Path) -> dict[str, Any]:
    folder = options.output / f"without_fold{fold}"
    settings = EvaluateOptions(
        annotations=str(scenes / "events.csv"),
        evaluation_fold=fold,
        threshold=options.threshold,
        median_filter_s=options.median_filter_s,
        window_pooling=POOLING,
        output=str(folder / f"{kind}_evaluation"),
        num_workers=0,
        **_FOLDS,
    )
    return evaluate_checkpoints([str(folder / kind / "checkpoint")], str(scenes), settings)


def _onset_errors(folds: dict[str, dict[str, Any]]) -> dict[str, tuple[list[float], int]]:
    """For each kind of model, those of all folds, and how many events are annotated."""
    kinds = next(iter(folds.values()))
    detections = {kind: [models[kind]["detection"] for models in folds.values()] for kind in kinds}
    return {
        kind: (
            [error for found in of_kind for error in found["onsets"]["errors_s"]],
            sum(found["events"] for found in of_kind),
        )
        for kind, of_kind in detections.items()
    }


def _print(folds: dict[str, dict[str, Any]], options: DetectionOptions) -> None:
    for fold, models in folds.items():
        some = next(iter(models.values()))
        print(
            f"fold {fold} held out: {some['clips']} soundscapes of {options.soundscape_s:g} s, "
            f"{some['detection']['events']} events; 95 % intervals over recordings"
        )
        print(f"{'':14}" + "".join(f"{kind:>26}" for kind in models))
        rows: dict[str, list[str]] = {}
        for report in models.values():
            for title, metric in _metrics(report).items():
                rows.setdefault(title, []).append(_interval(metric))
            onsets = report["detection"]["onsets"]
            rows.setdefault("onset ≤ 0.2 s", []).append(f"{100 * onsets['within_200_ms']:.0f} %")
            distance = onsets["median_error_s"]
            rows.setdefault("onset distance", []).append(
                "–" if distance is None else f"{distance:.2f} s"
            )
            rows.setdefault("training", []).append(f"{report['training_s']:.0f} s")
        for title, cells in rows.items():
            print(f"{title:14}" + "".join(f"{cell:>26}" for cell in cells))
    if len(folds) > 1:
        print(f"mean of {len(folds)} folds")
        kinds = next(iter(folds.values()))
        means = {kind: [_metrics(models[kind]) for models in folds.values()] for kind in kinds}
        for title in _metrics(some):
            values = [np.mean([of[title]["value"] for of in means[kind]]) for kind in kinds]
            print(f"{title:14}" + "".join(f"{value:>26.3f}" for value in values))


def _metrics(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the title of its row."""
    measured = report["detection"]["metrics"]
    return {
        **{title: measured[name] for name, title in DETECTION_METRICS.items()},
        "clip mAP": report["metrics"]["mean_average_precision"],
    }


def _interval(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} – {metric['high']:.3f})"
