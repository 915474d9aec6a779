"""Say what recordings sound like, from one file to a cluster's worth of them.

    ast-classify rec.wav other.mp3
    ast-classify recordings/ --output results --formats csv audacity --plot
    torchrun --nproc_per_node 8 -m ast_scripts.classify recordings/ --output results

Without --output the most likely labels are printed. With it every sound's windows, events and
embeddings are written into that folder, and the same command goes on where it was interrupted.
Sounds that cannot be read are reported and the others still classified; the exit status is 1 if
there was one, 2 for a wrong model or option.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging

from feature_extraction import AudioDecodingError
from modeling_ast import find_events

from .common.arguments import run_command
from .data.recordings import Recording, Recordings
from .inference.classifier import DEFAULT_MODEL, Classifier
from .inference.results import TABLE_FORMATS, TRACK_FORMATS, Parts, check_settings, collect, path_of

_LARGER_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
_PART_S = 30.0  # between writes: what a kill costs at most, besides the sounds not finished
_PART_WINDOWS = 4096  # in memory, at most, before a write
_CURVES = 5  # classes on a page


class _Heard:
    """A sound, as far as it was classified."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.spans: list[tuple[float, float]] = []  # seconds
        self.scores: list[np.ndarray] = []
        self.embeddings: list[np.ndarray] = []


def classify_recordings(
    recordings: Iterable[Recording],
    classifier: Classifier,
    options: argparse.Namespace,
    progress: tqdm,
) -> Iterator[dict[str, Any]]:
    """Rows of `results.PART`, one per sound, in order; batches go across sounds."""
    heard: dict[str, _Heard] = {}
    batch: list[tuple[_Heard, float, float, bool, dict[str, Any]]] = []
    seconds, began = 0.0, time.perf_counter()

    def run() -> Iterator[dict[str, Any]]:
        nonlocal seconds
        if not batch:
            return
        scores, embeddings = classifier([features for *_, features in batch])
        for (sound, start, end, is_last, _), of_labels, embedding in zip(
            batch, scores, embeddings, strict=True
        ):
            seconds += end - (sound.spans[-1][1] if sound.spans else 0.0)
            sound.spans.append((start, end))
            sound.scores.append(of_labels)
            if options.embeddings:
                sound.embeddings.append(embedding)
            if is_last:
                yield _row(heard.pop(sound.recording.name), classifier, options)
        batch.clear()
        speed = seconds / (time.perf_counter() - began)
        progress.set_postfix_str(f"{seconds / 3600:.2f} h of sound, {speed:.0f} x real time")

    for recording in recordings:
        sound = heard[recording.name] = _Heard(recording)
        try:
            windows = classifier.windows(
                recording.source, options.chunk_length_s, options.hop_length_s
            )
            for start, end, is_last, features in windows:
                batch.append((sound, start, end, is_last, features))
                if len(batch) == options.batch_size:
                    yield from run()
        except AudioDecodingError as error:
            del heard[recording.name]
            batch[:] = [window for window in batch if window[0] is not sound]
            yield {"sound": recording.name, "error": " ".join(str(error).split())}
    yield from run()


def _row(sound: _Heard, classifier: Classifier, options: argparse.Namespace) -> dict[str, Any]:
    names = classifier.label_names
    scores = np.stack(sound.scores)  # (windows, labels)
    duration = sound.spans[-1][1]
    clip = np.average(scores, axis=0, weights=[end - start for start, end in sound.spans])
    # Labels below every threshold make no events: hundreds of them need no look.
    heard = scores >= _lowest_threshold(options)
    events = find_events(
        (
            {
                "start": start,
                "end": end,
                "labels": _labels(names, of_labels, np.flatnonzero(is_heard)),
            }
            for (start, end), of_labels, is_heard in zip(sound.spans, scores, heard, strict=True)
        ),
        options.threshold,
        options.release_threshold,
        options.minimum_length,
    )
    if options.plot:
        best = np.argsort(-scores.max(axis=0), kind="stable")[:_CURVES]
        windows = [
            {"start": start, "end": end, "labels": _labels(names, of_labels, best)}
            for (start, end), of_labels in zip(sound.spans, scores, strict=True)
        ]
        _plot(sound.recording, classifier.sampling_rate, windows, events, options.output)
    return {
        "sound": sound.recording.name,
        "duration": duration,
        "labels": _labels(names, clip, _best(clip, options.top_k)),
        "windows": [
            {
                "start": start,
                "end": end,
                "labels": _labels(names, of_labels, _best(of_labels, options.top_k)),
            }
            for (start, end), of_labels in zip(sound.spans, scores, strict=True)
        ],
        "events": events,
        "embeddings": sound.embeddings,
    }


