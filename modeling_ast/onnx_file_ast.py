"""An ONNX file of `export_ast.py` in ONNX Runtime: arrays in, arrays out, without torch.

waveform        (B, samples)    or input_values (B, T, F)
logits          (B, labels)     of a frame model (B, columns, labels)
probabilities   as the logits
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


class OnnxFile:
    """What the file says of itself, and what it answers.

    Args:
        path: a file that `export_onnx` wrote, waveform-in or spectrogram-in, any precision.
        threads: of a run; None: as `OMP_NUM_THREADS` says, else one for each processor of this
            process.

    Raises:
        ValueError: when the file is not such a one, or the package onnxruntime is missing.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        onnxruntime = import_optional("onnxruntime")
        self.path = path
        if not Path(path).is_file():
            raise ValueError(f"No such file: {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _usual_threads()
        options.log_severity_level = 3  # errors; it warns of half precision, which it then casts
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=onnxruntime.get_available_providers()
            )
        # Its errors have no common class.
        except Exception as error:
            raise ValueError(f"ONNX Runtime cannot read {path}: {error}") from error
        try:
            self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
            missing = {"config", "preprocessor_config"} - set(self.metadata)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))} in its metadata")
            if "logits" not in [output.name for output in self.session.get_outputs()]:
                raise ValueError("it has no output named logits")
            self.input_name: str = self.session.get_inputs()[0].name
            self.config: dict[str, Any] = json.loads(self.metadata["config"])
            self.preprocessor_config: dict[str, Any] = json.loads(
                self.metadata["preprocessor_config"]
            )
        # Metadata fail in many ways on values that nobody wrote.
        except Exception as error:
            raise ValueError(f"{self.damaged}: {error}") from error

    @property
    def damaged(self) -> str:
        """How messages about its content begin."""
        return f"{self.path} is damaged, or was not written by ast-export-onnx"

    def run(self, inputs: np.ndarray, output: str = "logits") -> np.ndarray:
        """(B, samples) or (B, T, F), float32 -> logits or probabilities."""
        try:
            (found,) = self.session.run([output], {self.input_name: inputs})
        except Exception as error:
            raise ValueError(f"{self.damaged}: {' '.join(str(error).split())}") from error
        answer: np.ndarray = found
        return answer


def _usual_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def import_optional(name: str) -> Any:
    """Import a package of the extra `export`.

    Raises:
        ValueError: if it is missing; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"ONNX files need the package {name.split('.')[0]}, which is not installed. In this "
            "project's folder, run: pip install '.[export]'"
        ) from error
