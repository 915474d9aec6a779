"""The options of the commands that classify sound."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.checkpoints import DEFAULT_MODEL
from ..common.options import Options, setting
from ..data.options import GROUP as SOUNDS
from ..data.options import DatasetOptions, LabelledOptions
from .formats import FORMATS

if TYPE_CHECKING:
    from modeling_ast.events_ast import EventRules

MODEL_HELP = "checkpoint: a folder, an ONNX file, a Hub name or the bundled one"
SPEED_HELP = (
    "fast, fastest: the fastest way on this machine that loses at most 0.5 or 2 points; the first "
    "time, finding it takes a minute"
)
# As in modeling_ast/speed_ast.py; a test compares.
SPEEDS = ("exact", "fast", "fastest")
# What `ast-export-onnx` can write; modeling_ast/export_ast.py has the same, and a test compares.
ONNX_VARIANTS = ("fp32", "fp16", "int8", "spectrogram")

_THRESHOLD = 0.5
_HESITANT = 0.2  # the bundled model learned a teacher's doubts, too; see docs/general_model.md
_WINDOWS, _EVENTS, _RESULTS = "windows", "events", "results"


def default_threshold(model: str | None) -> float:
    """The score that makes an event of what this model hears."""
    return _HESITANT if model == DEFAULT_MODEL else _THRESHOLD


def read_threshold(word: str) -> float | dict[str, float]:
    """A number, or the name of a JSON file {label: number}.

    Raises:
        ValueError: for anything else.
    """
    try:
        return float(word)
    except ValueError:
        pass
    try:
        thresholds = json.loads(Path(word).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"must be a number or a JSON file, got {word!r} ({error})") from error
    if not isinstance(thresholds, dict) or not thresholds:
        raise ValueError(f"{word} must hold {{label: number}}")
    return thresholds


@dataclass
class WindowOptions(Options):
    """Which windows a sound is cut into."""

    chunk_length_s: float | None = setting(
        None, "length of a window; default: the model's", group=_WINDOWS, metavar="SECONDS"
    )
    hop_length_s: float | None = setting(
        None,
        "from one window's start to the next; default: half a window",
        group=_WINDOWS,
        metavar="SECONDS",
    )
    batch_size: int = setting(8, "windows per forward pass", at_least=1, group=_WINDOWS)


@dataclass
class EventOptions(Options):
    """What makes an event."""

    threshold: float | None = setting(
        None,
        "score that makes an event: a number, or a JSON file {label: number} for some labels; "
        f"default: {_THRESHOLD:g}, and {_HESITANT:g} for {DEFAULT_MODEL}, which scores low",
        parse=read_threshold,
        group=_EVENTS,
    )
    release_threshold: float | None = setting(
        None, "score that continues one; default: four fifths of the threshold", group=_EVENTS
    )
    minimum_length_s: float = setting(
        0.0,
        "drop shorter events",
        at_least=0,
        group=_EVENTS,
        metavar="SECONDS",
        aliases=["minimum_length"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            self.threshold = default_threshold(self._listening_model())

    def _listening_model(self) -> str | None:
        """The one whose scores make the events."""
        return getattr(self, "model", None)


@dataclass
class HearingOptions(EventOptions, WindowOptions):
    """Which windows a sound is cut into, and what to make of their scores."""

    window_pooling: str | None = setting(
        None,
        "how to combine the windows' scores of a long sound; default: as the checkpoint was "
        "trained, else mean",
        choices=("mean", "max", "linear_softmax"),
        group=_WINDOWS,
    )

    median_filter_s: float = setting(
        0.0,
        "find events in the running median of the scores over this long; ignores shorter peaks "
        "and gaps",
        at_least=0,
        group=_EVENTS,
        metavar="SECONDS",
    )

    def event_rules(self) -> "EventRules":
        """What makes an event.

        Raises:
            ValueError: for thresholds that contradict each other.
        """
        from modeling_ast.events_ast import EventRules  # numpy takes a moment to load

        assert self.threshold is not None
        return EventRules(
            self.threshold,
            self.release_threshold,
            self.minimum_length_s,
            self.median_filter_s,
        )


@dataclass
class ClassifyOptions(DatasetOptions, HearingOptions):
    """What to listen to, with which model, and where the results go."""

    sounds: list[str] = setting(
        [],
        "audio files or addresses, folders (searched recursively), globs, Parquet or tar files, "
        "folders of such files, or names of Hub datasets",
        positional="+",
    )
    model: str = setting(DEFAULT_MODEL, MODEL_HELP)
    speed: str = setting("exact", SPEED_HELP, choices=SPEEDS)
    output: Path | None = setting(
        None,
        "write the results into this folder instead of printing them; after an interruption, the "
        "same command resumes",
        metavar="FOLDER",
    )
    top_k: int = setting(3, "labels per row", at_least=1)
    plot: bool = setting(False, "also draw every sound: OUTPUT/plots/….png")
    labels: Path | None = setting(
        None, "only these labels: a text file with one name per line", metavar="FILE"
    )
    clips: Path | None = setting(
        None,
        "cut out each label's best events, with a second before and after, as FOLDER/LABEL/….wav",
        metavar="FOLDER",
    )
    best: int = setting(5, "at most this many clips per label", at_least=1)

    per: str = setting("file", "one row per …", choices=("file", "window"), group=_RESULTS)
    json: bool = setting(False, "print JSON instead of a table", group=_RESULTS)
    formats: list[str] = setting(
        ["csv"],
        "tables (csv, json, parquet) of rows and of events; Audacity label tracks and Raven "
        "selection tables of events, one per sound",
        choices=tuple(FORMATS),
        group=_RESULTS,
    )
    embeddings: bool = setting(
        False, "also write embeddings.parquet, a vector per row", group=_RESULTS
    )
    logits: bool = setting(
        False,
        "also write answers.parquet: each window's logits, and its embedding with --embeddings: "
        "what ast-finetune --teacher reads",
        group=_RESULTS,
    )

    processes: int = setting(
        1, "on this machine, which share files and processors", at_least=1, group=_WINDOWS
    )

    split: str = setting("train", "split of a dataset", group=SOUNDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            for name in ("embeddings", "logits", "plot"):
                if getattr(self, name):
                    raise ValueError(f"--{name} writes files: it needs --output FOLDER.")
        elif self.json:
            raise ValueError("--json prints; with --output, choose --formats json.")
        if self.embeddings and (self.model.endswith(".onnx") or self.speed != "exact"):
            raise ValueError(
                "--embeddings needs a checkpoint at --speed exact: an ONNX file only gives scores."
            )


@dataclass
class ListenOptions(EventOptions):
    """What to listen to, now, with which model, and what to tell of it."""

    source: str | None = setting(
        None,
        "- for a WAV stream on standard input, or an address that ffmpeg reads (rtsp://…, "
        "http://…); default: the microphone",
        positional="?",
    )
    model: str = setting(DEFAULT_MODEL, MODEL_HELP)
    speed: str = setting("exact", SPEED_HELP, choices=SPEEDS)
    format: str = setting("text", "format of the lines", choices=("text", "csv", "json"))
    device: str | None = setting(None, "microphone: its number, or a part of its name")
    labels: Path | None = setting(
        None, "only these labels: a text file with one name per line", metavar="FILE"
    )
    clips: Path | None = setting(
        None,
        "cut out every event when it is over, with a second before and after: FOLDER/LABEL/….wav",
        metavar="FOLDER",
    )

    chunk_length_s: float | None = setting(
        None, "length of a window; default: the model's", group=_WINDOWS, metavar="SECONDS"
    )
    hop_length_s: float = setting(
        1.0, "from one window to the next", group=_WINDOWS, metavar="SECONDS"
    )
    buffer_s: float = setting(
        60.0,
        "how much sound to keep, for cut-outs and until the model catches up",
        group=_WINDOWS,
        metavar="SECONDS",
    )
    wait: bool = setting(
        False,
        "let standard input wait for the model, so that nothing is dropped; a file on standard "
        "input always does",
        group=_WINDOWS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is not None and self.source is not None:
            raise ValueError("--device chooses a microphone; leave out the source, or the device.")
        if self.wait and self.source != "-":
            raise ValueError("--wait is for standard input: ast-listen - --wait")


@dataclass
class DemoOptions(Options):
    """Which model the page shows, and to whom."""

    model: str = setting(DEFAULT_MODEL, MODEL_HELP, positional="?")
    speed: str = setting("exact", SPEED_HELP, choices=SPEEDS)
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 serves the network")
    port: int | None = setting(None, "default: the first free one from 7860", at_least=1)
    index: Path | None = setting(
        None, "also find, review and teach in the index that ast-index wrote", metavar="INDEX"
    )
    marks: Path | None = setting(
        None, "CSV to save marks in; default: INDEX/marks.csv", metavar="FILE"
    )
    write_space: Path | None = setting(
        None, "write a Hugging Face Space into this folder and exit", metavar="FOLDER"
    )
    max_minutes: float = setting(10.0, "longest sound", group="limits")
    max_megabytes: int = setting(100, "largest file", at_least=1, group="limits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_minutes > 0:
            raise ValueError(f"--max_minutes must be above 0, got {self.max_minutes:g}.")
        if self.marks is not None and self.index is None:
            raise ValueError("--marks needs --index INDEX.")


@dataclass
class ExportOptions(LabelledOptions):
    """What to export, and on which labelled clips to check it."""

    checkpoint: str = setting("", "checkpoint folder, bundled or Hub name", positional="?")
    output: Path = setting(Path("onnx"), "folder for the files", metavar="FOLDER")
    variants: list[str] = setting(
        list(ONNX_VARIANTS), "which files; default: all", choices=ONNX_VARIANTS
    )
    web: Path | None = setting(
        None,
        "write a page that names sounds in the visitor's browser into this folder, and exit",
        metavar="FOLDER",
    )
    web_runtime: Path | None = setting(
        None,
        "folder with ONNX Runtime Web, the dist of its npm package; default: fetched with npm",
        metavar="FOLDER",
        group="the page",
    )
    check: str | None = setting(
        None,
        "measure accuracy and speed on labelled clips: any dataset that ast-finetune takes",
        metavar="DATASET",
    )
    threads: int | None = setting(
        None, "CPU threads; default: torch's choice", at_least=1, group="speed"
    )
    repeats: int = setting(3, "timed passes", at_least=1, group="speed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError("Name a checkpoint: a folder, the bundled one or one on the Hub.")
