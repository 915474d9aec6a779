"""The options of an evaluation."""

from dataclasses import dataclass

from ..common.options import setting
from ..data.options import AnnotatedOptions
from ..inference.options import HearingOptions

_RUNNING = "how it runs"


@dataclass
class EvaluateOptions(AnnotatedOptions, HearingOptions):
    """Options of an evaluation; the data options are those of fine-tuning."""

    paths: list[str] = setting(
        [],
        "a checkpoint (folder, bundled or Hub name; several: their mean probability), then "
        "a dataset (folder of class folders, CSV, Parquet or tar file(s), or a Hub dataset)",
        positional="*",
        metavar="CHECKPOINT … DATASET",
    )
    output: str = setting(
        "runs/evaluation",
        "folder for the report, the tables, the picture",
        metavar="FOLDER",
        aliases=["output_dir"],
    )
    json: bool = setting(False, "print the report as JSON instead of tables")
    match_labels: str | None = setting(
        None,
        "for a dataset with other label names than the checkpoint's: a JSON file, "
        "{label of the dataset: [labels of the checkpoint]}, or a bundled one's name "
        "(esc10_in_audioset); the highest of their scores counts",
        metavar="FILE",
    )

    batch_size: int = setting(16, "windows per forward pass", group=_RUNNING, at_least=1)
    num_workers: int = setting(2, "processes that decode", group=_RUNNING, at_least=0)
    bootstrap_resamples: int = setting(
        1000, "resamples for the confidence intervals", group=_RUNNING, at_least=1
    )
    seed: int = setting(0, "random seed of the bootstrap", group=_RUNNING)

    def _listening_model(self) -> str | None:
        return self.paths[0] if self.paths else None
