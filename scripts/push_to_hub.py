"""Put a checkpoint on the Hugging Face Hub, with its code and its model card.

    ast-push-to-hub runs/my_sounds someone/my-sounds --dry-run

The folder is a run folder or a checkpoint folder. What goes to the Hub is config, weights
(safetensors), feature extractor, code, card and the card's pictures, nothing else of the folder. It
goes in one commit: either all of it is there afterwards, or none.

The token is `HF_TOKEN`'s or that of `hf auth login`. It is never printed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from .common.arguments import run_command
from .publishing.repository import check_name, push, write_repository


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ast-push-to-hub", description="Put a checkpoint on the Hugging Face Hub."
    )
    parser.add_argument("folder", type=Path, help="run folder, or checkpoint folder")
    parser.add_argument("repo_id", help="NAMESPACE/NAME, or NAME in your own namespace")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, and stop")
    parser.add_argument(
        "--with-pipeline",
        action="store_true",
        help="with the pipeline's code; transformers then loads a pipeline from it only with "
        "trust_remote_code=True",
    )
    args = parser.parse_args(argv)
    logging.disable_progress_bar()

    def command() -> None:
        if not args.dry_run:
            address = push(args.folder, args.repo_id, args.private, args.with_pipeline)
            print(f"Pushed {address}")
            return
        check_name(args.repo_id)
        with tempfile.TemporaryDirectory(prefix="ast_push_") as temporary:
            target = Path(temporary)
            files = write_repository(args.folder, target, args.repo_id, args.with_pipeline)
            for file in files:
                print(f"{(target / file).stat().st_size:>12,}  {file}")
            print(f"Would go to {args.repo_id}; nothing was sent.")

    run_command("ast-push-to-hub", command)


if __name__ == "__main__":
    main()
