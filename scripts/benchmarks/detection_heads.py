"""`ast-benchmark detection --trained head`: the comparison on a frozen encoder, fold by fold.

    soundscapes   -> columns (windows, columns, D), pooled (windows, D)      once for all folds
    other folds   -> head on columns | head on windows
    held-out fold -> scores of columns, stitched | scores of windows

The encoder runs once over each soundscape, so every fold can be held out in turn, and all
soundscapes count. The figures do not include what fine-tuning the encoder would add.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from feature_extraction import load_audio
from modeling_ast import ASTForAudioClassification, ASTForAudioFrameClassification
from modeling_ast.events_ast import EventRules
from modeling_ast.frames_ast import column_spans, count_columns, frame_targets, stitch
from modeling_ast.windows_ast import cut_windows, window_and_hop

from ..common.files import write_whole
from ..data.annotations import Annotation, read_annotations
from ..data.sources import open_stream
from ..evaluation.detection import Recording, measure_detection
from ..evaluation.metrics import ScoredClips
from ..inference.classifier import Classifier
from ..inference.heard import Heard
from ..inference.run import model_version
from .options import DetectionOptions

POOLING = "linear_softmax"  # of columns and of windows, for a clip's scores
_BATCH = 32  # windows
_HEARD_S = 0.5
_RESAMPLES = 100
_LEVEL = 0.95


@dataclass
class Sound:
    """A soundscape as the encoder gives it."""

    name: str
    fold: str
    events: list[Annotation]
    spans: list[tuple[float, float]]  # of its windows, in seconds
    columns: list[Tensor]  # (columns, D) of each window
    pooled: Tensor  # (windows, D)


def compare_heads(options: DetectionOptions, scenes: Path) -> dict[str, dict[str, Any]]:
    """Each kind of head, trained without each of the folds in turn, and measured on it.

    Returns:
        kind -> report as of `evaluate_checkpoints`, over the soundscapes of all these folds, with
        "training_s".
    """
    sounds = _sounds(options, scenes)
    labels = sorted({event.label for sound in sounds for event in sound.events})
    model = Classifier(options.model).pipeline.model
    model.config.num_labels = len(labels)
    stride, patch = model.config.time_stride, model.config.patch_shape[1]
    reports = {}
    for kind in options.models:
        began = time.perf_counter()
        held_out: list[tuple[Sound, list[np.ndarray]]] = []
        for fold in options.evaluation_folds:
            others = [sound for sound in sounds if sound.fold != fold]
            torch.manual_seed(options.seed)
            if kind == "frames":
                head = ASTForAudioFrameClassification.from_classifier(model).frame_classifier
            else:
                head = ASTForAudioClassification(model.config).classifier
            _train(head, *_examples(kind, others, labels, stride, patch), options)
            for sound in sounds:
                if sound.fold == fold:
                    vectors = sound.columns if kind == "frames" else list(sound.pooled[:, None])
                    with torch.no_grad():
                        scores = [head(of_window).sigmoid().numpy() for of_window in vectors]
                    held_out.append((sound, scores))
        seconds = (time.perf_counter() - began) / len(options.evaluation_folds)
        heard = [_heard(kind, *each, labels, stride, patch) for each in held_out]
        reports[kind] = {**_measure(heard, labels, options), "training_s": seconds}
    return reports


def _sounds(options: DetectionOptions, scenes: Path) -> list[Sound]:
    """The soundscapes, embedded, or as an earlier run with the same weights embedded them."""
    path = options.output / "soundscapes.pt"
    version = model_version(options.model)
    if path.is_file():
        stored = torch.load(path, weights_only=True)
        if stored["version"] == version:
            return [
                Sound(**{**sound, "events": [Annotation(*event) for event in sound["events"]]})
                for sound in stored["sounds"]
            ]
    sounds = _embed(options, scenes)
    # Without our classes, whose module has two names, "scripts" and "ast_scripts".
    plain = [
        {**vars(sound), "events": [tuple(event) for event in sound.events]} for sound in sounds
    ]
    contents = {"version": version, "sounds": plain}
    write_whole(path, lambda unfinished: torch.save(contents, unfinished))
    return sounds


def _embed(options: DetectionOptions, scenes: Path) -> list[Sound]:
    """Windows of the model's length, every half of it, a whole number of columns apart."""
    pipeline = Classifier(options.model).pipeline
    model, extractor = pipeline.model, pipeline.feature_extractor
    filterbank = extractor.filterbank
    rate, config = extractor.sampling_rate, model.config
    step = config.time_stride * filterbank.frame_shift
    length, hop = window_and_hop(rate, filterbank.num_samples(config.max_length), None, None)
    hop = hop // step * step
    rows = list(open_stream(str(scenes), "train"))
    names = [row["audio"]["path"] for row in rows]
    events = read_annotations(str(scenes / "events.csv"), names).of_recording
    sounds = []
    for name, row in zip(names, tqdm(rows, desc="embedding"), strict=True):
        waveform = load_audio(row["audio"], rate)
        windows = list(cut_windows([(0, waveform)], length, hop, filterbank.frame_shift))
        columns, pooled = [], []
        for _, window, _ in windows:
            features = extractor(window, sampling_rate=rate, return_tensors="pt")
            with torch.inference_mode():
                encoded = model.base_model(**features)
            grid = model.base_model.patch_grid(
                encoded.last_hidden_state, *features["input_values"].shape[1:]
            )
            frames = filterbank.num_frames(len(window))
            valid = count_columns(frames, config.time_stride, config.patch_shape[1])
            columns.append(grid[0].mean(dim=0)[:valid].clone())
            pooled.append(encoded.pooler_output[0].clone())
        spans = [(start / rate, (start + len(window)) / rate) for start, window, _ in windows]
        fold = str(row["fold"])
        sounds.append(Sound(name, fold, events[name], spans, columns, torch.stack(pooled)))
    return sounds


