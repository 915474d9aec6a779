"""Writes docs/tutorials/detector_in_an_afternoon.md: the loop on ESC-10, joined to recordings.

    python -m docs.make_loop_tutorial ESC10 --work runs/loop

ESC10 is the dataset's folder in five folds (Parquet: audio, label, fold). The clips of some folds
are joined to recordings of ten; a quarter of them is left for the test at the end. Every command is
run as it stands on the page, with what it prints and how long it took; somebody who knows what is
in the recordings answers the queues. The page's prose is here, its figures are not.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

from feature_extraction import load_audio
from scripts import classify, evaluate, finetune_accelerate, index, teach
from scripts.workbench.marks import BACKGROUND, Mark, write_marks

PAGE = Path(__file__).parent / "tutorials" / "detector_in_an_afternoon.md"
PICTURES = Path(__file__).parent / "images"
RATE = 16000
NAMES = ["dog_bark", "rain", "sea_waves", "baby_cry", "clock_tick", "person_sneeze", "helicopter"]
NAMES += ["chainsaw", "rooster", "fire_crackling"]
WANTED = {"dog_bark": "dog", "rooster": "rooster", "baby_cry": "baby"}  # the rest is background
COMMANDS = {
    "ast-index": index.main,
    "ast-teach": teach.main,
    "ast-classify": classify.main,
    "ast-evaluate": evaluate.main,
    "ast-finetune-accelerate": finetune_accelerate.main,
}
PROGRESS = r"Listening:|Loading weights:|Writing model|scoring:|evaluating:|epoch \d+/\d+:|\x1b"
ROUNDS = 3
# A person knows a sound by two seconds of it, and overlooks half a second.
HEARD_S, OVERLOOKED_S = 2.0, 0.5


def join_clips(dataset: Path, folds: list[int]) -> list[Mark]:
    """Write recordings of ten clips into two folders; what is where in them."""
    rows = [
        row
        for fold in folds
        for row in pq.read_table(dataset / "data" / f"fold{fold}.parquet").to_pylist()
    ]
    order = np.random.default_rng(0).permutation(len(rows)).reshape(-1, 10)
    truth = []
    for number, clips in enumerate(order):
        folder = Path("unheard" if number >= 0.75 * len(order) else "recordings")
        folder.mkdir(exist_ok=True)
        path, sounds, at = folder / f"field_{number:02d}.flac", [], 0.0
        for clip in clips:
            sound = load_audio(rows[clip]["audio"], RATE)
            end = at + len(sound) / RATE
            truth.append(Mark(str(path), at, end, NAMES[rows[clip]["label"]]))
            sounds.append(sound)
            at = end
        soundfile.write(path, np.clip(np.concatenate(sounds), -1, 1), RATE)
    return truth


class Page:
    """Prose, and commands with what they print."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.seconds: dict[str, float] = {}

    def say(self, prose: str) -> None:
        self.text.append(prose.strip())

    def run(self, command: str, show: bool = True) -> None:
        name, *arguments = shlex.split(command)
        printed, began, computed = io.StringIO(), time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                COMMANDS[name](arguments)
                status = 0
            except SystemExit as ending:
                status = ending.code or 0
        seconds, cpu = time.perf_counter() - began, time.process_time() - computed
        if status:
            sys.exit(f"{command}\n{printed.getvalue()}")
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if show:
            lines = re.split(r"[\r\n]+", printed.getvalue())
            shown = [line for line in lines if line.strip() and not re.match(PROGRESS, line)]
            self.text.append("```text\n$ " + "\n".join([command, *shown]) + "\n```")
            self.text.append(f"{seconds:.1f} s, {cpu:.1f} s of it CPU time.")


def answer(start: float, end: float, truth: list[Mark]) -> str | None:
    """What somebody says of a stretch of one recording; None: cannot tell, so skips it."""
    names = set()
    for mark in truth:
        overlap = min(end, mark.end) - max(start, mark.start)
        if mark.label in WANTED and overlap >= HEARD_S:
            names.add(WANTED[mark.label])
        elif mark.label in WANTED and overlap > OVERLOOKED_S:
            return None
    return ";".join(sorted(names)) or BACKGROUND


def listen(table: Path, truth: list[Mark], marks: list[Mark]) -> int:
    """Fill in a table of stretches as a person would; how many were marked."""
    before = len(marks)
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            start, end = float(row["start"]), float(row["end"])
            label = answer(start, end, [mark for mark in truth if mark.file == row["file"]])
            known = any(m.file == row["file"] and m.start == start for m in marks)
            if label is not None and not known:
                marks.append(Mark(row["file"], start, end, label))
    write_marks(Path("marks.csv"), marks)
    return len(marks) - before


def compare(truth: list[Mark]) -> tuple[list[str], int, int, int]:
    """Events of results/ against what is there: lines; calls found, calls, false alarms."""
    with Path("results/events.csv").open(newline="", encoding="utf-8") as file:
        events = [
            Mark(row["sound"], float(row["start"]), float(row["end"]), row["label"])
            for row in csv.DictReader(file)
        ]
    calls = [mark for mark in truth if mark.file.startswith("unheard") and mark.label in WANTED]

    def meet(event: Mark, call: Mark) -> bool:
        same = event.file == call.file and event.label == WANTED[call.label]
        return same and min(event.end, call.end) - max(event.start, call.start) > OVERLOOKED_S

    found = sum(any(meet(event, call) for event in events) for call in calls)
    false = sum(not any(meet(event, call) for call in calls) for event in events)
    first = min(call.file for call in calls)
    lines = [
        f"{'event':8}  {e.start:5.1f} – {e.end:5.1f}  {e.label}" for e in events if e.file == first
    ]
    lines += [
        f"{'actual':8}  {c.start:5.1f} – {c.end:5.1f}  {WANTED[c.label]}"
        for c in calls
        if c.file == first
    ]
    return [first, *lines], found, len(calls), false


