"""Put a checkpoint on the Hugging Face Hub, with its code and its model card.

    ast-push-to-hub runs/my_sounds someone/my-sounds --dry-run

The folder is a run folder or a checkpoint folder. What goes to the Hub is config, weights
(safetensors), feature extractor, code, card and the card's pictures, nothing else of the folder. It
goes in one commit: either all of it is there afterwards, or none.

The token is `HF_TOKEN`'s or that of `hf auth login`. It is never printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .common.options import Options, run_command, setting


@dataclass
class PushOptions(Options):
    folder: Path = setting(Path(), "a run folder or a checkpoint folder", positional="1")
    repo_id: str = setting("", "NAMESPACE/NAME, or a NAME in your own namespace", positional="1")
    dry_run: bool = setting(False, "show what would go, and stop")
    private: bool = setting(False, "make the repository private")
    with_pipeline: bool = setting(
        False,
        "with the pipeline's code; transformers then builds a pipeline from the repository only "
        "with trust_remote_code=True",
    )


def push_to_hub(options: PushOptions) -> None:
    """Push, or show what a push would send.

    Raises:
        ValueError: as `publishing.repository.push`.
    """
    import tempfile

    from transformers.utils import logging

    from .publishing.repository import check_name, push, write_repository

    logging.disable_progress_bar()
    if not options.dry_run:
        address = push(options.folder, options.repo_id, options.private, options.with_pipeline)
        print(f"Pushed {address}")
        return
    check_name(options.repo_id)
    with tempfile.TemporaryDirectory(prefix="ast_push_") as temporary:
        target = Path(temporary)
        files = write_repository(options.folder, target, options.repo_id, options.with_pipeline)
        for file in files:
            print(f"{(target / file).stat().st_size:>12,}  {file}")
        print(f"Would go to {options.repo_id}; nothing was sent.")


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-push-to-hub", PushOptions, push_to_hub, argv)


if __name__ == "__main__":
    main()
