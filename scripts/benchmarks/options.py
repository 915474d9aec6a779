"""The options of the benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from ..common.checkpoints import DEFAULT_MODEL
from ..common.options import Options, setting
from ..data.options import LabelledOptions
from ..workbench.calibration import Wish


@dataclass
class CommonOptions(Options):
    threads: int | None = setting(
        None, "torch's CPU threads; default: torch's choice", at_least=1, group="the run"
    )
    json: Path | None = setting(None, "also write all the measurements here", group="the run")


@dataclass
class RepeatedOptions(CommonOptions):
    repeats: int = setting(3, "measurements per case", at_least=1, group="the run")


@dataclass
class SizeOptions(RepeatedOptions):
    hidden_size: int = setting(192, "width: 64 per attention head", at_least=1, group="the model")
    num_hidden_layers: int = setting(12, "depth", at_least=1, group="the model")
    max_length: int = setting(
        1024, "the model's length in frames of 10 ms", at_least=16, group="the model"
    )

    @property
    def config_fields(self) -> dict[str, int]:
        """The size as fields of an `ASTConfig`, ours or native."""
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": max(self.hidden_size // 64, 1),
            "intermediate_size": 4 * self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "max_length": self.max_length,
        }


@dataclass
class FeaturesOptions(RepeatedOptions):
    clips: int = setting(8, "clips per batch", at_least=1)
    gpu_clips: int = setting(256, "clips per batch on a GPU", at_least=1)
    clip_length_s: float = setting(10.0, "length of a clip in seconds")
    repeats: int = setting(15, "measurements per case", at_least=1, group="the run")


@dataclass
class ForwardOptions(SizeOptions):
    workload: str = setting(
        "full",
        "one clip of the model's length; 8 clips of 1 s; or 32 clips of 0.5 to 10 s",
        choices=("full", "short", "mixed"),
    )
    clips: int | None = setting(None, "instead of the workload's 1, 8 or 32", at_least=1)
    batch_size: int = setting(8, "largest batch", at_least=1)
    merged: int = setting(0, "also ours with this many tokens merged per layer", at_least=0)
    int8: bool = setting(False, "also ours as an 8-bit ONNX file, from the waveform on")
    hidden_size: int = setting(768, "width: 64 per attention head", at_least=1, group="the model")
    repeats: int = setting(5, "measurements per case", at_least=1, group="the run")


@dataclass
class LengthsOptions(SizeOptions):
    seconds: list[int] = setting([1, 5, 10, 20, 40, 80, 120], "lengths of sound", at_least=1)
    plot: Path | None = setting(None, "also draw the table, to a PNG")


@dataclass
class ColdOptions(SizeOptions):
    onnx: Path | None = setting(None, "also ast-classify with this ONNX file")
    repeats: int = setting(5, "measurements per case", at_least=1, group="the run")


@dataclass
class PipelineOptions(SizeOptions):
    folder: str | None = setting(None, "sounds to classify; default: made-up Ogg Vorbis clips")
    clips: int = setting(200, "made-up clips", at_least=1)
    clip_length_s: float = setting(5.0, "their length in seconds")
    sampling_rate: int = setting(44100, "their sampling rate in Hz", at_least=1)
    batch_size: int = setting(8, "clips per batch, in all cases", at_least=1)
    max_length: int = setting(512, "the model's, in frames", at_least=16, group="the model")


@dataclass
class TrainOptions(SizeOptions):
    batch_size: int = setting(4, "clips per step", at_least=1)
    time_patchout: int = setting(40, "columns dropped", at_least=0)
    frequency_patchout: int = setting(4, "rows dropped", at_least=0)
    repeats: int = setting(5, "measurements per case", at_least=1, group="the run")


@dataclass
class DescendantsOptions(RepeatedOptions):
    models: list[str] = setting(
        [
            "ast-audioset-10-10-0.4593",
            "ast-audioset-16-16-0.442",
            "ced-tiny",
            "ced-mini",
            "ced-small",
            "ced-base",
            "passt-s-kd-p16-s10-ap486",
            "passt-s-swa-p16-s16-ap473",
            "passt-l-kd-p16-s10-ap47",
            "audiomae-base-ap473",
            "ssast-tiny-patch-400",
            "ssast-base-patch-400",
            "ssast-base-frame-400",
            "dasheng-base",
        ],
        "folders in hub_configs to take shapes from; default: one of each shape",
    )
    clip_length_s: float = setting(10.0, "length of a clip in seconds")


@dataclass
class AccuracyOptions(CommonOptions):
    recipe: str = setting(
        "", "a recipe such as esc10.yaml: columns, geometry, settings", positional="1"
    )
    dataset: str = setting("", "a dataset, as in ast-finetune", positional="1")
    weights: str = setting("", "where both start: a DeiT or ViT folder", positional="1")
    target: float = setting(93.0, "accuracy in percent")
    plain_epochs: int = setting(10, "epochs of the plain loop", at_least=1)
    ours: str = setting("", 'options that override our recipe, as in --ours="--num_epochs 5"')
    plot: Path | None = setting(None, "also draw accuracy over time, to a PNG")


@dataclass
class MergingOptions(RepeatedOptions):
    checkpoint: str = setting("", "a fine-tuned model's folder or Hub name", positional="1")
    dataset: str = setting(
        "", "labelled clips it was not trained on, as in ast-finetune", positional="1"
    )
    split: str = setting("train", "the dataset's split")
    merged: list[int] = setting([0, 4, 8, 12, 16, 20], "tokens merged per layer", at_least=0)
    batch_size: int = setting(8, "clips at once", at_least=1)
    plot: Path | None = setting(None, "also draw accuracy over speed, to a PNG")


@dataclass
class AgreementOptions(CommonOptions):
    checkpoint: str = setting("", "the student: folder, bundled or Hub name", positional="1")
    dataset: str = setting("", "sounds, as in ast-finetune; labels are not needed", positional="1")
    split: str = setting("train", "the dataset's split")
    teacher: list[str] = setting([], "Parquet files of the teacher's answers, instead of a column")
    teacher_column: str = setting("logits", "column of the dataset with the teacher's logits")
    teacher_labels: str = setting("audioset", "names of the teacher's labels, if not in the file")
    source_column: str = setting("source", "column that says where a sound is from")
    sources: list[str] = setting([], "only sounds of these sources; default: all")
    threshold: float = setting(0.5, "the teacher's probability that counts as true")


@dataclass
class MarkedOptions(Options):
    checkpoint: str = setting("", "embedding model: folder or Hub name", positional="1")
    dataset: str = setting("", "labelled clips, as in ast-finetune", positional="1")
    splits: list[str] = setting(["train"], "which of its splits")
    fold_column: str | None = setting(None, "column with the fold; each fold is tested in turn")
    group_column: str | None = setting(None, "column with recording or speaker, never split")
    test_part: str | None = setting(None, "split to test on, instead of folds")
    unused_part: list[str] = setting([], "splits to ignore")
    embeddings: Path | None = setting(None, "file to cache the embeddings in")
    draws: int = setting(50, "random draws", at_least=2)
    json: Path | None = setting(None, "also write all the measurements here")


@dataclass
class FewOptions(MarkedOptions):
    shots: list[int] = setting([1, 2, 5, 10, 20], "marked clips per class", at_least=1)


@dataclass
class QueuesOptions(MarkedOptions):
    queues: list[str] = setting(
        ["random", "uncertain", "disputed", "novel"],
        "queues to compare",
        choices=("random", "uncertain", "disputed", "novel"),
    )
    batch: int = setting(10, "at least this many marks per round", at_least=1)
    draws: int = setting(10, "random draws", at_least=2)
    plot: Path | None = setting(None, "also draw accuracy over marks, to a PNG")


@dataclass
class CalibrationOptions(MarkedOptions):
    head: str = setting(
        "new",
        "teach a head on the other folds, or keep the checkpoint's own: then half of the clips it "
        "is tested on calibrate it",
        choices=("new", "keep"),
    )
    wish: Wish = setting(Wish(0.9), "what the thresholds are to promise", parse=Wish.read)
    draws: int = setting(20, "random draws", at_least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wish.precision is None:
            raise ValueError("--wish is a precision here, such as precision=0.9.")


@dataclass
class LoopOptions(RepeatedOptions):
    windows: int = setting(1_000_000, "in the index", at_least=1000)
    width: int = setting(192, "of an embedding", at_least=2)
    marks: int = setting(1000, "marked windows, two per recording", at_least=20)
    labels: int = setting(10, "different labels", at_least=2)


@dataclass
class DetectionOptions(CommonOptions):
    dataset: str = setting("", "labelled clips with folds, to make soundscapes of", positional="1")
    model: str = setting(DEFAULT_MODEL, "start of both, which was not trained on the held-out fold")
    output: Path = setting(
        Path("runs/detection"),
        "folder for sounds and runs; what is there already is not made again",
        metavar="FOLDER",
    )
    models: list[str] = setting(
        ["frames", "windows"], "which to train and measure", choices=("frames", "windows")
    )
    evaluation_folds: list[str] = setting(
        ["5"], "folds held out, of the column fold: for each one, both models are trained anew"
    )
    soundscape_s: float = setting(45.0, "length of a soundscape", group="soundscapes")
    mixtures_per_fold: int = setting(60, "soundscapes of each fold", group="soundscapes")
    max_clips: int = setting(6, "events in one, at most, of different classes", group="soundscapes")
    trained: str = setting(
        "all",
        "all weights, or only the heads, whose encoder runs once over each soundscape; then the "
        "folds held out are measured together",
        choices=("all", "head"),
    )
    head_steps: int = setting(300, "of the heads, with 32 windows each", group="training")
    head_learning_rate: float = setting(1e-2, "peak, of the heads", group="training")
    num_epochs: int = setting(1, "passes over them", at_least=1, group="training")
    windows_per_clip: int = setting(
        4, "windows of each per epoch, which are a step", at_least=1, group="training"
    )
    learning_rate: float = setting(3e-4, "peak", group="training")
    layer_decay: float = setting(
        1.0, "factor on the learning rate from each layer to the one below", group="training"
    )
    frequency_patchout: int = setting(
        0, "patch rows dropped in training", at_least=0, group="training"
    )
    threshold: float = setting(0.5, "score that makes an event")
    median_filter_s: float = setting(0.5, "of the scores, before events", at_least=0)
    seed: int = setting(0, "of soundscapes, windows and training", group="training")
    plot: Path | None = setting(None, "also draw how late onsets are found, to a PNG")


@dataclass
class WeakOptions(CommonOptions):
    checkpoint: str = setting("", "the encoder: folder, bundled or Hub name", positional="1")
    dataset: str = setting(
        "", "recordings of one length, with one label and a fold each", positional="1"
    )
    events: str = setting("", "when their events are, for the oracle: see --annotations")
    evaluation_fold: str = setting("5", "the fold held out, of the column fold")
    embeddings: Path | None = setting(None, "keep them in this file, or take them from it")
    seeds: int = setting(5, "runs of each way", at_least=1, group="training")
    steps: int = setting(300, "of the head, over all recordings", at_least=1, group="training")
    learning_rate: float = setting(1e-2, "peak", group="training")


@dataclass
class HoursOptions(CommonOptions):
    checkpoints: list[str] = setting(
        [], "checkpoints; default: models of random weights, see --models", positional="*"
    )
    models: list[str] = setting(
        ["tiny-128-10", "tiny-128-16", "tiny-64-16", "small-64-16", "base-64-16"],
        "SIZE-MEL_BINS-STRIDE of each: tiny, small or base",
    )
    hops: list[str] = setting(
        ["half hop", "whole hop"], "of windows", choices=("half hop", "whole hop")
    )
    minutes: int = setting(1, "files of a minute each", at_least=1)
    int8: bool = setting(True, "also as 8-bit ONNX files")
    onnx: Path | None = setting(None, "folder of the 8-bit files: kept, or taken from it")
    stock: bool = setting(True, "also the stock pipeline")
    tagger: bool = setting(True, "also a convolutional tagger")
    repeats: int = setting(2, "measurements of each case", at_least=1, group="the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        for model in self.models:
            size, *numbers = model.split("-")
            is_known = size in ("tiny", "small", "base") and len(numbers) == 2
            if not is_known or not all(number.isdigit() for number in numbers):
                raise ValueError(f"--models: expected such as tiny-64-16, got {model!r}.")


@dataclass
class ProcessesOptions(CommonOptions):
    model: str = setting(DEFAULT_MODEL, "checkpoint or ONNX file", positional="?")
    speed: list[str] = setting(
        ["exact"], "as in ast-classify", choices=("exact", "fast", "fastest")
    )
    processes: list[int] = setting([1, 2], "how many", at_least=1)
    minutes: int = setting(8, "files of a minute each", at_least=1)
    repeats: int = setting(2, "measurements of each case", at_least=1, group="the run")


@dataclass
class SpeedOptions(LabelledOptions):
    checkpoint: str = setting("", "a classifier: folder, bundled or Hub name", positional="1")
    dataset: str = setting("", "labelled clips, as in ast-finetune", positional="1")
    ways: list[str] = setting(
        ["compile", "dynamic8", "static", "openvino"],
        "beside PyTorch, ONNX Runtime and its 8-bit file; OpenVINO where it is installed",
        choices=("compile", "dynamic8", "static", "openvino", "none"),
    )
    clips: int = setting(400, "at most", at_least=1)
    timed: int = setting(8, "clips of a timed run", at_least=1)
    threads: int | None = setting(None, "CPU threads; default: torch's choice", at_least=1)
    repeats: int = setting(5, "measurements of each case", at_least=1)
    json: Path | None = setting(None, "also write all the measurements here")
