"""ast-benchmark: its tables and JSON, on loads too small to say anything about speed."""

import json
import multiprocessing.dummy
import time
from argparse import Namespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from transformers import ViTConfig, ViTModel

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification
from scripts.benchmark import benchmark
from scripts.benchmarks import accuracy
from scripts.benchmarks.forward import multiplications
from scripts.benchmarks.weak import compare
from scripts.common import timing
from scripts.inference import classifier
from scripts.inference.run import model_version
from scripts.workbench import teach
from scripts.workbench.heads import Standard, fit_head, layer_normed

from .conftest import TINY_MODEL, TINY_RECIPE
from .sounds import PITCHES, write_class_folders, write_parquet


def test_features(tmp_path, capsys):
    path = tmp_path / "features.json"
    benchmark(
        [
            "features",
            "--clips",
            "2",
            "--clip_length_s",
            "0.5",
            "--gpu_clips",
            "2",
            "--repeats",
            "2",
            "--json",
            str(path),
        ]
    )
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["title"] == "2 clips of 0.5 s"
    assert written["machine"]["threads"] >= 1
    assert written["cases"][0]["case"] == "native ASTFeatureExtractor"
    for case in written["cases"]:
        assert case["case"] in printed
        assert len(case["runs_s"]) == 2
        assert case["min"] <= case["ms_per_clip"] <= case["max"]


def test_cases_alternate(monkeypatch):
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    monkeypatch.setattr(timing, "_SHORTEST_S", 0.0)
    timing.measure(cases, repeats=2)
    assert "".join(calls) == "ababab"  # the first round warms up


def test_short_cases_run_on_end():
    """Short runs are averaged; long ones run once per measurement."""
    calls = []
    cases = {
        "short": lambda: (calls.append("short"), time.sleep(0.01)),
        "long": lambda: (calls.append("long"), time.sleep(0.25)),
    }
    seconds = timing.measure(cases, repeats=2)
    assert calls.count("long") == 3
    assert 10 < calls.count("short") < 60
    assert all(0.01 <= run < 0.1 for run in seconds["short"])


def test_mistakes():
    with pytest.raises(ValueError, match="--repeats must be at least 1, got 0"):
        benchmark(["features", "--repeats", "0"])


def test_pipeline(tmp_path, capsys):
    path = tmp_path / "pipeline.json"
    sizes = ["--clips=3", "--clip_length_s=0.5", "--batch_size=2", "--max_length=64"]
    model = ["--hidden_size=64", "--num_hidden_layers=1"]
    benchmark(["pipeline", *sizes, *model, "--repeats=1", f"--json={path}"])
    written = json.loads(path.read_text())
    assert written["title"].startswith("3 files, 0.000 h of sound, batches of 2, width 64")
    names = [case["case"] for case in written["cases"]]
    assert names[0].startswith("stock pipeline, ")
    assert names[1:] == ["ours", "ours, padding masked"]
    assert written["largest_score_difference"] < 1e-4
    assert set(written["hours_of_sound_per_hour"]) == set(names)
    assert "hours of sound per hour" in capsys.readouterr().out


@pytest.mark.slow  # four processes
def test_processes(native_folder, tmp_path):
    path = tmp_path / "processes.json"
    small = ["--minutes=1", "--repeats=1", "--processes=1", f"--json={path}"]
    benchmark(["processes", str(native_folder), *small])
    written = json.loads(path.read_text())
    names = ["no option", "exact, 1 process of 1 thread"]
    assert [case["case"] for case in written["cases"]] == names
    hours = written["hours_of_sound_per_hour"]
    for case in written["cases"]:
        assert hours[case["case"]] == pytest.approx(60_000 / case["ms_per_min"], abs=0.06)


@pytest.mark.slow  # three processes
def test_descendants(tmp_path, capsys):
    path = tmp_path / "descendants.json"
    options = ["--clip_length_s=0.5", "--repeats=1", "--threads=1", f"--json={path}"]
    benchmark(["descendants", "--models", "ced-tiny", "ssast-tiny-frame-400", *options])
    assert "ssast-tiny-frame-400" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert [case["case"] for case in written["cases"]] == ["ced-tiny", "ssast-tiny-frame-400"]
    # One hears half a second, the other pads it to 10 s.
    assert written["cases"][1]["times_faster"] < 1
    assert all(memory > 0 for memory in written["peak_memory_in_MiB"].values())
    with pytest.raises(ValueError, match="ced-huge is not a folder in hub_configs"):
        benchmark(["descendants", "--models", "ced-huge"])


