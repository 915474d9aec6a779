"""The page per sound: what is drawn, where, and for sounds of any length."""

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

from modeling_ast import find_events
from scripts.inference.timeline import plot_timeline

RATE = 16000


def answer(seconds, hop=1.0):
    starts = np.arange(0, seconds - hop, hop)
    return {
        "windows": [
            {
                "start": start,
                "end": min(start + 2 * hop, seconds),
                "labels": [
                    {"label": "dog", "score": 0.9 if start > seconds / 2 else 0.1},
                    {"label": "rain", "score": 0.4},
                ],
            }
            for start in starts
        ]
    }


def test_page(tmp_path):
    """A tone in the second half: the spectrogram shows it at its frequency, the axes are real."""
    t = np.arange(10 * RATE) / RATE
    sound = (0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 5)).astype(np.float32)
    soundfile.write(tmp_path / "sound.wav", sound, RATE, subtype="FLOAT")
    found = answer(10.0)
    events = find_events(found["windows"])
    assert [event["label"] for event in events] == ["dog"]
    path = tmp_path / "page.png"
    figure = plot_timeline(tmp_path / "sound.wav", RATE, found, path, events=events, title="a dog")
    assert path.read_bytes().startswith(b"\x89PNG")
    waveform, spectrogram, curves, rows = figure.axes[:4]
    assert curves.get_xlim() == (0, 10)
    assert rows.get_xlabel() == "time (s)"
    assert waveform.get_ylim()[1] == pytest.approx(0.525, abs=0.01)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["dog", "rain"]
    assert [text.get_text() for text in rows.get_yticklabels()] == ["dog"]

    image = spectrogram.images[0].get_array()
    assert image.shape == (128, 1000)
    loudest = image[:, 600:].mean(axis=1).argmax()
    at_1000_hz = dict(
        zip(
            [text.get_text() for text in spectrogram.get_yticklabels()],
            spectrogram.get_yticks(),
            strict=True,
        )
    )["1000"]
    assert abs(loudest - at_1000_hz) <= 1
    assert image[:, 510:].mean() > image[:, :490].mean() + 2


def test_a_figure_and_an_array(tmp_path):
    """In a given figure, without events, and in columns of more than 10 ms."""
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 130 * RATE).astype(np.float32)
    figure = Figure()
    assert plot_timeline(sound, RATE, answer(130.0, hop=5.0), figure) is figure
    assert figure.axes[2].get_xlabel() == "time (min:s)"
    assert "2:00" in [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert figure.axes[1].images[0].get_array().shape == (128, 1445)  # 90 ms each
    x, low = figure.axes[0].collections[0].get_paths()[0].vertices.min(axis=0)
    assert x == pytest.approx(0, abs=0.1)
    assert low == pytest.approx(-0.1, abs=1e-4)


def test_no_windows():
    with pytest.raises(ValueError, match="call the pipeline with return_timestamps=True"):
        plot_timeline(np.zeros(RATE, np.float32), RATE, [{"score": 1, "label": "dog"}], "page.png")
