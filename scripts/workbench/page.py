"""The tabs Find, Review and Teach of `ast-demo`: the loop of `bench.py`, to see and hear.

A card shows a window: its spectrogram with axes, which plays from where you click, and the
browser's own player.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_extraction import AudioDecodingError, kaldi_fbank, load_audio
from feature_extraction.fbank_ast import mel_bin

from ..common.shown import clock, readable, shown
from .bench import Progress, Stretch, Workbench, pack
from .calibration import Wish
from .marks import BACKGROUND
from .queues import QUEUES

_AROUND_S = 1.0
_RATE = 16000  # for drawing and playing
_MEL_BINS = 128
_TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000)
_PLACE = (0.09, 0.2, 0.89, 0.74)  # of the spectrogram in its picture: left, bottom, width, height
_KEYED_LABELS = 9
_FOUND = 12
_QUEUES = {
    "where it is unsure": "uncertain",
    "where marks contradict": "disputed",
    "unlike everything marked": "novel",
    "a label's highest scores": "likely",
    "anything": "random",
}
assert set(_QUEUES.values()) == set(QUEUES)

CSS = """
.card { display: flex; flex-direction: column; gap: 4px; margin-bottom: 14px; max-width: 640px; }
.card .picture { position: relative; cursor: pointer; }
.card img { width: 100%; display: block; }
.card .needle { position: absolute; width: 2px; background: #e33; opacity: 0;
  pointer-events: none; }
.card audio { width: 100%; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
  gap: 12px; }
