"""`ast-benchmark detection`: a frame model and a window classifier with `find_events`, compared.

    labelled clips with folds -> soundscapes  -> frame model    strong labels of columns
                                 the same     -> window model   labels of windows cut out of them
    held-out fold             -> PSDS, event F1, segment F1, clip mAP, onsets, of both

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
from ..data.annotated import open_annotated_audio
from ..data.batches import Collator
from ..data.mixtures import mix_clips
from ..data.options import MixOptions
from ..evaluation.detection import DETECTION_METRICS
from ..evaluation.options import EvaluateOptions
from ..evaluation.scoring import evaluate_checkpoints
from ..training.options import FinetuneOptions
from ..training.with_accelerate import finetune
from .options import DetectionOptions
from .timing import machine, on_threads

_HEARD_S = 0.5  # of an event in a window, or half of it, for its label to be the window's
_FOLDS: dict[str, Any] = {"fold_column": "fold", "label_column": "labels"}


@on_threads
def benchmark_detection(options: DetectionOptions) -> None:
    """Train whatever is not yet trained in `--output`, and measure both."""
    output = options.output
    scenes = output / "soundscapes"
    if not (scenes / "events.csv").is_file():
        mix_clips(
            MixOptions(
                dataset=options.dataset,
                output=str(scenes),
                soundscape_s=options.soundscape_s,
                mixtures_per_fold=options.mixtures_per_fold,
                max_clips=options.max_clips,
                seed=options.seed,
            )
        )
    report: dict[str, Any] = {"machine": machine(), "models": {}}
    for kind in options.models:
        seconds = _train(kind, options, scenes)
        report["models"][kind] = {**_measure(kind, options, scenes), "training_s": seconds}
    _print(report["models"], options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def _train(kind: str, options: DetectionOptions, scenes: Path) -> float:
    """Train a model, or resume an earlier run; returns the seconds it took."""
    run = options.output / kind
    if not (run / "checkpoint").is_dir():
        settings: dict[str, Any] = {
            "model": options.model,
            "learning_rate": options.learning_rate,
            "frequency_patchout": options.frequency_patchout,
            "time_mask": 24,
            "frequency_mask": 16,
            "num_workers": 0,
            "seed": options.seed,
            "evaluation_fold": options.evaluation_fold,
            "output": str(run),
            **_FOLDS,
        }
        if kind == "frames":
            finetune(
                FinetuneOptions(
                    dataset=str(scenes),
                    annotations=str(scenes / "events.csv"),
                    num_epochs=options.num_epochs,
                    windows_per_clip=options.windows_per_clip,
                    batch_size=1,
                    **settings,
                )
            )
        else:
            windows = options.output / "windows_of_soundscapes.parquet"
            if not windows.is_file():
                _cut_windows(options, scenes, windows)
            finetune(
                FinetuneOptions(
                    dataset=str(windows),
                    num_epochs=1,  # the windows already cover all epochs
                    batch_size=options.windows_per_clip,
                    **settings,
                )
            )
    records = (run / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(records[-1])["seconds"])


def _cut_windows(options: DetectionOptions, scenes: Path, path: Path) -> None:
    """As many random windows of each recording as the frame model gets in all epochs."""
    name = resolve_checkpoint(options.model)
    window_s = Collator(ASTFeatureExtractor.from_pretrained(name), 0).window_s
    config = ASTConfig.from_pretrained(name)
    data = open_annotated_audio(
        str(scenes),
        str(scenes / "events.csv"),
        FinetuneOptions(evaluation_fold=options.evaluation_fold, **_FOLDS),
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
                    heard = {
                        data.label_names[int(label)]
                        for begin, end, label in row["events"]
                        if min(end, start + window_s) - max(begin, start)
                        >= min(_HEARD_S, (end - begin) / 2)
                    }
                    yield {
                        "audio": {"bytes": sound.getvalue(), "path": f"{start:.2f}-{row['name']}"},
                        "labels": sorted(names.index(label) for label in heard),
                        "fold": options.evaluation_fold if is_held_out else "others",
                    }

    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "labels": List(ClassLabel(names=names)),
            "fold": Value("string"),
        }
    )
    Dataset.from_list(list(rows()), features=features).to_parquet(path)


def _measure(kind: str, options: DetectionOptions, scenes: Path) -> dict[str, Any]:
    output = options.output / f"{kind}_evaluation"
    settings = EvaluateOptions(
        annotations=str(scenes / "events.csv"),
        evaluation_fold=options.evaluation_fold,
        median_filter_s=options.median_filter_s,
        output=str(output),
        num_workers=0,
        **_FOLDS,
    )
    checkpoint = str(options.output / kind / "checkpoint")
    return evaluate_checkpoints([checkpoint], str(scenes), settings)


def _print(models: dict[str, dict[str, Any]], options: DetectionOptions) -> None:
    some = next(iter(models.values()))
    print(
        f"{some['clips']} soundscapes of {options.soundscape_s:g} s, fold "
        f"{options.evaluation_fold} held out, {some['detection']['events']} events; 95 % intervals "
        "over recordings"
    )
    print(f"{'':14}" + "".join(f"{kind:>26}" for kind in models))
    rows: dict[str, list[str]] = {}
    for report in models.values():
        metrics = report["detection"]["metrics"]
        for name, title in DETECTION_METRICS.items():
            rows.setdefault(title, []).append(_interval(metrics[name]))
        clip = report["metrics"]["mean_average_precision"]
        rows.setdefault("clip mAP", []).append(_interval(clip))
        onsets = report["detection"]["onsets"]
        rows.setdefault("onset ≤ 0.2 s", []).append(f"{100 * onsets['within_200_ms']:.0f} %")
        distance = onsets["median_error_s"]
        rows.setdefault("onset distance", []).append(
            "–" if distance is None else f"{distance:.2f} s"
        )
        rows.setdefault("training", []).append(f"{report['training_s']:.0f} s")
    for title, cells in rows.items():
        print(f"{title:14}" + "".join(f"{cell:>26}" for cell in cells))


def _interval(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} – {metric['high']:.3f})"
