"""What a run chooses where the options do not say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import yaml
from transformers.utils import logging

from feature_extraction import ASTFeatureExtractor
from scripts.common.checkpoints import DEFAULT_MODEL, bundled_checkpoints
from scripts.training import with_accelerate, with_trainer
from scripts.training.choices import choices, choose, describe_choices
from scripts.training.options import FinetuneOptions
from scripts.training.start import open_data, start_model

from .conftest import TINY_RECIPE, tiny_model
from .sounds import PITCHES, tone
from .test_annotated import write_recordings


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Clips of 0.8 s, and one of 3 s."""
    folder = tmp_path_factory.mktemp("choices") / "sounds"
    for name, pitch in PITCHES.items():
        (folder / name).mkdir(parents=True)
        for number in range(22):
            is_long = (name, number) == ("mid", 21)
            clip = tone(pitch, seed=number, seconds=3.0 if is_long else 0.8)
            soundfile.write(folder / name / f"{number}.wav", clip, 16000)
    return folder


def test_the_start_is_in_the_box():
    assert DEFAULT_MODEL in bundled_checkpoints()


def test_small_data_short_clips(sounds):
    options = FinetuneOptions(dataset=str(sounds), model="scratch")
    chosen = choose(options, open_data(options))
    assert chosen.max_length == 80  # of most clips; the start would take 1024
    assert chosen.time_mask == 16
    assert chosen.num_epochs == 16
    assert chosen.batch_size * chosen.gradient_accumulation_steps == 8
    assert choose(options, open_data(options)) == chosen
    said = describe_choices(choices(options, chosen), chosen)
    assert "16 epochs; 8 clips in a step" in said
    assert "80 frames (0.80 s) at once" in said


def test_what_is_given_stays(sounds):
    given = {
        "max_length": 64, "num_epochs": 2, "batch_size": 3, "gradient_accumulation_steps": 2,
        "time_mask": 5, "frequency_mask": 0,
    }  # fmt: skip
    options = FinetuneOptions(dataset=str(sounds), model="scratch", **given)
    chosen = choose(options, open_data(options))
    assert chosen == options
    assert describe_choices(choices(options, chosen), chosen) == ""
    frozen = FinetuneOptions(dataset=str(sounds), model="scratch", trained="linear")
    assert choose(frozen, open_data(frozen)).time_mask == 0


def test_a_new_head_on_an_encoder_that_knows_sound_learns_faster(sounds, tmp_path):
    data = open_data(FinetuneOptions(dataset=str(sounds), model="scratch"))
    for labels, expected in ((["a", "b"], 2e-3), (data.label_names, None)):
        tiny_model(num_labels=len(labels), id2label=dict(enumerate(labels))).save_pretrained(
            tmp_path
        )
        ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(tmp_path)
        options = FinetuneOptions(dataset=str(sounds), model=str(tmp_path), learning_rate=2e-4)
        chosen = choose(options, data)
        assert chosen.head_learning_rate == expected
        said = describe_choices(choices(options, chosen), chosen)
        assert ("the new head learns at 0.002" in said) == (expected is not None)
        assert choose(replace(options, trained="head"), data).head_learning_rate is None
    given = replace(options, head_learning_rate=1e-3)
    assert choose(given, data).head_learning_rate == 1e-3


def test_large_models_and_many_clips_go_in_small_parts_and_few_epochs(sounds):
    options = FinetuneOptions(dataset=str(sounds), model="scratch", hidden_size=768, max_length=998)
    data = open_data(options)
    data.train_clips = 20_000
    chosen = choose(options, data)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == (1, 32)
    assert chosen.num_epochs == 3


def test_a_start_with_masks_keeps_its_length(sounds, tmp_path):
    """Batches are padded to their longest clip; positions need not be cut."""
    tiny_model().save_pretrained(tmp_path / "start")
    extractor = ASTFeatureExtractor(max_length=128, num_mel_bins=64, return_attention_mask=True)
    extractor.save_pretrained(tmp_path / "start")
    options = FinetuneOptions(dataset=str(sounds), model=str(tmp_path / "start"))
    chosen = choose(options, open_data(options))
    assert chosen.max_length is None
    assert chosen.time_mask == 80 // 5
    assert chosen.frequency_mask == 12


def test_a_new_head_is_nothing_to_warn_of(sounds, tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "start")
    ASTFeatureExtractor(max_length=128, num_mel_bins=64).save_pretrained(tmp_path / "start")
    options = FinetuneOptions(dataset=str(sounds), model=str(tmp_path / "start"))
    data = open_data(options)
    logging.enable_propagation()
    try:
        model, _ = start_model(options, data)
    finally:
        logging.disable_propagation()
    assert model.config.num_labels == 3
    assert not caplog.records


@pytest.mark.parametrize("door", [with_accelerate, with_trainer])
def test_a_run_says_what_it_chose_and_how_long_it_takes(door, sounds, tmp_path, capsys):
    left_out = ("batch_size", "max_length", "time_mask", "frequency_mask")
    tiny = {name: value for name, value in TINY_RECIPE.items() if name not in left_out}
    options = FinetuneOptions(
        **tiny, dataset=str(sounds), output=str(tmp_path / "run"), num_epochs=2
    )
    door.finetune(options)
    said = capsys.readouterr()
    assert "Chosen for these clips: 8 clips in a step; 80 frames" in said.out
    assert re.search(r"About \d+ s to go: \d+ steps, \d\.\d\d s each", said.out + said.err)
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert report["chosen"]["batch_size"] == 8
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert re.search(r"batch_size\W+8\b", card)
    with pytest.raises(ValueError, match="holds a finished run"):
        door.finetune(options)


def test_annotated_recordings_are_used_whole(tmp_path):
    recordings = write_recordings(tmp_path / "recordings")  # 8 of 3 s
    options = FinetuneOptions(
        dataset=str(recordings), annotations=str(recordings), model="scratch", max_length=100
    )
    data = open_data(options)
    data.train_clips = 240
    chosen = choose(options, data)
    assert chosen.windows_per_clip == 3
    assert chosen.batch_size * chosen.gradient_accumulation_steps == 8 // 3
    assert chosen.num_epochs == 4  # of 720 windows
    assert "3 windows of a longer clip" in describe_choices(choices(options, chosen), chosen)
    assert choose(replace(options, windows_per_clip=2), data).windows_per_clip == 2
    assert FinetuneOptions(dataset=str(recordings)).windows_per_clip == 1