.card .name { overflow-wrap: anywhere; font-size: 0.9em; }
"""

# Plays from where you click; a needle follows. One card at a time.
_PLAYER = """
element.addEventListener('click', event => {
  const picture = event.target.closest('.picture');
  if (!picture) return;
  const card = picture.closest('.card'), audio = card.querySelector('audio');
  const box = picture.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - picture.dataset.left)
    / picture.dataset.width;
  audio.currentTime = Math.min(Math.max(share, 0), 0.999) * audio.duration;
  audio.play();
});
element.addEventListener('play', event => {
  for (const other of document.querySelectorAll('.card audio'))
    if (other !== event.target) other.pause();
  const picture = event.target.closest('.card').querySelector('.picture');
  const needle = picture.querySelector('.needle');
  needle.style.opacity = 1;
  const move = () => {
    const share = event.target.currentTime / event.target.duration;
    needle.style.left = 100 * (+picture.dataset.left + share * picture.dataset.width) + '%';
    if (!event.target.paused) requestAnimationFrame(move);
  };
  move();
}, true);
"""

# Keys of the Review tab; not while typing, and not with Ctrl or Alt.
KEYS = """
() => {
  if (window.astKeys) return;
  window.astKeys = true;
  const buttons = {a: 'accept', b: 'background', s: 'skip', u: 'undo'};
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const typing = event.target.closest('input:not([type=radio]):not([type=checkbox]), textarea');
    const review = document.getElementById('review');
    if (typing || !review || !review.offsetParent) return;
    const press = element => element && !element.disabled && element.click();
    if (event.key === ' ') {
      const audio = review.querySelector('audio');
      if (audio) audio.paused ? audio.play() : audio.pause();
    } else if (buttons[event.key.toLowerCase()]) {
      press(document.getElementById(buttons[event.key.toLowerCase()]));
    } else if (event.key >= '1' && event.key <= '9') {
      press(document.getElementById('label' + event.key));
    } else return;
    event.preventDefault();
  });
}
"""


def spectrogram(samples: np.ndarray, rate: int, start: float) -> bytes:
    """A PNG with axes: seconds of the recording, and kHz.

    Args:
        samples: (samples,).
        rate: in Hz.
        start: of the samples in their recording, in seconds.
    """
    from matplotlib.figure import Figure

    # Shorter than one 25 ms frame would show nothing: pad with silence.
    padded = np.pad(samples, (0, max(0, rate // 20 - len(samples)))).astype(np.float32)
    log_mel = kaldi_fbank(torch.from_numpy(padded), rate, _MEL_BINS).numpy()
    figure = Figure(figsize=(6.4, 2.6), dpi=100)
    axes = figure.add_axes(_PLACE)
    end = start + len(samples) / rate
    axes.imshow(
        log_mel.T,
        origin="lower",
        aspect="auto",
        extent=(start, end, 0, _MEL_BINS),
        cmap="magma",
        vmin=max(float(np.percentile(log_mel, 2)), -12.0),
    )
    ticks = [hz for hz in _TICKS_HZ if hz <= rate / 2]
    axes.set_yticks(
        [mel_bin(hz, rate, _MEL_BINS) for hz in ticks], [f"{hz / 1000:g}" for hz in ticks]
    )
    axes.set_ylabel("kHz")
    axes.set_xlabel("s")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def card(bench: Workbench, stretch: Stretch, number: int | None = None) -> str:
    """A window as HTML: name, spectrogram, player; or what is wrong with its recording."""
    import soundfile

    score = "" if np.isnan(stretch.score) else f" · {stretch.score:.2f}"
    lead = "" if number is None else f"{number}. "
    span = f"{clock(stretch.start, 1)} – {clock(stretch.end, 1)}"
    name = html.escape(f"{lead}{shown(Path(stretch.file).name)} · {span}{score}")
    try:
        samples, rate = bench.read(stretch, _AROUND_S)
        if rate != _RATE:
            samples = load_audio({"array": samples, "sampling_rate": rate}, _RATE)
    except ValueError as error:
        return (
            f'<div class="card"><div class="name">{name}<br>{html.escape(shown(error))}</div></div>'
        )
    first = max(0.0, stretch.start - _AROUND_S)
    picture = base64.b64encode(spectrogram(samples, _RATE, first)).decode()
    sound = io.BytesIO()
    soundfile.write(sound, samples, _RATE, format="FLAC")
    audio = base64.b64encode(sound.getvalue()).decode()
    left, bottom, width, height = _PLACE
    return (
        f'<div class="card" data-window="{stretch.window}"><div class="name">{name}</div>'
        f'<div class="picture" data-left="{left}" data-width="{width}">'
        f'<img alt="spectrogram" src="data:image/png;base64,{picture}">'
        f'<div class="needle" style="top:{100 * (1 - bottom - height)}%;height:{100 * height}%">'
        "</div></div>"
        f'<audio controls preload="auto" src="data:audio/flac;base64,{audio}"></audio></div>'
    )


def describe_progress(progress: Progress) -> str:
    """A lesson's result, as Markdown."""
    report = progress.report
    what = "Accuracy" if "accuracy" in report else "Mean average precision"
    figure = report.get("accuracy", report["mean_average_precision"])
    lines = [
        f"**{what} {figure:.2f}** on {report['held_out_windows']} windows of held-out recordings, "
        f"from {report['marked_windows']} marked windows of "
        f"{report['marked_recordings']} recordings, in {report['seconds']:.1f} s."
    ]
    if not report["held_out_windows"]:
        lines = [
            f"Taught from {report['marked_windows']} marked windows. Mark each label in at least "
            "two recordings: then some can be held out to tell how good this is."
        ]
    if progress.marks_since is not None:
        before = progress.figure_before
        was = "" if before is None or np.isnan(before) else f" It was {before:.2f}."
        lines.append(
            f"{progress.marks_since} more marks than last time; {progress.changed} windows of the "
            f"index now have another best label.{was}"
        )
    return "\n\n".join(lines)


def progress_table(progress: Progress) -> list[list[Any]]:
    """Label, recordings, average precision, threshold, precision with its interval, a note."""
    precisions = progress.report["average_precision"]
    rows = []
    for threshold in progress.lesson.thresholds:
        low, high = threshold.precision_interval
        rows.append(
            [
                readable(threshold.label),
                threshold.recordings,
                _rounded(precisions[threshold.label]),
                _rounded(threshold.value),
                f"{low:.2f} – {high:.2f}",
                threshold.message,
            ]
        )
    return rows


def _rounded(value: float) -> Any:
    return "" if np.isnan(value) else round(value, 2)