def write_page(truth: list[Mark], options: argparse.Namespace) -> Page:
    page, marks = Page(), []
    files = sorted({mark.file for mark in truth})
    unheard = [name for name in files if name.startswith("unheard")]
    known = [mark for mark in truth if mark.file.startswith("recordings")]
    minutes = sum(max(m.end for m in known if m.file == f) for f in files if f not in unheard) / 60
    model = f" --model {options.model}" if options.model else ""
    folds = " --folds " + " ".join(map(str, options.folds))
    windows = "--chunk_length_s 5 --hop_length_s 2.5"
    page.say(f"""
# A detector in an afternoon

You have recordings and want to find three sounds in them: dogs, roosters and babies. This page goes
once round the loop of [From recordings to a detector](../loop.md), with everything the commands
printed and the time each took (Python's start-up not counted) on {os.cpu_count()} CPU cores shared
with other work. A program wrote the page (`python -m docs.make_loop_tutorial ESC10{model}{folds}`):
no figure is made up.

The recordings are {len(files) - len(unheard)} files of about 50 s, {minutes:.0f} minutes in all,
joined from clips of ESC-10 (Piczak 2015, CC BY 3.0): dogs, roosters and babies among rain, waves,
clocks, sneezes, helicopters, chainsaws and fires. {len(unheard)} more are set aside in `unheard/`
for a final test.

## Index
""")
    page.run(f"ast-index recordings --output index{model} {windows}")
    page.say("""
## Find

A minute's listening has turned up one bark. What else sounds like it?
""")
    for label, name in WANTED.items():
        example = next(mark for mark in known if mark.label == label)
        stretch = f"{example.file}:{example.start:.1f}-{example.end:.1f}"
        page.run(
            f"ast-index --output index --like {stretch} --count 10 --table {name}.csv"
            f" --clips found/{name}",
            show=name == "dog",
        )
        listen(Path(f"{name}.csv"), known, marks)
        if name == "dog":
            heard, dogs = len(marks), sum("dog" in mark.label for mark in marks)
    page.say(f"""
{heard} of them are clear to the ear; {dogs} are dogs. The same search for a rooster and a
baby, and listening to the clips in `found/`, gives {len(marks)} marks in `marks.csv`. Windows with
none of the three are worth marking, too, as `background`.

## Teach, and ask what to mark next
""")
    rounds = []
    for number in range(ROUNDS):
        page.run(
            "ast-teach index marks.csv --output taught --queue uncertain --count 20",
            show=number in (0, ROUNDS - 1),
        )
        report = read_report(Path("taught/teaching.json"))
        rounds.append((len(marks), *report))
        if number < ROUNDS - 1:
            marked = listen(Path("next.csv"), known, marks)
            if number == 0:
                page.say(f"""
`next.csv` lists the 20 windows that the detector is least sure of. Listening settles {marked} of
them; a window in which a sound only begins or ends is left unmarked. After {ROUNDS - 1} such
rounds:
""")
    rows = "\n".join(
        f"| {n} | {ap:.3f} | {before:.3f} → {after:.3f} |" for n, ap, before, after in rounds
    )
    page.say(f"""
| marks | mean average precision | calibration error |
| --- | --- | --- |
{rows}

All figures are cross-validated over held-out recordings. The queue asks about hard windows, so each
round is measured on harder ones than the last.

## Use it

The {len(unheard)} recordings in `unheard/` were neither indexed nor marked.
""")
    page.run(
        f"ast-classify unheard --model taught --threshold taught/thresholds.json {windows} "
        "--output results --plot"
    )
    lines, hits, calls, false = compare(truth)
    shutil.copy(next(Path("results/plots").rglob("*.png")), PICTURES / "loop_unheard.png")
    page.say(
        f"""
```text
{chr(10).join(lines)}
```

In the {len(unheard)} recordings, {hits} of {calls} calls are found, with {false} false alarms,
after {len(marks)} marks of five seconds: {len(marks) * 5 / 60:.0f} minutes of listening.

![Waveform, spectrogram and scores of a recording that nobody marked](../images/loop_unheard.png)

## How long it took

| step | seconds |
| --- | --- |
"""
        + "\n".join(
            f"| `{name}`, all runs | {seconds:.0f} |" for name, seconds in page.seconds.items()
        )
        + """

To do the same in the browser, with players and pictures:
`ast-demo --index index --marks marks.csv`.
"""
    )
    return page


def read_report(path: Path) -> tuple[float, float, float]:

    report = json.loads(path.read_text())
    errors = report["calibration_error"]
    return report["mean_average_precision"], errors["before"], errors["after"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", help="that makes the index; default: the bundled one")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--work", type=Path, default=Path("runs/loop"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    dataset, page = options.dataset.absolute(), options.page.absolute()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    os.chdir(options.work)
    truth = join_clips(dataset, options.folds)
    text = "\n\n".join(write_page(truth, options).text) + "\n"
    page.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
