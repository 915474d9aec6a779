"""ast-index and ast-teach, from sound files to a checkpoint that tells them apart."""

import base64
import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from modeling_ast import ASTForAudioClassification
from modeling_ast.export_ast import export_onnx
from scripts.inference import run as inference_run
from scripts.inference.classifier import Classifier
from scripts.inference.clips import clip_name
from scripts.inference.parts import Parts
from scripts.workbench import run
from scripts.workbench.bench import Stretch, Workbench
from scripts.workbench.calibration import Wish
from scripts.workbench.heads import Head
from scripts.workbench.index import SoundIndex, parse_example
from scripts.workbench.marks import Mark, marks_of_annotations, read_marks, write_marks
from scripts.workbench.options import IndexOptions, TeachOptions
from scripts.workbench.page import card, read_upload
from scripts.workbench.teach import targets_of

from .conftest import REPOSITORY
from .sounds import PITCHES, encode, tone

LENGTH = 1.28  # seconds of a window of the tiny model


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Path:
    """Twelve recordings of two windows each, four of a pitch, and quiet ones in a folder."""
    folder = tmp_path_factory.mktemp("field")
    for number in range(12):
        name = list(PITCHES)[number % 3]
        path = folder / f"{name}_{number}.flac"
        path.write_bytes(encode(tone(PITCHES[name], seed=number, seconds=2 * LENGTH)))
    (folder / "quiet").mkdir()
    for number in range(4):
        noise = 0.01 * np.random.default_rng(number).standard_normal(int(2 * LENGTH * 16000))
        soundfile.write(folder / "quiet" / f"{number}.wav", noise, 16000)
    return folder


@pytest.fixture(scope="module")
def index_folder(field, native_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    options = IndexOptions(
        sounds=[str(field)], output=folder, model=str(native_folder), hop_length_s=LENGTH
    )
    assert run.index(options) == 0
    return folder


@pytest.fixture
def marks(field, tmp_path) -> Path:
    path = tmp_path / "marks.csv"
    files = sorted(field.glob("*.flac"))
    write_marks(path, [Mark(str(file), None, None, file.name.split("_")[0]) for file in files])
    return path


def test_an_index_holds_every_window_as_the_model_hears_it(index_folder, field, native_folder):
    index = SoundIndex.open(index_folder)
    assert len(index.sounds) == 16
    assert index.sounds == sorted(index.sounds)
    classifier = Classifier(str(native_folder), hop_length_s=LENGTH)
    for number in (0, 9, 15):
        heard = classifier.hear(index.sounds[number])
        mine = index.sound_of_window == number
        np.testing.assert_allclose(index.spans[mine], heard.spans)
        np.testing.assert_allclose(index.embeddings[mine], heard.embeddings, atol=1e-5)


def test_an_interrupted_index_resumes(field, native_folder, index_folder, tmp_path, monkeypatch):
    """Each recording is in the parts once, and the index equals that of an uninterrupted run."""
    folder = tmp_path / "index"
    options = IndexOptions(
        sounds=[str(field)], output=folder, model=str(native_folder), hop_length_s=LENGTH
    )
    write, written = Parts.write, []

    def write_and_stop(self, results):
        write(self, results)
        written.extend(results)
        if len(written) >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(inference_run, "PART_S", 0.0)  # every recording a part
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Parts, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run.index(options)
    assert 3 <= len(SoundIndex.open(folder).sounds) < 16
    assert run.index(options) == 0
    expect_equal(folder, index_folder)


def expect_equal(folder: Path, reference: Path) -> None:
    """The same windows, none twice."""
    names = [name for name, *_ in Parts(folder).arrays()]
    assert len(names) == len(set(names))
    one, other = SoundIndex.open(folder), SoundIndex.open(reference)
    assert one.sounds == other.sounds
    np.testing.assert_array_equal(one.spans, other.spans)
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-5)


