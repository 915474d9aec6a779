"""Fine-tune AST on labelled sound with a `transformers` Trainer.

    ast-finetune my_sounds/ --output runs/my_sounds

`my_sounds` has one sub-folder of sounds per class; a CSV, Parquet or tar file, a folder of them, or
the name of a Hub dataset works, too. A recipe sets options, and the command line overrides it:

    ast-finetune esc10.yaml path/to/esc10 --num_epochs 5

If it is killed, run the same command again: it resumes exactly where it stopped. Options, run
folder and result are those of `ast-finetune-accelerate`; choose this one to build on `Trainer` and
its callbacks.
"""

from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.options import run_command
from .training.options import FinetuneOptions


def run(options: FinetuneOptions) -> None:
    if options.model != "scratch":
        check_checkpoints(options.model)
    from .training.folds import finetune_folds
    from .training.with_trainer import finetune

    finetune_folds(finetune, options)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(
        "ast-finetune",
        FinetuneOptions,
        run,
        argv,
        recipes=True,
        resumes=lambda options: not options.overwrite,
    )


if __name__ == "__main__":
    main()
