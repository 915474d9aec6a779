"""A page per sound: waveform, spectrogram, the top classes' curves over time, events.

plot_timeline("an_hour.flac", 16000, answer, "an_hour.png", events=find_events(answer["windows"]))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from feature_extraction import kaldi_fbank, stream_audio
from feature_extraction.fbank_ast import LOWEST_FREQUENCY, frame_shift, num_samples
from modeling_ast.pipeline_ast import cut_windows

_COLUMNS = 1500  # of the spectrogram, at most: about one per pixel
_MEL_BINS = 128
_TIME_STEPS_S = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
_TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000, 16000)


def plot_timeline(
    sound: Any,
    sampling_rate: int,
    answer: Mapping[str, Any],
    path_or_figure: str | Path | Figure,
    events: Sequence[Mapping[str, Any]] | None = None,
    classes: int = 5,
    title: str = "",
) -> Figure:
    """Draw what was heard when.

    The sound is read block by block, so that ten hours take no more memory than ten minutes.

    Args:
        sound: a waveform (samples,) at `sampling_rate`, or anything else `stream_audio` reads.
        sampling_rate: of the waveform and of the spectrogram, in Hz.
        answer: the pipeline's with `return_timestamps=True`: {"labels": …, "windows": …}.
        path_or_figure: where the page goes: a PNG, PDF or SVG file, or a figure to draw in.
        events: what `find_events` returned; None: no row for them.
        classes: how many classes get a curve: those that score highest in any window.
        title: of the page.

    Returns:
        the figure.

    Raises:
        ValueError: when the answer has no windows.
        AudioDecodingError: when the sound cannot be read.
    """
    windows = answer.get("windows") if isinstance(answer, Mapping) else None
    if not windows:
        raise ValueError(
            "The answer has no windows: call the pipeline with return_timestamps=True."
        )
    end = windows[-1]["end"]
    curves = _curves(windows, classes)
    if events is not None:
        best: dict[str, float] = {}
        for event in events:
            best[event["label"]] = max(event["score"], best.get(event["label"], event["score"]))
        rows = sorted(best, key=lambda label: -best[label])
        # Classes with a curve first: rows and curves share their colours.
        rows = [label for label in curves if label in best] + [r for r in rows if r not in curves]
    else:
        rows = []
    names = dict.fromkeys([*curves, *rows])
    colours = {label: f"C{index % 10}" for index, label in enumerate(names)}

    figure = path_or_figure if isinstance(path_or_figure, Figure) else Figure(dpi=100)
    heights = [0.8, 2.0, 1.6] + ([0.25 + 0.22 * max(1, len(rows))] if events is not None else [])
    figure.set_size_inches(12, 1.5 * sum(heights) + 1.2)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)

    seconds, lowest, highest, log_mel = _overview(sound, sampling_rate, end)
    axes[0].fill_between(seconds, lowest, highest, step="mid", color="0.3", linewidth=0.5)
    reach = max(1e-3, float(np.abs([lowest, highest]).max()))
    axes[0].set(ylabel="amplitude", ylim=(-1.05 * reach, 1.05 * reach))

    image = axes[1].imshow(
        log_mel.T,
        origin="lower",
        aspect="auto",
        extent=(0, seconds[0] + seconds[-1], -0.5, _MEL_BINS - 0.5),
        # Digital silence, -15.9, would take most of the colours.
        vmin=max(float(np.percentile(log_mel, 2)), -12.0),
    )
    ticks = [hz for hz in _TICKS_HZ if hz <= sampling_rate / 2]
    axes[1].set_yticks([_mel_bin(hz, sampling_rate) for hz in ticks], [f"{hz:g}" for hz in ticks])
    axes[1].set_ylabel("frequency (Hz)")
    figure.colorbar(image, cax=axes[1].inset_axes((1.01, 0, 0.01, 1)), label="log-mel")

    edges = [windows[0]["start"], *((w["start"] + w["end"]) / 2 for w in windows), end]
    for label, scores in curves.items():
        line = [scores[0], *scores, scores[-1]]
        axes[2].plot(edges, line, color=colours[label], label=_short(label))
    axes[2].set_ylabel("score")
    scores = [score for values in curves.values() for score in values]
    if min(scores) >= 0 and max(scores) <= 1:
        axes[2].set_ylim(-0.02, 1.02)
    axes[2].grid(alpha=0.3)
    axes[2].legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize="small", frameon=False)

    if events is not None:
        for event in events:
            row = rows.index(event["label"])
            axes[3].broken_barh(
                [(event["start"], event["end"] - event["start"])],
                (row - 0.35, 0.7),
                color=colours[event["label"]],
                edgecolor="white",  # events that touch stay apart
            )
        axes[3].set_ylim(max(1, len(rows)) - 0.4, -0.6)
        axes[3].set_yticks(range(len(rows)), [_short(label) for label in rows], fontsize="small")
        axes[3].set_ylabel("events")
        if not rows:
            axes[3].text(0.5, 0.5, "no events", transform=axes[3].transAxes, ha="center")
        axes[3].grid(alpha=0.3, axis="x")
        axes[3].set_axisbelow(True)
    axes[-1].set_xlim(0, end)
    _label_time(axes[-1], end)
    if title:
        figure.suptitle(title if len(title) <= 110 else f"…{title[-109:]}")
    if not isinstance(path_or_figure, Figure):
        figure.savefig(path_or_figure)
    return figure


def _curves(windows: Sequence[Mapping[str, Any]], classes: int) -> dict[str, list[float]]:
    """Scores over the windows of the classes that score highest anywhere, best first."""
    best: dict[str, float] = {}
    for window in windows:
        for entry in window["labels"]:
            best[entry["label"]] = max(entry["score"], best.get(entry["label"], entry["score"]))
    labels = sorted(best, key=lambda label: -best[label])[:classes]
    if not labels:
        raise ValueError("The answer's windows name no label: ask for a lower threshold.")
    by_window = [{e["label"]: e["score"] for e in window["labels"]} for window in windows]
    return {label: [scores.get(label, 0.0) for scores in by_window] for label in labels}


def _overview(
    sound: Any, sampling_rate: int, end: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The whole sound in at most ~1500 columns.

    Returns:
        their middles in seconds, the lowest and the highest sample in each, all (columns,), and
        their mean log-mel (columns, mel).
    """
    shift = frame_shift(sampling_rate)
    column = max(1, round(end * sampling_rate / _COLUMNS / shift)) * shift  # samples
    per_block = max(1, 60 * sampling_rate // column)  # columns in about a minute
    hop = per_block * column
    # A frame is longer than its step: blocks overlap, so that their last frames are whole.
    overlap = num_samples(1, sampling_rate) - shift
    lowest, highest, spectra = [], [], []
    for _, samples, is_last in cut_windows(stream_audio(sound, sampling_rate), hop + overlap, hop):
        columns = -(-len(samples) // column) if is_last else per_block
        needed = columns * column + overlap
        samples = np.pad(samples, (0, max(0, needed - len(samples))), mode="edge")[:needed]
        parts = samples[: columns * column].reshape(columns, column)
        lowest.append(parts.min(axis=1))
        highest.append(parts.max(axis=1))
        log_mel = kaldi_fbank(torch.from_numpy(samples), sampling_rate, _MEL_BINS).numpy()
        spectra.append(log_mel.reshape(columns, -1, _MEL_BINS).mean(axis=1))
    middles = (np.arange(sum(map(len, lowest))) + 0.5) * column / sampling_rate
    return middles, np.concatenate(lowest), np.concatenate(highest), np.concatenate(spectra)


def _mel_bin(hz: float, sampling_rate: int) -> float:
    """Where a frequency lies among the mel bins; see `kaldi_fbank`."""

    def mel(frequency: float) -> float:
        return 1127.0 * float(np.log(1.0 + frequency / 700.0))

    lowest, highest = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    return (mel(hz) - lowest) / (highest - lowest) * (_MEL_BINS + 1) - 1


def _label_time(axes: Any, end: float) -> None:
    if end < 120:
        axes.set_xlabel("time (s)")
        return
    step = next((step for step in _TIME_STEPS_S if end / step <= 10), _TIME_STEPS_S[-1])
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(_clock))
    axes.set_xlabel("time (h:min:s)" if end >= 3600 else "time (min:s)")


def _clock(seconds: float, _: Any = None) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{whole % 60:02d}"


def _short(label: str) -> str:
    return label if len(label) <= 32 else f"{label[:31]}…"
