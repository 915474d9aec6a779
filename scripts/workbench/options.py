"""The options of the commands around an index."""

from dataclasses import dataclass
from pathlib import Path

from ..common.options import Options, setting
from ..data.options import GROUP as SOUNDS
from ..data.options import DatasetOptions
from ..inference.options import MODEL_HELP, WindowOptions
from .calibration import Wish
from .queues import QUEUES

_SEARCH, _FOUND, _QUEUE = "search", "what is found", "what to listen to next"
_ANNOTATIONS = "annotations"


@dataclass
class IndexOptions(DatasetOptions, WindowOptions):
    """What an index holds, and what to look for in it."""

    sounds: list[str] = setting(
        [],
        "recordings to add, as in ast-classify: files, folders, globs, datasets",
        positional="*",
    )
    output: Path = setting(Path(), "the index's folder", metavar="INDEX")
    model: str | None = setting(
        None, f"{MODEL_HELP}; default: the index's own, or the bundled one for a new index"
    )

    like: list[str] = setting(
        [],
        "find windows that sound like a file, a stretch of it (FILE:START-END in seconds) or the "
        "embeddings of a .npy file",
        metavar="EXAMPLE",
        group=_SEARCH,
    )
    label: str | None = setting(
        None,
        "find a label's highest scores with the head of --model, such as one from ast-teach",
        group=_SEARCH,
    )

    count: int = setting(20, "at most this many windows", at_least=1, group=_FOUND)
    per_recording: int | None = setting(
        None,
        "at most this many per recording, before the rest follow",
        at_least=1,
        metavar="COUNT",
        group=_FOUND,
    )
    table: Path | None = setting(None, "also write them as CSV", metavar="FILE", group=_FOUND)
    clips: Path | None = setting(
        None, "cut them out, with a second before and after", metavar="FOLDER", group=_FOUND
    )
    clip_format: str = setting("wav", "clips' format", choices=("wav", "flac"), group=_FOUND)
    label_studio: Path | None = setting(
        None, "also write them as tasks for Label Studio", metavar="FILE", group=_FOUND
    )

    split: str = setting("train", "split of a dataset", group=SOUNDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output == Path():
            raise ValueError("Name the index's folder: --output INDEX.")
        if self.like and self.label:
            raise ValueError("Search with --like or with --label, not both.")
        searches = bool(self.like or self.label)
        if not self.sounds and not searches:
            raise ValueError("Name recordings to add, or search with --like or --label.")
        if not searches:
            for name in ("table", "clips", "label_studio"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} is for a search: --like EXAMPLE or --label NAME.")


@dataclass
class TeachOptions(Options):
    """What was marked, and what to make of it."""

    index: Path = setting(Path(), "the index that ast-index wrote", positional="1")
    marks: list[str] = setting(
        [],
        "CSV with the columns file, start, end, label (seconds; neither: the whole file), or Label "
        "Studio's JSON export",
        positional="*",
    )
    output: Path = setting(Path("taught"), "folder for the checkpoint", metavar="FOLDER")
    background: Path | None = setting(
        None, "folder of indexed recordings that contain none of the labels", metavar="FOLDER"
    )
    annotations: Path | None = setting(
        None,
        "file or folder of annotations, with marks or instead of them (Raven, Audacity, "
        "DCASE's TSV, CSV)",
        metavar="PATH",
        group=_ANNOTATIONS,
    )
    annotation_label_column: str | None = setting(
        None, "column with the label, if its name is unusual", group=_ANNOTATIONS
    )
    unmarked: str = setting(
        "background",
        "what the unannotated parts of annotated recordings are",
        choices=("background", "unknown"),
        group=_ANNOTATIONS,
    )
    wish: Wish = setting(
        Wish(),
        'goal of the thresholds: "f1", the highest F1, or for example "precision=0.9"',
        parse=Wish.read,
    )
    labels: str = setting(
        "auto",
        "whether labels exclude each other (one softmax) or not (a sigmoid each); auto: they do if "
        "every marked window has exactly one",
        choices=("auto", "exclusive", "independent"),
    )
    head: str = setting(
        "new",
        "fit a new head, or keep --model's and calibrate it",
        choices=("new", "keep"),
    )
    model: str | None = setting(None, f"{MODEL_HELP}; default: the index's own")

    queue: str | None = setting(
        None, "also choose windows to mark next", choices=QUEUES, group=_QUEUE
    )
    queue_label: str | None = setting(None, "the label for --queue likely", group=_QUEUE)
    queue_file: Path = setting(
        Path("next.csv"), "where to write them; fill in their labels", metavar="FILE", group=_QUEUE
    )
    count: int = setting(20, "at most this many windows", at_least=1, group=_QUEUE)
    clips: Path | None = setting(None, "cut them out, too", metavar="FOLDER", group=_QUEUE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.marks and self.annotations is None:
            raise ValueError("Name what was marked: a file of marks, or --annotations PATH.")
        if (self.queue == "likely") != (self.queue_label is not None):
            raise ValueError("--queue likely and --queue_label NAME go together.")
        if self.head == "keep" and self.labels != "auto":
            raise ValueError("--labels is for a new head: one that is kept has its own kind.")
