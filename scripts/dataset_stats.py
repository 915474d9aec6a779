"""Measure the mean and standard deviation of a dataset's log-mel values: a model's normalisation.

    ast-dataset-stats sounds/ --output my-checkpoint

Makes one streaming pass over the real frames: nothing is padded, cut or augmented, and every frame
counts the same. Prints the statistics, draws a histogram, and writes them into the output folder's
preprocessor_config.json, for this extractor and for transformers' own.
"""

from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.options import run_command
from .data.options import StatsOptions


def run(options: StatsOptions) -> None:
    check_checkpoints(options.checkpoint)
    from .data.normalisation import dataset_stats

    dataset_stats(options)


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-dataset-stats", StatsOptions, run, argv)


if __name__ == "__main__":
    main()
