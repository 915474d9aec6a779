"""Measure how fast the parts are, next to what people use today, in one run.

    ast-benchmark features --json features.json
    ast-benchmark forward --workload mixed
    ast-benchmark lengths --plot lengths.png
    ast-benchmark cold
    ast-benchmark pipeline --clip_length_s 5 --hidden_size 192 --max_length 512
    ast-benchmark hours --json hours.json
    ast-benchmark processes CHECKPOINT --speed fast
    ast-benchmark speed CHECKPOINT DATASET --fold_column fold --evaluation_fold 5
    ast-benchmark train
    ast-benchmark descendants --threads 1
    ast-benchmark merging CHECKPOINT DATASET --plot merging.png
    ast-benchmark agreement CHECKPOINT DATASET --sources SOURCE
    ast-benchmark few CHECKPOINT DATASET --fold_column fold
    ast-benchmark queues CHECKPOINT DATASET --fold_column fold --plot queues.png
    ast-benchmark calibration CHECKPOINT DATASET --fold_column fold
    ast-benchmark loop --threads 2
    ast-benchmark detection DATASET
    ast-benchmark weak CHECKPOINT DATASET --events events.csv

After a warm-up the cases alternate, so a machine that gets busier slows all of them alike. The
table gives medians, the spread, and how much faster each case is than the first.
"""

from collections.abc import Sequence

from .benchmarks import options
from .common.options import Subcommand, call_subcommand, run_subcommand

# A new benchmark is one entry.
BENCHMARKS = {
    "features": Subcommand(
        options.FeaturesOptions,
        "waveforms to input_values: ours, native's extractor, torchaudio",
        "benchmarks.features:benchmark_features",
    ),
    "forward": Subcommand(
        options.ForwardOptions,
        "spectrograms to logits: full length, short clips, mixed lengths",
        "benchmarks.forward:benchmark_forward",
    ),
    "lengths": Subcommand(
        options.LengthsOptions,
        "time and memory by length of the sound, in windows and whole",
        "benchmarks.forward:benchmark_lengths",
    ),
    "cold": Subcommand(
        options.ColdOptions,
        "a new process: imports, loading, the first label of one file",
        "benchmarks.forward:benchmark_cold",
    ),
    "pipeline": Subcommand(
        options.PipelineOptions,
        'files to labels: pipeline("audio-classification"), stock and ours',
        "benchmarks.pipeline:benchmark_pipeline",
    ),
    "hours": Subcommand(
        options.HoursOptions,
        "hours of sound per hour: sizes, mel bins, strides, precision, hops; stock pipeline",
        "benchmarks.hours:benchmark_hours",
    ),
    "processes": Subcommand(
        options.ProcessesOptions,
        "ast-classify with one process and with several",
        "benchmarks.hours:benchmark_processes",
    ),
    "speed": Subcommand(
        options.SpeedOptions,
        "ways to run a checkpoint here: PyTorch, compiled, ONNX Runtime, 8 bits, OpenVINO",
        "benchmarks.speed:benchmark_speed",
    ),
    "train": Subcommand(
        options.TrainOptions,
        "a training step: native AST, ours, ours with PaSST's patchout",
        "benchmarks.step:benchmark_train",
    ),
    "descendants": Subcommand(
        options.DescendantsOptions,
        "sounds to logits: AST and its descendants, as published, with random weights",
        "benchmarks.descendants:benchmark_descendants",
    ),
    "accuracy": Subcommand(
        options.AccuracyOptions,
        "time to reach an accuracy: our recipe, and a plain loop around native AST",
        "benchmarks.accuracy:benchmark_accuracy",
    ),
    "merging": Subcommand(
        options.MergingOptions,
        "token merging: speed and accuracy on a dataset",
        "benchmarks.merging:benchmark_merging",
    ),
    "agreement": Subcommand(
        options.AgreementOptions,
        "how far a student says what its teacher says, by group of labels",
        "benchmarks.agreement:benchmark_agreement",
    ),
    "few": Subcommand(
        options.FewOptions,
        "accuracy with a few marked clips per class",
        "benchmarks.marking:benchmark_few",
    ),
    "queues": Subcommand(
        options.QueuesOptions,
        "marks each queue needs to reach 90 and 95 % of the accuracy with all marks",
        "benchmarks.marking:benchmark_queues",
    ),
    "calibration": Subcommand(
        options.CalibrationOptions,
        "calibration error before and after; promised and attained precision",
        "benchmarks.marking:benchmark_calibration",
    ),
    "loop": Subcommand(
        options.LoopOptions,
        "an index: seconds for a search, and for teaching",
        "benchmarks.loop:benchmark_loop",
    ),
    "detection": Subcommand(
        options.DetectionOptions,
        "sounds found in soundscapes: a frame model against a window classifier",
        "benchmarks.detection:benchmark_detection",
    ),
    "weak": Subcommand(
        options.WeakOptions,
        "long recordings with one label each: windows, bags and their poolings, an oracle",
        "benchmarks.weak:benchmark_weak",
    ),
}


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark named by the first argument.

    Raises:
        ValueError: for an invalid name or option.
    """
    call_subcommand("ast-benchmark", BENCHMARKS, __doc__ or "", argv)


def main(argv: Sequence[str] | None = None) -> None:
    run_subcommand("ast-benchmark", BENCHMARKS, __doc__ or "", argv)


if __name__ == "__main__":
    main()
