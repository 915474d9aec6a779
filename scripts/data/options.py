"""Options for the sounds that a command reads, the same in every command."""

from dataclasses import dataclass

from ..common.options import Options, setting

GROUP = "which sounds"
_SOUNDSCAPES = "soundscapes"


@dataclass
class DatasetOptions(Options):
    """Where a dataset's sounds are."""

    audio_column: str = setting("audio", "column with the sound", group=GROUP)
    dataset_config: str | None = setting(None, "configuration of the Hub dataset", group=GROUP)


@dataclass
class LabelledOptions(DatasetOptions):
    """Where their labels are, and which are for training and which for evaluation.

    Raises:
        ValueError: for a fraction outside 0 to 1.
    """

    label_column: str = setting(
        "label", "column with the class: a name or index, or a list of them", group=GROUP
    )
    label_separator: str | None = setting(
        None, "what separates several class names in one string", group=GROUP
    )
    train_split: str = setting("train", "split to train on", group=GROUP)
    evaluation_split: str | None = setting(None, "split to evaluate on", group=GROUP)
    fold_column: str | None = setting(None, "column with the fold, instead of a split", group=GROUP)
    evaluation_fold: str | None = setting(
        None, "the fold to evaluate on", group=GROUP, aliases=["fold"]
    )
    evaluation_fraction: float = setting(
        0.2, "share to hold out if there is neither split nor fold", group=GROUP
    )
    group_column: str | None = setting(
        None, "column with the speaker or recording; groups are held out whole", group=GROUP
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.evaluation_fraction < 1:
            raise ValueError(
                f"--evaluation_fraction must be between 0 and 1, got {self.evaluation_fraction}."
            )


@dataclass
class AnnotatedOptions(LabelledOptions):
    """Where it is written down when what is heard in them."""

    annotations: str | None = setting(
        None,
        "file or folder that says what can be heard when (Raven, Audacity, DCASE's TSV, CSV)",
        group=GROUP,
        metavar="PATH",
    )
    annotation_label_column: str | None = setting(
        None, "the annotations' label column, if it has an unusual name", group=GROUP
    )


@dataclass
class StatsOptions(DatasetOptions):
    """What to measure, and what to do with the result."""

    dataset: str = setting(
        "", "folder of class folders, CSV, Parquet or tar file(s), or a Hub dataset", positional="?"
    )
    output: str | None = setting(
        None,
        "folder whose preprocessor_config.json to write or update",
        metavar="FOLDER",
    )
    checkpoint: str | None = setting(
        None, "compare with this checkpoint's statistics (folder, bundled or Hub name)"
    )
    histogram: str | None = setting(
        None,
        "PNG; default: log_mel_histogram.png in the output folder, or none without one",
        metavar="FILE",
    )
    split: str = setting("train", "split to measure: the one the model is trained on", group=GROUP)
    num_mel_bins: int = setting(128, "mel bins, if the output folder does not say", at_least=1)
    sampling_rate: int = setting(16000, "Hz, if the output folder does not say", at_least=1)
    num_workers: int = setting(2, "processes that decode and featurise; 0: only this", at_least=0)


@dataclass
class MixOptions(DatasetOptions):
    """What to mix. All clips of a mixture come from one fold."""

    dataset: str = setting(
        "", "folder, CSV, Parquet or tar file(s), or a Hub dataset, with folds", positional="?"
    )
    output: str = setting(
        "runs/mixtures", "folder for the Parquet files", metavar="FOLDER", aliases=["output_dir"]
    )
    mixtures_per_fold: int = setting(160, "mixtures to make from each fold", at_least=1)
    max_clips: int = setting(3, "most clips in a mixture; uniform from 1 to this", at_least=1)
    seed: int = setting(0, "random seed for the choice and loudness of clips")
    soundscape_s: float = setting(
        0.0,
        "make soundscapes of this length instead: events at random times in noise, listed in "
        "events.csv; 0: plain mixtures",
        at_least=0,
        group=_SOUNDSCAPES,
        metavar="SECONDS",
    )
    snr_from: float = setting(
        3.0, "lowest level of an event above the noise", group=_SOUNDSCAPES, metavar="DB"
    )
    snr_to: float = setting(15.0, "highest level", group=_SOUNDSCAPES, metavar="DB")
    split: str = setting("train", "its split", group=GROUP)
    label_column: str = setting("label", "column with the class, a name or an index", group=GROUP)
    fold_column: str = setting("fold", "column with the fold", group=GROUP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_to < self.snr_from:
            raise ValueError(
                f"--snr_to ({self.snr_to:g}) must not be below --snr_from ({self.snr_from:g})."
            )


@dataclass
class PoolOptions(Options):
    """Which sounds to collect."""

    sources: str = setting("", "folder with a folder for each source", positional="?")
    output: str = setting(
        "runs/pool", "folder for the Parquet files", metavar="FOLDER", aliases=["output_dir"]
    )
    list: str = setting("open_sounds", "YAML list of sources, or the name of a bundled one")
    skip_missing: bool = setting(False, "leave out sources that are not there")
    sampling_rate: int = setting(32000, "Hz of the windows", at_least=1)