# A process that the kernel kills: rank 1, after its second recording.
KILLED = """
import os, signal
from scripts import index
from scripts.inference import run
run.PART_S = 0.0
write, written = run.Parts.write, []
def write_and_die(self, results):
    write(self, results)
    written.extend(results)
    if self.rank == 1 and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("KILL"):
    run.Parts.write = write_and_die
index.main()
"""


@pytest.mark.slow
def test_two_processes_one_killed(native_folder, field, index_folder, tmp_path):
    """A restart indexes what the killed process had not."""
    (tmp_path / "main.py").write_text(KILLED)
    folder = tmp_path / "index"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29623"]
    command += [str(tmp_path / "main.py"), str(field), "--model", str(native_folder)]
    command += ["--output", str(folder), "--hop_length_s", str(LENGTH)]

    def launch(**more: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False
        )

    assert launch(KILL="1").returncode != 0
    assert len(list((folder / "parts").glob("rank00001-*.parquet"))) == 2
    restarted = launch()
    assert restarted.returncode == 0, restarted.stderr
    assert "holds 32 windows of 16 recordings" in restarted.stderr
    expect_equal(folder, index_folder)


def test_it_grows_and_hears_nothing_twice(index_folder, field, native_folder, tmp_path, capsys):
    grown = tmp_path / "index"
    shutil.copytree(index_folder, grown)
    before = {path: path.stat().st_mtime_ns for path in (grown / "parts").iterdir()}
    more = tmp_path / "more.flac"
    more.write_bytes(encode(tone(500.0, seed=1, seconds=1)))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    # The model and the windows are the index's own.
    options = IndexOptions(sounds=[str(field), str(more), str(broken)], output=grown)
    assert run.index(options) == 1
    errors = capsys.readouterr().err
    assert "holds 33 windows of 17 recordings" in errors
    assert "broken.wav" in errors
    index = SoundIndex.open(grown)
    assert len(index.sounds) == 17
    assert str(more) in index.sounds
    written = set((grown / "parts").glob("*.parquet")) - set(before)
    assert len(list(Parts(grown).arrays())) == 17
    assert len(written) == 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())


def test_another_model_s_and_other_windows_are_refused(
    index_folder, field, native_folder, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(native_folder, other)
    model = ASTForAudioClassification.from_pretrained(other)
    with torch.no_grad():
        model.audio_spectrogram_transformer.layernorm.bias.add_(0.1)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"differs from .*: use that model, or another index"):
        run.index(
            IndexOptions(
                sounds=[str(field)], output=index_folder, model=str(other), hop_length_s=LENGTH
            )
        )
    with pytest.raises(ValueError, match="hop_length_s"):
        run.index(IndexOptions(sounds=[str(field)], output=index_folder, hop_length_s=0.5))
    with pytest.raises(ValueError, match="is not an index"):
        SoundIndex.open(tmp_path)


def test_a_head_s_change_keeps_the_index(index_folder, native_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(native_folder, other)
    model = ASTForAudioClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.dense.bias.add_(1)
    model.save_pretrained(other)
    SoundIndex.open(index_folder).check(Classifier(str(other)))


def test_search_by_example_finds_what_sounds_alike(index_folder, field, tmp_path, capsys):
    example = tmp_path / "example.wav"
    sound = np.concatenate([tone(300.0, seed=50, seconds=2), tone(3000.0, seed=51, seconds=LENGTH)])
    soundfile.write(example, sound, 16000)
    options = IndexOptions(
        output=index_folder,
        like=[f"{example}:2-{2 + LENGTH}"],
        count=8,
        table=tmp_path / "found.csv",
        clips=tmp_path / "clips",
        clip_format="flac",
        label_studio=tmp_path / "tasks.json",
    )
    assert run.index(options) == 0
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name.split("_")[0] for row in rows] == ["high"] * 8
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(capsys.readouterr().out.splitlines()) == 8
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == 8
    first = rows[0]
    name = clip_name(first["file"], float(first["start"]), float(first["end"]), scores[0], ".flac")
    samples, rate = soundfile.read(tmp_path / "clips" / name)
    # A second before and after, as far as there is sound.
    assert len(samples) / rate == pytest.approx(LENGTH + 1, abs=0.02)
    assert len(json.loads((tmp_path / "tasks.json").read_text())) == 4


