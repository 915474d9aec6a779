"""The page of a Hugging Face Space; `ast-demo --write-space` puts the code beside this file."""

import os
from pathlib import Path

from ast_scripts.inference.classifier import Classifier
from ast_scripts.inference.page import serve

# A checkpoint in this folder wins; the setting AST_MODEL of the Space names one on the Hub.
HERE = Path(__file__).parent / "checkpoint"
MODEL = os.environ.get("AST_MODEL", "MIT/ast-finetuned-audioset-10-10-0.4593")

if __name__ == "__main__":
    serve(Classifier(str(HERE) if HERE.is_dir() else MODEL), host="0.0.0.0", port=7860)
