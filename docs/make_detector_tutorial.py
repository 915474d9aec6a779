"""The transcript and the pictures of docs/tutorials/detector.md: a detector of four sounds.

    python -m docs.make_detector_tutorial ESC10 --work runs/detector_tutorial

ESC10 is the dataset's folder in five folds (Parquet: audio, label, fold). Clips of four classes
become recordings of 30 s with noise; those of folds 1 to 4 are annotated in Raven selection tables,
those of fold 5 are new. What the commands print goes to standard output, with the time that each
took; pictures go to docs/images. What is already in the folder is not made again.
"""

import argparse
import csv
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_extraction import load_audio
from modeling_ast.events_ast import Event
from scripts.data.mixtures import mix_clips
from scripts.data.options import MixOptions
from scripts.inference.formats import FORMATS

from .make_loop_tutorial import NAMES, RATE, Page

WANTED = ["dog_bark", "rooster", "baby_cry", "person_sneeze"]
RAVEN = FORMATS["raven"]
IMAGES = Path(__file__).resolve().parent / "images"


def make_recordings(dataset: Path, work: Path) -> None:
    """recordings/ and new/ with FLAC files, raven/ and truth/ with a selection table for each."""
    import soundfile

    clips = []
    for fold in range(1, 6):
        for row in pq.read_table(dataset / "data" / f"fold{fold}.parquet").to_pylist():
            if NAMES[row["label"]] in WANTED:
                clips.append({"audio": row["audio"], "label": NAMES[row["label"]], "fold": fold})
    (work / "clips").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(clips), work / "clips" / "train.parquet")
    mix_clips(
        MixOptions(
            dataset=str(work / "clips"),
            output=str(work / "scenes"),
            soundscape_s=30.0,
            mixtures_per_fold=10,
            max_clips=4,
        )
    )
    with (work / "scenes" / "events.csv").open() as file:
        rows = list(csv.DictReader(file))
    for fold in range(1, 6):
        sounds, tables = ("new", "truth") if fold == 5 else ("recordings", "raven")
        (work / sounds).mkdir(exist_ok=True)
        (work / tables).mkdir(exist_ok=True)
        for row in pq.read_table(work / "scenes" / f"fold{fold}.parquet").to_pylist():
            name = row["audio"]["path"]
            soundfile.write(work / sounds / name, load_audio(row["audio"], RATE), RATE)
            events = [
                Event(float(r["start"]), float(r["end"]), r["label"], 1.0)
                for r in rows
                if r["file"] == name
            ]
            text = RAVEN.track(events)  # type: ignore[misc]
            (work / tables / f"{Path(name).stem}{RAVEN.suffix}").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/detector_tutorial"))
    options = parser.parse_args()
    if not (options.work / "raven").is_dir():
        make_recordings(options.dataset, options.work)
    os.chdir(options.work)
    name = "fold5_0"  # the first of the new ones
    print(f"\n```text\n{(Path('raven') / f'fold1_0{RAVEN.suffix}').read_text()}```\n")
    page = Page()
    if not Path("runs/detector/checkpoint").is_dir():
        page.run(
            "ast-finetune-accelerate recordings/ --annotations raven/ --output runs/detector "
            "--num_workers 0"
        )
    shutil.rmtree("results", ignore_errors=True)
    page.run(
        "ast-classify new/ --model runs/detector/checkpoint --output results "
        "--formats raven csv --median_filter_s 0.5 --plot"
    )
    page.run(
        "ast-evaluate runs/detector/checkpoint new/ --annotations truth/ "
        "--evaluation_split train --median_filter_s 0.5 --output runs/evaluation --num_workers 0"
    )
    print("\n\n".join(page.text), "\n")
    for folder, title in (("results/raven", "found"), ("truth", "what is in it")):
        (table,) = Path(folder).rglob(f"{name}.*")
        print(f"{name}, {title}:\n\n```text\n{table.read_text()}```\n")
    (plot,) = Path("results/plots").rglob(f"{name}.*")
    shutil.copy(plot, IMAGES / "detector_events.png")
    shutil.copy("runs/evaluation/onset_errors.png", IMAGES / "detector_onset_errors.png")


if __name__ == "__main__":
    main()
