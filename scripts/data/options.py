"""The options that say which sounds a command reads, the same in every command."""

from dataclasses import dataclass

from ..common.options import Options, setting

GROUP = "which sounds"


@dataclass
class DatasetOptions(Options):
    """Where the sounds of a data set are."""

    audio_column: str = setting("audio", "column with the sound", group=GROUP)
    dataset_config: str | None = setting(None, "configuration of the Hub dataset", group=GROUP)


@dataclass
class LabelledOptions(DatasetOptions):
    """Where their labels are, and which of them are for training and which for evaluation."""

    label_column: str = setting(
        "label", "column with the class: a name or index, or a list of them", group=GROUP
    )
    label_separator: str | None = setting(
        None, "between several class names in one string", group=GROUP
    )
    train_split: str = setting("train", "split to train on", group=GROUP)
    evaluation_split: str | None = setting(None, "split to evaluate on", group=GROUP)
    fold_column: str | None = setting(None, "column with the fold, instead of a split", group=GROUP)
    evaluation_fold: str | None = setting(None, "the fold to evaluate on", group=GROUP)
    evaluation_fraction: float = setting(
        0.2, "share held out where there is neither split nor fold", group=GROUP
    )
    group_column: str | None = setting(
        None, "column with the speaker or recording: held out whole", group=GROUP
    )
