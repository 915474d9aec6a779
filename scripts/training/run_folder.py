"""The folder of a training run: what it was made with, its progress, and where to resume it.

    arguments.yaml       every option; itself a recipe
    report.yaml          command, versions, git revision, machine, dataset, model, result
    metrics.jsonl        a line per epoch
    learning_curve.png
    resume/step-N/       during the run: the two newest states it can resume from
    resume/best-N/       during the run: the result after its best epoch
    checkpoint/          the result: weights, config with label names, preprocessor_config.json

A folder is written under a temporary name, flushed to disk, and renamed once it is whole. Anything
with its final name is therefore complete, whenever the process was killed. `checkpoint` gets its
name last: a run that has one is finished, even if there is still something to tidy up.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from feature_extraction import ASTFeatureExtractor

from ..common.files import usual_modes, write_whole
from ..common.lock import hold
from ..data.batches import SkippedSounds
from ..data.fingerprint import Fingerprint
from ..evaluation.metrics import METRICS, headline
from ..publishing.cards import write_model_card
from .options import FinetuneOptions

logger = logging.getLogger(__name__)

_KEPT_STATES = 2
_SAME_STATISTICS = 1e-4  # tolerance for measuring again, perhaps on another machine
# Options that may change without making it another run.
_FREE_OPTIONS = ("output", "overwrite", "report_to", "save_steps")
_REPORTED_PACKAGES = (
    "audio-spectrogram-transformer", "torch", "transformers", "accelerate", "datasets", "peft",
    "numpy", "soundfile", "soxr",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run is; saved with every state."""

    epoch: int = 1  # the current one, counted from 1
    step: int = 0  # optimizer steps done in it
    loss_sum: float = 0.0  # over the clips of this epoch so far
    clips: int = 0  # in this epoch so far
    seconds: float = 0.0  # of work, without interruptions
    records: list[dict[str, Any]] = field(default_factory=list)  # one per finished epoch
    best_epoch: int | None = None
    epoch_start: float = 0.0  # of `seconds`, when this epoch began

    def add_step(self, loss: float, clips: int, seconds: float) -> None:
        """Count an optimizer step over `clips` clips with this mean loss, at `seconds`."""
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
        """Finish the epoch and return its record."""
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
    """A run's folder, opened to begin a run or to resume an interrupted one.

    Opening only reads, so every process of a run can do it; `begin` writes.

    Args:
        options: the run's options.
        command: the command that runs it; another command cannot use its states.
        processes: how many train together.
        data: what it trains on.

    Raises:
        ValueError: if the folder holds a finished run, or an interrupted one with other options or
            other data, and `options.overwrite` is not set; and for a damaged state.
    """

    def __init__(self, options: FinetuneOptions, command: str, processes: int, data: Fingerprint):
        self.options = options
        self.path = Path(options.output)
        self.checkpoint = self.path / "checkpoint"
        self._states = self.path / "resume"
        self._identity = {
            "command": command,
            "processes": processes,
            **dataclasses.asdict(options),
        }
        self._data = data
        self._statistics: dict[str, float] | None = None
        self.progress = Progress()
        self.newest_state: Path | None = None
        if self.checkpoint.exists() and not options.overwrite:
            raise ValueError(
                f"{self.path} holds a finished run; choose another --output or pass --overwrite."
            )
        if not self.checkpoint.exists():
            self._open_newest_state()

    def _open_newest_state(self) -> None:
        state = max(self._states.glob("step-*"), default=None)
        if state is None:
            return
        if self.options.overwrite:
            try:
                self._open(state)
            except ValueError:
                return  # of another run, or damaged: start over
        else:
            self._open(state)

    def _open(self, state: Path) -> None:
        stored = _read_state(state)
        changed = _changes(stored["run"], self._identity)
        changed += self._data.differences(stored["data"])
        if changed:
            raise ValueError(
                f"{self.path} holds an interrupted run with {'; '.join(changed)}. Give the same "
                "options and data to resume it, another --output, or --overwrite."
            )
        self._check_best(stored)
        self.progress = Progress(**stored["progress"])
        self._statistics = stored["statistics"]
        self.newest_state = state

    def _check_best(self, stored: dict[str, Any]) -> None:
        """Nobody reads the best epoch's result before it becomes the checkpoint."""
        best = self._states / f"best-{stored['progress']['best_epoch']}"
        if damaged := _damaged(best, stored.get("best", {})):
            raise ValueError(
                f"The best result so far, {best}, is damaged ({damaged}). Choose another --output, "
                "or pass --overwrite to start over."
            )

    def settle_statistics(self, extractor: ASTFeatureExtractor) -> None:
        """Give the extractor the run's normalisation, which must be bit-identical when resuming.

        Raises:
            ValueError: if the statistics measured now come from different data.
        """
        now = {"mean": float(extractor.mean), "std": float(extractor.std)}
        if self._statistics is None:
            self._statistics = now
        for name, value in self._statistics.items():
            if abs(now[name] - value) > _SAME_STATISTICS * max(1.0, abs(value)):
                raise ValueError(
                    f"{self.path} holds an interrupted run on data whose log-mel {name} was "
                    f"{value:.4f}; now it is {now[name]:.4f}. Give the same data to resume it, "
                    "another --output, or --overwrite."
                )
            setattr(extractor, name, value)

    def begin(self, report: dict[str, Any]) -> None:
        """Write down what the run is made with; remove what is left of another run."""
        try:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            self._states.mkdir(parents=True, exist_ok=True)
            for left_over in self._states.iterdir():
                if self.newest_state is None or left_over.name.startswith("."):
                    shutil.rmtree(left_over)
            arguments = yaml.safe_dump(dataclasses.asdict(self.options), sort_keys=False)
            _write_text(self.path / "arguments.yaml", arguments)
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
        self.report["dataset"]["fingerprint"] = self._data.digest
        self._write_report()

    def _write_report(self) -> None:
        text = yaml.safe_dump(self.report, sort_keys=False, allow_unicode=True)
        _write_text(self.path / "report.yaml", text)

    def save_state(
        self, accelerator: Accelerator, step: int, write: Callable[[Path], None]
    ) -> None:
        """Keep a state to resume from: `write` fills a folder in every process.

        Raises:
            ValueError: if it cannot be written; earlier states are kept.
        """

        def write_all(folder: Path) -> None:
            write(folder)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                content = {
                    "run": self._identity,
                    "data": self._data.to_json(),
                    "statistics": self._statistics,
                    "progress": dataclasses.asdict(self.progress),
                    "best": _checksums(self._states / f"best-{self.progress.best_epoch}"),
                }
                _seal_state(folder, content)

        _write_folder(self._states / f"step-{step:09d}", write_all, accelerator)
        if accelerator.is_main_process:
            states = sorted(self._states.glob("step-*"))
            for old in states[:-_KEPT_STATES]:
                shutil.rmtree(old)
            needed = {f"best-{_best_epoch(state)}" for state in states[-_KEPT_STATES:]}
            for best in self._states.glob("best-*"):
                if best.name not in needed:
                    shutil.rmtree(best)

    def stops_early(self) -> bool:
        """Whether --early_stopping_epochs have passed since the best epoch."""
        patience, best = self.options.early_stopping_epochs, self.progress.best_epoch
        return bool(patience and best and len(self.progress.records) - best >= patience)

    def record_epoch(self, record: dict[str, Any]) -> bool:
        """Add an epoch's record to the progress; True if it is the best so far."""
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
        """Rewrite metrics.jsonl and the learning curve from all records: no duplicates."""
        lines = [json.dumps(record) + "\n" for record in self.progress.records]
        try:
            _write_text(self.path / "metrics.jsonl", "".join(lines))
            if lines:
                picture = partial(plot_learning_curve, self.progress.records)
                write_whole(self.path / "learning_curve.png", picture)
        except OSError as error:
            raise ValueError(f"Cannot write to the run folder {self.path}: {error}") from error

    def save_best(self, accelerator: Accelerator, write: Callable[[Path], None]) -> None:
        """Keep the result of the best epoch so far."""
        _write_folder(self._states / f"best-{self.progress.best_epoch}", write, accelerator)

    def finish(
        self, accelerator: Accelerator, write: Callable[[Path], None], skipped: SkippedSounds
    ) -> None:
        """Leave the result as `checkpoint`: the best epoch's, or what `write` writes now.

        Until the last step, which gives the checkpoint its name, the run can be resumed; after it,
        only unneeded states are left.
        """
        unreadable = dict(gather_object(list(skipped.reasons.items())))
        result = self._states / f"best-{self.progress.best_epoch}"
        if self.progress.best_epoch is None:
            result = self._states / "result"
            _write_folder(result, write, accelerator)
        if not accelerator.is_main_process:
            return
        record = self.progress.records[(self.progress.best_epoch or 0) - 1]
        self.report["result"] = {**record, "checkpoint": str(self.checkpoint)}
        self.report["unreadable_sounds"] = unreadable
        self._write_report()
        try:
            write_model_card(self.path, result)
        except ValueError as error:  # a missing card must not cost the checkpoint
            logger.warning("No model card: %s", error)
        usual_modes(result)
        _flush(result)
        _rename(result, self.checkpoint)
        shutil.rmtree(self._states)


