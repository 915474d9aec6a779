"""The page of `ast-demo`: from a sound to labels, timeline, events and an explanation."""

import html
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feature_extraction import AudioDecodingError, load_audio
from modeling_ast import class_relevance, plot_relevance
from modeling_ast.events_ast import Event, EventRules

from ..common.shown import clock, readable, shown
from .classifier import Classifier
from .formats import FORMATS
from .heard import Heard
from .live import Line, Listener
from .live_sources import Resampler
from .options import DemoOptions, default_threshold

_KEPT_S = 900  # uploads; deleted within a minute after that
_SESSIONS = 20  # whose last sound stays in memory, for the slider
_TOP_LABELS = 5
_LIVE_ROWS = 50
_LIVE_HOP_S = 1.0
_LIVE_BLOCK_S = 0.25  # of sound at a time: what it takes to get here adds to the latency
_COLUMN_WIDTHS: list[str | int] = ["46%", "34%", "20%"]  # no score out of sight on a phone
_NAMED_SOUNDS = 12  # of those that the model knows, before "and … more"
_EVENT_COLUMNS = {"start": "double", "end": "double", "label": "string", "score": "float"}
# On a phone, class names wrap instead of being cut off, pictures keep a readable size and scroll,
# and all tabs fit in a row.
_CSS = """
@media (max-width: 640px) {
    #timeline, #explanation { overflow-x: auto; }
    #timeline img, #explanation img { min-width: 720px; max-width: none; }
}
.tab-container button { padding: 0 8px !important; }  /* also those that gradio measures */
#labels .text { white-space: normal; overflow-wrap: anywhere; }
#labels .label-text, #events td, #events th { white-space: normal !important; }
#events .cell-wrap span { white-space: normal; overflow: visible; text-overflow: clip; }
"""


@dataclass
class Listened:
    """A sound and what the model hears in it."""

    waveform: np.ndarray  # (samples,) at the model's rate
    heard: Heard

    @property
    def is_long(self) -> bool:
        """Whether it is longer than two windows, so that a mean over all of it says little."""
        start, end = self.heard.spans[0]
        return self.heard.duration > 2 * (end - start)

    @property
    def best_label(self) -> str:
        """The label that the page names first."""
        best = self.heard.highest(1) if self.is_long else self.heard.labels(1)
        return best[0].label


def listen(classifier: Classifier, path: str | Path, max_minutes: float) -> Listened:
    """Classify a file, window by window.

    Raises:
        AudioDecodingError: if it cannot be read; the message has its name, not its folder.
        ValueError: if it is longer than `max_minutes`; no more than that is decoded.
    """
    rate = classifier.sampling_rate
    longest = max_minutes * 60
    try:
        waveform = load_audio(str(path), rate, duration=longest + 1)
    except AudioDecodingError as error:
        raise AudioDecodingError(str(error).replace(str(path), Path(path).name)) from error
    if len(waveform) > longest * rate:
        raise ValueError(
            f"{Path(path).name} is longer than {max_minutes:g} minutes, the limit of this page. "
            "Cut it, or use ast-classify, which takes any length."
        )
    return Listened(waveform, classifier.hear(waveform))


def draw_timeline(classifier: Classifier, sound: Listened, events: Sequence[Event]) -> Any:
    """Waveform, spectrogram, the top classes over time and events, as a matplotlib figure."""
    from matplotlib.figure import Figure

    from .timeline import plot_timeline

    rate = classifier.sampling_rate
    return plot_timeline(sound.waveform, rate, sound.heard, Figure(dpi=100), events)


def can_explain(classifier: Classifier) -> bool:
    """Whether the model's attention is available: not from ONNX, and not with merged tokens."""
    if classifier.model_name.endswith(".onnx"):
        return False
    return not any(classifier.pipeline.model.config.merged_tokens)


