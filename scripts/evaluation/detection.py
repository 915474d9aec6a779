"""Measures detection: what was heard when, compared with annotations.

    PSDS 1, PSDS 2  from scores, over all thresholds at once: 1 demands exact times, 2 the right
                    class (Bilen et al., arXiv 1910.08440; scenarios of DCASE's task 4)
    event F1        from events: onset within 200 ms, offset within 200 ms or 20 % of the length
    segment F1      from events: whether a class is heard in each second

They are macro means over the annotated classes. `sed_scores_eval` counts and matches; events come
from `find_events`, for window classifiers and frame models alike.

    recordings  -> report, with bootstrap intervals over recordings
    onset_pairs -> how far found onsets are from annotated ones
"""

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from tqdm.auto import tqdm

from modeling_ast.events_ast import Event, EventRules
from modeling_ast.frames_ast import median_filter

from ..common.files import write_whole
from ..data.annotations import Annotation, without_overlaps
from ..inference.heard import Heard

DETECTION_METRICS = {
    "psds_1": "PSDS 1",
    "psds_2": "PSDS 2",
    "event_f1": "event F1",
    "segment_f1": "segment F1",
}
_PSDS: dict[str, dict[str, Any]] = {
    "psds_1": {"dtc_threshold": 0.7, "gtc_threshold": 0.7, "cttc_threshold": None, "alpha_ct": 0.0},
    "psds_2": {"dtc_threshold": 0.1, "gtc_threshold": 0.1, "cttc_threshold": 0.3, "alpha_ct": 0.5},
}
_PSDS_RESAMPLES = 200  # maximum: each sorts all thresholds of all classes
_COLLAR_S = 0.2
_COLLARS = {"onset_collar": _COLLAR_S, "offset_collar": _COLLAR_S, "offset_collar_rate": 0.2}
_SEGMENT_S = 1.0
# Scores closer than this in log odds count as one threshold, which bounds time and memory for hours
# of sound.
_LOG_ODDS_STEP = 0.05
_GRID_S = 0.1  # for reading a window classifier's scores
_SHOWN_ERROR_S = 1.0


@dataclass
class Recording:
    """What was found in a recording, and what is annotated."""

    name: str
    heard: Heard
    annotations: Sequence[Annotation]