def test_similarity_is_exact(index_folder):
    """Folding the standardisation into the example changes nothing."""
    index = SoundIndex.open(index_folder)
    features = index.features()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    similarity = index.similarity(index.embeddings[[3, 20]])
    expected = (features @ features[[3, 20]].T).max(axis=1)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    assert set(np.argsort(-similarity)[:2]) == {3, 20}
    with pytest.raises(ValueError, match="comes from another model"):
        index.similarity(np.zeros((1, 7)))


@pytest.mark.parametrize("exclusive", [True, False])
def test_scores_are_those_of_the_checkpoint_s_head(index_folder, exclusive):
    """Folding the LayerNorm into the product changes nothing."""
    index = SoundIndex.open(index_folder)
    random = np.random.default_rng(0)
    head = Head(
        random.normal(size=(3, index.embeddings.shape[1])), random.normal(size=3), exclusive
    )
    normed = index.normed()
    np.testing.assert_allclose(
        index.logits(head.weight, head.bias), head.logits(normed), rtol=1e-4, atol=1e-4
    )
    for label in range(3):
        expected = head.scores(normed)[:, label]
        np.testing.assert_allclose(index.scores(head, label), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a.wav", ("a.wav", None)),
        ("a.wav:1-2.5", ("a.wav", (1.0, 2.5))),
        ("C:/a-b.wav", ("C:/a-b.wav", None)),
        ("a.wav:0-3:1-2", ("a.wav:0-3", (1.0, 2.0))),
    ],
)
def test_examples(word, expected):
    assert parse_example(word) == expected
    with pytest.raises(ValueError, match="with END after START"):
        parse_example("a.wav:3-2")


@pytest.mark.parametrize("kind", ["exclusive", "independent"])
def test_what_is_taught_is_an_ordinary_checkpoint(index_folder, field, marks, tmp_path, kind):
    """transformers' own classes compute the lesson's logits."""
    options = TeachOptions(
        index=index_folder, marks=[str(marks)], output=tmp_path / "taught", labels=kind
    )
    assert run.teach(options) == 0
    index = SoundIndex.open(index_folder)
    report = json.loads((tmp_path / "taught" / "teaching.json").read_text())
    assert report["marked_recordings"] == 12
    assert report["held_out_windows"] == 24
    assert report["mean_average_precision"] > 0.95

    classifier = Classifier(str(tmp_path / "taught"), hop_length_s=LENGTH)
    assert classifier.label_names == sorted(PITCHES)
    from transformers.models.audio_spectrogram_transformer import (
        modeling_audio_spectrogram_transformer as native,
    )

    model = native.ASTForAudioClassification.from_pretrained(tmp_path / "taught").eval()
    head = run.head_of(classifier)
    windows = list(classifier.windows(index.sounds[0]))
    values = torch.cat([window.content["input_values"] for window in windows])
    with torch.inference_mode():
        logits = model(values).logits.numpy()
    mine = index.sound_of_window == 0
    np.testing.assert_allclose(logits, head.logits(index.normed(mine)), atol=2e-4)
    high = next(name for name in index.sounds if "high" in name)
    assert classifier.hear(high).labels(1)[0].label == "high"
    thresholds = json.loads((tmp_path / "taught" / "thresholds.json").read_text())
    assert set(thresholds) == set(PITCHES)

    # Its own head searches the index, without hearing anything again.
    found = tmp_path / "found.csv"
    taught = str(tmp_path / "taught")
    run.index(IndexOptions(output=index_folder, label="low", model=taught, count=8, table=found))
    assert all("low" in mark.file for mark in read_marks(found))
    assert len(read_marks(found)) == 8


