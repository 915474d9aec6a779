"""Put a checkpoint on the Hugging Face Hub, with its code and its model card.

    ast-push-to-hub runs/my_sounds someone/my-sounds --dry_run

The folder is a run folder or a checkpoint folder. It uploads config, weights (safetensors), feature
extractor, code, card and the card's pictures, and nothing else from the folder, in one commit:
either all of it arrives, or none.

The token comes from `HF_TOKEN` or `hf auth login`. It is never printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .common.lean import quiet_libraries
from .common.options import Options, run_command, setting


@dataclass
class PushOptions(Options):
    folder: Path = setting(Path(), "a run folder or a checkpoint folder", positional="1")
    repo_id: str = setting("", "NAMESPACE/NAME, or a NAME in your own namespace", positional="1")
    dry_run: bool = setting(False, "only show what would be uploaded")
    private: bool = setting(False, "make the repository private")
    with_pipeline: bool = setting(
        False,
        "include the pipeline's code; transformers then builds a pipeline from the repository only "
        "with trust_remote_code=True",
    )


def push_to_hub(options: PushOptions) -> None:
    """Push, or show what a push would send.

    Raises:
        ValueError: as for `publishing.repository.push`.
    """
    import tempfile

    quiet_libraries()
    from .publishing.repository import check_name, push, write_repository

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
        print(f"Would upload to {options.repo_id}; nothing was sent.")


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-push-to-hub", PushOptions, push_to_hub, argv)


if __name__ == "__main__":
    main()