def measure_detection(
    recordings: Sequence[Recording],
    rules: EventRules,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """All figures for annotated recordings.

    Args:
        recordings: each with scores for the same labels.
        rules: what makes an event.
        resamples: of the bootstrap over recordings; for PSDS, which is costly, at most 200.
        seed: of the bootstrap.
        level: of its intervals.

    Returns:
        The report's "detection":
            "recordings", "events", "found"     how many, annotated and found by the model
            "metrics"       {name of `DETECTION_METRICS`: {"value", "low", "high"}}
            "per_class"     [{"label", "events", "found", and for each metric "…", "…_low",
                            "…_high"}, …], for the annotated classes
            "onsets"        {"matched", "median_error_s", "within_200_ms", "errors_s"}: annotated
                            events overlapped by a found one of their class, the median distance of
                            their onsets, the share of all annotated events with an onset that
                            close, and of each matched one: found minus annotated, in seconds

    Raises:
        ValueError: without annotations, or without the package.
    """
    measured = _Detection(recordings, rules)
    if not measured.labels:
        raise ValueError("There are no annotated events to compare with in these recordings.")
    counts = {"event_f1": measured.event_counts, "segment_f1": measured.segment_counts}
    random = np.random.default_rng(seed)
    weights = [
        np.bincount(
            random.integers(len(recordings), size=len(recordings)), minlength=len(recordings)
        )
        for _ in range(resamples)
    ]
    values: dict[str, np.ndarray] = {}  # (1 + labels,): the mean, then each class
    drawn: dict[str, list[np.ndarray]] = {}
    ones = np.ones(len(recordings))
    for name in _PSDS:
        values[name] = measured.psds(name, ones)
        bar = tqdm(weights[:_PSDS_RESAMPLES], desc="bootstrap", delay=2, leave=False)
        drawn[name] = [measured.psds(name, of_each) for of_each in bar]
    for name, of_recordings in counts.items():
        values[name] = _f1(of_recordings, ones)
        drawn[name] = [_f1(of_recordings, of_each) for of_each in weights]
    intervals = {name: _intervals(np.stack(drawn[name]), level) for name in drawn}

    errors = np.array(
        [found.start - there.start for r in measured.matched for there, found in r], float
    )
    events = measured.event_counts[:, :, 0].sum(axis=0)
    return {
        "recordings": len(recordings),
        "events": int(events.sum()),
        "found": sum(map(len, measured.found)),
        "metrics": {
            name: dict(
                zip(("value", "low", "high"), map(float, (values[name][0], *intervals[name][0])),
                    strict=True)
            )
            for name in DETECTION_METRICS
        },
        "per_class": [
            {
                "label": label,
                "events": int(events[index]),
                "found": sum(event.label == label for of_one in measured.found for event in of_one),
                **{
                    key: float(number)
                    for name in DETECTION_METRICS
                    for key, number in zip(
                        (name, f"{name}_low", f"{name}_high"),
                        (values[name][1 + index], *intervals[name][1 + index]),
                        strict=True,
                    )
                },
            }
            for index, label in enumerate(measured.labels)
        ],
        "onsets": {
            "matched": len(errors),
            "median_error_s": float(np.median(np.abs(errors))) if len(errors) else None,
            "within_200_ms": float((np.abs(errors) <= _COLLAR_S).sum() / events.sum()),
            "errors_s": errors.round(3).tolist(),
        },
    }  # fmt: skip


def score_curve(heard: Heard, median_filter_s: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores over time without overlap, as `find_events` reads them.

    A frame model's scores are those of its columns. A window classifier's are placed at the middles
    of its windows and interpolated between them, every 0.1 s.

    Returns:
        edges (n + 1,) in seconds, scores (n, labels).
    """
    spans, scores = np.array(heard.spans), heard.scores.astype(np.float64)
    edges = np.append(spans[:, 0], spans[-1, 1])
    if (spans[1:, 0] < spans[:-1, 1] - 1e-6).any():
        edges = np.append(np.arange(0.0, spans[-1, 1] - _GRID_S / 2, _GRID_S), spans[-1, 1])
        places, middles = (edges[1:] + edges[:-1]) / 2, spans.mean(axis=1)
        scores = np.stack([np.interp(places, middles, column) for column in scores.T], axis=1)
    step_s = float(np.median(np.diff(edges)))
    if median_filter_s > step_s:
        length = round(median_filter_s / step_s)
        scores = median_filter(scores, length + 1 - length % 2)
    return edges, scores


def onset_pairs(
    annotations: Sequence[Annotation], found: Sequence[Event]
) -> list[tuple[Annotation, Event]]:
    """Annotated and found events with the same label that overlap; each once, largest first."""
    overlaps = sorted(
        (
            (min(there.end, event.end) - max(there.start, event.start), i, j)
            for i, there in enumerate(annotations)
            for j, event in enumerate(found)
            if there.label == event.label
        ),
        key=lambda pair: -pair[0],
    )
    taken: set[tuple[str, int]] = set()
    pairs = []
    for overlap, i, j in overlaps:
        if overlap > 0 and not {("there", i), ("found", j)} & taken:
            taken |= {("there", i), ("found", j)}
            pairs.append((annotations[i], found[j]))
    return pairs


def draw_onset_errors(found: Mapping[str, tuple[Sequence[float], int]], path: Path) -> None:
    """Histograms of how late onsets were found; the outermost bars include everything beyond.

    Args:
        found: for each model, by its name, the errors (events found,) in seconds, found minus
            annotated, and how many events are annotated.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.6 + 3.0 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = np.linspace(-_SHOWN_ERROR_S, _SHOWN_ERROR_S, 41)
    for axes, (name, (errors, events)) in zip(rows, found.items(), strict=True):
        axes.axvspan(-_COLLAR_S, _COLLAR_S, color="tab:green", alpha=0.12, label="within 200 ms")
        axes.hist(np.clip(errors, edges[0], edges[-1]), bins=edges.tolist(), color="#2b6ca3")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlim=(edges[0], edges[-1]), ylabel="events")
        title = f"{name}: " if name else ""
        title += f"{len(errors)} of {events} events found"
        if len(errors):
            distances = np.abs(errors)
            near = (distances <= _COLLAR_S).sum()
            title += f", {near} within 200 ms; median distance {np.median(distances):.2f} s"
        axes.set_title(title, fontsize=10)
    rows[0].legend(frameon=False)
    rows[-1].set_xlabel("found onset − annotated onset, s")
    write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))