def tidy_finished(options: FinetuneOptions) -> bool:
    """Remove the states of a run that was killed just after its result was in place.

    Returns:
        Whether there was such a run.

    Raises:
        ValueError: if it had other options, or another process has the folder.
    """
    states = Path(options.output) / "resume"
    if options.overwrite or not states.exists() or finished_result(options) is None:
        return False
    with hold(Path(options.output)):
        shutil.rmtree(states, ignore_errors=True)
    return True


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes this another run, for an error message."""
    return [
        f"{key} {stored.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in _FREE_OPTIONS and stored.get(key) != value
    ]


def finished_result(
    options: FinetuneOptions, data: Fingerprint | None = None
) -> dict[str, Any] | None:
    """The record of the result in `options.output`; None if no run was finished there.

    Args:
        options: of the run that is wanted there.
        data: what it would train on; None skips this check.

    Raises:
        ValueError: if that run had other options or other data, or its files are damaged.
    """
    folder = Path(options.output)
    if not (folder / "checkpoint").exists():
        return None
    ways_out = "Give the same options and data, another --output, or --overwrite."
    stored = _read_yaml(folder / "arguments.yaml")
    if changed := _changes(stored, dataclasses.asdict(options)):
        raise ValueError(f"{folder} holds a finished run with {'; '.join(changed)}. {ways_out}")
    report = _read_yaml(folder / "report.yaml")
    if not isinstance(report.get("result"), dict):
        raise ValueError(f"{folder / 'report.yaml'} does not hold the run's result. {ways_out}")
    if data is not None and report.get("dataset", {}).get("fingerprint") != data.digest:
        raise ValueError(f"{folder} holds a finished run on other data. {ways_out}")
    return report["result"]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines.")
    return content


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _seal_state(folder: Path, content: dict[str, Any]) -> None:
    """Write a state's progress.json, with a checksum of itself and of every file next to it."""
    content = {**content, "files": _checksums(folder)}
    sealed = {"checksum": _digest(content), "state": content}
    (folder / "progress.json").write_text(json.dumps(sealed), encoding="utf-8")


