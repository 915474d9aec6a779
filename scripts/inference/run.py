"""What `ast-classify` does: classify recordings, and print or store the results."""

import contextlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from feature_extraction.audio_ast import AudioDecodingError
from modeling_ast.events_ast import EventRules
from modeling_ast.scores_ast import activation

from ..common.checkpoints import DEFAULT_MODEL, checkpoint_folder, resolve_checkpoint
from ..common.lock import hold
from ..common.options import did_you_mean
from ..common.shown import how_long, shown, valid_text
from ..data.recordings import Recording, Recordings, locate
from .classifier import Classifier, Scored, Unreadable
from .clips import best_events, clip_name, write_clip
from .heard import Heard
from .options import ClassifyOptions
from .parts import Parts, Result, check_settings
from .printed import format_json, format_results
from .processes import Share, launched_share, run_shares
from .progress import Progress
from .results import collect, file_of, path_of

_LARGER_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
PART_S = 30.0  # between writes: the most that a kill can cost
SHOWING = 0.02  # of the time, at most, goes into tables that can be read during the run
PART_WINDOWS = 4096  # in memory, at most, before a write
_NOTHING = np.empty(0, np.float32)

# The settings that the results in a folder depend on; --formats and --per can change.
_SETTINGS = ["model", "top_k", "chunk_length_s", "hop_length_s", "threshold", "release_threshold"]
_SETTINGS += [
    "minimum_length_s",
    "median_filter_s",
    "window_pooling",
    "embeddings",
    "plot",
    "split",
    "dataset_config",
    "audio_column",
]


class Listening:
    """Turns recordings into results.

    Args:
        classifier: the model.
        options: what to make of its scores.
        begun: returns the windows of a recording from an earlier run.
    """

    def __init__(
        self,
        classifier: Classifier,
        options: ClassifyOptions,
        rules: EventRules,
        begun: Callable[[Recording], Heard] | None = None,
    ):
        self.classifier, self.options, self.rules = classifier, options, rules
        self._begun = begun or (lambda _: classifier.new_heard())
        self.unfinished: dict[str, tuple[Recording, Heard]] = {}

    def results(
        self, recordings: Iterable[Recording], progress: Progress
    ) -> Iterator[Result | None]:
        """A result per recording, in order; None after each window but the last."""
        for answer in self.classifier.listen(self._sounds(recordings, progress)):
            recording = answer.sound
            if isinstance(answer, Unreadable):
                self.unfinished.pop(recording.name, None)
                progress.finished()
                error = " ".join(answer.error.split())
                yield Result(recording.name, recording.version, error=error)
                continue
            _, heard = self.unfinished[recording.name]
            progress.heard(heard.add(answer.span, answer.scores, self._kept(answer)))
            if answer.is_last:
                del self.unfinished[recording.name]
                progress.finished()
                yield self._result(recording, heard)
            else:
                yield None

    def _kept(self, answer: Scored) -> np.ndarray:
        """Of a window, besides its scores: logits (labels,), embedding (D,), as one vector."""
        logits = answer.logits if self.options.logits else _NOTHING
        embedding = answer.embedding if self.options.embeddings else _NOTHING
        return np.concatenate([logits, embedding])

    def _sounds(
        self, recordings: Iterable[Recording], progress: Progress
    ) -> Iterator[tuple[Recording, Any, int]]:
        for recording in recordings:
            heard = self._begun(recording)
            if self.classifier.is_frame_model:  # its unfinished columns cannot be kept
                heard = self.classifier.new_heard()
            heard.pooling = self.classifier.window_pooling
            progress.skip(heard.duration)
            self.unfinished[recording.name] = (recording, heard)
            yield recording, recording.source, len(heard.spans)

    def begun(self) -> list[Result]:
        """What is known so far of the recordings that are being heard."""
        return [self._so_far(*entry) for entry in self.unfinished.values() if entry[1].spans]

    def _so_far(self, recording: Recording, heard: Heard) -> Result:
        return Result(
            sound=recording.name,
            version=recording.version,
            duration=heard.duration,
            labels=heard.labels(self.options.top_k),
            windows=heard.windows(self.options.top_k),
            events=heard.events(self.rules),
            embeddings=heard.embeddings,
        )

    def _result(self, recording: Recording, heard: Heard) -> Result:
        options, result = self.options, self._so_far(recording, heard)
        if options.plot and options.output is not None:
            from .timeline import plot_timeline  # matplotlib takes a second to load

            path = file_of(options.output / "plots", recording.name, ".png")
            rate = self.classifier.sampling_rate
            # The sound is read again: by now it may be gone.
            with contextlib.suppress(AudioDecodingError):
                plot_timeline(
                    recording.source, rate, heard, path, result.events, title=recording.name
                )
        return result