class _Detection:
    """Recordings prepared for `sed_scores_eval`, and counted by it."""

    def __init__(self, recordings: Sequence[Recording], rules: EventRules):
        self._library = _sed_scores_eval()
        self.annotations = [
            without_overlaps(
                a._replace(end=min(a.end, r.heard.duration))
                for a in r.annotations
                if a.start < r.heard.duration
            )
            for r in recordings
        ]
        known = recordings[0].heard.label_names if recordings else ()
        used = {annotation.label for events in self.annotations for annotation in events}
        self.labels = [label for label in known if label in used]
        self.found = [
            [event for event in r.heard.events(rules) if event.label in used] for r in recordings
        ]
        self.matched = [
            onset_pairs(there, found)
            for there, found in zip(self.annotations, self.found, strict=True)
        ]
        self.durations = np.array([r.heard.duration for r in recordings])
        self._curves = []
        for recording in recordings:
            edges, scores = score_curve(recording.heard, rules.median_filter_s)
            columns = [list(recording.heard.label_names).index(label) for label in self.labels]
            odds = np.clip(scores[:, columns], 1e-9, 1 - 1e-9)
            steps = np.round(np.log(odds / (1 - odds)) / _LOG_ODDS_STEP)
            self._curves.append(self._table(edges, steps))
        # Their own names could clash with the table's columns.
        self._truth = {
            str(number): [(a.start, a.end, self._names[self.labels.index(a.label)]) for a in events]
            for number, events in enumerate(self.annotations)
        }

    @property
    def _names(self) -> list[str]:
        return [f"class {number}" for number in range(len(self.labels))]

    def _table(self, edges: np.ndarray, scores: np.ndarray) -> pandas.DataFrame:
        """In the format of `create_score_dataframe`."""
        columns = {"onset": edges[:-1], "offset": edges[1:]}
        return _WritableTable({**columns, **dict(zip(self._names, scores.T, strict=True))})

    def _of_each(self, tables: Sequence[pandas.DataFrame]) -> dict[str, pandas.DataFrame]:
        return {str(number): table for number, table in enumerate(tables)}

    @cached_property
    def _event_tables(self) -> list[pandas.DataFrame]:
        """The found events as scores of 1 between their ends, and 0 elsewhere."""
        tables = []
        for found, duration in zip(self.found, self.durations, strict=True):
            times = [t for event in found for t in (event.start, event.end) if 0 < t < duration]
            edges = np.unique([0.0, *times, duration])
            middles = (edges[1:] + edges[:-1]) / 2
            scores = np.zeros((len(middles), len(self.labels)))
            for event in found:
                is_heard = (event.start <= middles) & (middles < event.end)
                scores[is_heard, self.labels.index(event.label)] = 1.0
            tables.append(self._table(edges, scores))
        return tables

    @cached_property
    def event_counts(self) -> np.ndarray:
        """(recordings, labels, 3): annotated, matched, found without a match."""
        deltas = self._library.collar_based.intermediate_statistics_deltas(
            self._of_each(self._event_tables), self._truth, **_COLLARS
        )
        counts = self._counts_of(deltas)
        for number, events in enumerate(self._truth.values()):
            for _, _, name in events:
                counts[number, self._names.index(name), 0] += 1
        return counts

    @cached_property
    def segment_counts(self) -> np.ndarray:
        """(recordings, labels, 3) seconds: annotated, found correctly, found wrongly."""
        segments = self._library.segment_based.intermediate_statistics
        deltas = segments.intermediate_statistics_deltas(
            self._of_each(self._event_tables),
            self._truth,
            {str(number): float(duration) for number, duration in enumerate(self.durations)},
            segment_length=_SEGMENT_S,
        )
        counts = self._counts_of(deltas)
        for number, of_recording in deltas.items():
            counts[int(number), :, 0] = [stats["tps"].sum() for _, stats in of_recording.values()]
        return counts

    def _counts_of(self, deltas: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
        """What a threshold between 0 and 1 counts; (…, 0) is left for the caller."""
        counts = np.zeros((len(deltas), len(self.labels), 3))
        for number, of_recording in deltas.items():
            for index, (at, stats) in enumerate(of_recording.values()):
                for place, key in ((1, "tps"), (2, "fps")):
                    counts[int(number), index, place] = np.asarray(stats[key])[at > 0.5].sum()
        return counts

    @cached_property
    def _changes(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray, list[str]]]]:
        """For each PSDS and class, what each threshold changes in each recording:
        thresholds (n,), changes (recordings, n, counts), what is counted."""
        found: dict[str, dict[str, tuple[np.ndarray, np.ndarray, list[str]]]] = {}
        for metric in _PSDS:
            criteria = _criteria(metric, len(self.labels))
            del criteria["alpha_ct"]
            deltas = self._library.intersection_based.intermediate_statistics_deltas(
                self._of_each(self._curves), self._truth, **criteria
            )
            found[metric] = {}
            for name in self._names:
                of_class = [deltas[number][name] for number in self._truth]
                thresholds = np.unique(np.concatenate([at for at, _ in of_class]))
                keys = list(of_class[0][1])
                changes = np.zeros((len(of_class), len(thresholds), len(keys)))
                for number, (at, stats) in enumerate(of_class):
                    places = np.searchsorted(thresholds, at)
                    for index, key in enumerate(keys):
                        np.add.at(changes[number, :, index], places, stats[key])
                found[metric][name] = (thresholds, changes, keys)
        return found

    def psds(self, metric: str, weights: np.ndarray) -> np.ndarray:
        """(1 + labels,): overall, then per class, with weighted recordings.

        Recordings are summed up into one beforehand, which makes resampling affordable.
        """
        truth, begin = [], 0.0
        for events, duration, times in zip(
            self._truth.values(), self.durations, weights.astype(int), strict=True
        ):
            for _ in range(times):
                truth += [(begin + start, begin + end, name) for start, end, name in events]
                begin += duration + 1.0  # keeps an event at the end apart from the next one
        there = {name for _, _, name in truth}
        if not there:
            return np.full(1 + len(self.labels), np.nan)
        deltas = {}
        for name, (thresholds, changes, keys) in self._changes[metric].items():
            if name not in there:  # excluded, as from the means of F1
                continue
            summed = np.tensordot(weights, changes, axes=1)  # (n, counts)
            deltas[name] = (
                thresholds,
                {
                    key: values
                    for key, values in zip(keys, summed.T, strict=True)
                    if "\\" not in key or key.split("\\")[1] in there  # confused with which class
                },
            )
        criteria = _criteria(metric, len(there))
        value, of_classes, *_ = self._library.intersection_based.psds(
            scores=None,
            ground_truth={"all": truth},
            audio_durations={"all": float(weights @ self.durations)},
            deltas={"all": deltas},
            alpha_st=1.0,
            max_efpr=100.0,
            **criteria,
        )
        return np.array([value, *(of_classes.get(name, np.nan) for name in self._names)])


