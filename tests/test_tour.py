"""The demo's sounds, and the whole of it (slow)."""

import subprocess
import sys

import numpy as np
import pytest

from scripts.data.sources import open_stream
from scripts.tour import RATE, SECONDS, SOUNDS, synthesise, write_split

from .conftest import REPOSITORY


def test_sounds_are_distinct_and_seeded(tmp_path):
    for name in SOUNDS:
        clip = synthesise(name, np.random.default_rng(3))
        assert clip.shape == (int(SECONDS * RATE),)
        assert clip.dtype == np.float32
        assert 0.02 < np.abs(clip).max() <= 1
        np.testing.assert_array_equal(clip, synthesise(name, np.random.default_rng(3)))
        assert not np.array_equal(clip, synthesise(name, np.random.default_rng(4)))
    write_split(tmp_path / "train.parquet", 2, seed=0)
    stream = open_stream(str(tmp_path), "train")
    assert [row["label"] for row in stream] == [*range(8), *range(8)]
    assert stream.features["label"].names == list(SOUNDS)


@pytest.mark.slow
def test_whole_demo(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tour", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split("Held-out accuracy: ")[1].split(" %")[0])
    assert accuracy >= 90
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
