"""Export an AST checkpoint to ONNX files, from waveform to probabilities.

    ast-export-onnx CHECKPOINT --output onnx/
    ast-export-onnx CHECKPOINT --output onnx/ --check DATASET --fold_column fold --evaluation_fold 5

Every file is compared with PyTorch on sounds from 0.1 s to 20 s. `--check` also measures accuracy
and speed on labelled clips: a dataset's evaluation split, one of its folds, or the fifth that
`ast-finetune-accelerate` holds out.
"""

from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.lean import quiet_libraries
from .common.options import run_command
from .inference.options import ExportOptions


def export(options: ExportOptions) -> None:
    check_checkpoints(options.checkpoint)
    quiet_libraries()
    from .inference.onnx_files import export_and_check

    export_and_check(options)


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-export-onnx", ExportOptions, export, argv)


if __name__ == "__main__":
    main()
