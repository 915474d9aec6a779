"""Say what a recording sounds like.

    ast-classify rec.wav other.mp3 --model FOLDER_OR_HUB_NAME

Prints the most likely labels of every file. Files that cannot be read are reported and the others
still classified; the exit status is 1 if there was one, 2 for a wrong model or option.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import pipeline
from transformers.utils import logging

import modeling_ast  # noqa: F401  (registers the pipeline)
from feature_extraction import AudioDecodingError

from .arguments import run_command

_DEFAULT_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"


def load_classifier(model: str, **kwargs: Any) -> Any:
    """`pipeline("audio-classification")` of a checkpoint folder or Hub name.

    Raises:
        ValueError: when there is no such folder.
        OSError: when there is no such model on the Hub, or it cannot be reached.
    """
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ValueError(f"No such checkpoint folder: {model}")
    # transformers builds its own extractor first, and warns of it; the pipeline takes ours.
    warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
    return pipeline("audio-classification", model=model, **kwargs)


def classify(files: list[str], model: str, top_k: int) -> list[dict[str, Any]]:
    """Classify files one by one: {"file", "labels": [{"score", "label"}, …]} or {"file", "error"}.

    Raises:
        ValueError: for a model that cannot be loaded.
    """
    if top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {top_k}.")
    classifier = load_classifier(model)
    results: list[dict[str, Any]] = []
    for file in files:
        try:
            results.append({"file": file, "labels": classifier(file, top_k=top_k)})
        except AudioDecodingError as error:
            results.append({"file": file, "error": str(error)})
    return results


def format_table(results: list[dict[str, Any]]) -> str:
    """The readable files' labels with their scores in per cent, best first."""
    lines = []
    for result in results:
        for rank, label in enumerate(result.get("labels", ())):
            name = result["file"] if rank == 0 else ""
            lines.append((name, f"{100 * label['score']:5.1f} %", label["label"]))
    width = max((len(name) for name, _, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {score}  {label}" for name, score, label in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what recordings sound like.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sounds, any format and rate")
    parser.add_argument(
        "--model", default=_DEFAULT_MODEL, help="checkpoint folder or Hub name (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=3, help="labels per file (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    logging.disable_progress_bar()

    def command() -> int:
        results = classify(args.files, args.model, args.top_k)
        if args.json:
            print(json.dumps(results, indent=2, ensure_ascii=False))
        elif table := format_table(results):
            print(table)
        errors = [result["error"] for result in results if "error" in result]
        for error in errors:
            print(f"ast-classify: {error}", file=sys.stderr)
        return 1 if errors else 0

    run_command("ast-classify", command)


if __name__ == "__main__":
    main()