def classify(options: ClassifyOptions) -> int:
    """Run the command. Returns the exit status."""
    # Find wrong thresholds before hours of work.
    rules = options.event_rules()
    status = _print(options, rules) if options.output is None else _write(options, rules)
    if options.model == DEFAULT_MODEL:
        print(
            f"Classified by the bundled {DEFAULT_MODEL}, a small model. A larger and better one: "
            f"--model {_LARGER_MODEL}",
            file=sys.stderr,
        )
    return status


def _print(options: ClassifyOptions, rules: EventRules) -> int:
    recordings = _recordings(options)
    if options.processes > 1:
        found = _found_by_processes(options, recordings)
        if found is None:
            return 2
    else:
        classifier = _classifier(options, rules)
        listening = Listening(classifier, options, rules)
        files = None if recordings.datasets else recordings.files
        with Progress(files, leave=False) as progress:
            results = listening.results(recordings.share(0, 1), progress)
            found = [result for result in results if result is not None]
    if options.json:
        print(format_json(found, options.per))
    elif table := format_results(found, options.per):
        print(table)
    if options.clips is not None:
        _cut_out(options, found)
    errors = {result.sound: result.error for result in found if result.error is not None}
    report_errors("ast-classify", errors)
    return 1 if errors else 0


def _found_by_processes(options: ClassifyOptions, recordings: Recordings) -> list[Result] | None:
    """What several processes hear, in order; None when they could not."""
    with tempfile.TemporaryDirectory(prefix="ast-classify-") as folder:
        status, _, _ = run_shares(replace(options, output=Path(folder), json=False, plot=False))
        if status:
            return None
        parts = Parts(Path(folder))
        found = [*parts.results(), *parts.results(errors=True)]
    order = {sound: place for place, sound in enumerate(map(valid_text, recordings.files))}
    return sorted(found, key=lambda result: (order.get(result.sound, len(order)), result.sound))


def _write(options: ClassifyOptions, rules: EventRules) -> int:
    """Classify this process's share into the output folder; the first process merges all shares."""
    output = options.output
    assert output is not None
    if options.processes > 1:
        began = time.perf_counter()
        status, seconds, run = run_shares(options)
        if status:
            return status
        remove_unfinished(output)
        elapsed = time.perf_counter() - began
        return _collect(options, replace(run, seconds=seconds, elapsed=elapsed, processes=1))
    with listen_into(output, options, rules, _settings(options), show=_show) as run:
        return 0 if run is None else _collect(options, run)


def hear_share(options: ClassifyOptions, share: Share) -> "Run":
    """One process's part of `--processes`."""
    assert options.output is not None
    with hold(options.output, _lock_of(share)):
        return _hear_share(
            options.output, options, options.event_rules(), _settings(options), share, show=_show
        )


def _settings(options: ClassifyOptions) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in _SETTINGS}
    settings["labels"] = None if options.labels is None else read_names(options.labels)
    settings["model_version"] = model_version(options.model)
    if options.logits:
        settings["logits"] = True
    return settings


