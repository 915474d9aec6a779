"""A page in the browser that says what recordings sound like, and when.

    ast-demo CHECKPOINT
    ast-demo --write-space my_space/ CHECKPOINT

Upload or record a sound: labels, timeline, events above a threshold to download as CSV, and where
in the spectrogram the model looked. The page needs no network. It is served to this computer only
unless `--host` says otherwise. A sound is decoded and nothing else; it lies in a temporary folder
for a quarter of an hour at most, and no longer than the program runs.

`--write-space` writes a folder to push to a Hugging Face Space, with all the code it needs.
"""

import argparse
import csv
import html
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

import feature_extraction
import modeling_ast
from feature_extraction import AudioDecodingError, load_audio
from feature_extraction.fbank_ast import num_frames
from modeling_ast import class_relevance, find_events, plot_relevance

from .common.arguments import run_command
from .common.bundled import hub_configs_folder
from .common.checkpoints import checkpoint_folder
from .inference.classifier import DEFAULT_MODEL, Classifier

_SPACE_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"  # as space/app.py has it
MAX_MINUTES = 10.0
MAX_MEGABYTES = 100
_KEPT_S = 900  # uploads; deleted within a minute after that
_SESSIONS = 20  # whose last sound is held in memory, for the slider
_TOP_LABELS = 5
_BATCH_SIZE = 4


@dataclass
class Heard:
    """A sound and what the model says of it."""

    waveform: np.ndarray  # (samples,) at the model's rate
    answer: dict[str, Any]  # the pipeline's, with all labels of all windows

    @property
    def best_label(self) -> str:
        return self.answer["labels"][0]["label"]


def listen(classifier: Any, path: str | Path, max_minutes: float = MAX_MINUTES) -> Heard:
    """Classify a file, window by window.

    Raises:
        AudioDecodingError: when it cannot be read; the message has its name, not its folder.
        ValueError: when it is longer than `max_minutes`; no more than that is decoded.
    """
    rate = classifier.feature_extractor.sampling_rate
    longest = max_minutes * 60
    try:
        waveform = load_audio(str(path), rate, duration=longest + 1)
    except AudioDecodingError as error:
        raise AudioDecodingError(str(error).replace(str(path), Path(path).name)) from error
    if len(waveform) > longest * rate:
        raise ValueError(
            f"{Path(path).name} is longer than {max_minutes:g} minutes, the most that this page "
            "takes. Cut it, or use ast-classify, which takes any length."
        )
    answer = classifier(waveform, top_k=None, return_timestamps=True, batch_size=_BATCH_SIZE)
    return Heard(waveform, answer)


def draw_timeline(classifier: Any, heard: Heard, events: Sequence[dict[str, Any]]) -> Any:
    """Waveform, spectrogram, curves of the top classes and events, as a matplotlib figure."""
    from matplotlib.figure import Figure

    from .inference.timeline import plot_timeline

    rate = classifier.feature_extractor.sampling_rate
    return plot_timeline(heard.waveform, rate, heard.answer, Figure(dpi=100), events)


def can_explain(classifier: Any) -> bool:
    """Whether the model shows its attention: not in an ONNX file, and not with merged tokens."""
    has_layers = isinstance(classifier.model, torch.nn.Module)
    return has_layers and not classifier.model.config.merged_tokens_per_layer


def explain(classifier: Any, heard: Heard, path: str | Path) -> str:
    """Draw what speaks for the best label, in the window that scores it highest, into a PNG.

    Returns:
        which label and window that is.
    """
    label = heard.best_label

    def score(window: dict[str, Any]) -> float:
        return next(entry["score"] for entry in window["labels"] if entry["label"] == label)

    window = max(heard.answer["windows"], key=score)
    rate = classifier.feature_extractor.sampling_rate
    samples = heard.waveform[round(window["start"] * rate) : round(window["end"] * rate)]
    features = next(iter(classifier.preprocess(samples)))
    input_values = features["input_values"].to(classifier.model.device)
    mask = features.get("attention_mask")
    mask = None if mask is None else mask.to(classifier.model.device)
    index = next(i for i, name in classifier.model.config.id2label.items() if name == label)
    relevance = class_relevance(classifier.model, input_values, index, mask)[0]
    frames = max(1, num_frames(len(samples), rate))  # without padding
    caption = f"What speaks for “{label}”, from {window['start']:.1f} s to {window['end']:.1f} s"
    plot_relevance(input_values[0, :frames], relevance[:, :frames], path, caption)
    return caption


