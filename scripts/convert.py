"""Convert checkpoints: other code bases' weights to a Hugging Face folder, and AST's back.

    ast-convert audiotransformer_tiny_mAP_4814.pt --output ced-tiny
    ast-convert model.safetensors --variant ced-tiny --output ced-tiny
    ast-convert my_ast.pth my-ast --labels audioset
    ast-convert ast-audioset audioset.pth

Names and shapes of the tensors tell whose weights they are: the original AST's, one of its
descendants' (PaSST, SSAST, AudioMAE, CED, Dasheng), or an image transformer's to start from. What
they do not tell, such as the strides, is assumed to be as in the published models and reported; a
number that does not fit is refused. An AST checkpoint folder becomes the original code's `.pth`.

`--variant` names one of the authors' published checkpoints: geometry, labels, statistics and card
come from its folder in `hub_configs`, and the result is a complete Hub repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .common.options import Options, run_command, setting

_TRAINED_WITH = "what the weights were trained with, if they do not tell or it differs"


@dataclass
class ConvertOptions(Options):
    source: Path = setting(
        Path(), "a .pth, .pt or .safetensors, a folder with one, or an AST folder", positional="1"
    )
    target: Path | None = setting(None, "the folder, or the .pth, to write", positional="?")
    output: Path | None = setting(None, "the same as the second argument")
    variant: str | None = setting(None, "name of a published checkpoint: a folder of hub_configs")
    family: str | None = setting(
        None,
        "whose weights they are, if they look like another's: a fine-tuned SSAST with 16 x 16 "
        "patches looks like an AST",
    )
    labels: str | None = setting(
        None, "JSON list of label names, or a bundled one: audioset, esc50, …"
    )
    problem_type: str | None = setting(
        None,
        "what the scores mean; AudioSet models are multi-label",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    frequency_stride: int | None = setting(
        None, "fstride; AST: 10", at_least=1, group=_TRAINED_WITH
    )
    time_stride: int | None = setting(None, "tstride; AST: 10", at_least=1, group=_TRAINED_WITH)
    max_length: int | None = setting(
        None, "input_tdim, in frames; AST: 1024", at_least=1, group=_TRAINED_WITH
    )
    num_mel_bins: int | None = setting(
        None, "input_fdim; AST: 128", at_least=1, group=_TRAINED_WITH
    )
    num_attention_heads: int | None = setting(
        None, "needed only for unusual widths", at_least=1, group=_TRAINED_WITH
    )
    pooling: str | None = setting(
        None,
        "what the head gets; special_tokens for an SSAST fine-tuned with ft_cls",
        choices=("special_tokens", "patches"),
        group=_TRAINED_WITH,
    )


_OF_WEIGHTS = (
    "labels", "problem_type", "family", "frequency_stride", "time_stride", "max_length",
    "num_mel_bins", "num_attention_heads", "pooling",
)  # fmt: skip


def convert(options: ConvertOptions) -> None:
    """Convert others' weights or an AST folder, whichever the first argument is.

    Raises:
        ValueError: if something is missing or does not fit together.
    """
    from .publishing.conversion import (
        folder_to_original,
        is_checkpoint_folder,
        weights_to_folder,
        weights_to_repository,
    )

    source, result = options.source, options.target or options.output
    if result is None or (options.target is not None and options.output is not None):
        raise ValueError("Name the target once: ast-convert SOURCE TARGET, or --output TARGET.")
    if not source.exists():
        raise ValueError(f"No such file or folder: {source}")
    given = {name: getattr(options, name) for name in _OF_WEIGHTS}
    given = {name: value for name, value in given.items() if value is not None}
    is_back = source.is_dir() and (is_checkpoint_folder(source) or result.suffix == ".pth")
    if is_back:
        if given or options.variant:
            raise ValueError(
                "--labels, --problem-type, --variant and the numbers it was trained with are for "
                f"a .pth, which states none of them; {source} is a checkpoint folder."
            )
        folder_to_original(source, result)
    elif options.variant is None:
        for note in weights_to_folder(source, result, **given):
            print(note)
    else:
        if given:
            option = next(iter(given))
            raise ValueError(f"--variant fixes geometry and labels: omit --{option}.")
        weights_to_repository(source, result, options.variant)
    print(f"Wrote {result}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-convert", ConvertOptions, convert, argv)


if __name__ == "__main__":
    main()