def _lowest_threshold(options: argparse.Namespace) -> float:
    thresholds = options.threshold
    lowest = min(thresholds.values()) if isinstance(thresholds, dict) else thresholds
    return lowest if options.release_threshold is None else min(lowest, options.release_threshold)


def _best(scores: np.ndarray, top_k: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:top_k]


def _labels(names: Sequence[str], scores: np.ndarray, indices: np.ndarray) -> list[dict[str, Any]]:
    return [{"score": float(scores[index]), "label": names[index]} for index in indices]


def _plot(
    recording: Recording,
    sampling_rate: int,
    windows: list[dict[str, Any]],
    events: list[dict[str, Any]],
    folder: Path,
) -> None:
    from .inference.timeline import plot_timeline  # matplotlib takes a second to load

    path = folder / "plots" / f"{path_of(recording.name)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = {"windows": windows}
    plot_timeline(recording.source, sampling_rate, answer, path, events, title=recording.name)


def print_results(options: argparse.Namespace) -> int:
    """Classify, then print a table or JSON. Returns the exit status."""
    recordings = Recordings(options.sounds, options.split, options.config, options.audio_column)
    classifier = Classifier(options.model)
    with _progress(recordings.files_in_share(0, 1), leave=False) as progress:
        rows = []
        for row in classify_recordings(recordings.share(0, 1), classifier, options, progress):
            rows.append(row)
            progress.update()
    if options.json:
        print(json.dumps([_result(row, options.per) for row in rows], indent=2, ensure_ascii=False))
    elif table := format_table(rows, options.per):
        print(table)
    errors = {row["sound"]: row["error"] for row in rows if "error" in row}
    _report_errors(errors)
    return 1 if errors else 0


def _result(row: dict[str, Any], per: str) -> dict[str, Any]:
    if "error" in row:
        return {"file": row["sound"], "error": row["error"]}
    windows = {"windows": row["windows"]} if per == "window" else {}
    return {"file": row["sound"], "labels": row["labels"], **windows}


