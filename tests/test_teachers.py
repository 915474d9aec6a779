"""Learning from a teacher: stored and online answers, what is mixed, the losses, the checkpoint."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoFeatureExtractor, Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor, AudioDecodingError
from modeling_ast import ASTForAudioClassification, ASTForAudioFrameClassification
from scripts import classify
from scripts.benchmark import benchmark
from scripts.benchmarks.agreement import agreement, groups_of
from scripts.common.bundled import read_label_names
from scripts.data.answers import FileAnswers, read_answers
from scripts.data.batches import Collator
from scripts.training import with_accelerate, with_trainer
from scripts.training.distil import Student, soft_loss
from scripts.training.options import FinetuneOptions
from scripts.training.start import keep_old_head, open_data
from scripts.training.steps import parts_of, training_loss
from scripts.training.teachers import OnlineTeacher, Teacher

from .conftest import TINY_RECIPE, tiny_model
from .sounds import PITCHES, TEACHERS_LABELS, encode, tone, write_answers, write_class_folders

DOORS = (with_accelerate, with_trainer)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("teachers") / "sounds", 8)


@pytest.fixture(scope="module")
def answers(sounds) -> str:
    return write_answers(sounds.parent / "answers.parquet", sounds)


def run(door, dataset, output, **settings) -> Path:
    args = {**TINY_RECIPE, "num_epochs": 2, "dataset": str(dataset), "output": str(output)}
    door.finetune(FinetuneOptions(**{**args, **settings}))
    return output / "checkpoint"


# Stored answers


def test_the_answer_to_a_crop_is_that_of_the_stretches_it_lies_in(tmp_path):
    table = {
        "file": ["birds/a.wav"] * 2 + ["birds/b.wav"],
        "offset": [0.0, 10.0, 0.0],
        "length": [10.0, 10.0, 3.0],
        "logits": [np.full(2, value, np.float16).tobytes() for value in (20.0, -20.0, 0.0)],
        "embedding": [[1.0], [5.0], [9.0]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "answers.parquet")
    stored = read_answers([str(tmp_path / "answers.parquet")])
    assert (stored.num_labels, stored.embedding_size) == (2, 1)
    row = {"name": "/elsewhere/birds/a.wav"}
    for span, expected in (
        ((0.0, 10.0), [1.0, 1.0, 1.0]),
        ((12.0, 13.0), [0.0, 0.0, 5.0]),
        ((8.0, 12.0), [0.5, 0.5, 3.0]),
        ((9.0, 12.0), [1 / 3, 1 / 3, 1 / 3 * 1 + 2 / 3 * 5]),
    ):
        torch.testing.assert_close(stored(row, [span]), torch.tensor(expected), atol=1e-6, rtol=0)
    both = stored(row, [(0.0, 1.0), (15.0, 16.0)])
    assert both.tolist() == pytest.approx([0.5, 0.5, 3.0])
    assert stored({"name": "b"}, [(0.0, 1.0)]).tolist() == [0.5, 0.5, 9.0]
    with pytest.raises(AudioDecodingError, match=r"have none to 30\.00 to 31\.00 s"):
        stored(row, [(30.0, 31.0)])
    with pytest.raises(AudioDecodingError, match="no such sound"):
        stored({"name": "birds/c.wav"}, [(0.0, 1.0)])


def test_a_name_that_two_sounds_share_is_none(tmp_path):
    table = {"sound": ["one/a.wav", "two/a.wav"], "logits": [[1.0], [2.0]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "answers.parquet")
    stored = read_answers([str(tmp_path / "answers.parquet")])
    assert not stored.knows({"name": "three/a.wav"})
    assert stored.knows({"name": "/here/two/a.wav"})


def test_temperature_softens():
    stored = FileAnswers(1, 0, logits=np.array([[4.0]]), spans=np.array([[0.0, 9.0]]))
    stored.rows, stored.embeddings = {"a": [0]}, np.empty((1, 0))
    for temperature in (1.0, 2.0, 8.0):
        stored.temperature = temperature
        expected = 1 / (1 + np.exp(-4 / temperature))
        assert stored({"name": "a"}, [(0.0, 1.0)]).item() == pytest.approx(expected, abs=1e-6)


def test_answers_are_mixed_as_labels_are():
    """Where the answer is the label, it stays so in every mixture."""
    logits = np.where(np.eye(3), 30.0, -30.0)
    stored = FileAnswers(3, 3, logits=logits, embeddings=10 * np.eye(3))
    stored.spans, stored.rows = np.array([[0.0, np.inf]] * 3), {str(i): [i] for i in range(3)}
    extractor = ASTFeatureExtractor(max_length=64, num_mel_bins=32)  # whole clips
    collator = Collator(extractor, 3, mixup_rate=0.7, answers=stored, keeps_waveforms=True)
    rows = [
        {"audio": {"bytes": encode(tone(pitch, seed=label))}, "label": label, "name": str(label)}
        for label, pitch in enumerate(PITCHES.values())
    ]
    batch = collator(rows * 8)
    assert (batch["labels"].max(dim=1).values < 0.99).any()
    torch.testing.assert_close(batch["teacher_targets"], batch["labels"])
    torch.testing.assert_close(batch["teacher_embeddings"], 10 * batch["labels"])
    # The keys of crops that were mixed tell nothing.
    is_mixed = batch["labels"].max(dim=1).values < 1
    assert (batch["teacher_keys"][is_mixed & (batch["labels"] > 0).sum(dim=1).gt(1)] == -1).all()
    assert len(set(batch["teacher_keys"][~is_mixed].tolist()) - {-1}) <= 3


# Losses


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_soft_loss_is_least_where_student_and_teacher_agree(activation):
    logits = torch.randn(4, 3)
    targets = (logits / 2).sigmoid() if activation == "sigmoid" else (logits / 2).softmax(dim=-1)
    least = soft_loss(logits, targets, activation, 2.0)
    assert least.shape == (4,)
    for _ in range(5):
        other = soft_loss(logits + 0.3 * torch.randn(4, 3), targets, activation, 2.0)
        assert (other > least).all()


@pytest.mark.parametrize("hard", ["single_label_classification", "multi_label_classification"])
def test_soft_targets_weigh_as_much_as_hard_ones(hard):
    """However many labels the teacher has: each counts like one of the student's own."""
    is_multi_label = hard == "multi_label_classification"
    losses = []
    for number in (5, 10):
        teacher = Teacher([f"teacher's {label}" for label in range(number)], "sigmoid", 0)
        options = FinetuneOptions(teacher=["x"], teacher_share=1.0)
        student = Student(tiny_model(problem_type=hard), teacher, options, None).eval()
        for weight in student.teacher_head.parameters():
            nn.init.zeros_(weight)  # every score is a half
        labels = torch.zeros(2, 5) if is_multi_label else torch.zeros(2, dtype=torch.long)
        batch = {
            "input_values": torch.randn(2, 32, 64),
            "labels": labels,
            "teacher_targets": torch.zeros(2, number),
        }
        loss = training_loss(student, batch, "mean", labels.numel())
        losses.append(loss.item() / math.log(2))
    assert losses == pytest.approx([1, 2] if is_multi_label else [5, 10])