def write_events(events: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Events as CSV: start and end in seconds, label, highest score."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["start", "end", "label", "score"])
        for event in events:
            numbers = (f"{event[name]:.3f}" for name in ("start", "end"))
            writer.writerow([*numbers, event["label"], f"{event['score']:.4f}"])


def build_app(
    classifier: Any,
    folder: str | Path,
    max_minutes: float = MAX_MINUTES,
    title: str = "Audio Spectrogram Transformer",
) -> Any:
    """The page, as `gradio.Blocks`.

    Args:
        classifier: a pipeline.
        folder: for the files that the page offers; gradio deletes them when they are old if it is
            its own, `$GRADIO_TEMP_DIR`.
        max_minutes: of a sound.
        title: of the page.

    Raises:
        ValueError: when gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            "The page needs the package gradio, which is not installed: "
            "pip install 'audio-spectrogram-transformer[demo]'"
        ) from error
    import matplotlib

    matplotlib.use("agg")  # drawing happens in threads, where windows cannot open
    explains = can_explain(classifier)

    def outcome(heard: Heard, threshold: float) -> list[Any]:
        events = find_events(heard.answer["windows"], threshold)
        table = [
            [round(e["start"], 2), round(e["end"], 2), e["label"], round(e["score"], 3)]
            for e in events
        ]
        csv_path = Path(tempfile.mkdtemp(dir=folder), "events.csv")
        write_events(events, csv_path)
        figure = draw_timeline(classifier, heard, events)
        return [figure, table, gradio.update(value=str(csv_path), interactive=True)]

    def new_sound(path: str | None, threshold: float) -> list[Any]:
        message, heard = "", None
        if path is not None:
            try:
                heard = listen(classifier, path, max_minutes)
            except ValueError as error:
                message = str(error)
        shown = gradio.update(value=message, visible=bool(message))
        if heard is None:
            no_file = gradio.update(value=None, interactive=False)
            return [shown, None, None, None, None, no_file, *([None] if explains else [])]
        scores = {entry["label"]: entry["score"] for entry in heard.answer["labels"]}
        outputs = [shown, heard, scores, *outcome(heard, threshold)]
        if explains:
            image = Path(tempfile.mkdtemp(dir=folder), "explanation.png")
            explain(classifier, heard, image)
            outputs.append(str(image))
        return outputs

    def new_threshold(heard: Heard | None, threshold: float) -> list[Any]:
        return [gradio.skip()] * 3 if heard is None else outcome(heard, threshold)

    with gradio.Blocks(
        title=title, analytics_enabled=False, delete_cache=(60, _KEPT_S), fill_width=True
    ) as app:
        gradio.Markdown(
            f"# {html.escape(title)}\n"
            f"Upload or record a sound of up to {max_minutes:g} minutes. It is not kept."
        )
        state = gradio.State(time_to_live=_KEPT_S)
        with gradio.Row():
            sound = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Sound",
                editable=False,
                buttons=[],
                elem_id="sound",
            )
            labels = gradio.Label(
                num_top_classes=_TOP_LABELS, label="Whole sound", elem_id="labels"
            )
        # Plain text, as it may hold a file's name.
        message = gradio.Textbox(
            label="This sound cannot be classified", visible=False, elem_id="message"
        )
        threshold = gradio.Slider(
            0.05, 0.95, value=0.5, step=0.05, label="Threshold: a score that makes an event"
        )
        timeline = gradio.Plot(show_label=False, elem_id="timeline")
        with gradio.Row():
            table = gradio.Dataframe(
                headers=["start (s)", "end (s)", "label", "score"],
                datatype=["number", "number", "str", "number"],
                label="Events",
                interactive=False,
                scale=4,
                elem_id="events",
            )
            download = gradio.DownloadButton(
                "Download events (CSV)", interactive=False, elem_id="download"
            )
        outputs = [message, state, labels, timeline, table, download]
        if explains:
            outputs.append(
                gradio.Image(
                    show_label=False,
                    type="filepath",
                    interactive=False,
                    buttons=[],
                    elem_id="explanation",
                )
            )
        sound.change(new_sound, [sound, threshold], outputs, api_visibility="private")
        threshold.change(
            new_threshold,
            [state, threshold],
            [timeline, table, download],
            trigger_mode="always_last",
            api_visibility="private",
        )
    return app


def serve(
    classifier: Any,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_minutes: float = MAX_MINUTES,
    max_megabytes: int = MAX_MEGABYTES,
    title: str = "Audio Spectrogram Transformer",
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then delete what was uploaded."""
    with tempfile.TemporaryDirectory(prefix="ast-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_RUN_HISTORY"] = "False"
        app = build_app(classifier, folder, max_minutes, title)
        app.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_megabytes}mb",
            state_session_capacity=_SESSIONS,
            share=False,
            ssr_mode=False,
            footer_links=[],
        )


def write_space(folder: Path, checkpoint: str) -> None:
    """Write a Hugging Face Space: `hub_configs/space`, the code, and a local checkpoint.

    Raises:
        ValueError: when the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the Space.")
    shutil.copytree(hub_configs_folder() / "space", folder, dirs_exist_ok=True)
    for package, source in (
        ("feature_extraction", Path(feature_extraction.__file__).parent),
        ("modeling_ast", Path(modeling_ast.__file__).parent),
        ("ast_scripts", Path(__file__).parent),
    ):
        for file in source.rglob("*.py"):
            target = folder / package / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    checkpoint = checkpoint_folder(checkpoint)
    if Path(checkpoint).is_dir():
        shutil.copytree(checkpoint, folder / "checkpoint")
    else:
        app = folder / "app.py"
        app.write_text(app.read_text().replace(_SPACE_MODEL, checkpoint))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ast-demo", description="A page in the browser that says what recordings sound like."
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT_MODEL,
        help="checkpoint folder, Hub name or ONNX file (%(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 to serve the network (%(default)s)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--max-minutes", type=float, default=MAX_MINUTES, help="longest sound (%(default)g)"
    )
    parser.add_argument(
        "--max-megabytes", type=int, default=MAX_MEGABYTES, help="largest file (%(default)s)"
    )
    parser.add_argument(
        "--write-space", type=Path, metavar="FOLDER", help="write a Space to push and stop"
    )
    options = parser.parse_args(argv)
    logging.disable_progress_bar()

    def command() -> None:
        for name in ("max_minutes", "max_megabytes"):
            if not getattr(options, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}."
                )
        if options.write_space:
            write_space(options.write_space, options.checkpoint)
            print(f"Wrote {options.write_space}. To push it, see its README.md.")
            return
        classifier = Classifier(options.checkpoint).pipeline
        serve(classifier, options.host, options.port, options.max_minutes, options.max_megabytes)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command("ast-demo", command)


if __name__ == "__main__":
    main()
