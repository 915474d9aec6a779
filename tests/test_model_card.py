"""Model cards: numbers from the run's files, metadata by the Hub's rules, nothing that leaks."""

import ast
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification
from scripts.common.bundled import read_label_names
from scripts.publishing.cards import check_card, find_source, wilson_interval, write_model_card

from .conftest import tiny_model

ESC10 = ["dog_bark", "rooster", "rain", "sea_waves", "fire_crackling"]
EVALUATION = {
    "dataset": "esc10",
    "fold": "5",
    "clips": 80,
    "split": "train",
    "metrics": {
        "accuracy": {"value": 0.9375, "low": 0.8619, "high": 0.973},
        "macro_f1": {"value": 0.98125, "low": 0.95, "high": 0.99},
        "d_prime": {"value": None, "low": None, "high": None},
    },
    "per_class": [
        {"label": name, "positives": 8, "recall": 1 / 3, "roc_auc": None} for name in ESC10
    ],
}


@pytest.fixture
def run(tmp_path):
    """A run folder, as after training and evaluation."""
    names = {"id2label": dict(enumerate(ESC10)), "label2id": {n: i for i, n in enumerate(ESC10)}}
    folder = tmp_path / "esc10_fold5"
    tiny_model(**names).save_pretrained(folder / "checkpoint")
    ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(folder / "checkpoint")
    arguments = {
        "dataset": "/home/someone/secret/esc10",
        "model": "/home/someone/secret/deit_tiny_imagenet",
        "output_dir": "/home/someone/secret/runs",
        "hub_token": "hf_averysecrettoken",
        "evaluation_fold": "5",
        "learning_rate": 1e-4,
        "num_epochs": 16,
        "mixup_rate": 0.0,
        "seed": 0,
    }
    (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    records = [
        {"epoch": n, "evaluation_accuracy": 0.5 + n / 4, "evaluation_clips": 80, "seconds": 90 * n}
        for n in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "evaluation").mkdir()
    for name in ("learning_curve.png", "evaluation/confusion_matrix.png"):
        (folder / name).write_bytes(b"\x89PNG")
    return folder


def card_of(run, **arguments) -> tuple[str, dict]:
    text = write_model_card(run, run / "checkpoint", **arguments).read_text()
    return text, yaml.safe_load(text.split("---\n")[1])


def test_everything_a_card_must_say(run):
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    report = {"machine": {"gpu": None, "threads": 2, "processes": 1}}
    (run / "report.yaml").write_text(yaml.safe_dump(report))
    text, metadata = card_of(run, repo_id="someone/esc10")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "audio-classification"
    assert metadata["license"] == "apache-2.0"  # the start weights'
    assert metadata["base_model"] == "facebook/deit-tiny-patch16-224"
    assert metadata["datasets"] == ["ashraq/esc50"]
    (result,) = ModelCard(text).data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9375)
    assert result.metric_args == {"low": 0.8619, "high": 0.973, "confidence": 0.95}
    assert (result.dataset_name, result.dataset_split) == ("ESC-10", "5")
    for part in (
        "| accuracy | 0.9375 | 0.8619 to 0.9730 |",
        "| macro f1 | 0.9812 | 0.9500 to 0.9900 |",
        "| sea\\_waves | 8 | 0.333 | – |",
        "DeiT-Tiny on ImageNet-1k](https://github.com/facebookresearch/deit), licence apache-2.0",
        "licence cc-by-3.0. 400 clips of 5 s",
        "| learning_rate | 0.0001 |\n| seed | 0 |",
        "2 epoch(s) took 3.0 minutes on 1 x 2 CPU threads",
        "On ESC-10, fold 5, 80 clips:",
        "Energy: not measured",
        "dog\\_bark, rooster, rain, sea\\_waves, fire\\_crackling",
        "## Limits and biases",
        "@inproceedings{gong21b_interspeech",
        "@inproceedings{piczak2015esc",
    ):
        assert part in text, part
    assert text.count("```python\n") == 3
    assert text.count('name = "someone/esc10"') == 3
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (run / "checkpoint" / picture).is_file()
    assert {"learning_curve.png", "evaluation_confusion_matrix.png"} <= set(
        re.findall(r"\((\w+\.png)\)", text)
    )


def test_a_card_tells_nothing_about_the_machine(run):
    text, _ = card_of(run)
    for secret in ("hf_averysecrettoken", "/home", "someone", str(run.parent)):
        assert secret not in text


