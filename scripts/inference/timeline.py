"""Draws a page per sound: waveform, spectrogram, the top classes over time, events.

heard = classifier.hear("an_hour.flac")
plot_timeline("an_hour.flac", 16000, heard, "an_hour.png", events=heard.events(EventRules()))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from feature_extraction import kaldi_fbank, stream_audio
from feature_extraction.fbank_ast import frame_shift, mel_bin, num_samples
from modeling_ast.events_ast import Event, window_territories
from modeling_ast.pipeline_ast import cut_windows

from ..common.files import write_whole
from ..common.shown import clock, readable, shown
from .heard import Heard

_COLUMNS = 1500  # of the spectrogram, at most: about one per pixel
_MEL_BINS = 128
_CURVES = 5  # classes; more cannot be told apart in one picture
_CURVE_WINDOWS = 40  # with more windows than this, curves overlap: draw a heat map
_HEAT_ROWS = 12  # classes
_TIME_STEPS_S = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
_TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000, 16000)


def plot_timeline(
    sound: Any,
    sampling_rate: int,
    heard: Heard,
    path_or_figure: str | Path | Figure,
    events: Sequence[Event] | None = None,
    title: str = "",
) -> Figure:
    """Draw what was heard when.

    A short sound's best classes are curves, a long one's are rows of a heat map. The sound is read
    block by block, so ten hours take no more memory than ten minutes.

    Args:
        sound: a waveform (samples,) at `sampling_rate`, or anything else `stream_audio` reads.
        sampling_rate: of the waveform and of the spectrogram, in Hz.
        heard: what a classifier hears in it; for a pipeline's answer use `Heard.of_answer`.
        path_or_figure: where to draw: a PNG, PDF or SVG file, or a figure.
        events: drawn in rows below; None: no space for them.
        title: of the page.

    Returns:
        the figure.

    Raises:
        AudioDecodingError: if the sound cannot be read.
    """
    end = heard.duration
    is_long = len(heard.spans) > _CURVE_WINDOWS
    classes = [best.label for best in heard.highest(_HEAT_ROWS if is_long else _CURVES)]
    rows: list[str] = []
    if events is not None:
        best: dict[str, float] = {}
        for event in events:
            best[event.label] = max(event.score, best.get(event.label, event.score))
        rows = sorted(best, key=lambda label: -best[label])
        # Classes drawn above come first: both have the same order and colours.
        rows = [label for label in classes if label in best] + [r for r in rows if r not in classes]
    names = dict.fromkeys([*classes, *rows])
    colours = {label: f"C{index % 10}" for index, label in enumerate(names)}

    figure = path_or_figure if isinstance(path_or_figure, Figure) else Figure(dpi=100)
    middle = 0.4 + 0.17 * len(classes) if is_long else 1.6
    heights = [0.8, 2.0, middle]
    heights += [0.25 + 0.22 * max(1, len(rows))] if events is not None else []
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
    places = [mel_bin(hz, sampling_rate, _MEL_BINS) for hz in ticks]
    axes[1].set_yticks(places, [f"{hz:g}" for hz in ticks])
    axes[1].set_ylabel("frequency (Hz)")
    figure.colorbar(image, cax=axes[1].inset_axes((1.01, 0, 0.01, 1)), label="log-mel")

    draw = _draw_heat_map if is_long else _draw_curves
    draw(axes[2], heard, classes, colours)

    if events is not None:
        for event in events:
            row = rows.index(event.label)
            axes[3].broken_barh(
                [(event.start, event.end - event.start)],
                (row - 0.35, 0.7),
                color=colours[event.label],
                edgecolor="white",  # separates events that touch
            )
        axes[3].set_ylim(max(1, len(rows)) - 0.4, -0.6)
        _name_rows(axes[3], rows)
        axes[3].set_ylabel("events")
        if not rows:
            axes[3].text(0.5, 0.5, "no events", transform=axes[3].transAxes, ha="center")
        axes[3].grid(alpha=0.3, axis="x")
        axes[3].set_axisbelow(True)
    axes[-1].set_xlim(0, end)
    _label_time(axes[-1], end)
    if title:
        title = shown(title)
        title = title if len(title) <= 110 else f"…{title[-109:]}"
        figure.suptitle(title, parse_math=False)  # a name can contain $
    if not isinstance(path_or_figure, Figure):
        path = Path(path_or_figure)
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:] or "png"))
    return figure


def _draw_curves(axes: Any, heard: Heard, classes: Sequence[str], colours: dict[str, str]) -> None:
    spans = np.array(heard.spans)
    places = [spans[0, 0], *spans.mean(axis=1), spans[-1, 1]]
    chosen = heard.scores_of(classes)  # (windows, classes)
    for label, scores in zip(classes, chosen.T, strict=True):
        line = [scores[0], *scores, scores[-1]]
        axes.plot(places, line, color=colours[label], label=_short(label))
    axes.set_ylabel("score")
    if chosen.min() >= 0 and chosen.max() <= 1:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize="small", frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_heat_map(
    axes: Any, heard: Heard, classes: Sequence[str], colours: dict[str, str]
) -> None:
    territories = window_territories(heard.spans)
    edges = [*territories[:, 0], territories[-1, 1]]
    chosen = heard.scores_of(classes)  # (windows, classes)
    is_probability = chosen.min() >= 0 and chosen.max() <= 1
    image = axes.pcolormesh(
        edges,
        np.arange(len(classes) + 1) - 0.5,
        chosen.T,
        vmin=0 if is_probability else None,
        vmax=1 if is_probability else None,
        rasterized=True,
    )
    axes.set_ylim(len(classes) - 0.5, -0.5)
    _name_rows(axes, classes)
    for text, label in zip(axes.get_yticklabels(), classes, strict=True):
        text.set_color(colours[label])
    axes.figure.colorbar(image, cax=axes.inset_axes((1.01, 0, 0.01, 1)), label="score")


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    names = [_short(label) for label in labels]
    axes.set_yticks(range(len(labels)), names, fontsize="small", parse_math=False)


def _overview(
    sound: Any, sampling_rate: int, end: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The whole sound in about 1500 columns at most.

    Returns:
        their middles in seconds, the lowest and the highest sample in each, all (columns,), and
        their mean log-mel (columns, mel).
    """
    shift = frame_shift(sampling_rate)
    column = max(1, round(end * sampling_rate / _COLUMNS / shift)) * shift  # samples
    per_block = max(1, 60 * sampling_rate // column)  # columns in about a minute
    hop = per_block * column
    # A frame is longer than its hop: blocks overlap so that their last frames are whole.
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


def _label_time(axes: Any, end: float) -> None:
    if end < 120:
        axes.set_xlabel("time (s)")
        return
    step = next((step for step in _TIME_STEPS_S if end / step <= 10), _TIME_STEPS_S[-1])
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds)))
    axes.set_xlabel("time (h:min:s)" if end >= 3600 else "time (min:s)")


def _short(label: str) -> str:
    name = readable(label)
    return name if len(name) <= 32 else f"{name[:31]}…"