def _show(listening: Listening) -> None:
    """Renew the tables that people read during the run."""
    options = listening.options
    assert options.output is not None
    top_k = min(options.top_k, len(listening.classifier.label_names))
    collect(options.output, options.per, options.formats, top_k, False, begun=listening.begun())


def _collect(options: ClassifyOptions, run: "Run") -> int:
    """Make what people read of the parts. Returns the exit status."""
    output = options.output
    assert output is not None
    top_k = min(options.top_k, run.labels)
    answers = run.answers if options.logits else None
    errors = collect(output, options.per, options.formats, top_k, options.embeddings, answers)
    if options.clips is not None:
        _cut_out(options, Parts(output).results())
    print(f"{run} Results: {shown(output)}", file=sys.stderr)
    report_errors("ast-classify", errors)
    return 1 if errors else 0


def _cut_out(options: ClassifyOptions, results: Iterable[Result]) -> None:
    """Cut out every label's best events as files."""
    assert options.clips is not None
    best = best_events(results, options.best)
    sounds = {sound for events in best.values() for sound, _ in events}
    where = locate(sorted(sounds), options.split, options.dataset_config, options.audio_column)
    count = 0
    for label, events in best.items():
        for sound, event in events:
            name = clip_name(sound, event.start, event.end, event.score, "")
            # One path component: a label can contain a slash, a name what no file name can.
            path = file_of(options.clips / path_of(label.replace("/", "_")), name, ".wav")
            write_clip(path, where[sound], event.start, event.end)
            count += 1
    print(f"{count} clips: {shown(options.clips)}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """What a run has done, for its last line."""

    seconds: float  # of sound
    elapsed: float
    processes: int
    labels: int  # known to the model
    answers: dict[str, str]  # what a file of its logits says of them

    def __str__(self) -> str:
        everyone = f" by process 0 of {self.processes}" if self.processes > 1 else ""
        return (
            f"{how_long(self.seconds)} of sound{everyone} in {self.elapsed:.0f} s, "
            f"{self.seconds / max(self.elapsed, 1e-9):.0f} x real time."
        )


@contextlib.contextmanager
def listen_into(
    output: Path,
    options: ClassifyOptions,
    rules: EventRules,
    settings: dict[str, Any],
    check: Callable[[Classifier], None] | None = None,
    show: Callable[[Listening], None] | None = None,
) -> Iterator[Run | None]:
    """Classify the rest of this process's share of the recordings into parts.

    Inside the `with`, every process is done and the folder is still locked; the first process gets
    its `Run`, the others None.

    Args:
        output: the folder.
        options: what to classify and what to keep.
        rules: for events.
        settings: what the results depend on.
        check: raises ValueError for a model that does not belong here.
        show: writes what people read, from the parts so far; the first process calls it at times.
    """
    share = launched_share()
    with hold(output, _lock_of(share)):
        run = _hear_share(output, options, rules, settings, share, check, show)
        share.wait()
        if share.index:
            yield None
            return
        remove_unfinished(output)
        yield run


def _lock_of(share: Share) -> str:
    return f"rank{share.index:05d}"


def _hear_share(
    output: Path,
    options: ClassifyOptions,
    rules: EventRules,
    settings: dict[str, Any],
    share: Share,
    check: Callable[[Classifier], None] | None = None,
    show: Callable[[Listening], None] | None = None,
) -> Run:
    """Hear what an earlier run left of a share, into parts."""
    recordings = _recordings(options)
    check_settings(output, settings)
    parts = Parts(output, share.index)
    done = parts.done()
    classifier = _classifier(options, rules, share.device)
    if check is not None:
        check(classifier)
    sounds: Iterator[Recording] = (
        sound
        for sound in recordings.share(share.index, share.count)
        if done.get(sound.name) != sound.version
    )
    files = None
    if not recordings.datasets:
        remaining = list(sounds)
        sounds, files = iter(remaining), [str(sound.source) for sound in remaining]
    listening = Listening(
        classifier,
        options,
        rules,
        lambda sound: parts.unfinished(sound.name, sound.version, classifier.label_names),
    )
    began = time.perf_counter()
    with Progress(files, disabled=share.index > 0) as progress:
        if share.index:
            show = None
        _listen_and_keep(listening.results(sounds, progress), parts, listening, show)
    elapsed = time.perf_counter() - began
    about = {
        "label_names": json.dumps(classifier.label_names),
        "activation": activation(classifier.problem_type),
    }
    return Run(progress.seconds, elapsed, share.count, len(classifier.label_names), about)


def _listen_and_keep(
    results: Iterator[Result | None],
    parts: Parts,
    listening: Listening,
    show: Callable[[Listening], None] | None,
) -> None:
    """Write results every half minute, and the rest when this run ends, for whatever reason."""
    kept: list[Result] = []
    next_show = 0.0
    windows, written = 0, time.perf_counter()

    def write() -> None:
        nonlocal kept, windows, written
        # Cleared before they are written: a signal in between must not write them twice.
        part, kept, windows = kept, [], 0
        parts.write(part)
        for recording, heard in listening.unfinished.values():
            if heard.spans:
                parts.write_unfinished(recording.name, recording.version, heard)
        written = time.perf_counter()

    try:
        for result in results:
            windows += 1
            if result is not None:
                kept.append(result)
            if time.perf_counter() - written >= PART_S or windows >= PART_WINDOWS:
                write()
                if show is not None and time.perf_counter() >= next_show:
                    began = time.perf_counter()
                    show(listening)
                    # It reads all parts: the more there are, the rarer.
                    cost = time.perf_counter() - began
                    next_show = time.perf_counter() + cost * (1 / SHOWING - 1)
    finally:
        write()


def read_names(path: Path) -> list[str]:
    """Label names, one per line; empty lines are ignored.

    Raises:
        ValueError: for a file without names, or with a duplicate.
    """
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"{path} names no label: expected one name per line.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} names {twice!r} twice.")
    return names


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left half written; nobody is writing any more."""
    for path in folder.rglob("*.unfinished"):
        path.unlink(missing_ok=True)


def model_version(model: str) -> str:
    """What a checkpoint holds, so that results of different weights never mix.

    A checksum of its files, or of a name on the Hub the commit that is there now, or, without a
    network, that was downloaded.
    """
    path = Path(checkpoint_folder(model))
    if not path.exists():
        return _commit(model)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    checksum = 0
    for file in files:
        if file.suffix in (".onnx", ".json", ".safetensors", ".bin") and file.is_file():
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}" if files else ""


