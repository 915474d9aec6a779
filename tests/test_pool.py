"""The pool of sound: what gets in, with which licence, the same every time, whole or not at all."""

import io
import re
import zipfile

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import yaml

from scripts.build_pool import main
from scripts.data.options import PoolOptions
from scripts.data.pool import build_pool, checksum, read_pool_list, sound_files
from scripts.data.sources import open_stream

from .sounds import tone

KINDS = {
    "speech": {"windows_per_file": 3, "minutes": 4, "path": "voice"},
    "music": {"windows_per_file": 2, "minutes": 4, "path": "music"},
    "effect": {"windows_per_file": 24, "minutes": 60},
}


def encoded(sound, rate=16000, file_format="WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.rint(sound * 32767).astype(np.int16), rate, format=file_format)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two sources and one that is held out, as they come unpacked."""
    files = {
        "farm/sounds/hen.wav": encoded(tone(400.0, 0, 1.0)),
        "farm/sounds/hen_again.wav": encoded(tone(400.0, 0, 1.0)),  # the same file
        "farm/sounds/hen.flac": encoded(tone(400.0, 0, 1.0), file_format="FLAC"),  # the same sound
        "farm/sounds/silence.wav": encoded(np.zeros(16000)),
        "farm/sounds/click.wav": encoded(tone(400.0, 1, 0.1)),
        "farm/sounds/broken.ogg": b"OggS and no more",
        "farm/ESC-50/1-100032-A-0.wav": encoded(tone(500.0, 2, 1.0)),
        "farm/music/song.wav": encoded(tone(600.0, 3, 41.0)),
        "farm/readme.txt": b"hello",
        "town/horn.wav": encoded(np.stack([tone(700.0, 4, 12.0)] * 2, 1), 44100),
        "town/test/bell.wav": encoded(tone(800.0, 5, 2.0)),  # as in the one that is held out
        "town/private/bell.wav": encoded(tone(900.0, 6, 2.0)),
        "unheard/bell.wav": encoded(tone(800.0, 5, 2.0)),
    }
    for name, content in files.items():
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with zipfile.ZipFile(tmp_path / "sources/town/data.pk3", "w") as archive:
        archive.writestr("snd/door.ogg", encoded(tone(1000.0, 7, 2.0), file_format="OGG"))
    return tmp_path


def list_of(folder, **changes) -> str:
    sources = [
        {"name": "farm", "origin": "Debian farm", "version": "1-1", "licence": "CC0", **changes},
        {
            "name": "town", "origin": "GitHub x/town", "version": "abc", "licence": "CC BY 4.0",
            "author": "Ann", "exclude": "^private/",
        },
        {
            "name": "unheard", "origin": "Debian unheard", "version": "2", "licence": "GPL-2",
            "held_out": True,
        },
    ]  # fmt: skip
    path = folder / "list.yaml"
    content = {"exclude": "esc-?50", "kinds": KINDS, "sources": sources}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def build(folder, **changes) -> str:
    sources, output = str(folder / "sources"), str(folder / "pool")
    return build_pool(PoolOptions(sources, output, list_of(folder, **changes)))


def rows_of(folder, name) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "pool" / f"{name}.parquet").to_pylist()


def test_pool_holds_each_good_sound_once_with_its_licence(folder):
    text = build(folder)
    rows = rows_of(folder, "train-farm")
    first = {row["file"] for row in rows if row["kind"] == "effect"}
    assert len(first) == 1
    assert first < {"sounds/hen.wav", "sounds/hen_again.wav", "sounds/hen.flac"}
    # Of 41 s of music two windows, neither the first nor the last.
    assert [row["offset"] for row in rows if row["kind"] == "music"] == [10.0, 30.0]
    rows = {(row["file"], row["offset"]): row for row in rows_of(folder, "train-town")}
    assert set(rows) == {("horn.wav", 0.0), ("data.pk3!snd/door.ogg", 0.0)}
    horn = rows["horn.wav", 0.0]
    assert (horn["licence"], horn["author"], horn["original_rate"]) == ("CC BY 4.0", "Ann", 44100)
    sound, rate = soundfile.read(io.BytesIO(horn["audio"]["bytes"]))
    assert (rate, sound.ndim) == (32000, 1)
    assert len(sound) / rate == horn["length"] == pytest.approx(12 * 16000 / 44100, abs=1e-4)
    assert [row["file"] for row in rows_of(folder, "test-unheard")] == ["bell.wav"]
    assert "| town | GitHub x/town abc | 2 | 0.00 | CC BY 4.0 | Ann |" in text
    assert "| unheard (held out) | Debian unheard 2 | 1 |" in text
    assert (folder / "pool/README.md").read_text() == text