def explain(classifier: Classifier, sound: Listened, path: str | Path) -> str:
    """Draw the evidence for the best label, in the window where it scores highest, into a PNG.

    Returns:
        which label and window that is.
    """
    label, model = sound.best_label, classifier.pipeline.model
    start, end = sound.heard.best_window(label)
    rate = classifier.sampling_rate
    samples = sound.waveform[round(start * rate) : round(end * rate)]
    features = next(classifier.windows(samples)).content
    input_values = features["input_values"].to(model.device)
    mask = features.get("attention_mask")
    mask = None if mask is None else mask.to(model.device)
    index = classifier.label_names.index(label)
    relevance = class_relevance(model, input_values, index, mask)[0]
    bank = classifier.pipeline.feature_extractor.filterbank
    frames = max(1, bank.num_frames(len(samples)))  # without padding
    caption = f"Evidence for “{readable(label)}”, {start:.1f} s to {end:.1f} s"
    plot_relevance(input_values[0, :frames], relevance[:, :frames], path, caption, bank)
    return caption


class LiveSession:
    """A visitor's microphone: sound comes in bit by bit, and a row stands for each event.

    Args:
        classifier: the model.
        rate: of the microphone, in Hz.
    """

    def __init__(self, classifier: Classifier, rate: int):
        self.rate = rate
        self.events: deque[tuple[Event, bool]] = deque(maxlen=_LIVE_ROWS)  # and whether it is over
        length, _ = classifier.window_samples()
        window_s = length / classifier.sampling_rate
        hop_s = min(_LIVE_HOP_S, window_s)
        self._listener = Listener(
            classifier,
            EventRules(default_threshold(classifier.model_name)),
            hop_s,
            3 * window_s + 3,
        )
        self._resampler = Resampler(rate, classifier.sampling_rate)

    def hear(self, samples: np.ndarray) -> bool:
        """(samples,) or (samples, channels), whole numbers or floats, as a browser sends them.

        Returns whether there is something new to show. After `end`, nothing is heard.
        """
        if self._listener.ring.is_closed:
            return False
        full_scale = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
        mono = samples.reshape(len(samples), -1).mean(axis=1, dtype=np.float32) / full_scale
        self._listener.ring.write(self._resampler(mono))
        return self._show_windows()

    def end(self) -> None:
        """The visitor has stopped: hear the rest, and end all events."""
        self._listener.ring.close()
        self._show_windows()
        self._show(self._listener.finish())

    def _show_windows(self) -> bool:
        windows = self._listener.figures.windows
        while self._listener.is_ready:
            self._show(self._listener.step())
        return self._listener.figures.windows > windows

    def _show(self, lines: Iterable[Line]) -> None:
        for line in lines:
            begun = [i for i, (event, _) in enumerate(self.events) if _same(event, line.event)]
            if line.is_over and begun:
                self.events[begun[0]] = (line.event, True)
            else:
                self.events.appendleft((line.event, line.is_over))

    @property
    def rows(self) -> list[list[str]]:
        """When, sound, score; the newest first."""
        return [
            [
                f"{clock(e.start, 1)} – {clock(e.end, 1) if is_over else 'now'}",
                readable(e.label),
                f"{e.score:.0%}",
            ]
            for e, is_over in self.events
        ]

    @property
    def figures(self) -> str:
        """How listening goes."""
        return str(self._listener.figures)


def _same(one: Event, other: Event) -> bool:
    return (one.start, one.label) == (other.start, other.label)