def _commit(model: str) -> str:
    from huggingface_hub import hf_hub_download

    found = Path(resolve_checkpoint(model))
    # In its cache each commit has a folder of this name.
    return (found if found.is_dir() else Path(hf_hub_download(model, "config.json")).parent).name


def _recordings(options: ClassifyOptions) -> Recordings:
    return Recordings(options.sounds, options.split, options.dataset_config, options.audio_column)


def _classifier(options: ClassifyOptions, rules: EventRules, device: Any = None) -> Classifier:
    classifier = Classifier(
        options.model,
        device,
        batch_size=options.batch_size,
        chunk_length_s=options.chunk_length_s,
        hop_length_s=options.hop_length_s,
        window_pooling=options.window_pooling,
        labels=None if options.labels is None else read_names(options.labels),
    )
    for name in ("embeddings", "logits"):
        if getattr(options, name) and classifier.is_frame_model:
            raise ValueError(f"--{name}: {options.model} is a frame model and only gives scores.")
    if isinstance(rules.threshold, dict):
        for label in rules.threshold:
            if label not in classifier.label_names:
                raise ValueError(
                    f"--threshold: unknown label {label!r}"
                    f"{did_you_mean(label, classifier.label_names)}"
                )
    return classifier


def report_errors(command: str, errors: dict[str, str]) -> None:
    """Print a line for every sound that could not be read."""
    for error in errors.values():
        print(f"{command}: {shown(error)}", file=sys.stderr)