class _WritableTable(pandas.DataFrame):
    """pandas 3 returns read-only arrays, which the library's compiled part refuses."""

    @property
    def _constructor(self) -> Any:
        return _WritableTable

    def to_numpy(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return super().to_numpy(*args, **kwargs).copy()


def _criteria(metric: str, classes: int) -> dict[str, Any]:
    """Parameters of a PSDS; a single class cannot be confused with another."""
    alone = {"cttc_threshold": None, "alpha_ct": 0.0} if classes == 1 else {}
    return {**_PSDS[metric], **alone}


def _sed_scores_eval() -> Any:
    """Import the package; from `sed_eval`, which it imports, it only needs the event matching.

    `sed_eval` in turn imports dcase_util, for files that we do not read, and dcase_util imports
    pkg_resources, which setuptools dropped (82.0). An empty module therefore replaces it in this
    process.

    Raises:
        ValueError: if it is not installed.
    """
    if "dcase_util" not in sys.modules:
        sys.modules["dcase_util"] = types.ModuleType("dcase_util")
    try:
        import sed_scores_eval
    except ImportError as error:
        raise ValueError(
            "Measuring detection needs sed_scores_eval. In the project's folder: "
            "pip install '.[detection]'"
        ) from error
    return sed_scores_eval


def _f1(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(recordings, labels, 3) annotated, right, wrong -> (1 + labels,): the mean, then each class.

    NaN for a class without annotations, which the mean excludes.
    """
    there, right, wrong = np.tensordot(weights, counts, axes=1).T
    of_classes = np.where(there > 0, 2 * right / np.maximum(there + right + wrong, 1), np.nan)
    return np.array([np.nanmean(of_classes) if (there > 0).any() else np.nan, *of_classes])


def _intervals(drawn: np.ndarray, level: float) -> np.ndarray:
    """(resamples, n) -> (n, 2): percentiles, without the resamples that have no value."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    columns = [column[~np.isnan(column)] for column in drawn.T]
    return np.array([np.quantile(c, ends) if len(c) else [np.nan] * 2 for c in columns])