def test_pool_is_a_dataset_of_which_the_held_out_part_is_the_test_split(folder):
    build(folder)
    sources = {
        split: {row["source"] for row in open_stream(str(folder / "pool"), split)}
        for split in ("train", "test")
    }
    assert sources == {"train": {"farm", "town"}, "test": {"unheard"}}


def test_finished_sources_are_kept_and_follow_the_list(folder):
    build(folder)
    files = sorted((folder / "pool").glob("*.parquet"))
    times = [file.stat().st_mtime_ns for file in files]
    build(folder)
    assert [file.stat().st_mtime_ns for file in files] == times
    build(folder, licence="CC BY 3.0")
    assert {row["licence"] for row in rows_of(folder, "train-farm")} == {"CC BY 3.0"}


def test_interrupted_build_goes_on_to_the_same_pool(folder, monkeypatch):
    build(folder)
    expected = rows_of(folder, "train-town")
    (folder / "pool/train-town.parquet").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("scripts.data.pool.load_audio", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(folder)
    assert {file.name for file in (folder / "pool").iterdir()} == {
        "README.md", "test-unheard.parquet", "train-farm.parquet",
    }  # fmt: skip
    build(folder)
    assert rows_of(folder, "train-town") == expected


def test_other_sounds_than_the_lists_are_refused(folder):
    source = read_pool_list(list_of(folder)).sources[1]
    digest = checksum(sound_files(folder / "sources/farm", source, "esc-?50"))
    (folder / "sources/farm/readme.txt").write_text("no sound")
    build(folder, sha256=digest)
    (folder / "sources/farm/sounds/hen.wav").write_bytes(encoded(tone(401.0, 8, 1.0)))
    build(folder, sha256=digest)  # it was right when it was read
    (folder / "pool/train-farm.parquet").unlink()
    with pytest.raises(ValueError, match=rf"checksum \w+, not {digest}.*Get Debian farm 1-1"):
        build(folder, sha256=digest)
    assert not (folder / "pool/train-farm.parquet").exists()


def test_missing_sources_are_named_or_left_out(folder, capsys):
    (folder / "sources/town").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="lacks 1 of 3 sources: town"):
        build(folder)
    words = [str(folder / "sources"), "--list", list_of(folder), "--output", str(folder / "pool")]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--skip_missing", "true"])
    assert "| farm | Debian farm 1-1 | 3 |" in capsys.readouterr().out
    assert not (folder / "pool/train-town.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "noise"}, "unknown kinds"),
        ({"include": "("}, "no list of sources"),
        ({"colour": "red"}, "colour"),
        ({"name": "town"}, "must differ"),
        ({"name": "../farm"}, "names of folders"),
    ],
)
def test_wrong_lists(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **changes)


def test_unknown_list_is_refused_with_those_that_there_are(folder):
    with pytest.raises(ValueError, match=r"No list of sources nothing.*open_sounds"):
        build_pool(PoolOptions(str(folder), list="nothing"))


def test_bundled_list_states_origin_licence_and_checksum_of_every_source():
    pool = read_pool_list("open_sounds")
    assert {source.name for source in pool.sources if source.held_out} == {
        "ufoai-sound", "gh_Fris0uman+CDDA-Soundpacks", "unknown-horizons", "sonic-pi-samples",
        "klettres-data",
    }  # fmt: skip
    for source in pool.sources:
        assert all((source.origin, source.version, source.licence))
        assert len(source.sha256) == 64
        assert not re.search(r"\b(NC|ND)\b", source.licence, re.IGNORECASE)