@pytest.mark.slow  # the export
def test_onnx_has_the_taught_scores(index_folder, marks, tmp_path):
    """Standardisation, calibration and all: on sounds that no index holds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    taught = tmp_path / "taught"
    run.teach(
        TeachOptions(index=index_folder, marks=[str(marks)], output=taught, labels="independent")
    )
    classifier = Classifier(str(taught))
    pipeline = classifier.pipeline
    files = export_onnx(pipeline.model, pipeline.feature_extractor, tmp_path / "onnx", ["fp32"])
    exported = Classifier(str(files["fp32"]))
    assert exported.label_names == classifier.label_names
    for number, pitch in enumerate(PITCHES.values()):
        sound = tone(pitch, seed=100 + number, seconds=3)
        scores = classifier.hear(sound).scores
        np.testing.assert_allclose(exported.hear(sound).scores, scores, atol=1e-4)
        assert np.ptp(scores) > 0.2


RAVEN = "Selection\tView\tBegin Time (s)\tEnd Time (s)\tSpecies\n"
ANNOTATIONS = {
    "raven": ("{name}.Table.1.selections.txt", RAVEN + "1\tSpectrogram 1\t0.0\t1.2\t{label}\n"),
    "audacity": ("{name}.txt", "0.0\t1.2\t{label}\n"),
    "dcase": ("all.tsv", "{name}.flac\t0.0\t1.2\t{label}\n"),
    "csv": ("all.csv", "{name}.flac,0.0,1.2,{label}\n"),
}
HEADERS = {"all.tsv": "filename\tonset\toffset\tevent_label\n", "all.csv": "file,start,end,label\n"}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_annotations_of_other_programs_teach(index_folder, field, tmp_path, kind):
    """The first window of every recording is annotated; the second is background, or unknown."""
    name, row = ANNOTATIONS[kind]
    folder = tmp_path / "annotations"
    folder.mkdir()
    for path in sorted(field.glob("*.flac")):
        file = folder / name.format(name=path.stem)
        text = file.read_text() if file.exists() else HEADERS.get(file.name, "")
        file.write_text(text + row.format(name=path.stem, label=path.stem.split("_")[0]))
    index = SoundIndex.open(index_folder)
    for background in (True, False):
        marks, problems = marks_of_annotations(folder, index.sounds, background)
        assert problems == ""
        targets = targets_of(index, marks, sorted(PITCHES))
        annotated = np.array(["quiet" not in sound for sound in index.sounds])
        first = (index.spans[:, 0] == 0) & annotated[index.sound_of_window]
        second = (index.spans[:, 0] > 0) & annotated[index.sound_of_window]
        assert (targets[first].sum(axis=1) == 1).all()
        assert (targets[second] == 0).all() if background else np.isnan(targets[second]).all()
        assert np.isnan(targets[~annotated[index.sound_of_window]]).all()


def test_teaching_from_annotations_alone(index_folder, field, tmp_path, capsys):
    """An invalid row is reported; a track without rows means that nothing can be heard."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    for path in sorted(field.glob("*.flac")):
        (folder / f"{path.stem}.txt").write_text(f"0.0\t2.56\t{path.stem.split('_')[0]}\n")
    for number in range(4):
        (folder / f"{number}.txt").write_text("")
    (folder / "high_0.txt").write_text("0.0\t2.56\thigh\n3\t2\tlow\n")
    taught = tmp_path / "taught"
    options = TeachOptions(index=index_folder, annotations=folder, output=taught)
    assert run.teach(options) == 0
    printed = capsys.readouterr()
    assert "32 marked windows of 16 recordings" in printed.out
    assert "high_0.txt, line 2: it ends at 2 s" in printed.err
    report = json.loads((taught / "teaching.json").read_text())
    assert report["labels"] == "independent"
    assert report["mean_average_precision"] > 0.95


