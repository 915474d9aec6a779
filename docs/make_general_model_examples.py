"""The examples of docs/general_model.md: the first clip of each class, whatever comes out.

    python -m docs.make_general_model_examples ESC10

ESC10 is the dataset's folder (Parquet: audio, label); the bundled model was not trained on it.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from ast_scripts.inference.classifier import DEFAULT_MODEL, Classifier
from ast_scripts.inference.heard import Heard
from datasets import Features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("esc10", type=Path)
    files = sorted(parser.parse_args().esc10.rglob("*.parquet"))
    names = Features.from_arrow_schema(pq.read_schema(files[0]))["label"]
    first: dict[int, bytes] = {}
    for file in files:
        for row in pq.read_table(file).to_pylist():
            first.setdefault(row["label"], row["audio"]["bytes"])
    print("| class | best labels |\n| --- | --- |")
    for clip, heard in Classifier(DEFAULT_MODEL).hear_each(sorted(first.items())):
        assert isinstance(heard, Heard), heard
        said = ", ".join(f"{label} {score:.2f}" for score, label in heard.labels(3))
        print(f"| {names.int2str(clip).replace('_', ' ')} | {said} |")


if __name__ == "__main__":
    main()