def test_the_teachers_head_begins_where_the_start_ended(tmp_path):
    start = tiny_model(num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    start.save_pretrained(tmp_path)
    options = FinetuneOptions(teacher=["x"], model=str(tmp_path))
    teacher = Teacher(["z", "x", "y"], "sigmoid", 0)
    ast = tiny_model(num_labels=2, problem_type="single_label_classification")
    ast.audio_spectrogram_transformer = start.audio_spectrogram_transformer
    student = Student(ast, teacher, options, None).eval()
    sound = torch.randn(2, 32, 64)
    # Without that, no label is likely.
    assert student(sound).teacher_logits.sigmoid().mean() < 0.1
    assert keep_old_head(student, options)
    torch.testing.assert_close(student(sound).teacher_logits, start(sound).logits[:, [2, 0, 1]])
    others = Teacher(["z", "x", "w"], "sigmoid", 0)
    assert not keep_old_head(Student(ast, others, options, None), options)
    ASTForAudioFrameClassification.from_classifier(start).save_pretrained(tmp_path / "frames")
    frames = FinetuneOptions(teacher=["x"], model=str(tmp_path / "frames"))
    assert not keep_old_head(student, frames)  # a detector's head is of another kind


@pytest.mark.parametrize("bags", [False, True])
def test_the_losses_of_parts_add_up(bags):
    ast = tiny_model(problem_type="single_label_classification")
    teacher = Teacher(["a", "b"], "sigmoid", 3)
    options = FinetuneOptions(teacher=["x"], teacher_share=0.4, embedding_weight=2.0)
    student = Student(ast, teacher, options, (torch.zeros(3), torch.ones(3))).eval()
    batch = {
        "input_values": torch.randn(6, 2, 32, 64) if bags else torch.randn(6, 32, 64),
        "labels": torch.tensor([0, 1, 2, 3, 4, 0]),
        "teacher_targets": torch.rand(6, 2),
        "teacher_embeddings": torch.randn(6, 3),
    }
    if bags:
        batch["window_weights"] = torch.tensor([[1.0, 0.5]] * 3 + [[1.0, 0.0]] * 3)
    whole = training_loss(student, batch, "mean", 6)
    parts = [training_loss(student, part, "mean", 6) for part in parts_of(batch, 4)]
    torch.testing.assert_close(sum(parts), whole)
    hard = FinetuneOptions(teacher=["x"], teacher_share=0.0)
    alone = training_loss(Student(ast, teacher, hard, None).eval(), batch, "mean", 6)
    if not bags:
        expected = ast(input_values=batch["input_values"], labels=batch["labels"]).loss
        torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize(
    ("names", "activation", "share"),
    [
        (None, "softmax", 0.5),
        (["a", "b"], "softmax", 0.5),
        (["a", "b"], "sigmoid", 0.1),
        ([], "sigmoid", 0.0),
    ],
)
def test_share_by_the_teachers_labels(names, activation, share):
    """The sum over independent labels outweighs the hard labels' cross-entropy."""
    ast = tiny_model(problem_type="single_label_classification")
    own = [ast.config.id2label[index] for index in range(ast.config.num_labels)]
    teacher = Teacher(own if names is None else names, activation, 3)
    options = FinetuneOptions(teacher=["x"])
    student = Student(ast, teacher, options, (torch.zeros(3), torch.ones(3)))
    assert student.lesson.share == share


# Runs


def test_both_doors_learn_the_same_from_stored_answers(sounds, answers, tmp_path, capsys):
    settings = {
        "teacher": [answers], "mixup_rate": 0.5, "batch_size": 4, "ema_decay": 0.5,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    found = [run(door, sounds, tmp_path / door.__name__, **settings) for door in DOORS]
    first, second = (load_file(folder / "model.safetensors") for folder in found)
    assert "2 labels through a head of its own, share 0.1; embeddings of 2" in (
        capsys.readouterr().out
    )
    for name, weight in first.items():
        if "key.bias" not in name:  # its gradient is 0 up to rounding, which Adam blows up
            torch.testing.assert_close(second[name], weight, atol=1e-5, rtol=1e-4)
    # What only the teacher needed is gone.
    model, info = native.ASTForAudioClassification.from_pretrained(
        found[0], output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(model.config.id2label.values()) == set(PITCHES)
    alone = load_file(run(with_accelerate, sounds, tmp_path / "alone") / "model.safetensors")
    assert not torch.allclose(alone["classifier.dense.weight"], first["classifier.dense.weight"])


@pytest.mark.parametrize(("trained", "num_epochs"), [("all", 6), ("lora", 1)])
def test_the_teachers_head_can_be_the_checkpoints(trained, num_epochs, sounds, answers, tmp_path):
    settings = {"teacher": [answers], "keep_teacher_head": True, "trained": trained}
    checkpoint = run(
        with_accelerate, sounds, tmp_path / "run", num_epochs=num_epochs, batch_size=4, **settings
    )
    model = ASTForAudioClassification.from_pretrained(checkpoint).eval()
    assert list(model.config.id2label.values()) == TEACHERS_LABELS
    assert model.config.problem_type == "multi_label_classification"
    if trained == "all":
        extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
        inputs = extractor(
            [tone(PITCHES[name], seed=50) for name in ("high", "low")],
            sampling_rate=16000,
            return_tensors="pt",
        )
        high, low = model(**inputs).logits
        assert high[0] > low[0]
        assert high[1] < low[1]


@pytest.fixture(scope="module")
def model(sounds, tmp_path_factory) -> str:
    return str(run(with_accelerate, sounds, tmp_path_factory.mktemp("model") / "run"))


def test_sound_without_labels_is_learnt_from_a_model(sounds, model, tmp_path, capsys):
    """A folder of sounds and nothing else."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for file in sounds.rglob("*.flac"):
        (folder / file.name).write_bytes(file.read_bytes())
    for door in DOORS:
        output = tmp_path / door.__name__
        student = run(door, folder, output, teacher=[model], mixup_rate=0.3)
        out = capsys.readouterr().out
        assert "clips without labels to train on" in out
        assert "3 labels through the same head, share 1; embeddings of 32" in out
        lines = (output / "metrics.jsonl").read_text().splitlines()
        first, last = (json.loads(line) for line in lines)
        assert last["train_loss"] < first["train_loss"]
        # What the teacher says is what is evaluated.
        assert 0 <= last["evaluation_accuracy"] <= 1
        config = ASTForAudioClassification.from_pretrained(student).config
        assert set(config.id2label.values()) == set(PITCHES)


def test_other_answers_are_another_run(sounds, tmp_path):
    file = write_answers(tmp_path / "answers.parquet", sounds)
    options = FinetuneOptions(dataset=str(sounds), teacher=[file])
    before = open_data(options).fingerprint
    assert open_data(options).fingerprint.digest == before.digest
    write_answers(tmp_path / "answers.parquet", sounds, names=False)
    (difference,) = open_data(options).fingerprint.differences(before.to_json() | {})
    assert difference.startswith(f"{file} ")


def test_labels_without_names_cannot_be_a_checkpoints(sounds, tmp_path):
    nameless = write_answers(tmp_path / "nameless.parquet", sounds, names=False)
    with pytest.raises(ValueError, match="name them"):
        run(with_accelerate, sounds, tmp_path / "x", teacher=[nameless], label_column="")


def test_cached_answers_are_the_same(model):
    teacher = OnlineTeacher(model, CPU)
    clips = [tone(pitch, seed=seed) for seed, pitch in enumerate(PITCHES.values())]
    batch = {
        "input_values": torch.zeros(3, 1),
        "teacher_waveforms": torch.from_numpy(np.stack(clips)),
        "teacher_samples": torch.tensor([8000, 8000, 7000]),
        "teacher_keys": torch.tensor([1, 2, -1]),
    }
    names = teacher.label_names
    cache: dict[int, torch.Tensor] = {}
    plain = Teacher(names, "softmax", teacher.embedding_size, online=(teacher,))
    cached = Teacher(names, "softmax", teacher.embedding_size, online=(teacher,), cache=cache)
    expected = plain.with_answers(batch, 16000)
    assert expected["teacher_targets"].sum(dim=1).tolist() == pytest.approx([1.0] * 3)
    for _ in range(2):
        found = cached.with_answers(batch, 16000)
        assert set(found) == {"input_values", "teacher_targets", "teacher_embeddings"}
        torch.testing.assert_close(found["teacher_targets"], expected["teacher_targets"])
        torch.testing.assert_close(found["teacher_embeddings"], expected["teacher_embeddings"])
        assert set(cache) == {1, 2}


def test_online_teachers_of_other_models_and_ensembles(tmp_path):
    """A Wav2Vec2 is asked as `transformers` asks it; two teachers answer with their mean."""
    names = ["a", "b", "c"]
    for seed, order in ((0, names), (1, names[::-1])):
        torch.manual_seed(seed)
        config = Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            conv_dim=[8] * 2, conv_stride=[10] * 2, conv_kernel=[10] * 2, classifier_proj_size=12,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
            id2label=dict(enumerate(order)), label2id={name: i for i, name in enumerate(order)},
        )  # fmt: skip
        Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / str(seed))
        extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}
        text = json.dumps({**extractor, "do_normalize": True, "feature_size": 1})
        (tmp_path / str(seed) / "preprocessor_config.json").write_text(text)
    teachers = tuple(OnlineTeacher(str(tmp_path / str(seed)), CPU) for seed in (0, 1))
    clips = [tone(440.0, 0), tone(880.0, 1, seconds=0.3)]
    expected = torch.zeros(2, 3)
    for seed, teacher in enumerate(teachers):
        assert teacher.embedding_size == 12
        features = AutoFeatureExtractor.from_pretrained(tmp_path / str(seed))
        targets, embeddings = teacher.answer(clips, 16000, 1.0)
        assert embeddings.shape == (2, 12)
        for number, clip in enumerate(clips):
            inputs = features(clip, sampling_rate=16000, return_tensors="pt")
            scores = teacher.pipeline.model(**inputs).logits.softmax(dim=-1)[0]
            torch.testing.assert_close(targets[number], scores.detach())
            in_order = scores.detach()[[teacher.label_names.index(name) for name in names]]
            expected[number] += in_order / 2
    both = Teacher(names, "softmax", 24, online=teachers)
    batch = {
        "input_values": torch.zeros(2, 1),
        "teacher_waveforms": torch.from_numpy(np.stack([clips[0], np.pad(clips[1], (0, 3200))])),
        "teacher_samples": torch.tensor([8000, 4800]),
        "teacher_keys": torch.tensor([-1, -1]),
    }
    found = both.with_answers(batch, 16000)
    torch.testing.assert_close(found["teacher_targets"], expected)
    assert found["teacher_embeddings"].shape == (2, 24)


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": ["a"], "annotations": "x"}, "train a classifier with the teacher first"),
        ({"teacher": ["a"], "teacher_column": "logits"}, "either --teacher or the columns"),
        ({"keep_teacher_head": True}, "needs --teacher"),
        ({"teacher": ["a"], "teacher_share": 1.5}, "from 0 to 1, got 1.5"),
        ({"teacher": ["a"], "teacher_temperature": 0}, "above 0"),
    ],
)
def test_options_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**settings)


def test_teachers_that_do_not_fit(sounds, answers, tmp_path):
    table = pyarrow.table({"sound": ["a", "b"], "logits": [[1.0], [2.0]]})
    pyarrow.parquet.write_table(table, tmp_path / "others.parquet")
    for settings, message in (
        ({"teacher": [str(tmp_path / "none.parquet")]}, "No such file of a teacher's answers"),
        ({"teacher": [str(tmp_path / "others.parquet")]}, "--teacher_key names a column"),
        ({"teacher": [answers, "ast-tiny-esc10"]}, "files of answers or models, not both"),
        ({"teacher": [answers], "teacher_labels": "audioset"}, "2 numbers, but there are 527"),
        ({"teacher_column": "logit"}, "no column 'logit'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(with_accelerate, sounds, tmp_path / "run", **settings)


# Agreement


def test_agreement_by_hand():
    """Four clips, two labels: the student ranks one label right and the other wrong."""
    teacher = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.7], [0.3, 0.4]])
    student = np.array([[0.9, 0.3], [0.7, 0.2], [0.2, 0.1], [0.6, 0.1]])
    found = agreement(student, teacher, ["a", "b"], 0.5)
    # b: true of one clip, which shares the last two of four ranks: precision 1 / 4.
    expected = {"clips": 4, "labels": 2, "mean_average_precision": (1 + 1 / 4) / 2, "top_1": 0.5}
    assert found == {"all": pytest.approx(expected), "all labels": pytest.approx(expected)}


def test_groups_of_audiosets_labels():
    names = read_label_names("audioset")
    groups = groups_of(names)
    assert sorted(index for indices in groups.values() for index in indices) == list(range(527))
    for label, group in (
        ("Sneeze", "human sounds"), ("Purr", "animals"), ("Violin, fiddle", "music"),
        ("Rain on surface", "natural sounds"), ("Chainsaw", "sounds of things"),
        ("Rustle", "source-ambiguous sounds"), ("White noise", "environment and background"),
    ):  # fmt: skip
        assert names.index(label) in groups[group]


def test_a_student_that_is_its_own_teacher_agrees(sounds, model, tmp_path, capsys):
    output = tmp_path / "answers"
    with pytest.raises(SystemExit):
        classify.main([str(sounds), "--model", model, "--output", str(output), "--logits"])
    answers = str(output / "answers.parquet")
    result = tmp_path / "agreement.json"
    options = ["--teacher", answers, "--threshold", "0.34", "--json", str(result)]
    benchmark(["agreement", model, str(sounds), *options])
    assert re.search(r"all  .* 24 .* 1\.000 +100\.0%", capsys.readouterr().out)
    found = json.loads(result.read_text())["agreement"]["all"]
    assert (found["mean_average_precision"], found["top_1"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="they must be the same"):
        benchmark(["agreement", "ast-tiny-esc10", str(sounds), "--teacher", answers])
