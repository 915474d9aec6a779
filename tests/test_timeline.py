"""The page per sound: what is drawn, where, and for sounds of any length."""

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

from modeling_ast.events_ast import EventRules
from scripts.inference.heard import Heard
from scripts.inference.timeline import plot_timeline

RATE = 16000


def heard(seconds, hop=1.0):
    starts = np.arange(0, seconds - hop, hop)
    spans = [(start, min(start + 2 * hop, seconds)) for start in starts]
    scores = np.array([[0.9 if start > seconds / 2 else 0.1, 0.4] for start in starts])
    return Heard.of_arrays(
        ["dog_bark", "rain"], spans, scores.astype(np.float32), np.empty((len(spans), 0))
    )


def test_page(tmp_path):
    """A tone in the second half: the spectrogram shows it at its frequency, the axes are real."""
    t = np.arange(10 * RATE) / RATE
    sound = (0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 5)).astype(np.float32)
    soundfile.write(tmp_path / "sound.wav", sound, RATE, subtype="FLOAT")
    found = heard(10.0)
    events = found.events(EventRules())
    assert [event.label for event in events] == ["dog_bark"]
    path = tmp_path / "page.png"
    figure = plot_timeline(tmp_path / "sound.wav", RATE, found, path, events=events, title="a dog")
    assert path.read_bytes().startswith(b"\x89PNG")
    waveform, spectrogram, curves, rows = figure.axes[:4]
    assert curves.get_xlim() == (0, 10)
    assert rows.get_xlabel() == "time (s)"
    assert waveform.get_ylim()[1] == pytest.approx(0.525, abs=0.01)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["dog bark", "rain"]
    assert [text.get_text() for text in rows.get_yticklabels()] == ["dog bark"]

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
    assert plot_timeline(sound, RATE, heard(130.0, hop=5.0), figure) is figure
    assert figure.axes[2].get_xlabel() == "time (min:s)"
    assert "2:00" in [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert figure.axes[1].images[0].get_array().shape == (128, 1445)  # 90 ms each
    x, low = figure.axes[0].collections[0].get_paths()[0].vertices.min(axis=0)
    assert x == pytest.approx(0, abs=0.1)
    assert low == pytest.approx(-0.1, abs=1e-4)


def test_a_long_sound_is_a_heat_map(tmp_path):
    """Hundreds of windows become rows of colours, not overlapping curves."""
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 300 * RATE).astype(np.float32)
    found = heard(300.0)
    figure = plot_timeline(sound, RATE, found, tmp_path / "page.png", found.events(EventRules()))
    heat = figure.axes[2]
    assert [text.get_text() for text in heat.get_yticklabels()] == ["dog bark", "rain"]
    (mesh,) = heat.collections
    assert not heat.lines
    np.testing.assert_allclose(mesh.get_array(), found.scores.T)
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges[0] == 0
    assert edges[-1] == 300
    # Windows of 2 s every second share their overlaps in the middle.
    np.testing.assert_allclose(edges[1:-1], np.arange(1, len(found.spans)) + 0.5)
    assert mesh.norm.vmin == 0
    assert mesh.norm.vmax == 1


def test_names_are_text(tmp_path):
    """A name with dollars is not a formula, and control characters do no harm."""
    names = ["a $x$ $\\frac{ _b", "\x1b]0;title\x07"]
    spans, scores = [(0.0, 2.0), (1.0, 3.0)], np.array([[0.9, 0.6], [0.2, 0.9]], np.float32)
    for windows in (1, 30):  # curves, heat map
        found = Heard.of_arrays(names, spans * windows, np.tile(scores, (windows, 1)), scores)
        events = found.events(EventRules())
        path = tmp_path / f"{windows}.png"
        title = "$1 and $\\frac{ of it \udcff.wav"
        figure = plot_timeline(np.zeros(3 * RATE, np.float32), RATE, found, path, events, title)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert figure._suptitle.get_text() == "$1 and $\\frac{ of it \\xff.wav"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["1.png", "30.png"]


def test_of_a_pipelines_answer():
    window = {"start": 0.0, "end": 1.0, "labels": [{"score": 0.75, "label": "dog"}]}
    other = {"start": 1.0, "end": 1.5, "labels": [{"score": 0.5, "label": "rain"}]}
    found = Heard.of_answer({"labels": [], "windows": [window, other]})
    assert found.scores.tolist() == [[0.75, 0.0], [0.0, 0.5]]
    assert found.duration == 1.5
    with pytest.raises(ValueError, match="call the pipeline with return_timestamps=True"):
        Heard.of_answer([{"score": 1, "label": "dog"}])
    with pytest.raises(ValueError, match="name no label: use a lower threshold"):
        Heard.of_answer({"windows": [{**window, "labels": []}]})
