"""The transcript of docs/loop.md: the loop on ESC-10 clips, joined to long recordings.

    python -m docs.make_loop_tutorial ESC10 --work runs/loop

ESC10 is the data set's folder in five folds (Parquet: audio, label, fold). Of fold 5, which the
bundled model was not trained on, the clips are joined to eight recordings of ten; six are marked,
two are for the test at the end. What the commands print goes to standard output, with the time that
each took.
"""

import argparse
import io
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

from feature_extraction import load_audio
from scripts.classify import classify
from scripts.inference.options import ClassifyOptions
from scripts.workbench import run
from scripts.workbench.calibration import Wish
from scripts.workbench.marks import Mark, write_marks
from scripts.workbench.options import IndexOptions, TeachOptions

RATE = 16000
NAMES = ["dog_bark", "rain", "sea_waves", "baby_cry", "clock_tick", "person_sneeze", "helicopter"]
NAMES += ["chainsaw", "rooster", "fire_crackling"]
WANTED = ["dog_bark", "rooster", "baby_cry"]  # what somebody looks for; all else is background


def join_clips(dataset: Path, folder: Path) -> list[Mark]:
    """Write eight recordings; what is where in them."""
    rows = pq.read_table(dataset / "data" / "fold5.parquet").to_pylist()
    order = np.random.default_rng(0).permutation(len(rows)).reshape(8, -1)
    folder.mkdir(parents=True)
    truth = []
    for number, clips in enumerate(order):
        sounds, at = [], 0.0
        path = folder / f"field_{number}.flac"
        for clip in clips:
            sound = load_audio(rows[clip]["audio"], RATE)
            end = at + len(sound) / RATE
            truth.append(Mark(str(path), at, end, NAMES[rows[clip]["label"]]))
            sounds.append(sound)
            at = end
        soundfile.write(path, np.clip(np.concatenate(sounds), -1, 1), RATE)
    return truth


def step(command: str, action) -> None:
    """Run, and print a block as a terminal would show it."""
    printed = io.StringIO()
    began = time.perf_counter()
    with redirect_stdout(printed), redirect_stderr(printed):
        action()
    seconds = time.perf_counter() - began
    # Progress bars rewrite their line.
    lines = [line.rpartition("\r")[2] for line in printed.getvalue().splitlines()]
    bars = ("it/s", "step/s", "s/step", "batch/s", "clips/s", "s/ clips", "heard,", "\x1b")
    text = "\n".join(line for line in lines if line.strip() and not any(b in line for b in bars))
    print(f"\n```text\n$ {command}\n{text}\n```\n\n{seconds:.1f} s, without the start of Python.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/loop"))
    options = parser.parse_args()
    work: Path = options.work
    shutil.rmtree(work, ignore_errors=True)
    truth = join_clips(options.dataset, work / "recordings")
    held_out = {str(work / "recordings" / f"field_{number}.flac") for number in (6, 7)}

    step(
        "ast-index recordings/ --output index --hop-length-s 2.56",
        lambda: run.index(
            IndexOptions(
                sounds=[str(work / "recordings")], output=work / "index", hop_length_s=2.56
            )
        ),
    )
    bark = next(mark for mark in truth if mark.label == "dog_bark" and mark.file not in held_out)
    stretch = f"{bark.file}:{bark.start:.1f}-{bark.end:.1f}"
    step(
        f"ast-index --output index --like {Path(bark.file).name}:{bark.start:.1f}-{bark.end:.1f} "
        "--count 8 --clips found",
        lambda: run.index(
            IndexOptions(output=work / "index", like=[stretch], count=8, clips=work / "found")
        ),
    )

    def label_of(mark: Mark) -> str:
        return mark.label if mark.label in WANTED else "background"

    marked = [mark._replace(label=label_of(mark)) for mark in truth if mark.file not in held_out]
    for share, name in ((3, "few"), (1, "all")):
        write_marks(work / f"{name}.csv", marked[::share])
        step(
            f"ast-teach index {name}.csv --output taught --queue uncertain --count 5",
            lambda name=name: run.teach(
                TeachOptions(
                    index=work / "index",
                    marks=[str(work / f"{name}.csv")],
                    output=work / "taught",
                    wish=Wish(),
                    queue="uncertain",
                    queue_file=work / "next.csv",
                    count=5,
                )
            ),
        )
    step(
        "ast-classify field_6.flac field_7.flac --model taught --threshold taught/thresholds.json "
        "--output results --plot",
        lambda: classify(
            ClassifyOptions(
                sounds=sorted(held_out),
                model=str(work / "taught"),
                threshold=str(work / "taught" / "thresholds.json"),
                hop_length_s=2.56,
                output=work / "results",
                plot=True,
            )
        ),
    )
    print("What was heard in the two recordings that nobody marked, and what is in them:\n")
    print("```text")
    print((work / "results" / "events.csv").read_text())
    for mark in truth:
        if mark.file in held_out and mark.label in WANTED:
            print(f"{Path(mark.file).name}: {mark.label} {mark.start:.1f}-{mark.end:.1f} s")
    print("```")


if __name__ == "__main__":
    main()