def write_example(folder: str | Path) -> Path:
    """A made-up sound to try the page with: 8 s of rain, then 8 s of a tune."""
    import soundfile

    rate, random = 16000, np.random.default_rng(0)
    time = np.arange(8 * rate) / rate
    rain = 0.1 * random.standard_normal(len(time))
    pitch = 220 * 2 ** (time // 0.5 % 7 / 12)  # Hz, of plucked strings
    tune = sum(0.2 / n * np.sin(2 * np.pi * n * pitch * time) for n in range(1, 6))
    path = Path(folder, "rain_and_tune.wav")
    soundfile.write(path, np.concatenate([rain, tune * np.exp(-5 * (time % 0.5))]), rate)
    return path


def describe_model(classifier: Classifier) -> str:
    """Which model this is and which sounds it knows, as Markdown."""
    names = [readable(name) for name in classifier.label_names]
    # Evenly spread: AudioSet's first are all voices. A name can contain commas.
    some = min(len(names), _NAMED_SOUNDS)
    known = " · ".join(names[number * len(names) // some] for number in range(some))
    if some < len(names):
        known += f" and {len(names) - some} more"
    path = Path(classifier.model_name).resolve()
    name = shown(path.parent.name if path.name == "checkpoint" else path.name)
    return html.escape(f"{name} knows {len(names)} sounds: {known}.")


def build_app(
    classifier: Classifier,
    folder: str | Path,
    max_minutes: float = DemoOptions.max_minutes,
    title: str = "What does it sound like?",
    tabs: Sequence[tuple[str, Callable[[], None]]] = (),
    script: str = "",
) -> Any:
    """The page, as `gradio.Blocks`.

    Args:
        classifier: the model.
        folder: for the files that the page offers; gradio deletes old ones if it is gradio's own,
            `$GRADIO_TEMP_DIR`.
        max_minutes: longest sound.
        title: of the page.
        tabs: more tabs, next to those that name sounds: titles, and functions that build them.
        script: JavaScript to run once the page has loaded.

    Raises:
        ValueError: if gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            "The page needs the package gradio, which is not installed. In this project's folder, "
            "run: pip install '.[demo]'"
        ) from error
    import matplotlib

    matplotlib.use("agg")  # figures are drawn in threads, which cannot open windows
    explains = can_explain(classifier)

    start_threshold = default_threshold(classifier.model_name)

    def of_events(sound: Listened, threshold: float) -> list[Any]:
        events = sound.heard.events(EventRules(threshold))
        table = [
            [f"{clock(e.start, 1)} – {clock(e.end, 1)}", readable(e.label), f"{e.score:.0%}"]
            for e in events
        ]
        path = Path(tempfile.mkdtemp(dir=folder), "events.csv")
        write = FORMATS["csv"].table
        assert write is not None
        write(path, _EVENT_COLUMNS, (event._asdict() for event in events))
        figure = draw_timeline(classifier, sound, events)
        label = "Heard when" if table else "No sound reaches the threshold: lower it to see more"
        rows = gradio.update(value=table, label=label)
        return [figure, rows, gradio.update(value=str(path), interactive=True)]

    def new_sound(path: str | None, threshold: float) -> list[Any]:
        message, sound = "", None
        if path is not None:
            try:
                sound = listen(classifier, path, max_minutes)
            except ValueError as error:
                message = shown(error)
        shown_message = gradio.update(value=message, visible=bool(message))
        hint = gradio.update(visible=sound is None and not message)
        if sound is None:
            no_file = gradio.update(value=None, interactive=False)
            hidden = gradio.update(visible=False)
            empty = [None] * 4 + [no_file] + ([None] if explains else [])
            return [shown_message, hint, hidden, *empty]
        scores = sound.heard.highest() if sound.is_long else sound.heard.labels()
        labels = gradio.update(
            value={readable(label): score for score, label in scores},
            label="Highest score at any time" if sound.is_long else "Whole sound",
        )
        results = gradio.update(visible=True)
        outputs = [shown_message, hint, results, sound, labels, *of_events(sound, threshold)]
        if explains:
            image = Path(tempfile.mkdtemp(dir=folder), "explanation.png")
            explain(classifier, sound, image)
            outputs.append(str(image))
        return outputs

    def new_threshold(sound: Listened | None, threshold: float) -> list[Any]:
        return [gradio.skip()] * 3 if sound is None else of_events(sound, threshold)

    def example() -> str:
        return str(write_example(tempfile.mkdtemp(dir=folder)))

    def name_tab() -> None:
        gradio.Markdown(f"# {html.escape(title)}\n{describe_model(classifier)}", elem_id="model")
        state = gradio.State(time_to_live=_KEPT_S)
        with gradio.Row():
            sound = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Sound",
                editable=False,
                buttons=[],
                elem_id="sound",
                scale=4,
            )
            try_example = gradio.Button("Try a made-up example", elem_id="example", scale=1)
        hint = gradio.Markdown(
            f"Upload a sound of up to {max_minutes:g} minutes, record one, or try the example. It "
            "is not kept. You will see what the model hears and when, and where in the "
            "spectrogram it looks.",
            elem_id="hint",
        )
        # Plain text, because it may contain a file name.
        message = gradio.Textbox(
            label="This sound cannot be classified", visible=False, elem_id="message"
        )
        with gradio.Column(visible=False) as results:
            labels = gradio.Label(
                num_top_classes=_TOP_LABELS, label="Whole sound", elem_id="labels"
            )
            threshold = gradio.Slider(
                0.05,
                0.95,
                value=start_threshold,
                step=0.05,
                label="Threshold: the score that makes an event",
            )
            with gradio.Row():
                table = gradio.Dataframe(
                    headers=["when", "sound", "score"],
                    datatype=["str", "str", "str"],
                    label="Heard when",
                    interactive=False,
                    wrap=True,
                    column_widths=_COLUMN_WIDTHS,
                    scale=4,
                    elem_id="events",
                )
                download = gradio.DownloadButton(
                    "Download as CSV", interactive=False, elem_id="download"
                )
            timeline = gradio.Plot(show_label=False, elem_id="timeline")
            image = gradio.Image(
                show_label=False,
                type="filepath",
                interactive=False,
                visible=explains,
                buttons=[],
                elem_id="explanation",
            )
        outputs = [message, hint, results, state, labels, timeline, table, download]
        if explains:
            outputs.append(image)
        sound.change(new_sound, [sound, threshold], outputs, api_visibility="private")
        try_example.click(example, None, sound, api_visibility="private")
        threshold.change(
            new_threshold,
            [state, threshold],
            [timeline, table, download],
            trigger_mode="always_last",
            api_visibility="private",
        )

    def hear_live(
        chunk: tuple[int, np.ndarray] | None, session: LiveSession | None
    ) -> tuple[Any, Any, Any]:
        if chunk is None:
            return session, gradio.skip(), ""
        rate, samples = chunk
        if session is None or session.rate != rate:
            session = LiveSession(classifier, rate)
        if session.hear(samples):
            return session, session.rows, session.figures
        return session, gradio.skip(), gradio.skip()

    def end_live(session: LiveSession | None) -> tuple[Any, Any]:
        if session is None:
            return gradio.skip(), gradio.skip()
        session.end()
        return session.rows, session.figures

    def live_tab() -> None:
        gradio.Markdown(
            "Press record and allow the microphone: a row appears as a sound begins. Nothing is "
            "kept but the last seconds."
        )
        session = gradio.State(time_to_live=_KEPT_S)
        microphone = gradio.Audio(
            sources=["microphone"],
            type="numpy",
            streaming=True,
            label="Microphone",
            elem_id="microphone",
        )
        table = gradio.Dataframe(
            headers=["when", "sound", "score"],
            datatype=["str", "str", "str"],
            label="Heard",
            interactive=False,
            wrap=True,
            column_widths=_COLUMN_WIDTHS,
            elem_id="live_events",
        )
        figures = gradio.Markdown(elem_id="live_figures")
        microphone.stream(
            hear_live,
            [microphone, session],
            [session, table, figures],
            stream_every=_LIVE_BLOCK_S,
            show_progress="hidden",
            api_visibility="private",
            concurrency_id="live",  # with start and end: one after the other, in order
        )
        microphone.stop_recording(
            end_live,
            session,
            [table, figures],
            show_progress="hidden",
            api_visibility="private",
            concurrency_id="live",
        )
        microphone.start_recording(
            lambda: None, None, session, api_visibility="private", concurrency_id="live"
        )

    with gradio.Blocks(
        title=title, analytics_enabled=False, delete_cache=(60, _KEPT_S), fill_width=True
    ) as app:
        with gradio.Tabs():
            for name, build in [("Name", name_tab), ("Live", live_tab), *tabs]:
                with gradio.Tab(name):
                    build()
        if script:
            app.load(None, js=script)
    return app


def serve(
    classifier: Classifier,
    host: str = DemoOptions.host,
    port: int | None = None,
    max_minutes: float = DemoOptions.max_minutes,
    max_megabytes: int = DemoOptions.max_megabytes,
    tabs: Callable[[Path], Sequence[tuple[str, Callable[[], None]]]] | None = None,
    script: str = "",
    css: str = "",
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then delete what was uploaded.

    `tabs` gets the folder for files that the page offers; see `build_app`.
    """
    with tempfile.TemporaryDirectory(prefix="ast-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_RUN_HISTORY"] = "False"
        more = () if tabs is None else tabs(Path(folder))
        app = build_app(classifier, folder, max_minutes, tabs=more, script=script)
        app.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_megabytes}mb",
            state_session_capacity=_SESSIONS,
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=_CSS + css,
        )
