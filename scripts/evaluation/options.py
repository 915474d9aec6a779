"""The options of an evaluation."""

from dataclasses import dataclass

from ..common.arguments import setting


@dataclass
class EvaluateArguments:
    """Options of an evaluation; those of the data are as in fine-tuning."""

    dataset_config: str | None = setting(None, "configuration of the Hub dataset")
    audio_column: str = setting("audio", "column with the sound")
    label_column: str = setting("label", "column with the label or labels")
    train_split: str = setting("train", "split that the fold or fraction is held out of")
    evaluation_split: str | None = setting(None, "evaluate this whole split")
    fold_column: str | None = setting(None, "column with the fold, instead of a split")
    evaluation_fold: str | None = setting(None, "the fold to evaluate on")
    evaluation_fraction: float = setting(0.2, "held out when there is no split and no fold")
    group_column: str | None = setting(None, "column of what the fraction is of: a speaker, say")
    label_separator: str | None = setting(None, "between the labels of a clip in one string")

    output_dir: str = setting("runs/evaluation", "folder for the report, the tables, the picture")
    json: bool = setting(False, "print the report as JSON instead of tables")
    batch_size: int = setting(16, "windows per forward pass")
    num_workers: int = setting(2, "processes that decode")
    bootstrap_resamples: int = setting(1000, "for the confidence intervals")
    seed: int = setting(0, "of the bootstrap")