def _examples(
    kind: str, sounds: Sequence[Sound], labels: list[str], stride: int, patch: int
) -> tuple[Tensor, Tensor]:
    """Vectors (N, columns, D) or (N, D) of all windows, and targets; -1 marks padding."""
    vectors, targets = [], []
    for sound in sounds:
        for (start, end), columns, pooled in zip(
            sound.spans, sound.columns, sound.pooled, strict=True
        ):
            events = [
                (event.start - start, event.end - start, labels.index(event.label))
                for event in sound.events
                if event.start < end and event.end > start
            ]
            if kind == "frames":
                spans = column_spans(len(columns), stride, patch, duration=end - start)
                vectors.append(columns)
                targets.append(torch.from_numpy(frame_targets(events, spans, len(labels))))
                continue
            target = torch.zeros(len(labels))
            target[sorted(labels_of_window(events, 0.0, end - start))] = 1.0
            vectors.append(pooled)
            targets.append(target)
    return (
        pad_sequence(vectors, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=-1.0),
    )


def labels_of_window(
    events: Iterable[tuple[float, float, int]], start: float, end: float
) -> set[int]:
    """Of the events of which a window has at least half, or half a second."""
    return {
        int(label)
        for begin, finish, label in events
        if min(finish, end) - max(begin, start) >= min(_HEARD_S, (finish - begin) / 2)
    }


def _train(head: nn.Module, vectors: Tensor, targets: Tensor, options: DetectionOptions) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), options.head_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.head_steps)
    for _ in range(options.head_steps):
        drawn = torch.randint(len(vectors), (_BATCH,))
        wanted = targets[drawn]
        is_known = wanted >= 0
        loss = binary_cross_entropy_with_logits(head(vectors[drawn])[is_known], wanted[is_known])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _heard(
    kind: str, sound: Sound, scores: list[np.ndarray], labels: list[str], stride: int, patch: int
) -> Recording:
    """The scores of a sound as the pipeline would give them."""
    spans, of_parts = sound.spans, np.concatenate(scores)
    if kind == "frames":
        hop = round((sound.spans[1][0] - sound.spans[0][0]) * 100 / stride) if spans[1:] else 1
        of_parts = stitch(scores, hop)
        duration = sound.spans[-1][1]
        edges = column_spans(len(of_parts), stride, patch, duration=duration)
        spans = [(start, end) for start, end in edges.tolist()]
    heard = Heard.of_arrays(labels, spans, of_parts, np.empty((len(spans), 0)))
    heard.pooling = POOLING
    return Recording(sound.name, heard, sound.events)


def _measure(
    recordings: list[Recording], labels: list[str], options: DetectionOptions
) -> dict[str, Any]:
    targets = [
        [int(any(event.label == label for event in each.annotations)) for label in labels]
        for each in recordings
    ]
    scored = ScoredClips(np.stack([each.heard.clip_scores() for each in recordings]), targets)
    intervals = scored.confidence_intervals(_RESAMPLES, options.seed, _LEVEL)
    rules = EventRules(options.threshold, median_filter_s=options.median_filter_s)
    return {
        "clips": len(recordings),
        "metrics": {
            name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
            for name, value in scored.metrics().items()
        },
        "detection": measure_detection(recordings, rules, _RESAMPLES, options.seed, _LEVEL),
    }
