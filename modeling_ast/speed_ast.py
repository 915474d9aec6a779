"""The fastest way to run a checkpoint on this machine that loses little, measured once and kept.

    choose("ast-tiny-esc10's folder", "fast")

Ways that are compared: PyTorch ("exact"), the same numbers in ONNX Runtime ("onnx"), 8-bit weights
there ("int8"), and these with tokens merged ("merged"). What one loses is measured on made-up
sounds: of the score that the exact model gives its best label, what the label that the other way
calls best is short of, in points, averaged. With scores that are right as often as they say, that
is the accuracy lost. `ast-benchmark speed` measures on labelled clips, and what it finds takes the
place of that.

A cache folder for each checkpoint, set of versions and processor:

    HF_HOME/ast/speed/KEY/measured.json     what was measured
    HF_HOME/ast/speed/KEY/model….onnx       the files

It appears whole or not at all. Reading it needs no torch.
"""

import copy
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPEEDS = {"exact": 0.0, "fast": 0.5, "fastest": 2.0}  # points that may be lost
FILES = {"onnx": "model.onnx", "int8": "model_int8.onnx", "merged": "model_merged.onnx"}
_FORMAT = "2"  # of the cache
_PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript")
_SOUNDS = 24
_LEAST_GAIN = 1.05  # times as fast as exact, else exact it is
_NAMES = {
    "exact": "PyTorch",
    "onnx": "ONNX Runtime",
    "int8": "8-bit weights in ONNX Runtime",
    "merged": "8-bit weights and merged tokens in ONNX Runtime",
}

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A way to run a checkpoint here."""

    way: str  # "exact" or one of `FILES`
    file: Path | None  # None: the checkpoint itself
    window_s: float  # the model's
    times_faster: float
    lost_points: float
    sounds: str  # that the loss was measured on
    left_out: str  # why a faster way was not taken; "": there is none

    def __str__(self) -> str:
        text = f"{_NAMES[self.way]}, {self.times_faster:.1f} x as fast as exact here"
        if self.way != "exact":
            text += f", {max(0.0, self.lost_points):.2f} points lost on {self.sounds}"
        return f"{text}{self.left_out}."


def choose(checkpoint: str | Path, speed: str) -> Choice:
    """The fastest way within a word's loss; measured when it is asked for the first time.

    Args:
        checkpoint: a folder.
        speed: of `SPEEDS`.

    Raises:
        ValueError: for another word, or when the packages of the extra `export` are missing.
    """
    if speed not in SPEEDS:
        raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}.")
    folder = cache_folder(checkpoint)
    if not (folder / "measured.json").is_file():
        logger.warning("Measuring ways to run this model here, once: about a minute.")
        _measure_into(folder, checkpoint)
    return _choice(folder, speed)


def swap(model: Any, feature_extractor: Any, speed: str) -> tuple[Any, Any]:
    """A pipeline's model and feature extractor -> those that `choose` chooses.

    The choice is logged. A model that was changed since it was loaded is measured as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        choice = choose(folder, speed)
    logger.warning("speed=%r: %s", speed, choice)
    if choice.file is None:
        return model, feature_extractor
    from .onnx_ast import OnnxModel

    faster = OnnxModel(choice.file)
    return faster, faster.feature_extractor


def cache_folder(checkpoint: str | Path) -> Path:
    """Where what was measured of a checkpoint is kept: by weights, versions and processor."""
    checksum = hashlib.sha256(_FORMAT.encode())
    for file in sorted(Path(checkpoint).iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin") and file.is_file():
            checksum.update(file.name.encode())
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    checksum.update(block)
    for package in _PACKAGES:
        try:
            checksum.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            continue
    checksum.update(processor().encode())
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home).expanduser() / "ast" / "speed" / checksum.hexdigest()[:16]