def read_upload(
    path: str | None, rate: int, max_minutes: float, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """An uploaded sound, or a stretch of it; nothing beyond the limit is decoded.

    Raises:
        ValueError: if there is none, if it cannot be read, is too long, or ends before it begins;
            messages have the file's name, not its folder.
    """
    if path is None:
        raise ValueError("Upload or record a sound first.")
    if end is not None and end <= start:
        raise ValueError(f"It ends at {end:g} s, before it begins ({start:g} s).")
    longest = max_minutes * 60
    duration = longest + 1 if end is None else min(end - start, longest + 1)
    name = Path(path).name
    try:
        waveform = load_audio(path, rate, start, duration)
    except AudioDecodingError as error:
        raise ValueError(str(error).replace(path, name)) from error
    if len(waveform) > longest * rate:
        raise ValueError(f"{name} is longer than {max_minutes:g} minutes, the limit of this page.")
    return waveform


def tabs(
    bench: Workbench, folder: str | Path, max_minutes: float
) -> list[tuple[str, Callable[[], None]]]:
    """Names and builders of the tabs, to be called inside `gradio.Tab`.

    Args:
        bench: what they work on.
        folder: for checkpoints to download.
        max_minutes: longest upload.
    """
    return [
        ("Find", lambda: _find_tab(bench, max_minutes)),
        ("Review", lambda: _review_tab(bench)),
        ("Teach", lambda: _teach_tab(bench, Path(folder), max_minutes)),
    ]


def _find_tab(bench: Workbench, max_minutes: float) -> None:
    import gradio

    index = bench.index
    gradio.Markdown(
        f"The index holds {len(index)} windows of {len(index.sounds)} recordings. Give an example "
        "of what you are looking for to find the most similar windows. Check those that are right, "
        "name them, and mark them.",
        elem_id="find_hint",
    )
    with gradio.Row():
        example = gradio.Audio(
            sources=["upload", "microphone"], type="filepath", label="Example", editable=True,
            buttons=[], elem_id="example_sound", scale=3,
        )  # fmt: skip
        with gradio.Column(scale=2):
            start = gradio.Number(value=0, minimum=0, label="from (s)", elem_id="find_from")
            end = gradio.Number(value=0, minimum=0, label="to (s); 0: its end")
            search = gradio.Button("Find", variant="primary", elem_id="find")
    message = gradio.Textbox(label="Nothing was found", visible=False, elem_id="find_message")
    cards = gradio.HTML(js_on_load=_PLAYER, elem_id="found")
    state = gradio.State([])
    with gradio.Row(visible=False) as marking:
        chosen = gradio.CheckboxGroup(label="Right ones", elem_id="right_ones", scale=3)
        name = gradio.Textbox(label="What they are", elem_id="find_label", scale=2)
        mark = gradio.Button("Mark them", elem_id="mark_found", scale=1)
    done = gradio.Markdown(elem_id="find_done")

    def find(path: str | None, first: float | None, last: float | None) -> list[Any]:
        try:
            rate = bench.classifier.sampling_rate
            waveform = read_upload(path, rate, max_minutes, first or 0.0, last or None)
            found = bench.find(bench.classifier.hear(waveform).embeddings, _FOUND)
        except ValueError as error:
            return [
                gradio.update(value=shown(error), visible=True),
                "",
                [],
                gradio.update(visible=False),
                gradio.update(),
                "",
            ]
        numbers = [str(number) for number in range(1, len(found) + 1)]
        pictures = "".join(card(bench, one, n) for n, one in enumerate(found, start=1))
        return [
            gradio.update(visible=False),
            f'<div class="cards">{pictures}</div>',
            found,
            gradio.update(visible=True),
            gradio.update(choices=numbers, value=[]),
            "",
        ]

    def mark_all(found: Sequence[Stretch], numbers: Sequence[str], label: str) -> list[Any]:
        if not numbers:
            return ["Check the right ones first.", gradio.update()]
        try:
            for number in numbers:
                bench.mark(found[int(number) - 1], label)
        except (ValueError, OSError) as error:
            return [html.escape(shown(error)), gradio.update()]
        count = len(bench.book.marks)
        return [
            f"Marked {len(numbers)} as {html.escape(shown(label))}. {count} marks in all, in "
            f"`{html.escape(shown(bench.book.path))}`.",
            gradio.update(value=[]),
        ]

    search.click(
        find, [example, start, end], [message, cards, state, marking, chosen, done],
        api_visibility="private",
    )  # fmt: skip
    mark.click(mark_all, [state, chosen, name], [done, chosen], api_visibility="private")


def _review_tab(bench: Workbench) -> None:
    import gradio

    with gradio.Column(elem_id="review"):
        with gradio.Row():
            queue = gradio.Dropdown(
                list(_QUEUES), value=next(iter(_QUEUES)), label="Hear next", elem_id="queue"
            )
            label = gradio.Dropdown(
                bench.labels, value=None, label="Label", visible=False, elem_id="queue_label"
            )
            start = gradio.Button("Start", variant="primary", elem_id="start")
        status = gradio.Markdown(
            "Press Start to hear one window after another, and say what each is. The recordings "
            "stay as they are: marks are rows of a table.",
            elem_id="review_status",
        )
        shown_card = gradio.HTML(js_on_load=_PLAYER, elem_id="review_card")
        with gradio.Row():
            # On a phone there are two in a row.
            wide: dict[str, Any] = {"interactive": False, "min_width": 130}
            accept = gradio.Button("Accept (A)", elem_id="accept", **wide)
            background = gradio.Button("Background (B)", elem_id="background", **wide)
            skip = gradio.Button("Skip (S)", elem_id="skip", **wide)
            undo = gradio.Button("Undo (U)", elem_id="undo", min_width=130)
        with gradio.Row():
            others = [
                gradio.Button(visible=False, elem_id=f"label{number + 1}", min_width=130)
                for number in range(_KEYED_LABELS)
            ]
        with gradio.Row():
            other = gradio.Textbox(
                label="Another label (several: joined by ;)", elem_id="other_label", scale=3
            )
            add = gradio.Button("Mark", elem_id="mark_other", interactive=False, scale=1)
        gradio.Markdown("Keys: space plays, A accepts, 1–9 choose a label, B, S, U. What you mark "
                        "is saved at once.")  # fmt: skip
        current = gradio.State(None)
        outputs = [
            current,
            status,
            shown_card,
            accept,
            background,
            skip,
            add,
            label,
            *others,
            other,
        ]

    def show(stretch: Stretch | None, note: str = "") -> list[Any]:
        count = len(bench.book.marks)
        names = bench.labels
        keyed = [
            gradio.update(value=f"{readable(names[i])} ({i + 1})", visible=True)
            if i < len(names)
            else gradio.update(visible=False)
            for i in range(_KEYED_LABELS)
        ]
        can = gradio.update(interactive=stretch is not None)
        choices = gradio.update(choices=names)
        if stretch is None:
            text = note or "Nothing is left in this queue: choose another, or teach."
            return [None, text, "", gradio.update(value="Accept (A)", interactive=False), can, can,
                    can, choices, *keyed, ""]  # fmt: skip
        suggestion = stretch.suggestion
        text = f"{count} marks. "
        if suggestion is None:
            text += "What is it? (No suggestion: nothing has been taught yet.)"
        else:
            text += f"It sounds like **{html.escape(readable(suggestion))}** ({stretch.score:.2f})."
        accepted = gradio.update(
            value="Accept (A)" if suggestion is None else f"{readable(suggestion)} (A)",
            interactive=suggestion is not None,
        )
        return [stretch, f"{note} {text}", card(bench, stretch), accepted, can, can, can, choices,
                *keyed, ""]  # fmt: skip

    def following(kind: str, of: str | None, note: str = "") -> list[Any]:
        try:
            return show(bench.next(_QUEUES[kind], of), note)
        except ValueError as error:
            return show(None, html.escape(shown(error)))

    def marked(stretch: Stretch | None, name: str, kind: str, of: str | None) -> list[Any]:
        if stretch is None:
            return following(kind, of)
        try:
            bench.mark(stretch, name)
        except (ValueError, OSError) as error:
            return show(stretch, html.escape(shown(error)))
        return following(kind, of, f"Marked as {html.escape(shown(name))}.")

    def as_suggested(stretch: Stretch | None, kind: str, of: str | None) -> list[Any]:
        return marked(stretch, (stretch.suggestion if stretch else None) or "", kind, of)

    def as_nothing(stretch: Stretch | None, kind: str, of: str | None) -> list[Any]:
        return marked(stretch, BACKGROUND, kind, of)

    def skipped(stretch: Stretch | None, kind: str, of: str | None) -> list[Any]:
        if stretch is not None:
            bench.skip(stretch)
        return following(kind, of)

    def undone(kind: str, of: str | None) -> list[Any]:
        try:
            undone = bench.undo()
        except (ValueError, OSError) as error:
            return following(kind, of, html.escape(shown(error)))
        if undone is None:
            return following(kind, of, "There is nothing to undo.")
        mark, back = undone
        note = html.escape(f"Took back: {shown(mark.label)}, {shown(Path(mark.file).name)}.")
        return following(kind, of, note) if back is None else show(back, note)

    def as_number(number: int) -> Callable[..., list[Any]]:
        def handler(stretch: Stretch | None, kind: str, of: str | None) -> list[Any]:
            names = bench.labels
            if number >= len(names):
                return following(kind, of)
            return marked(stretch, names[number], kind, of)

        return handler

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    where = [queue, label]
    queue.change(
        lambda kind: gradio.update(visible=_QUEUES[kind] == "likely", choices=bench.labels),
        queue, label, **private,
    )  # fmt: skip
    start.click(following, where, outputs, **private)
    accept.click(as_suggested, [current, *where], outputs, **private)
    background.click(as_nothing, [current, *where], outputs, **private)
    skip.click(skipped, [current, *where], outputs, **private)
    undo.click(undone, where, outputs, **private)
    add.click(marked, [current, other, *where], outputs, **private)
    other.submit(marked, [current, other, *where], outputs, **private)
    for number, button in enumerate(others):
        button.click(as_number(number), [current, *where], outputs, **private)


def _teach_tab(bench: Workbench, folder: Path, max_minutes: float) -> None:
    import gradio

    gradio.Markdown(
        "Mark some windows in Find or Review, each label in at least two recordings; then teach. "
        "It takes seconds. The result is an ordinary checkpoint, for the pipeline, ast-classify "
        "and ONNX."
    )
    with gradio.Row():
        wish = gradio.Dropdown(
            [("the highest F1", "f1")]
            + [(f"a precision of {p:g} or more", f"precision={p:g}") for p in (0.8, 0.9, 0.95)],
            value="f1", label="Thresholds for", elem_id="wish",
        )  # fmt: skip
        button = gradio.Button("Teach", variant="primary", elem_id="teach")
    outcome = gradio.Markdown(elem_id="outcome")
    table = gradio.Dataframe(
        headers=["label", "recordings", "average precision", "threshold", "its precision (90 %)",
                 "note"],
        column_widths=["110px", "120px", "110px", "110px", "120px", "320px"],  # a phone scrolls
        interactive=False, wrap=True, visible=False, elem_id="taught_table",
    )  # fmt: skip
    download = gradio.DownloadButton(
        "Download the checkpoint", interactive=False, elem_id="download_checkpoint"
    )
    gradio.Markdown("Try it on a new sound:")
    sound = gradio.Audio(
        sources=["upload", "microphone"], type="filepath", label="Sound", editable=False,
        buttons=[], elem_id="try_sound",
    )  # fmt: skip
    answer = gradio.Label(
        num_top_classes=5, label="What it says", visible=False, elem_id="try_labels"
    )
    trouble = gradio.Markdown(elem_id="try_message")

    def teach(word: str) -> list[Any]:
        try:
            progress = bench.teach(Wish.read(word), folder / "taught")
            packed = pack(progress.checkpoint, folder)
        except (ValueError, OSError) as error:
            return [html.escape(shown(error)), gradio.update(), gradio.update()]
        return [
            describe_progress(progress),
            gradio.update(value=progress_table(progress), visible=True),
            gradio.update(value=str(packed), interactive=True),
        ]

    def try_out(path: str | None) -> tuple[Any, str]:
        nothing = gradio.update(visible=False)
        if path is None:
            return nothing, ""
        if bench.progress is None:
            return nothing, "Teach something first."
        try:
            waveform = read_upload(path, bench.classifier.sampling_rate, max_minutes)
            heard = bench.hear(waveform)
        except ValueError as error:
            return nothing, html.escape(shown(error))
        scores = {readable(label): score for label, score in heard.items()}
        return gradio.update(value=scores, visible=True), ""

    button.click(teach, wish, [outcome, table, download], api_visibility="private")
    sound.change(try_out, sound, [answer, trouble], api_visibility="private")