def format_table(rows: Iterable[dict[str, Any]], per: str) -> str:
    """The readable sounds' labels with their scores in per cent, best first."""
    lines = []
    for row in rows:
        parts = [row] if per == "file" else row.get("windows", [])
        for part in parts:
            span = f"  {part['start']:8.2f} – {part['end']:8.2f} s" if per == "window" else ""
            for rank, label in enumerate(part.get("labels", ())):
                name = row["sound"] + span if rank == 0 else ""
                lines.append((name, f"{100 * label['score']:5.1f} %", label["label"]))
    width = max((len(name) for name, _, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {score}  {label}" for name, score, label in lines)


def write_results(options: argparse.Namespace) -> int:
    """Classify this process's share into the output folder; the first process puts all together.

    Returns the exit status.
    """
    # Processes wait for the slowest at the end, however many hours its share takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    rank, count = state.process_index, state.num_processes
    recordings = Recordings(options.sounds, options.split, options.config, options.audio_column)
    check_settings(options.output, _settings(options))
    parts = Parts(options.output, rank)
    done = parts.done()
    classifier = Classifier(options.model, state.device)
    top_k = min(options.top_k, len(classifier.label_names))
    share = (sound for sound in recordings.share(rank, count) if sound.name not in done)

    rows: list[dict[str, Any]] = []
    total = recordings.files_in_share(rank, count)
    if total is not None:
        total -= sum(file in done for file in recordings.files[rank::count])
    began = written = time.perf_counter()
    seconds, windows = 0.0, 0
    try:
        with _progress(total, leave=True, disable=not state.is_main_process) as progress:
            for row in classify_recordings(share, classifier, options, progress):
                rows.append(row)
                seconds += row.get("duration", 0.0)
                progress.update()
                windows += len(row.get("windows", ()))
                if time.perf_counter() - written >= _PART_S or windows >= _PART_WINDOWS:
                    # No longer held before it is written: a signal in between writes none twice.
                    part, rows, windows = rows, [], 0
                    parts.write(part)
                    written = time.perf_counter()
    finally:  # what is finished is kept, whatever ends this run
        if rows:
            parts.write(rows)
    elapsed = time.perf_counter() - began
    state.wait_for_everyone()
    if not state.is_main_process:
        return 0
    errors = collect(options.output, options.per, options.formats, top_k, options.embeddings)
    everyone = f" by process 0 of {count}" if count > 1 else ""
    print(
        f"{seconds / 3600:.2f} h of sound{everyone} in {elapsed:.0f} s, "
        f"{seconds / max(elapsed, 1e-9):.0f} x real time. Results: {options.output}",
        file=sys.stderr,
    )
    _report_errors(errors)
    return 1 if errors else 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the parts depend on; formats and --per can differ from run to run."""
    names = ["model", "top_k", "chunk_length_s", "hop_length_s", "threshold", "release_threshold"]
    names += ["minimum_length", "embeddings", "plot", "split", "config", "audio_column"]
    return {name: getattr(options, name) for name in names}


def _progress(total: int | None, leave: bool, disable: bool = False) -> tqdm:
    return tqdm(total=total, unit="file", desc="Classifying", leave=leave, disable=disable)


def _report_errors(errors: dict[str, str]) -> None:
    for error in errors.values():
        print(f"ast-classify: {error}", file=sys.stderr)


def _threshold(argument: str) -> float | dict[str, float]:
    """A number, or the name of a JSON file {label: number}."""
    try:
        return float(argument)
    except ValueError:
        pass
    try:
        thresholds = json.loads(Path(argument).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a number or a JSON file, got {argument!r} ({error})"
        ) from error
    if not isinstance(thresholds, dict) or not thresholds:
        raise argparse.ArgumentTypeError(f"{argument} must hold {{label: number}}")
    return thresholds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ast-classify", description="Say what recordings sound like."
    )
    add = parser.add_argument
    add(
        "sounds",
        nargs="+",
        metavar="SOUND",
        help="audio files or addresses, folders (searched with their sub-folders), globs, Parquet "
        "or tar files or folders of them, or names of Hub datasets",
    )
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="checkpoint folder, Hub name or ONNX file (%(default)s)",
    )
    add("--top-k", type=int, default=3, help="labels per row (%(default)s)")
    add("--batch-size", type=int, default=8, help="windows at a time (%(default)s)")
    add("--chunk-length-s", type=float, help="length of a window (the model's length)")
    add("--hop-length-s", type=float, help="from one window's start to the next (half of it)")
    add("--per", choices=["file", "window"], default="file", help="what a row is (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")

    output = parser.add_argument_group("results in a folder")
    add = output.add_argument
    add("--output", type=Path, help="the folder; run again to go on after an interruption")
    add(
        "--formats",
        nargs="+",
        choices=[*TABLE_FORMATS, *TRACK_FORMATS],
        default=["csv"],
        help="tables of rows and of events; Audacity label tracks and Raven selection tables of "
        "events, one per sound (csv)",
    )
    add("--embeddings", action="store_true", help="also embeddings.parquet, a vector per row")
    add("--plot", action="store_true", help="also a page per sound, plots/…png")
    add(
        "--threshold",
        type=_threshold,
        default=0.5,
        help="score that makes an event: a number, or a JSON file {label: number} for some labels "
        "(%(default)s)",
    )
    add("--release-threshold", type=float, help="score that continues an event (the threshold)")
    add("--minimum-length", type=float, default=0.0, help="of an event, in seconds (%(default)s)")

    datasets = parser.add_argument_group("datasets")
    add = datasets.add_argument
    add("--split", default="train", help="(%(default)s)")
    add("--config", help="configuration of a Hub dataset")
    add("--audio-column", default="audio", help="(%(default)s)")
    return parser.parse_args(argv)


def _check(options: argparse.Namespace) -> None:
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}."
            )
    # Wrong thresholds are found before hours of work.
    find_events([], options.threshold, options.release_threshold, options.minimum_length)
    if options.output is None:
        for name in ("embeddings", "plot"):
            if getattr(options, name):
                raise ValueError(f"--{name} writes files: it needs --output FOLDER.")
    elif options.embeddings and options.model.endswith(".onnx"):
        raise ValueError("--embeddings needs a checkpoint: an ONNX file gives scores only.")
    elif options.json:
        raise ValueError("--json prints; with --output, choose --formats json.")


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments(argv)
    logging.disable_progress_bar()

    def command() -> int:
        _check(options)
        status = print_results(options) if options.output is None else write_results(options)
        if options.model == DEFAULT_MODEL:
            print(
                f"Heard by the bundled {DEFAULT_MODEL}, which knows ten sounds. For AudioSet's "
                f"527: --model {_LARGER_MODEL}",
                file=sys.stderr,
            )
        return status

    # A scheduler that ends this process lets it write what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command("ast-classify", command)


if __name__ == "__main__":
    main()