def _read_state(folder: Path) -> dict[str, Any]:
    """A state's progress.json, if it and all files next to it are as they were written.

    Raises:
        ValueError: if one is damaged.
    """
    damaged = ""
    content: dict[str, Any] = {}
    try:
        sealed = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        content = sealed["state"]
        if sealed["checksum"] != _digest(content):
            damaged = "progress.json"
        damaged = damaged or _damaged(folder, content["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        damaged = damaged or "progress.json, or a file that it lists"
    if damaged:
        raise ValueError(
            f"The state {folder} is damaged ({damaged}). Remove that folder: the same command then "
            "resumes from the state before it, or starts over if there is none."
        )
    return content


def _best_epoch(state: Path) -> int | None:
    sealed = json.loads((state / "progress.json").read_text(encoding="utf-8"))
    best: int | None = sealed["state"]["progress"]["best_epoch"]
    return best


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checksums(folder: Path) -> dict[str, int]:
    """Of every file in a folder, by its path there."""
    return {
        str(path.relative_to(folder)): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _damaged(folder: Path, checksums: dict[str, int]) -> str:
    """A file that is not as it was written; "" if there is none."""
    now = _checksums(folder)
    return next((name for name, checksum in checksums.items() if now.get(name) != checksum), "")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _write_folder(folder: Path, write: Callable[[Path], None], accelerator: Accelerator) -> None:
    """Let every process write into a temporary folder, then give it its name."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        write(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            usual_modes(temporary)
            _flush(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            _rename(temporary, folder)
        accelerator.wait_for_everyone()
    # torch and safetensors raise their own errors on a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = max(folder.parent.glob("step-*"), default=None)
        kept = f"The last good state, {last}, is kept: " if last else ""
        raise ValueError(
            f"Cannot save {folder}: {error}. {kept}free some space and run the same command again."
        ) from error


def _flush(folder: Path) -> None:
    """Wait until everything in a folder is on disk."""
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
    """Revision of the checkout that this code runs from; None if there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
            check=True,
        ).stdout.strip()  # fmt: skip

    try:
        if not git("ls-files", Path(__file__).name):
            return None  # the package is installed inside another project's repository
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
    figure.savefig(path, dpi=120, format="png")  # the name may be a temporary file's
    plt.close(figure)
