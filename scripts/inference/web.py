"""Writes a page that names sounds in the visitor's browser: static files, no server.

index.html, app.js, worker.js, recorder.js    the page
model.onnx                                    the model, waveform in, 8 bits
model.json                                    what the page must know about it
ort/                                          ONNX Runtime Web, from its npm package
"""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from modeling_ast.onnx_ast import OnnxModel

from ..common.bundled import hub_configs_folder

# The smallest WebAssembly of the versions tried (1.19 to 1.30): 11.2 MB; 1.30 has 14.2.
_RUNTIME = "onnxruntime-web@1.22.0"
_RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)


def write_web(onnx_file: Path, folder: Path, name: str, runtime: Path | None = None) -> None:
    """Write the page's folder.

    Args:
        onnx_file: waveform-in, of any precision; 8 bits are the smallest and fastest.
        folder: for the files; created if missing, must be empty.
        name: of the model, shown on the page.
        runtime: folder with ONNX Runtime Web's files, the `dist` of its npm package; None: fetch it
            with npm.

    Raises:
        ValueError: if the folder is not empty, the file is not waveform-in, or the runtime is not
            available.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the page.")
    model = OnnxModel(onnx_file)
    if model.input_name != "waveform":
        raise ValueError(
            f"{onnx_file} takes {model.input_name}; the page needs a waveform-in file."
        )
    rate = model.feature_extractor.sampling_rate
    shutil.copytree(hub_configs_folder() / "web", folder, dirs_exist_ok=True)
    _add_runtime(folder / "ort", runtime)
    shutil.copyfile(onnx_file, folder / "model.onnx")
    config = model.config
    facts = {
        "name": name,
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "samplingRate": rate,
        "windowSamples": model.feature_extractor.filterbank.num_samples(config.max_length),
    }
    (folder / "model.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _add_runtime(folder: Path, runtime: Path | None) -> None:
    folder.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        if runtime is None:
            runtime = _fetched(Path(temporary))
        for name in _RUNTIME_FILES:
            if not (runtime / name).is_file():
                raise ValueError(
                    f"{runtime} has no {name}: expected the dist folder of {_RUNTIME}."
                )
            shutil.copyfile(runtime / name, folder / name)


def _fetched(folder: Path) -> Path:
    """The package's `dist`, fetched with npm into a folder."""
    elsewhere = (
        f"On a machine with a network, run `npm pack {_RUNTIME}`, unpack it, and pass its dist "
        "folder as --web_runtime."
    )
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"The page needs ONNX Runtime Web, and npm is not installed. {elsewhere}")
    command = [npm, "pack", _RUNTIME, "--silent", "--pack-destination", str(folder)]
    if subprocess.run(command, capture_output=True, check=False, cwd=folder).returncode:
        raise ValueError(f"npm cannot fetch {_RUNTIME}. {elsewhere}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as package:
        for name in _RUNTIME_FILES:
            content = package.extractfile(f"package/dist/{name}")
            assert content is not None
            (folder / name).write_bytes(content.read())
    return folder
