"""Measures times: cases in turn, their table, the machine's name."""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_SHORTEST_S = 0.2  # shortest measurement


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds per run of every case, measured `repeats` times in turn after a warm-up.

    A measurement is the mean over enough consecutive runs to fill 0.2 s: after a pause, in which
    caches, memory and threads have gone to others, a single short run costs more than in a loop.
    """
    runs = {name: _runs_to_fill(_SHORTEST_S, run) for name, run in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            # numpy's threads keep spinning for tens of milliseconds after their last product, on
            # the cores that the next case needs.
            time.sleep(0.1)
            seconds[name].append(_timed(run, runs[name]))
    return seconds


def _runs_to_fill(seconds: float, run: Callable[[], object]) -> int:
    first = _timed(run, 1)  # includes everything that happens only once
    return 1 if first >= seconds else math.ceil(seconds / max(_timed(run, 1), 1e-6))


def _timed(run: Callable[[], object], times: int) -> float:
    """Mean seconds."""
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(times):
        run()
        _wait_for_gpu()
    return (time.perf_counter() - start) / times


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(
    title: str,
    seconds: dict[str, list[float]],
    units: Mapping[str, float],
    unit: str,
    json_path: Path | None,
    **extra: object,
) -> None:
    """Print a table of milliseconds per unit, and optionally write it as JSON.

    Args:
        title: what was measured, in words.
        seconds: from `measure`; other cases are compared with the first.
        units: how many units (clips, steps …) one run of each case handles.
        unit: their name, in the singular.
        json_path: where to write the JSON; None: nowhere.
        extra: figures to print and write: a column if there is one per case, else below the table.
    """
    print(f"{title}; " + ", ".join(f"{key} {value}" for key, value in machine().items() if value))
    columns = {
        name.replace("_", " "): value
        for name, value in extra.items()
        if isinstance(value, Mapping) and value.keys() == seconds.keys()
    }
    print(
        f"{'':44}{'ms/' + unit:>11}{'min':>11}{'max':>11}{unit + 's/s':>10}{'faster':>9}"
        + "".join(f"  {name}" for name in columns)
    )
    rows: list[dict] = []
    first: float | None = None
    for name, runs in seconds.items():
        per_unit = [1000 * run / units[name] for run in runs]
        median = statistics.median(per_unit)
        first = first or median
        row = {
            "case": name,
            f"ms_per_{unit}": median,
            "min": min(per_unit),
            "max": max(per_unit),
            "times_faster": first / median,
            "runs_s": runs,
        }
        rows.append(row)
        print(
            f"{name:44}{median:11.3f}{min(per_unit):11.3f}{max(per_unit):11.3f}"
            f"{1000 / median:10.1f}{first / median:8.1f}x"
            + "".join(f"{value[name]:{len(head) + 2}g}" for head, value in columns.items())
        )
    for name, value in extra.items():
        if name.replace("_", " ") not in columns:
            print(f"{name.replace('_', ' ')}: {value}")
    if json_path:
        json_path.write_text(
            json.dumps({"title": title, "machine": machine(), "cases": rows, **extra}, indent=2)
        )


def machine() -> dict[str, str | int | None]:
    """The machine and versions that the figures are for."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
