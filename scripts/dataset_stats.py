"""Mean and standard deviation of a data set's log-mel values, which normalise a model's input.

    ast-dataset-stats sounds/ --output my-checkpoint

One streaming pass over the real frames: nothing is padded, cut or augmented, every frame counts the
same. Prints the statistics, draws a histogram, and writes them into the output folder's
preprocessor_config.json, which ours and transformers' own extractor read.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from feature_extraction import ASTFeatureExtractor

from .common.arguments import parse_arguments, run_command, setting
from .data.sources import open_stream
from .data.statistics import HISTOGRAM_EDGES, Statistics, measure_dataset

logger = logging.getLogger(__name__)

# From where a checkpoint's statistics are far from the data's: means apart, in the checkpoint's
# standard deviations, or the ratio of the standard deviations. AudioSet's means are 0.5 from those
# published for ESC-50 and Speech Commands, which were fine-tuned with their own.
_FAR_MEAN = 0.4
_FAR_STD = 1.4


@dataclass
class StatsArguments:
    dataset: str = setting("", "folder of class folders, Parquet or tar file(s), or a Hub dataset")
    dataset_config: str | None = setting(None, "configuration of the Hub dataset")
    split: str = setting("train", "split to measure: the one that the model is trained on")
    audio_column: str = setting("audio", "column with the sound")
    output: str | None = setting(
        None, "folder whose preprocessor_config.json is written, or updated where there is one"
    )
    histogram: str | None = setting(
        None, "PNG; default: log_mel_histogram.png in the output folder, or none without one"
    )
    checkpoint: str | None = setting(
        None, "compare with this checkpoint's statistics (folder or Hub name)"
    )
    num_mel_bins: int = setting(128, "mel bins, where the output folder does not say")
    sampling_rate: int = setting(16000, "Hz, where the output folder does not say")
    num_workers: int = setting(2, "processes that decode and featurise; 0: this one")


def draw_histogram(
    statistics: Statistics, path: Path, checkpoint: ASTFeatureExtractor | None = None
) -> None:
    """All log-mel values, with mean ± std of the data and, where given, of a checkpoint."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    share = 100 * statistics.histogram / statistics.values
    axes.stairs(share, HISTOGRAM_EDGES, fill=True, color="0.75")
    shown = [("data", statistics.mean, statistics.std, "C0")]
    if checkpoint is not None:
        shown.append(("checkpoint", checkpoint.mean, checkpoint.std, "C1"))
    for height, (name, mean, std, color) in enumerate(shown, start=1):
        axes.errorbar(
            mean,
            -0.04 * height * share.max(),
            xerr=std,
            fmt="o",
            color=color,
            capsize=4,
            label=f"{name}: {mean:.2f} ± {std:.2f}",
        )
    axes.set_xlabel("log-mel value")
    axes.set_ylabel("% of the values")
    axes.set_title(f"{statistics.clips:,} clips, {statistics.frames:,} frames")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def difference_from(checkpoint: ASTFeatureExtractor, statistics: Statistics) -> str | None:
    """What is wrong with normalising this data by the checkpoint's statistics; None if little."""
    shift = (statistics.mean - checkpoint.mean) / checkpoint.std
    spread = statistics.std / checkpoint.std
    if abs(shift) <= _FAR_MEAN and 1 / _FAR_STD <= spread <= _FAR_STD:
        return None
    return (
        f"The checkpoint's statistics ({checkpoint.mean:.4f} / {checkpoint.std:.4f}) are far from "
        f"the data's: its input would be {shift:+.2f} standard deviations off, with "
        f"{spread:.2f} times the spread. Fine-tune with the data's statistics."
    )


def _load_extractor(folder: str) -> ASTFeatureExtractor:
    try:
        return ASTFeatureExtractor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"No feature extractor in {folder}: {error}") from error


def _output_extractor(args: StatsArguments) -> ASTFeatureExtractor:
    """The one that is to be written: the output folder's own where it has one."""
    if args.output is not None:
        config = Path(args.output) / "preprocessor_config.json"
        if config.exists():
            kind = json.loads(config.read_text()).get("feature_extractor_type")
            if kind != "ASTFeatureExtractor":
                raise ValueError(f"{config} is of a {kind}, expected an ASTFeatureExtractor.")
            return _load_extractor(args.output)
    return ASTFeatureExtractor(sampling_rate=args.sampling_rate, num_mel_bins=args.num_mel_bins)


def dataset_stats(args: StatsArguments) -> Statistics:
    """Measure, print, draw and write, as the arguments say.

    Raises:
        ValueError: for a wrong path, column or checkpoint, or when no sound can be read.
    """
    if not args.dataset:
        raise ValueError("Name a dataset: a folder, Parquet or tar file(s), or one on the Hub.")
    if args.num_workers < 0:
        raise ValueError(f"--num_workers must be 0 or more, got {args.num_workers}.")
    extractor = _output_extractor(args)
    checkpoint = _load_extractor(args.checkpoint) if args.checkpoint else None
    stream = open_stream(args.dataset, args.split, args.dataset_config, args.audio_column)
    statistics = measure_dataset(
        stream,
        args.audio_column,
        extractor.sampling_rate,
        extractor.num_mel_bins,
        args.num_workers,
    )

    print(f"mean    {statistics.mean:.7f}")
    print(f"std     {statistics.std:.7f}")
    print(f"clips   {statistics.clips}")
    print(f"hours   {statistics.samples / extractor.sampling_rate / 3600:.4f}")
    print(f"frames  {statistics.frames}")
    print(f"floor   {100 * statistics.floor:.1f} % of the values are those of digital silence")
    left_out = len(statistics.unreadable) + statistics.too_short
    if left_out:
        print(
            f"left out: {len(statistics.unreadable)} unreadable, {statistics.too_short} too short"
        )
    if checkpoint is not None and (warning := difference_from(checkpoint, statistics)):
        logger.warning(warning)

    histogram = args.histogram
    if args.output is not None:
        if any(Path(args.output).glob("*.safetensors")):
            logger.warning(
                f"{args.output} holds weights that were trained with {extractor.mean} / "
                f"{extractor.std}: fine-tune them before they are used with the new statistics."
            )
        extractor.mean, extractor.std = round(statistics.mean, 7), round(statistics.std, 7)
        extractor.save_pretrained(args.output)
        print(f"wrote {Path(args.output) / 'preprocessor_config.json'}")
        histogram = histogram or str(Path(args.output) / "log_mel_histogram.png")
    if histogram:
        draw_histogram(statistics, Path(histogram), checkpoint)
        print(f"wrote {histogram}")
    return statistics


def _run() -> None:
    dataset_stats(
        parse_arguments(StatsArguments, "dataset", "Normalisation statistics of a data set.")
    )


def main() -> None:
    run_command("ast-dataset-stats", _run)


if __name__ == "__main__":
    main()
