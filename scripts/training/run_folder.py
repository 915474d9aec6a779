"""The folder of a training run: what it was made with, how it goes, and where to go on.

    arguments.yaml       every option; itself a recipe
    report.yaml          command, versions, git revision, machine, dataset, model, result
    metrics.jsonl        a line per epoch
    learning_curve.png
    resume/step-N/       while the run lasts: the newest two states that it can go on from
    resume/best-N/       while the run lasts: the result after its best epoch
    checkpoint/          the result: weights, config with label names, preprocessor_config.json

A folder is written under a temporary name, flushed to the disk, and renamed when it is whole. So
whatever has its final name is complete, whenever the process was killed.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..data.batches import SkippedSounds
from ..evaluation.metrics import METRICS, headline
from ..publishing.cards import write_model_card
from .options import FinetuneOptions

_KEPT_STATES = 2
# Other values of these do not make it another run.
_FREE_OPTIONS = ("output", "overwrite", "report_to", "save_steps")
_REPORTED_PACKAGES = (
    "audio-spectrogram-transformer", "torch", "transformers", "accelerate", "datasets", "peft",
    "numpy", "soundfile", "soxr",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run has come; saved with every state."""

    epoch: int = 1  # under way, counted from 1
    step: int = 0  # optimizer steps done in it
    loss_sum: float = 0.0  # over the clips of this epoch so far
    clips: int = 0  # in this epoch so far
    seconds: float = 0.0  # of work, interruptions not counted
    records: list[dict[str, Any]] = field(default_factory=list)  # one per finished epoch
    best_epoch: int | None = None
    epoch_start: float = 0.0  # of `seconds`, when this epoch began

    def add_step(self, loss: float, clips: int, seconds: float) -> None:
        """An optimizer step over `clips` clips of this mean loss, `seconds` into the run."""
        self.step += 1
        self.loss_sum += loss * clips
        self.clips += clips
        self.seconds = seconds

    def figures(self) -> dict[str, str]:
        """For a progress bar."""
        return {
            "loss": f"{self.loss_sum / self.clips:.3f}",
            "clips_per_s": f"{self.clips / (self.seconds - self.epoch_start):.1f}",
        }

    def end_epoch(
        self, scores: dict[str, float | None], learning_rate: float, seconds: float
    ) -> dict[str, Any]:
        """The epoch's record; what follows is the next epoch."""
        record = {
            "epoch": self.epoch,
            "train_loss": self.loss_sum / self.clips,
            **scores,
            "learning_rate": learning_rate,
            "clips_per_second": self.clips / (self.seconds - self.epoch_start),
            "seconds": seconds,
        }
        self.epoch, self.step, self.loss_sum, self.clips = self.epoch + 1, 0, 0.0, 0
        self.seconds = self.epoch_start = seconds
        return record


