"""Measures, compares, draws and writes a dataset's statistics as a checkpoint's normalisation."""

import json
import logging
from pathlib import Path

from feature_extraction import ASTFeatureExtractor

from ..common.checkpoints import resolve_checkpoint
from .options import StatsOptions
from .sources import open_stream
from .statistics import HISTOGRAM_EDGES, Statistics, measure_dataset

logger = logging.getLogger(__name__)

# When a checkpoint's statistics count as far from the data's: the distance of the means, in the
# checkpoint's standard deviations, or the ratio of the standard deviations. AudioSet's mean is 0.5
# from those published for ESC-50 and Speech Commands, which were fine-tuned with their own.
_FAR_MEAN = 0.4
_FAR_STD = 1.4


def draw_histogram(
    statistics: Statistics, path: Path, checkpoint: ASTFeatureExtractor | None = None
) -> None:
    """Draw all log-mel values, with mean ± std of the data and optionally of a checkpoint."""
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
    """Warnings if the checkpoint's normalisation does not fit this data closely.

    A wrong mean is a mistake. A different deviation is a choice: it scales the contrast, the
    weights were trained with it, and some recipes use it deliberately.
    """
    shift = (statistics.mean - checkpoint.mean) / checkpoint.std
    spread = statistics.std / checkpoint.std
    both = (
        f"({checkpoint.mean:.4f} / {checkpoint.std:.4f}; the data's are {statistics.mean:.4f} / "
        f"{statistics.std:.4f})"
    )
    if abs(shift) > _FAR_MEAN:
        return (
            f"The checkpoint's mean is far from the data's {both}: its input would be {shift:+.2f} "
            "standard deviations off. Fine-tune it with the data's: "
            f"--mean {statistics.mean:.4f} --std {statistics.std:.4f}"
        )
    if not 1 / _FAR_STD <= spread <= _FAR_STD:
        return (
            f"The checkpoint's deviation differs from the data's {both}. That can be deliberate: a "
            "smaller one gives more contrast, as in esc10.yaml. Keep the one the weights were "
            "trained with; fine-tuning does so unless you pass --std."
        )
    return None


def _load_extractor(folder: str) -> ASTFeatureExtractor:
    try:
        return ASTFeatureExtractor.from_pretrained(resolve_checkpoint(folder))
    except OSError as error:
        raise ValueError(f"No feature extractor in {folder}: {error}") from error


def _output_extractor(options: StatsOptions) -> ASTFeatureExtractor:
    """The one to write: the output folder's own if it has one."""
    if options.output is not None:
        config = Path(options.output) / "preprocessor_config.json"
        if config.exists():
            kind = json.loads(config.read_text()).get("feature_extractor_type")
            if kind != "ASTFeatureExtractor":
                raise ValueError(f"{config} is of a {kind}, expected an ASTFeatureExtractor.")
            return _load_extractor(options.output)
    return ASTFeatureExtractor(
        sampling_rate=options.sampling_rate, num_mel_bins=options.num_mel_bins
    )


def dataset_stats(options: StatsOptions) -> Statistics:
    """Measure, print, draw and write, as the options say.

    Raises:
        ValueError: for a wrong path, column or checkpoint, or if no sound can be read.
    """
    if not options.dataset:
        raise ValueError("Name a dataset: a folder, Parquet or tar file(s), or one on the Hub.")
    extractor = _output_extractor(options)
    checkpoint = _load_extractor(options.checkpoint) if options.checkpoint else None
    stream = open_stream(
        options.dataset, options.split, options.dataset_config, options.audio_column
    )
    statistics = measure_dataset(
        stream,
        options.audio_column,
        extractor.sampling_rate,
        extractor.num_mel_bins,
        options.num_workers,
    )

    print(f"mean    {statistics.mean:.7f}")
    print(f"std     {statistics.std:.7f}")
    print(f"clips   {statistics.clips}")
    print(f"hours   {statistics.samples / extractor.sampling_rate / 3600:.4f}")
    print(f"frames  {statistics.frames}")
    print(f"floor   {100 * statistics.floor:.1f} % of the values are digital silence")
    left_out = len(statistics.unreadable) + statistics.too_short
    if left_out:
        print(f"skipped: {len(statistics.unreadable)} unreadable, {statistics.too_short} too short")
    if checkpoint is not None and (warning := difference_from(checkpoint, statistics)):
        logger.warning(warning)

    histogram = options.histogram
    if options.output is not None:
        if any(Path(options.output).glob("*.safetensors")):
            logger.warning(
                f"{options.output} holds weights that were trained with {extractor.mean} / "
                f"{extractor.std}: fine-tune them before using them with the new statistics."
            )
        extractor.mean, extractor.std = round(statistics.mean, 7), round(statistics.std, 7)
        extractor.save_pretrained(options.output)
        print(f"wrote {Path(options.output) / 'preprocessor_config.json'}")
        histogram = histogram or str(Path(options.output) / "log_mel_histogram.png")
    if histogram:
        draw_histogram(statistics, Path(histogram), checkpoint)
        print(f"wrote {histogram}")
    return statistics