def test_background_and_queues(index_folder, field, marks, tmp_path):
    """A detector with a background; what it asks for next is not marked yet."""
    some = [mark for mark in read_marks(marks) if not mark.file.endswith(("_9.flac", "_10.flac"))]
    few = tmp_path / "few.csv"
    write_marks(few, some)
    for queue in ("uncertain", "disputed", "novel", "random", "likely"):
        options = TeachOptions(
            index=index_folder,
            marks=[str(few)],
            output=tmp_path / queue,
            background=field / "quiet",
            queue=queue,
            queue_label="high" if queue == "likely" else None,
            queue_file=tmp_path / f"{queue}.csv",
            count=4,
        )
        assert run.teach(options) == 0
        with open(tmp_path / f"{queue}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4
        assert {Path(row["file"]).name for row in rows} == {"high_9.flac", "low_10.flac"}
        # A queue is a marks file that waits for its labels.
        assert read_marks(tmp_path / f"{queue}.csv") == []
    likely = tmp_path / "likely.csv"
    with open(likely, newline="", encoding="utf-8") as file:
        assert "high_9" in next(csv.DictReader(file))["file"]
    report = json.loads((tmp_path / "random" / "teaching.json").read_text())
    assert report["labels"] == "independent"
    quiet = Classifier(str(tmp_path / "random")).hear(str(field / "quiet" / "0.wav"))
    assert quiet.scores.max() < 0.5


def test_a_kept_head_is_only_calibrated(index_folder, marks, native_folder, tmp_path):
    first = tmp_path / "taught"
    run.teach(TeachOptions(index=index_folder, marks=[str(marks)], output=first))
    model = ASTForAudioClassification.from_pretrained(first)
    with torch.no_grad():
        model.classifier.dense.weight.mul_(20)
        model.classifier.dense.bias.mul_(20)
    model.save_pretrained(first)
    options = TeachOptions(
        index=index_folder,
        marks=[str(marks)],
        output=tmp_path / "calibrated",
        head="keep",
        model=str(first),
    )
    run.teach(options)
    after = ASTForAudioClassification.from_pretrained(tmp_path / "calibrated").classifier
    ratio = after.dense.weight / model.classifier.dense.weight
    assert ratio.std() < 1e-5
    other = tmp_path / "other.csv"
    write_marks(other, [Mark(read_marks(marks)[0].file, None, None, "whale")])
    options.marks = [str(other)]
    with pytest.raises(ValueError, match="has no label 'whale'"):
        run.teach(options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("quiet/0.wav", "background")], "The marks name no label"),
        ([("high_0.flac", "high")], "Only 'high' is marked"),
        ([("nowhere.flac", "high")], "not in the index"),
    ],
)
def test_marks_that_teach_nothing(index_folder, field, tmp_path, rows, message):
    path = tmp_path / "marks.csv"
    write_marks(path, [Mark(file, None, None, label) for file, label in rows])
    with pytest.raises(ValueError, match=message):
        run.teach(TeachOptions(index=index_folder, marks=[str(path)], output=tmp_path / "out"))


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="--output INDEX"):
        IndexOptions(sounds=["x.wav"])
    with pytest.raises(ValueError, match="Name recordings to add, or search"):
        IndexOptions(output=Path("index"))
    with pytest.raises(ValueError, match="--clips is for a search"):
        IndexOptions(sounds=["x.wav"], output=Path("index"), clips=Path("clips"))
    with pytest.raises(ValueError, match="a file of marks, or --annotations PATH"):
        TeachOptions(index=Path("index"))
    with pytest.raises(ValueError, match="--queue likely and --queue_label"):
        TeachOptions(index=Path("index"), marks=["m.csv"], queue="likely")


def test_help_needs_no_torch():
    code = "import sys; from scripts import index, teach\n"
    code += "for m in (index, teach):\n try: m.main(['--help'])\n except SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--like EXAMPLE" in done.stdout


@pytest.fixture
def bench(index_folder, tmp_path) -> Workbench:
    return Workbench(index_folder, tmp_path / "marks.csv")


def true_label(stretch: Stretch) -> str:
    name = Path(stretch.file).name.split("_")[0]
    return name if name in PITCHES else "background"