class RunFolder:
    """A run's folder, opened to begin a run or to go on with an interrupted one.

    Opening only reads, so that every process of a run may do it; `begin` writes.

    Args:
        options: the run's options.
        command: the command that runs it; a state is of no use to another one.
        processes: how many train together.

    Raises:
        ValueError: when the folder holds a finished run, or an interrupted one with other
            options, and `options.overwrite` is not set.
    """

    def __init__(self, options: FinetuneOptions, command: str, processes: int):
        self.options = options
        self.path = Path(options.output)
        self.checkpoint = self.path / "checkpoint"
        self._states = self.path / "resume"
        self._identity = {"command": command, "processes": processes, **dataclasses.asdict(options)}
        finished = self.checkpoint.exists()
        if finished and not options.overwrite:
            raise ValueError(
                f"{self.path} holds a finished run; choose another --output or pass --overwrite."
            )
        self.newest_state = None if finished else self._newest_state()
        self.progress = Progress()
        if self.newest_state is not None:
            stored = json.loads((self.newest_state / "progress.json").read_text("utf-8"))
            changed = _changes(stored["run"], self._identity)
            if not changed:
                self.progress = Progress(**stored["progress"])
            elif options.overwrite:
                self.newest_state = None
            else:
                raise ValueError(
                    f"{self.path} holds an interrupted run with {'; '.join(changed)}. Give the "
                    "same options to go on with it, another --output, or --overwrite."
                )

    def _newest_state(self) -> Path | None:
        return max(self._states.glob("step-*"), default=None)

    def begin(self, report: dict[str, Any]) -> None:
        """Write what the run is made with; clear away what is left of another one."""
        try:
            self._states.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            for left_over in self._states.iterdir():
                if self.newest_state is None or left_over.name.startswith("."):
                    shutil.rmtree(left_over)
            arguments = yaml.safe_dump(dataclasses.asdict(self.options), sort_keys=False)
            (self.path / "arguments.yaml").write_text(arguments, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"Cannot write the run folder {self.path}: {error}") from error
        self.report = {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": _versions(),
            "git_revision": _git_revision(),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "processes": self._identity["processes"],
                "threads": torch.get_num_threads(),
            },
            **report,
        }
        self._write_report()

    def _write_report(self) -> None:
        text = yaml.safe_dump(self.report, sort_keys=False, allow_unicode=True)
        (self.path / "report.yaml").write_text(text, encoding="utf-8")

    def save_state(
        self, accelerator: Accelerator, step: int, write: Callable[[Path], None]
    ) -> None:
        """Keep a state to go on from: `write` fills a folder in every process.

        Raises:
            ValueError: when it cannot be written; the states before are still there.
        """

        def write_all(folder: Path) -> None:
            write(folder)
            if accelerator.is_main_process:
                state = {"run": self._identity, "progress": dataclasses.asdict(self.progress)}
                (folder / "progress.json").write_text(json.dumps(state), encoding="utf-8")

        _write_whole(self._states / f"step-{step:09d}", write_all, accelerator)
        if accelerator.is_main_process:
            for old in sorted(self._states.glob("step-*"))[:-_KEPT_STATES]:
                shutil.rmtree(old)
            for best in self._states.glob("best-*"):
                if best.name != f"best-{self.progress.best_epoch}":
                    shutil.rmtree(best)

    def stops_early(self) -> bool:
        """Whether the best epoch is as long ago as --early_stopping_epochs allows."""
        patience, best = self.options.early_stopping_epochs, self.progress.best_epoch
        return bool(patience and best and len(self.progress.records) - best >= patience)

    def record_epoch(self, record: dict[str, Any]) -> bool:
        """Add an epoch's record to the progress; True when it is the best one so far."""
        progress, metric = self.progress, self.options.best_metric
        progress.records.append(record)
        if metric is None:
            return False
        key = f"evaluation_{metric}"
        best = progress.best_epoch
        best_value = None if best is None else progress.records[best - 1][key]
        if best is None or METRICS[metric].is_better(record[key], best_value):
            progress.best_epoch = record["epoch"]
        return progress.best_epoch == record["epoch"]

    def write_records(self) -> None:
        """metrics.jsonl and the learning curve, from all the records: nothing twice."""
        lines = [json.dumps(record) + "\n" for record in self.progress.records]
        try:
            (self.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
            if lines:
                plot_learning_curve(self.progress.records, self.path / "learning_curve.png")
        except OSError as error:
            raise ValueError(f"Cannot write to the run folder {self.path}: {error}") from error

    def save_best(self, accelerator: Accelerator, write: Callable[[Path], None]) -> None:
        """Keep the result of the epoch that is the best so far."""
        _write_whole(self._states / f"best-{self.progress.best_epoch}", write, accelerator)

    def finish(
        self, accelerator: Accelerator, write: Callable[[Path], None], skipped: SkippedSounds
    ) -> None:
        """Leave the result as `checkpoint`: the best epoch's, or what `write` writes now."""
        unreadable = dict(gather_object(list(skipped.reasons.items())))
        if self.progress.best_epoch is None:
            _write_whole(self.checkpoint, write, accelerator)
        if not accelerator.is_main_process:
            return
        result = self.progress.records[(self.progress.best_epoch or 0) - 1]
        self.report["result"] = {**result, "checkpoint": str(self.checkpoint)}
        self.report["unreadable_sounds"] = unreadable
        self._write_report()
        if self.progress.best_epoch is not None:
            _rename(self._states / f"best-{self.progress.best_epoch}", self.checkpoint)
        shutil.rmtree(self._states)
        write_model_card(self.path, self.checkpoint)


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes it another run, for an error message."""
    return [
        f"{key} {stored.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in _FREE_OPTIONS and stored.get(key) != value
    ]


def finished_result(options: FinetuneOptions) -> dict[str, Any] | None:
    """The record of the result in `options.output`; None where no run was finished.

    Raises:
        ValueError: when that run had other options.
    """
    folder = Path(options.output)
    if not (folder / "checkpoint").exists():
        return None
    stored = yaml.safe_load((folder / "arguments.yaml").read_text(encoding="utf-8"))
    if changed := _changes(stored, dataclasses.asdict(options)):
        raise ValueError(
            f"{folder} holds a finished run with {'; '.join(changed)}. Give the same options, "
            "another --output, or --overwrite."
        )
    report = yaml.safe_load((folder / "report.yaml").read_text(encoding="utf-8"))
    return report["result"]


def _write_whole(folder: Path, write: Callable[[Path], None], accelerator: Accelerator) -> None:
    """Let every process write into a temporary folder, which then gets its name."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        write(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _flush(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            _rename(temporary, folder)
        accelerator.wait_for_everyone()
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = max(folder.parent.glob("step-*"), default=None)
        kept = f"The last good state, {last}, is kept: " if last else ""
        raise ValueError(
            f"Cannot save {folder}: {error}. {kept}make room there and run the same command again."
        ) from error


def _flush(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)
    _flush_names(target.parent)


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str | None:
    """Of the checkout that this code runs from; None when it is installed without one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # some other project's repository around an installed package
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def plot_learning_curve(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses and the main metric over epochs, as a PNG."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    metric = headline(name.removeprefix("evaluation_") for name in records[0])
    epochs = [record["epoch"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, [r["train_loss"] for r in records], "o-", label="train")
    left.plot(epochs, [r["evaluation_loss"] for r in records], "o-", label="evaluation")
    left.set(xlabel="epoch", ylabel="mean over clips", title="loss")
    left.set_ylim(0, 1.05 * left.get_ylim()[1])
    left.legend()
    values = [100 * (r[f"evaluation_{metric}"] or 0) for r in records]
    right.plot(epochs, values, "o-", color="tab:green")
    right.set(
        xlabel="epoch", ylabel="%", title=f"evaluation {METRICS[metric].title}", ylim=(0, 102)
    )
    right.annotate(f"{values[-1]:.1f} %", (epochs[-1], values[-1]), (-8, -14),
                   textcoords="offset points", ha="right")  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    plt.close(figure)
