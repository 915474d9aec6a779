"""Commands that need no torch, and ast-classify in several processes."""

import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from modeling_ast.pooling_ast import WINDOW_POOLINGS, pool_scores
from scripts import classify
from scripts.inference.options import ClassifyOptions
from scripts.inference.run import classify as run_classify

from .conftest import REPOSITORY, forkserver


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five sounds, of which one is none."""
    folder, random = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number in range(4):
        sound = random.uniform(-0.3, 0.3, 16000 * (number + 1))
        soundfile.write(folder / f"{number}.wav", sound, 16000)
    (folder / "broken.wav").write_bytes(b"no sound")
    return folder


@pytest.fixture(params=["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request, monkeypatch):
    """How the command's processes start; slow: as they do, importing everything."""
    is_slow = request.param == "spawn"
    context = multiprocessing.get_context("spawn") if is_slow else forkserver()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("start_method")
def test_processes_hear_what_one_hears(native_folder, recordings, tmp_path, capsys):
    answers = {}
    for processes in (1, 2):
        options = {"sounds": [str(recordings)], "model": str(native_folder), "json": True}
        assert run_classify(ClassifyOptions(**options, processes=processes)) == 1
        printed = capsys.readouterr()
        answers[processes] = json.loads(printed.out)
        assert "broken.wav" in printed.err
    one, two = ({x["file"]: x for x in answers[processes]} for processes in (1, 2))
    assert list(two) == sorted(one)
    assert one.keys() == two.keys()
    for file, answer in one.items():
        if "error" not in answer:
            assert two[file]["duration"] == answer["duration"]
            scores = [[label["score"] for label in x["labels"]] for x in (answer, two[file])]
            np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.usefixtures("start_method")
def test_processes_write_into_one_folder_and_resume(native_folder, recordings, tmp_path, capsys):
    options = ClassifyOptions(
        sounds=[str(recordings)], model=str(native_folder), output=tmp_path, processes=2
    )
    assert run_classify(options) == 1
    assert len(list((tmp_path / "parts").glob("rank0000[01]-*.parquet"))) == 2
    assert len((tmp_path / "files.csv").read_text().splitlines()) == 5
    capsys.readouterr()
    assert run_classify(options) == 1  # the broken one is tried again, the others are done
    assert "0 s of sound" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_no_process_can_load_is_one_error(recordings, tmp_path, capfd):
    (tmp_path / "config.json").write_text("{")
    options = ClassifyOptions(sounds=[str(recordings)], model=str(tmp_path), processes=2)
    assert run_classify(options) == 2
    assert capfd.readouterr().err.count("ast-classify: error:") == 1


@pytest.mark.parametrize("pooling", WINDOW_POOLINGS)
def test_arrays_are_pooled_as_tensors_are(pooling):
    import torch

    scores, weights = np.random.default_rng(0).uniform(size=(2, 5, 3)).astype(np.float32)
    weights = weights[:, 0] * np.array([0, 1, 1, 1, 1], np.float32)
    of_tensors = pool_scores(torch.from_numpy(scores), pooling, torch.from_numpy(weights))
    np.testing.assert_allclose(pool_scores(scores, pooling, weights), of_tensors.numpy(), rtol=1e-6)
    alone = pool_scores(torch.from_numpy(scores), pooling).numpy()
    np.testing.assert_allclose(pool_scores(scores, pooling), alone, rtol=1e-6)


def test_libraries_are_there_when_they_are_asked_for(recordings):
    """Modules first, without torch; then the package, with all that it registers, and no more."""
    sound = str(recordings / "0.wav")
    program = (
        "import gc, sys\n"
        "from scripts.common.lean import postpone_libraries\n"
        "postpone_libraries()\n"
        "from modeling_ast.events_ast import find_events\n"
        "from scripts.inference import run\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "from scripts.classify import classify\n"
        "from scripts.inference.options import ClassifyOptions\n"
        f"assert classify(ClassifyOptions(sounds=[{sound!r}])) == 0\n"
        "assert gc.isenabled()\n"
        "assert gc.get_freeze_count() > 100_000\n"
        "needless = 'datasets evaluate librosa matplotlib pandas pyarrow sklearn torchvision'\n"
        "assert not set(needless.split()) & set(sys.modules)\n"
        "import modeling_ast\n"
        "assert modeling_ast.find_events is find_events\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('audio-spectrogram-transformer')\n"
        "assert isinstance(config, modeling_ast.ASTConfig)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_the_command_knows_the_option(capsys):
    with pytest.raises(SystemExit):
        classify.main(["a.wav", "--processes", "0"])
    assert "--processes must be at least 1" in capsys.readouterr().err
