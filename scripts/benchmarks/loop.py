"""`ast-benchmark loop`: how long a search and a lesson take, on made-up embeddings."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..common.timing import measure, report
from ..workbench.calibration import Wish
from ..workbench.heads import Head
from ..workbench.index import SoundIndex
from ..workbench.marks import Mark
from ..workbench.queues import pick
from ..workbench.teach import teach
from .conditions import on_threads
from .options import LoopOptions


@on_threads
def benchmark_loop(options: LoopOptions) -> None:
    """The library calls behind `ast-index --like`, `--label` and `ast-teach`.

    A search compares every window and picks 20; the first in an index also computes what depends on
    the embeddings alone. A lesson chooses the penalty by cross-validation
    over recordings, fits, calibrates and sets thresholds.
    """
    random = np.random.default_rng(0)
    index = made_up_index(options.windows, options.width, options.labels)
    example = random.standard_normal((1, options.width), np.float32)
    weight = random.standard_normal((options.labels, options.width))
    head = Head(weight, np.zeros(options.labels), exclusive=True)
    marks = [
        Mark(
            index.sounds[window // 2],
            float(index.spans[window, 0]),
            float(index.spans[window, 1]),
            f"label {window // 2 % options.labels}",
        )
        for window in range(options.marks)
    ]

    def found(values: np.ndarray) -> list[int]:
        return pick(values, index.sound_of_window, index.spans, 20)

    def first() -> SoundIndex:
        """The index as it is after loading: nothing computed yet."""
        return dataclasses.replace(index)

    cases: dict[str, Callable[[], object]] = {
        "first search by example": lambda: found(first().similarity(example)),
        "search by example": lambda: found(index.similarity(example)),
        "first search by label": lambda: found(first().scores(head, 0)),
        "search by label": lambda: found(index.scores(head, 0)),
        f"teach {options.marks} marks": lambda: teach(index, marks, Wish(0.9)),
    }
    report(
        f"an index of {options.windows} windows, {options.width} wide, {options.labels} labels",
        measure(cases, options.repeats),
        dict.fromkeys(cases, 1),
        "run",
        options.json,
        # Of all threads: a figure that other work on the machine leaves alone.
        processor_s={name: round(_processor_seconds(run), 2) for name, run in cases.items()},
    )


def _processor_seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def made_up_index(windows: int, width: int, labels: int) -> SoundIndex:
    """An index in memory: two windows per recording, a label's windows around one centre."""
    random = np.random.default_rng(0)
    number = np.arange(windows)
    embeddings = random.standard_normal((windows, width), np.float32)
    # Centres so close together that a head makes mistakes.
    centres = 0.3 * random.standard_normal((labels, width), np.float32)
    embeddings += centres[number // 2 % labels]
    starts = 5.0 * (number % 2)
    return SoundIndex(
        folder=Path(tempfile.gettempdir()),
        about={"model": "made up", "encoder": "", "head_epsilon": 1e-6},
        settings={},
        sounds=[f"{recording}.wav" for recording in range((windows + 1) // 2)],
        sound_of_window=number // 2,
        spans=np.stack([starts, starts + 5.0], axis=1),
        embeddings=embeddings,
    )