@pytest.mark.parametrize("in_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_train(in_processes, tmp_path, capsys, monkeypatch):
    if not in_processes:  # of which each case starts one
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    path = tmp_path / "train.json"
    sizes = ["--batch_size=2", "--max_length=96", "--hidden_size=64", "--num_hidden_layers=1"]
    patchout = ["--time_patchout=4", "--frequency_patchout=2"]
    benchmark(["train", *sizes, *patchout, "--repeats=1", f"--json={path}"])
    written = json.loads(path.read_text())
    names = [case["case"] for case in written["cases"]]
    assert names == ["native AST", "ours, no patchout", "ours, patchout 2 rows 4 columns"]
    assert set(written["peak_memory_in_MiB"]) == set(names)
    assert "peak memory in MiB\n" in capsys.readouterr().out


def test_merging(tmp_path, capsys):
    model = ASTForAudioClassification(
        ASTConfig(
            hidden_size=12,
            num_attention_heads=1,
            num_hidden_layers=2,
            intermediate_size=12,
            max_length=64,
        )
    )
    model.save_pretrained(tmp_path / "model")
    ASTFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    for label in ("a", "b"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(2):
            noise = np.random.default_rng(number).uniform(-0.1, 0.1, 8000)
            soundfile.write(tmp_path / "sounds" / label / f"{number}.wav", noise, 16000)
    path, plot = tmp_path / "merging.json", tmp_path / "merging.png"
    paths = [str(tmp_path / "model"), str(tmp_path / "sounds"), f"--json={path}", f"--plot={plot}"]
    benchmark(["merging", *paths, "--merged", "0", "5", "--repeats=1", "--batch_size=2"])
    written = json.loads(path.read_text())
    assert list(written["accuracy_in_percent"]) == [
        "0 tokens merged per layer",
        "5 tokens merged per layer",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "4 clips of 64 frames, 12 x 5 patches, 2 layers" in capsys.readouterr().out


SMALL = ["--hidden_size=64", "--num_hidden_layers=1", "--max_length=128", "--repeats=1"]


@pytest.mark.parametrize("workload", ["full", "short", "mixed"])
def test_forward(workload, tmp_path, capsys):
    path = tmp_path / "forward.json"
    benchmark(["forward", f"--workload={workload}", "--clips=3", *SMALL, f"--json={path}"])
    written = json.loads(path.read_text())
    names = [case["case"] for case in written["cases"]]
    assert names == ["native, padded to 128 frames", "ours"]
    assert written["title"].startswith(f"{workload}: 3 clips of ")
    assert written["share_of_the_limit"] > 0
    assert "share of the limit" in capsys.readouterr().out


@pytest.mark.slow  # the ONNX export
def test_forward_approximated(tmp_path):
    path = tmp_path / "forward.json"
    extra = ["--clips=3", "--merged=4", "--int8"]
    benchmark(["forward", "--workload=mixed", *extra, *SMALL, f"--json={path}"])
    names = [case["case"] for case in json.loads(path.read_text())["cases"]]
    assert names[2:] == [
        "ours, 4 tokens merged per layer",
        "ours, int8 with ONNX Runtime, features too",
    ]


def test_accuracy(tmp_path, capsys):
    write_class_folders(tmp_path / "sounds", 6)
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=64, image_size=32)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    recipe = {**TINY_RECIPE, "num_epochs": 2, "loss": "binary_cross_entropy"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    what = [str(tmp_path / "tiny.yaml"), str(tmp_path / "sounds"), str(tmp_path / "vit")]
    outputs = [f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.png'}"]
    options = ["--plain_epochs=3", "--target=0", "--ours=--num_epochs 1 --layer_decay 0.8"]
    benchmark(["accuracy", *what, *options, *outputs])
    written = json.loads((tmp_path / "out.json").read_text())
    (plain, ours) = written["curves"].values()
    assert (len(plain), len(ours)) == (3, 1)
    for curve in (plain, ours):
        seconds, accuracies = zip(*curve, strict=True)
        assert sorted(seconds) == list(seconds)
        assert all(0 <= accuracy <= 100 for accuracy in accuracies)
    assert written["times_faster"] == plain[0][0] / ours[0][0]
    assert f"times faster: {written['times_faster']:.1f}" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_an_accuracy_that_the_plain_loop_never_reaches(capsys):
    curves = {"plain": [(10.0, 80.0), (30.0, 90.0)], "ours": [(5.0, 92.0), (12.0, 94.0)]}
    options = Namespace(target=93.0, ours="", json=None, plot=None)
    accuracy._report(curves, options)
    assert "times faster: more than 2.5" in capsys.readouterr().out
    accuracy._report({**curves, "ours": [(5.0, 92.0)]}, options)
    assert "times faster" not in capsys.readouterr().out


def test_multiplications_are_torchs():
    from torch.utils.flop_counter import FlopCounterMode

    config = ASTConfig(hidden_size=64, num_attention_heads=1, intermediate_size=256,
                       num_hidden_layers=2, max_length=128)  # fmt: skip
    model = ASTForAudioClassification(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 100, 128))
    ours = 2 * multiplications(config, 100)
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-3)  # less the classifier


@pytest.mark.slow
def test_lengths(tmp_path):
    path, plot = tmp_path / "lengths.json", tmp_path / "lengths.png"
    benchmark(["lengths", "--seconds", "1", "2", *SMALL, f"--json={path}", f"--plot={plot}"])
    written = json.loads(path.read_text())
    assert [case["case"] for case in written["cases"]] == [
        "1 s, whole", "1 s, in windows", "2 s, whole", "2 s, in windows",
    ]  # fmt: skip
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_cold(tmp_path):
    path = tmp_path / "cold.json"
    benchmark(["cold", *SMALL, f"--json={path}"])
    written = json.loads(path.read_text())
    assert [case["case"] for case in written["cases"]] == ["stock pipeline", "ours", "ast-classify"]
    assert 100 < written["peak_memory_in_MiB"]["ast-classify"] < 2000


@pytest.fixture
def embedded(tmp_path) -> list[str]:
    """Arguments for a dataset whose embeddings are at hand: 4 classes in 5 folds, told apart."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"some weights")
    random = np.random.default_rng(0)
    classes = np.tile(np.arange(4), 50)
    centres = np.random.default_rng(1).standard_normal((4, 16))
    embeddings = centres[classes] + 0.7 * random.standard_normal((200, 16))
    path = tmp_path / "embeddings.npz"
    np.savez(
        path,
        made_with=json.dumps(
            {
                "weights": model_version(str(model)),
                "dataset": "dataset",
                "splits": ["train"],
                "fold_column": None,
                "group_column": None,
            }
        ),
        embeddings=embeddings.astype(np.float32),
        classes=classes,
        groups=np.arange(200).astype(str),
        parts=(np.arange(200) // 40).astype(str),
    )
    out = tmp_path / "out.json"
    return [str(model), "dataset", "--embeddings", str(path), "--json", str(out)]


def test_few_marks(embedded, tmp_path, capsys):
    """More marks, more accuracy; the same command prints the same figures."""
    benchmark(["few", *embedded, "--draws", "3", "--shots", "1", "20"])
    printed = capsys.readouterr().out
    assert "20 per class" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["few"]["1"]["mean"] < found["few"]["20"]["mean"] <= found["full"] + 5
    benchmark(["few", *embedded, "--draws", "3", "--shots", "20"])
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["few"]["20"]["mean"] == found["few"]["20"]["mean"]
    with pytest.raises(ValueError, match="npz was made with dataset dataset, now others: name"):
        benchmark(["few", embedded[0], "others", *embedded[2:]])
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights, the same name")
    with pytest.raises(ValueError, match=r"npz was made with weights \w+, now \w+: name"):
        benchmark(["few", *embedded])


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04cut off"])
def test_kept_embeddings_that_cannot_be_read(embedded, tmp_path, content):
    (tmp_path / "embeddings.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"embeddings\.npz holds no embeddings: name another file"):
        benchmark(["few", *embedded])


def test_queues_of_marks(embedded, tmp_path, capsys):
    plot = tmp_path / "queues.png"
    benchmark(["queues", *embedded, "--draws", "2", "--plot", str(plot)])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["curves"]) == ["random", "uncertain", "disputed", "novel"]
    for queue, rows in found["needed"].items():
        assert queue in printed
        assert 4 <= rows[0][0] <= rows[1][0] <= 160
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_calibration_and_promises(embedded, tmp_path, capsys):
    arguments = ["calibration", *embedded, "--draws", "5", "--wish", "precision=0.8"]
    benchmark(arguments)
    assert "precision at least 0.8: promised for" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["labels"] == 20
    assert len(found["attained"]) > 5
    assert np.mean(found["attained"]) > 0.8
    with pytest.raises(ValueError, match="--wish is a precision here"):
        benchmark(["calibration", *embedded, "--wish", "f1"])


def test_a_head_that_is_kept_is_calibrated_on_half_of_the_clips(embedded, tmp_path, monkeypatch):
    """One that claims three times too much, on clips that nobody else calibrated."""
    with np.load(embedded[3]) as file:
        normed = layer_normed(file["embeddings"], 1e-6)
        targets = np.eye(4)[file["classes"]]
    head = fit_head(normed, targets, True, Standard.of(normed), 0.1)
    boastful = head.calibrated(np.full(4, 10.0), np.zeros(4))
    monkeypatch.setattr(classifier, "Classifier", lambda checkpoint: checkpoint)
    monkeypatch.setattr(teach, "head_of", lambda _: boastful)
    benchmark(["calibration", *embedded, "--draws", "5", "--head", "keep"])
    errors = json.loads((tmp_path / "out.json").read_text())["calibration_error"]
    assert np.mean(errors["after"]) < np.mean(errors["before"])


def test_loop(tmp_path, capsys):
    path = tmp_path / "loop.json"
    sizes = ["--windows", "1000", "--width", "16", "--marks", "40", "--labels", "3"]
    benchmark(["loop", *sizes, "--repeats", "1", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "  processor s" in printed
    for case in ("search by example", "search by label", "teach 40 marks"):
        assert case in printed


def test_weak_labels_are_learnt_from_bags():
    """Each recording has one window of its class and seven of noise."""
    random = np.random.default_rng(0)
    classes = np.arange(40) % 4
    embeddings = random.standard_normal((40, 8, 16)).astype(np.float32)
    event = random.standard_normal((40, 16)).astype(np.float32)
    for recording, label in enumerate(classes):
        event[recording, label] += 20
        embeddings[recording, random.integers(8)] = event[recording]
    arrays = {"embeddings": embeddings, "event": event, "classes": classes}
    results = compare(arrays, np.arange(40) >= 24, seeds=2, steps=60, learning_rate=0.05)
    right = {name: result["right"].mean() for name, result in results.items()}
    assert results["bags, max"]["right"].shape == (2, 16)
    assert right["oracle: event windows"] > 0.95
    assert right["bags, linear_softmax"] > 0.9
    assert right["bags, attention"] > 0.7
    assert right["first window"] < 0.6
    assert right["bags, mean"] < 0.6


def test_hours(tmp_path, capsys):
    """A checkpoint, and models by their shape, in the same table; no export, which takes long."""
    checkpoint = tmp_path / "tiny"
    config = ASTConfig(
        hidden_size=16,
        num_attention_heads=1,
        num_hidden_layers=1,
        intermediate_size=16,
        num_mel_bins=32,
        max_length=998,
    )
    ASTForAudioClassification(config).save_pretrained(checkpoint)
    ASTFeatureExtractor(num_mel_bins=32, max_length=998).save_pretrained(checkpoint)
    path = tmp_path / "hours.json"
    arguments = [str(checkpoint), "--no_int8", "--no_stock", "--no_tagger", "--repeats=1"]
    benchmark(["hours", *arguments, f"--json={path}"])
    written = json.loads(path.read_text())
    names = [case["case"] for case in written["cases"]]
    assert names[:2] == ["tiny, exact, half hop", "tiny, exact, whole hop"]
    assert names[2].startswith("of these, decoding")
    for case in written["cases"]:
        rate = 3600 / (case["ms_per_min"] / 1000 * 60)
        assert written["hours_of_sound_per_hour"][case["case"]] == pytest.approx(rate, rel=0.5)
    assert "tiny, exact, half hop" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--models: expected such as tiny-64-16, got 'huge-1-2'"):
        benchmark(["hours", "--models", "huge-1-2"])


def test_the_tagger_has_the_shape_of_mobilenet():
    from scripts.benchmarks.hours import ConvolutionalTagger

    model = ConvolutionalTagger(width=1.0).eval()
    assert model(torch.zeros(2, 200, 64)).shape == (2, 527)
    # MobileNetV2 has 2.22 million parameters below its classifier, of 3 channels in.
    count = sum(p.numel() for name, p in model.named_parameters() if "head" not in name)
    assert count == pytest.approx(2.22e6, rel=0.01)


def test_detection(tmp_path, capsys):
    """Soundscapes are made, both models are trained and measured; a second call only measures."""
    for fold in (1, 5):
        write_parquet(tmp_path / "clips" / f"fold{fold}.parquet", 2, seed=fold, fold=fold)
    names = dict(enumerate(PITCHES))
    config = {**TINY_MODEL, "num_labels": len(names), "max_length": 64}
    tiny = ASTConfig(**config, id2label=names, label2id={n: i for i, n in names.items()})
    ASTForAudioClassification(tiny).save_pretrained(tmp_path / "model")
    ASTFeatureExtractor(num_mel_bins=64, max_length=64).save_pretrained(tmp_path / "model")
    path = tmp_path / "detection.json"
    words = ["detection", str(tmp_path / "clips"), f"--model={tmp_path / 'model'}", "--threads=1"]
    words += [f"--output={tmp_path / 'run'}", f"--json={path}", "--soundscape_s=2"]
    words += ["--mixtures_per_fold=2", "--windows_per_clip=2"]
    words += [f"--plot={tmp_path / 'onsets.png'}"]
    benchmark(words)
    table = capsys.readouterr().out
    run = tmp_path / "run" / "without_fold5"
    assert "fold 5 held out: 2 soundscapes of 2 s" in table
    assert "event F1" in table
    assert (tmp_path / "onsets.png").is_file()
    models = json.loads(path.read_text())["folds"]["5"]
    assert list(models) == ["frames", "windows"]
    windows = pq.read_table(run / "windows_of_soundscapes" / "windows.parquet").to_pylist()
    assert [row["fold"] for row in windows] == ["others"] * 4 + ["5"] * 2
    assert any(row["labels"] for row in windows)
    trained = (run / "frames" / "metrics.jsonl").read_text()
    benchmark([*words, "--models", "frames"])
    assert (run / "frames" / "metrics.jsonl").read_text() == trained
    benchmark([*words, "--trained=head", "--head_steps=2", "--evaluation_folds", "1", "5"])
    assert "fold 1, 5 in turn held out: 4 soundscapes of 2 s" in capsys.readouterr().out
    (models,) = json.loads(path.read_text())["folds"].values()
    assert models["frames"]["detection"]["events"] == models["windows"]["detection"]["events"]
    embedded = (tmp_path / "run" / "soundscapes.pt").read_bytes()
    benchmark([*words, "--trained=head", "--head_steps=2", "--evaluation_folds", "1", "5"])
    assert (tmp_path / "run" / "soundscapes.pt").read_bytes() == embedded
    torch.manual_seed(1)  # other weights of the same name are embedded anew
    ASTForAudioClassification(tiny).save_pretrained(tmp_path / "model")
    benchmark([*words, "--trained=head", "--head_steps=2", "--evaluation_folds", "1", "5"])
    assert (tmp_path / "run" / "soundscapes.pt").read_bytes() != embedded
    with pytest.raises(ValueError, match="holds a finished run with learning_rate"):
        benchmark([*words, "--models", "frames", "--learning_rate=0.5"])
    with pytest.raises(ValueError, match=r"soundscapes was made with soundscape_s 2\.0, now 3\.0"):
        benchmark([*words, "--soundscape_s=3"])
    with pytest.raises(
        ValueError, match="windows_of_soundscapes was made with windows_per_clip 2, now 3"
    ):
        benchmark([*words, "--models", "windows", "--windows_per_clip=3"])
