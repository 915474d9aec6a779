"""Fine-tune AST on labelled sound with a plain Accelerate loop.

    ast-finetune-accelerate my_sounds/ --output runs/my_sounds

`my_sounds` has one sub-folder of sounds per class; a CSV, Parquet or tar file, a folder of them, or
the name of a Hub dataset works, too. A recipe sets options, and the command line overrides it:

    ast-finetune-accelerate esc10.yaml path/to/esc10 --num_epochs 5

If it is killed, run the same command again: it resumes exactly where it stopped. `ast-finetune`
does the same with a `transformers` Trainer.
"""

from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.options import run_command
from .training.options import FinetuneOptions


def run(options: FinetuneOptions) -> None:
    if options.model != "scratch":
        check_checkpoints(options.model)
    from .training.folds import finetune_folds
    from .training.with_accelerate import finetune

    finetune_folds(finetune, options)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(
        "ast-finetune-accelerate",
        FinetuneOptions,
        run,
        argv,
        recipes=True,
        resumes=lambda options: not options.overwrite,
    )


if __name__ == "__main__":
    main()
