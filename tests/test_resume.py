"""Runs that are killed, or cannot save, and resume end with an undisturbed run's weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from . import training_runs
from .conftest import REPOSITORY, TINY_RECIPE, forkserver
from .sounds import write_answers, write_class_folders

# Everything with state: order, mixing, augmentation, patchout, average, best epoch, workers.
SETTINGS = {
    **TINY_RECIPE,
    "num_epochs": 3,  # of 3 steps
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "shuffle_buffer": 8,
    "mixup_rate": 0.5,
    "time_roll": 48,
    "noise_level": 0.1,
    "filter_augment": 6.0,
    "speed_perturbation": 0.1,
    "time_patchout": 1,
    "averaged_epochs": 2,
    "best_metric": "loss",
    "evaluation_split": "test",
    "save_steps": 2,
    "num_workers": 2,
}
DOORS = ("ast-finetune-accelerate", "ast-finetune")


@pytest.fixture(scope="module")
def start():
    """Start a command in a process forked from one with everything imported; returns it."""
    context = forkserver()

    def start_process(command, arguments, errors, interruption=None):
        process = context.Process(
            target=training_runs.run_command, args=(interruption, command, arguments, str(errors))
        )
        process.start()
        process.join(timeout=300)
        return process

    return start_process


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    """The command line's first words: recipe and dataset."""
    folder = tmp_path_factory.mktemp("resume")
    write_class_folders(folder / "data" / "train", 8)
    write_class_folders(folder / "data" / "test", 3, seed=100)
    # A teacher adds a head, a projection and targets, which are mixed, too.
    answers = write_answers(folder / "answers.parquet", folder / "data" / "train")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**SETTINGS, "teacher": [answers]}))
    return [str(folder / "tiny.yaml"), str(folder / "data")]


def result(run: Path) -> tuple[bytes, list[dict]]:
    """Weights and records of a finished run, without times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["clips_per_second"]
    assert not (run / "resume").exists()
    return (run / "checkpoint" / "model.safetensors").read_bytes(), records


@pytest.fixture(scope="module")
def undisturbed(start, recipe, tmp_path_factory) -> tuple[bytes, list[dict]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    errors = run.parent / "errors"
    process = start(DOORS[0], [*recipe, "--output", str(run)], errors)
    assert process.exitcode == 0, errors.read_text()
    return result(run)


@pytest.mark.parametrize("door", DOORS)
def test_killed_again_and_again(door, start, recipe, undisturbed, tmp_path):
    run = tmp_path / "run"
    arguments = [*recipe, "--output", str(run)]
    for interruption, newest in (
        ("step:2", None),
        ("step:6", "step-000000005"),  # mid-epoch past the first
        ("write:1", "step-000000005"),  # half of the next state
        ("rename:3", "step-000000006"),  # after a better result and a state, all of the next
        ("rename:4", "step-000000009"),  # the result itself, of a run that has done all its steps
        ("tidy:2", "step-000000009"),  # after the result has its name
    ):
        process = start(door, arguments, tmp_path / "errors", interruption)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
        assert (run / "checkpoint").exists() == interruption.startswith("tidy")
        states = sorted(path.name for path in (run / "resume").glob("step-*"))
        assert (states[-1] if states else None) == newest
        assert len(states) <= 2
    process = start(door, arguments, tmp_path / "errors")
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    # Patchout draws from the global generator, which the two commands use differently.
    if door == DOORS[0]:
        assert result(run) == undisturbed
    else:
        once = tmp_path / "once"
        start(door, [*recipe, "--output", str(once)], tmp_path / "errors")
        assert result(run) == result(once)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("interruption", ["full:5", "missing:5"])
def test_cannot_save(door, interruption, start, recipe, tmp_path):
    run = tmp_path / "run"
    arguments = [*recipe, "--output", str(run)]
    process = start(door, arguments, tmp_path / "errors", interruption)
    assert process.exitcode == 2
    errors = (tmp_path / "errors").read_text()
    assert f"{door}: error: Cannot save {run}/resume/step-000000005: " in errors
    assert "Traceback" not in errors
    if interruption == "full:5":
        assert f"The last good state, {run}/resume/step-000000003, is kept" in errors
        process = start(door, arguments, tmp_path / "errors")
        assert process.exitcode == 0
        assert (run / "checkpoint").exists()


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess:
    """`tests.training_runs` with these words in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "tests.training_runs", *words]
    return subprocess.run(
        command,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_two_processes_killed(door, recipe, tmp_path):
    """Both killed in the middle of the second epoch, and started again."""
    # 2 processes x 2 clips x 2 parts: three steps per epoch, as above.
    arguments = [*recipe, "--batch_size", "2", "--output"]
    once = torchrun(2, "", door, *arguments, str(tmp_path / "once"))
    assert once.returncode == 0, once.stderr
    killed = torchrun(2, "step:6", door, *arguments, str(tmp_path / "run"))
    assert killed.returncode != 0
    states = sorted(path.name for path in (tmp_path / "run" / "resume").glob("step-*"))
    assert states[-1] == "step-000000005", killed.stderr
    again = torchrun(2, "", door, *arguments, str(tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    assert "Resuming" in again.stdout
    assert result(tmp_path / "run") == result(tmp_path / "once")


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_two_processes_equal_a_doubled_batch(door, recipe, tmp_path):
    """All 24 clips in every step, without randomness, as 2 x 12 and as 24."""
    plain = ["--shuffle_buffer", "0", "--mixup_rate", "0", "--time_roll", "0", "--noise_level", "0"]
    plain += ["--filter_augment", "0", "--speed_perturbation", "0"]
    plain += ["--time_patchout", "0", "--time_mask", "0", "--frequency_mask", "0"]
    plain += ["--num_workers", "0", "--num_epochs", "5", "--averaged_epochs", "1"]
    plain += ["--gradient_accumulation_steps", "1"]
    weights = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        words = [*recipe, *plain, "--batch_size", str(24 // processes), "--output", str(run)]
        done = torchrun(processes, "", door, *words)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(run / "checkpoint" / "model.safetensors"))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["evaluation_clips"] for record in records] == [9] * 5
    for name, one in weights[0].items():
        if "key.bias" in name:
            continue  # its gradient is 0 up to rounding, which Adam blows up
        torch.testing.assert_close(weights[1][name], one, atol=2e-5, rtol=1e-4)