def test_before_an_evaluation_the_last_epoch_counts(run):
    text, metadata = card_of(run)
    (metric,) = metadata["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 1.0
    assert metric["args"]["low"] == pytest.approx(0.9542, abs=1e-4)  # Wilson, 80 of 80
    assert "On ESC-10, held-out fold 5, at the end of training, 80 clips:" in text
    (run / "report.yaml").write_text(
        yaml.safe_dump({"result": {"epoch": 1, "evaluation_mean_average_precision": 0.25}})
    )
    text, metadata = card_of(run)  # the best epoch's, where that is the result
    (metric,) = metadata["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("mean_average_precision", 0.25)
    (run / "report.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    text, metadata = card_of(run)
    assert "model-index" not in metadata
    assert "Not evaluated." in text
    assert "Not recorded." in text


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval_as_published(right, count, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=6e-5)


def test_multi_label_models_get_a_sigmoid(run):
    model = ASTForAudioClassification.from_pretrained(run / "checkpoint")
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(run / "checkpoint")
    text, _ = card_of(run)
    assert text.count(".sigmoid()") == 2
    assert "softmax" not in text


def test_a_folder_of_the_same_name_is_not_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_source("data", "./esc10", ESC10)["license"] == "cc-by-3.0"
    assert find_source("data", "./esc10", ["cat", "my cat"]) == {"name": "esc10"}
    assert find_source("data", "someone/sounds") == {
        "name": "someone/sounds",
        "hub": "someone/sounds",
    }
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "README.md").write_text(
        "---\nlicense: cc0-1.0\npretty_name: My Sounds\n---\n# My Sounds\n"
    )
    found = find_source("data", "sounds", ["a"])
    assert found == {"name": "My Sounds", "license": "cc0-1.0"}
    assert find_source("weights", "/home/me/runs/dogs/checkpoint") == {"name": "dogs"}
    published = find_source("weights", "MIT/ast-finetuned-audioset-10-10-0.4593")
    assert published["license"] == "bsd-3-clause"


def test_label_names_are_text_in_a_card(run):
    model = tiny_model(num_labels=2)
    model.config.id2label = {0: "![x](http://tracker)", 1: "<script>a|b</script>: 'c' \"---\""}
    model.save_pretrained(run / "checkpoint")
    text, _ = card_of(run)
    assert "!\\[x\\](http://tracker)" in text.replace("\\!", "!")
    assert "<script>" not in text


HOSTILE = "](x) <img src=http://tracker>\n\n# New title\n| cell |\x1b[31m"


def test_names_from_anywhere_are_text_in_a_card(run, tmp_path):
    """Names of a dataset, its licence, a fold, a split and the run itself."""
    evaluation = {**EVALUATION, "dataset": HOSTILE, "fold": HOSTILE}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    data = tmp_path / "data"
    data.mkdir()
    card = {"pretty_name": HOSTILE, "license": HOSTILE}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    arguments = yaml.safe_load((run / "arguments.yaml").read_text())
    arguments |= {"dataset": str(data), "loss": HOSTILE, "mixed_precision": HOSTILE}
    (run / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    text, _ = card_of(run, repo_id='me/x"); import os  # \n')
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in text
    assert "<img" not in body.replace("\\<", "")
    assert "\n# New title" not in body
    assert "| cell" not in body.replace("\\|", "")
    for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        names = [
            node.value.value
            for node in ast.parse(code).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "name"
        ]
        assert names == ['me/x"); import os  # \n']
    (run / "evaluation" / "evaluation.json").unlink()
    assert "\n# New title" not in card_of(run)[0].split("---\n", 2)[2]


def test_a_card_speaks_of_code_only_where_there_is_some(run):
    assert "trust_remote_code" in card_of(run)[0]
    (run / "checkpoint" / "modeling_ast.py").unlink()
    assert "trust_remote_code" not in card_of(run)[0]


@pytest.mark.parametrize(
    ("line", "replacement", "problem"),
    [
        (
            "license: apache-2.0",
            "license: Apache 2",
            "'Apache 2' is not one of the Hub's identifiers",
        ),
        ("license: apache-2.0", "license: other", "'other' needs a license_name"),
        ("library_name: transformers", "", "library_name must be 'transformers', got None"),
        ("- ashraq/esc50", "- /data/esc50", "datasets must be names on the Hub"),
        ("base_model: f", "base_model: a/b/f", "base_model must be names on the Hub"),
        ("pipeline_tag: audio", "pipeline_tag: sound", "got 'sound-classification'"),
        ("value: 1.0", "value: '1,0'", "'1,0' is not a number"),
        ("      name: ESC-10", "", "model-index is incomplete: KeyError('name')"),
        ("tags:", "tags: [", "is not valid YAML"),
        ("---\nbase", "--\nbase", "has no metadata"),
    ],
)
def test_what_the_hub_would_refuse_is_noticed_before(run, line, replacement, problem):
    text, _ = card_of(run)
    check_card(text)
    assert line in text
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_card(text.replace(line, replacement, 1))


def test_bundled_sources_name_bundled_labels_and_known_licences():
    for name in ("audioset", "esc10", "esc50", "speech_commands_v2"):
        labels = ESC10 if name == "esc10" else read_label_names(name)
        source = find_source("data", name, labels[:2])
        assert {"name", "license", "url", "about", "limits", "hub"} <= set(source)


def test_parameters_are_counted(run):
    text, _ = card_of(run)
    model = ASTForAudioClassification.from_pretrained(run / "checkpoint")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters" in text
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    assert model.config.num_encoder_parameters == count - head
    assert torch.is_tensor(model.classifier.dense.weight)