def processor() -> str:
    """Its name, and whether it multiplies 8-bit numbers without overflow."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(
            line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        )
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        name = fields.get("model name", name)
        known = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
        found = fields.get("flags", fields.get("Features", "")).split()
        flags = " ".join(sorted(known & set(found)))
    return f"{name} {flags}".strip()


def record_loss(checkpoint: str | Path, lost_points: dict[str, float], sounds: str) -> None:
    """Put what was measured on labelled clips in the place of what made-up sounds said.

    Args:
        checkpoint: a folder, of which `choose` was asked before.
        lost_points: by way.
        sounds: what the clips are, for the line that tells of the choice.
    """
    path = cache_folder(checkpoint) / "measured.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    for way, lost in lost_points.items():
        measured["ways"][way]["lost_points"] = lost
    measured["sounds"] = sounds
    unfinished = path.with_name(f"measured.{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(measured, indent=2), encoding="utf-8")
    os.replace(unfinished, path)


def _choice(folder: Path, speed: str) -> Choice:
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    ways: dict[str, dict[str, float]] = measured["ways"]
    exact = ways["exact"]["ms_per_window"]
    best, left_out = "exact", ""
    for way in sorted(ways, key=lambda way: ways[way]["ms_per_window"]):
        faster = exact / ways[way]["ms_per_window"]
        lost = ways[way]["lost_points"]
        if way == "merged" and speed != "fastest":
            continue  # made-up sounds tell too little of what merging loses on real ones
        if way == "exact" or faster < _LEAST_GAIN:
            break
        if lost <= SPEEDS[speed]:
            best = way
            break
        left_out = (
            f"; {_NAMES[way]} would be {faster:.1f} x as fast, but loses {lost:.2f} points on "
            f"{measured['sounds']}, more than the {SPEEDS[speed]:g} that {speed!r} allows"
        )
    return Choice(
        best,
        folder / FILES[best] if best in FILES else None,
        measured["window_s"],
        exact / ways[best]["ms_per_window"],
        ways[best]["lost_points"],
        measured["sounds"],
        left_out,
    )


def _measure_into(folder: Path, checkpoint: str | Path) -> None:
    """Export and measure beside the folder, then take its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measuring_", dir=folder.parent) as unfinished:
        whole = Path(unfinished) / "whole"
        whole.mkdir()
        measured = _measure(checkpoint, whole)
        (whole / "measured.json").write_text(json.dumps(measured, indent=2), encoding="utf-8")
        try:
            os.replace(whole, folder)
        except OSError:  # another process was first
            if not (folder / "measured.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(whole, folder)


def _measure(checkpoint: str | Path, folder: Path) -> dict[str, Any]:
    """Write the files of all ways into a folder and measure them; one window at a time."""
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
    from transformers.utils import logging as of_transformers

    from . import ASTAudioClassificationPipeline, ASTFrameConfig
    from .export_ast import export_onnx
    from .onnx_ast import OnnxClassifier

    shown = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()  # for the loading of weights, amid other lines
    model = AutoModelForAudioClassification.from_pretrained(checkpoint).eval()
    if shown:
        of_transformers.enable_progress_bar()
    extractor = AutoFeatureExtractor.from_pretrained(checkpoint)
    export_onnx(model, extractor, folder, ["fp32", "int8"])
    if not isinstance(model.config, ASTFrameConfig):  # whose columns stay apart
        export_merged(model, extractor, folder / FILES["merged"])
    ways: dict[str, Callable[..., Any]] = {
        "exact": ASTAudioClassificationPipeline(
            model=model, feature_extractor=extractor, task="audio-classification", device=-1
        ),
        **{way: OnnxClassifier(file) for way, file in files_in(folder).items()},
    }
    samples = extractor.filterbank.num_samples(model.config.max_length)
    sounds = [made_up_sound(samples, seed, extractor.sampling_rate) for seed in range(_SOUNDS)]
    answers: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for sound in sounds:  # in turn, as other work on the machine comes and goes
        for way, classify in ways.items():
            began = time.perf_counter()
            scores = classify(sound, top_k=None)
            seconds[way].append(time.perf_counter() - began)
            answers[way].append({entry["label"]: entry["score"] for entry in scores})
    return {
        "processor": processor(),
        "sounds": f"{_SOUNDS} made-up sounds",
        "window_s": samples / extractor.sampling_rate,
        "ways": {
            way: {
                # The fastest run: other work on the machine only ever slows one down.
                "ms_per_window": 1000 * min(seconds[way]),
                "lost_points": lost_points(answers["exact"], answers[way]),
            }
            for way in ways
        },
    }


def files_in(folder: Path) -> dict[str, Path]:
    """The ways that a cache folder has files of."""
    return {way: folder / name for way, name in FILES.items() if (folder / name).is_file()}


def merging_layers(num_layers: int) -> list[int]:
    """Where tokens are merged, a third of them each time: after the model has looked at them all.

    In each layer, finding the pairs would take as long as it saves.
    """
    return [num_layers // 3 - 1, num_layers // 2 - 1, 2 * num_layers // 3 - 1]


def export_merged(model: Any, feature_extractor: Any, path: Path) -> None:
    """Write a model with 8-bit weights that merges tokens in `merging_layers`."""
    from .export_ast import export_onnx

    merging = copy.deepcopy(model)
    config = merging.config
    layers = merging_layers(config.num_hidden_layers)
    rows, columns = config.trained_grid
    config.merged_tokens_per_layer = [
        rows * columns if layer in layers else 0 for layer in range(config.num_hidden_layers)
    ]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        os.replace(export_onnx(merging, feature_extractor, folder, ["int8"])["int8"], path)


def lost_points(exact: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """What other answers' best labels are short of, by the exact model's scores, in points.

    Args:
        exact, other: label -> score, of each sound.
    """
    short = [
        max(of_exact.values()) - of_exact[max(of_other, key=lambda label: of_other[label])]
        for of_exact, of_other in zip(exact, other, strict=True)
    ]
    return 100 * float(np.mean(short))


def made_up_sound(samples: int, seed: int, rate: int = 16000) -> np.ndarray:
    """Noise of some colour, a gliding tone and clicks, each at its own level: (samples,)."""
    random = np.random.default_rng(seed)
    time_s = np.arange(samples) / rate
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** random.uniform(0, 1)
    noise = np.fft.irfft(spectrum, samples)
    low, rise = random.uniform(100, 4000), random.uniform(-0.5, 0.5)
    tone = np.sin(2 * np.pi * low * time_s * (1 + rise * time_s / time_s[-1] / 2))
    tone *= np.sin(2 * np.pi * random.uniform(0.2, 8) * time_s) > random.uniform(-1, 1)
    clicks = (random.uniform(size=samples) < random.uniform(0, 20) / rate).astype(float)
    clicks = np.convolve(clicks, np.exp(-np.arange(400) / 60), "same")
    parts = [part / max(1e-9, np.abs(part).max()) for part in (noise, tone, clicks)]
    levels = 10 ** random.uniform(-2.5, -0.3, len(parts))
    return sum(level * part for level, part in zip(levels, parts, strict=True)).astype(np.float32)


@functools.cache
def products_saturate() -> bool:
    """Whether 8-bit products overflow in ONNX Runtime on this processor, as without VNNI.

    The largest products that there can be, added in pairs as AVX2 and AVX-512 without VNNI do. With
    weights of 7 bits, as the exported files have them, no sum of two reaches the limit.
    """
    return _largest_product(127) != 255 * 127 * 64


def _largest_product(weight: int, terms: int = 64) -> int:
    """255 · weight, `terms` times, as ONNX Runtime adds them."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((terms, 16), weight, np.int8), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "weights"], ["sums"])],
        "products",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [16, terms])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [16, 16])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (sums,) = session.run(None, {"a": np.full((16, terms), 255, np.uint8)})
    return int(sums[0, 0])
