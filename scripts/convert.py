"""Convert AST checkpoints: the original code's `.pth` to a Hugging Face folder, and back.

    ast-convert audioset_10_10_0.4593.pth --variant ast-audioset-10-10-0.4593 --output ast-audioset
    ast-convert my_ast.pth my-ast --labels audioset
    ast-convert ast-audioset audioset.pth

The direction follows from the first argument: a file or a folder. `--variant` names one of the
author's published checkpoints: geometry, labels, statistics and card are those of its folder in
`hub_configs`, and the result is a complete Hub repository. Of any other `.pth`, strides, length and
mel bins are those that it was trained with; a wrong one is noticed, and what would fit is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .common.options import Options, run_command, setting

_TRAINED_WITH = "what the .pth was trained with"


@dataclass
class ConvertOptions(Options):
    source: Path = setting(Path(), "an original .pth, or a checkpoint folder", positional="1")
    target: Path | None = setting(None, "the folder, or the .pth, to write", positional="?")
    output: Path | None = setting(None, "the same as the second word")
    variant: str | None = setting(None, "name of a published checkpoint: a folder of hub_configs")
    labels: str | None = setting(
        None, "JSON list of label names, or the name of one of ours: audioset, esc50, …"
    )
    problem_type: str | None = setting(
        None,
        "what the scores mean; AudioSet models are multi-label",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    frequency_stride: int = setting(10, "fstride", at_least=1, group=_TRAINED_WITH)
    time_stride: int = setting(10, "tstride", at_least=1, group=_TRAINED_WITH)
    max_length: int = setting(1024, "input_tdim", at_least=16, group=_TRAINED_WITH)
    num_mel_bins: int = setting(128, "input_fdim", at_least=16, group=_TRAINED_WITH)
    num_attention_heads: int | None = setting(
        None, "only for widths of your own", at_least=1, group=_TRAINED_WITH
    )


_OF_A_FILE = (
    "labels", "problem_type", "frequency_stride", "time_stride", "max_length", "num_mel_bins",
    "num_attention_heads",
)  # fmt: skip


def convert(options: ConvertOptions) -> None:
    """Convert in the direction that the first word says: a file, or a folder.

    Raises:
        ValueError: when something is missing, or does not fit together.
    """
    from .publishing.conversion import (
        folder_to_original,
        original_to_folder,
        original_to_repository,
    )

    source, result = options.source, options.target or options.output
    if result is None or (options.target is not None and options.output is not None):
        raise ValueError("Say once what to write: ast-convert SOURCE TARGET, or --output.")
    defaults = ConvertOptions()
    changed = [n for n in _OF_A_FILE if getattr(options, n) != getattr(defaults, n)]
    if source.is_dir():
        if changed or options.variant:
            option = changed[0] if changed else "variant"
            raise ValueError(f"--{option} is for a .pth; {source} is a checkpoint folder.")
        folder_to_original(source, result)
    elif not source.is_file():
        raise ValueError(f"No such file or folder: {source}")
    elif options.variant is None:
        settings = {name: getattr(options, name) for name in _OF_A_FILE}
        original_to_folder(source, result, **settings)
    else:
        if changed:
            raise ValueError(f"--variant fixes geometry and labels: leave out --{changed[0]}.")
        original_to_repository(source, result, options.variant)
    print(f"Wrote {result}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-convert", ConvertOptions, convert, argv)


if __name__ == "__main__":
    main()