def test_the_loop_finds_marks_and_teaches(bench, field, tmp_path):
    """An example, similar windows marked, then queues: every lesson leaves less to ask."""
    example = bench.classifier.hear(str(field / "high_0.flac")).embeddings
    found = bench.find(example, 4)
    assert true_label(found[0]) == "high"
    bench.mark(found[0], "high")
    with pytest.raises(ValueError, match="Only 'high' is marked"):
        bench.teach(Wish(), tmp_path / "taught")
    for stretch in found[1:]:
        bench.mark(stretch, true_label(stretch))
    for _ in range(8):
        stretch = bench.next("uncertain")  # nothing is taught yet: what is unlike the marks
        assert stretch.suggestion is None
        assert not bench.marked[stretch.window]
        bench.mark(stretch, true_label(stretch))
    first = bench.teach(Wish(), tmp_path / "taught")
    assert first.marks_since is None
    heard = bench.hear(tone(300.0, seed=71, seconds=LENGTH))
    assert max(heard, key=lambda label: heard[label]) == "low"
    right = 0
    for _ in range(10):
        stretch = bench.next("uncertain")
        right += stretch.suggestion == true_label(stretch)
        bench.mark(stretch, true_label(stretch))
    assert right >= 5
    second = bench.teach(Wish(), tmp_path / "taught")
    assert second.marks_since == 10
    assert second.changed >= 0
    assert (tmp_path / "taught" / "model.safetensors").exists()
    likely = bench.next("likely", "low")
    assert true_label(likely) == "low"
    with pytest.raises(ValueError, match="Choose a label"):
        bench.next("likely", "whale")


def test_what_is_skipped_does_not_come_back_and_what_is_undone_does(bench, index_folder):
    first = bench.next("random")
    bench.skip(first)
    second = bench.next("random")
    assert second.window != first.window
    bench.mark(second, "high")
    third = bench.next("random")
    assert third.window not in (first.window, second.window)
    mark, back = bench.undo()
    assert (mark.label, back.window) == ("high", second.window)
    assert bench.next("random").window == second.window
    assert bench.undo() is None
    # A mark of a whole file has no window to go back to, and is not taken back in silence.
    bench.book.add(Mark(third.file, None, None, "background"))
    mark, back = bench.undo()
    assert (mark.label, back) == ("background", None)
    with pytest.raises(ValueError, match="Say what it is"):
        bench.mark(third, "  ")
    # All that was marked is in the file: a page that is killed and started again has it.
    bench.mark(third, "low")
    again = Workbench(index_folder, bench.book.path)
    assert again.marked[third.window]
    seen = set()
    while (stretch := again.next("random")) is not None:
        assert stretch.window not in seen
        seen.add(stretch.window)
        again.skip(stretch)
    assert len(seen) >= 30 - 1


def test_a_card_shows_axes_and_plays(bench):
    stretch = bench.next("random")
    shown = card(bench, stretch, 3)
    assert 'src="data:image/png;base64,' in shown
    sound = base64.b64decode(shown.split("data:audio/flac;base64,")[1].split('"')[0])
    samples, rate = soundfile.read(io.BytesIO(sound))
    assert len(samples) / rate == pytest.approx(LENGTH + 1, abs=0.05)
    assert f"3. {Path(stretch.file).name}" in shown
    gone = dataclasses.replace(stretch, file="<gone>.wav")
    assert "&lt;gone&gt;.wav" in card(bench, gone)
    assert "has moved, or this is not the folder" in card(bench, gone)


def test_uploads_have_limits(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, tone(300.0, seed=1, seconds=3), 16000)
    assert len(read_upload(str(path), 16000, 1, 0.5, 2)) == 24000
    for arguments, message in (
        ((None, 16000, 1), "Upload or record a sound first"),
        ((str(path), 16000, 0.01), "^sound.wav is longer than 0.01 minutes"),
        ((str(path), 16000, 1, 2, 1), "before it begins"),
        ((str(tmp_path / "none.wav"), 16000, 1), "none.wav"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_upload(*arguments)
        assert str(tmp_path) not in str(caught.value)
