"""Other people's run folders: nothing in them runs, whichever file is replaced by a pickle."""

import hashlib
import json
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from scripts.common.lock import hold
from scripts.training import with_accelerate, with_trainer
from scripts.training.folds import finetune_folds
from scripts.training.options import FinetuneOptions
from scripts.training.run_folder import Progress

from .conftest import TINY_RECIPE
from .sounds import write_class_folders

DOORS = (with_accelerate, with_trainer)
# What Accelerate and Trainer look for, and what our earlier versions did.
OLD_NAMES = (
    *("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin"),
    *("pytorch_model.bin", "average.pt", "sampler.bin", "dl_state_dict.bin"),
)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def poison(file: Path, marker: Path) -> None:
    """A pickle that touches the marker when it is loaded: torch's kind or a plain one, by name."""
    if file.suffix in (".json", ".pkl"):
        file.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(Payload(marker), file)


def seal(state: Path) -> None:
    """Correct the checksums, as anyone who tampers with a state would."""
    sealed = json.loads((state / "progress.json").read_text())
    files = {p.name: zlib.crc32(p.read_bytes()) for p in state.iterdir()}
    del files["progress.json"]
    sealed["state"]["files"] = files
    text = json.dumps(sealed["state"], sort_keys=True)
    sealed["checksum"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    (state / "progress.json").write_text(json.dumps(sealed))


@pytest.fixture(scope="module", params=DOORS, ids=lambda door: door.__name__.split("_")[-1])
def interrupted(request, tmp_path_factory):
    """A command, and a function that copies a run of it stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    options = FinetuneOptions(
        **{**TINY_RECIPE, "ema_decay": 0.9, "num_epochs": 2, "save_steps": 1},
        dataset=str(write_class_folders(folder / "sounds", 8)),
        output=str(folder / "run"),
    )
    add_step = Progress.add_step

    def stop(progress: Progress, *arguments) -> None:
        if progress.epoch == 2 and progress.step == 1:
            raise KeyboardInterrupt
        add_step(progress, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add_step", stop)
        with pytest.raises(KeyboardInterrupt):
            request.param.finetune(options)

    def copy(target: Path) -> tuple[FinetuneOptions, Path]:
        shutil.copytree(folder / "run", target)
        copied = FinetuneOptions(**{**vars(options), "output": str(target)})
        return copied, max((target / "resume").glob("step-*"))

    return request.param, copy


def test_every_file_of_a_state_replaced_by_a_pickle(interrupted, tmp_path):
    door, copy = interrupted
    _, state = copy(tmp_path / "look")
    names = sorted(path.name for path in state.iterdir())
    assert set(names) >= {"average.safetensors", "optimizer.safetensors", "random-0.safetensors"}
    for name in names:
        marker = tmp_path / f"marker {name}"
        options, state = copy(tmp_path / f"run {name}")
        poison(state / name, marker)
        if name != "progress.json":
            seal(state)
        with pytest.raises(ValueError, match=r"Cannot resume from|is damaged"):
            door.finetune(options)
        assert not marker.exists(), name


def test_pickles_beside_a_state_are_not_read(interrupted, tmp_path):
    door, copy = interrupted
    options, state = copy(tmp_path / "run")
    marker = tmp_path / "marker"
    for name in OLD_NAMES:
        poison(state / name, marker)
        poison(tmp_path / "run" / name, marker)
    seal(state)
    assert door.finetune(options)["epoch"] == 2
    assert not marker.exists()
    assert not [path for path in (tmp_path / "run").rglob("*.p*") if path.stem in OLD_NAMES]


def test_results_can_be_read_by_others(interrupted, tmp_path):
    door, copy = interrupted
    options, _ = copy(tmp_path / "run")
    door.finetune(options)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    for file in (tmp_path / "run" / "checkpoint").iterdir():
        assert file.stat().st_mode == usual, file


@pytest.mark.parametrize("door", DOORS)
def test_one_run_at_a_time_in_a_folder(door, tmp_path):
    sounds = str(write_class_folders(tmp_path / "sounds", 2))
    options = FinetuneOptions(dataset=sounds, output=str(tmp_path / "run"))
    with hold(tmp_path / "run"):
        before = sorted(tmp_path.rglob("*"))
        message = r"run is being written by process \d+ on .*since 20\d\d-.*Wait until it is done"
        with pytest.raises(ValueError, match=message):
            door.finetune(options)
        assert sorted(tmp_path.rglob("*")) == before
    with hold(tmp_path / "run"):  # it is free again
        pass


@pytest.mark.parametrize("door", DOORS)
def test_a_mistake_leaves_no_folder(door, tmp_path):
    options = FinetuneOptions(dataset=str(tmp_path / "no"), output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="No such folder"):
        door.finetune(options)
    assert not (tmp_path / "run").exists()


def test_a_folds_name_is_no_path(tmp_path):
    sounds = write_class_folders(tmp_path / "sounds", 4)
    files = sorted(sounds.rglob("*.flac"))
    rows = ["audio,label,fold"]
    for number, file in enumerate(files):
        rows.append(f"{file},{file.parent.name},{('a', '/../../../x')[number % 2]}")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    settings = {**TINY_RECIPE, "num_epochs": 1, "fold_column": "fold", "evaluation_fold": "all"}
    options = FinetuneOptions(
        **settings, dataset=str(tmp_path / "train.csv"), output=str(tmp_path / "out" / "run")
    )
    finetune_folds(with_accelerate.finetune, options)
    made = {path.name for path in (tmp_path / "out" / "run").iterdir() if path.is_dir()}
    assert made == {"folda", "fold%2F..%2F..%2F..%2Fx"}
    assert {path.name for path in tmp_path.iterdir()} == {"sounds", "train.csv", "out"}
