"""Several processes for one command: those that torchrun started, or the command's own.

Each one hears its share and writes parts of its own; the first one, or the command itself, puts the
results together.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..common.lean import quiet_libraries
from ..common.shown import shown
from .options import ClassifyOptions


@dataclass(frozen=True)
class Share:
    """Which process of how many this one is.

    `device` is what torch shall use; None: its choice.
    """

    index: int = 0
    count: int = 1
    device: Any = None
    wait: Callable[[], None] = lambda: None  # until all processes have come so far


def launched_share() -> Share:
    """Of torchrun, accelerate launch or srun; without them this process is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Share()
    import torch
    from accelerate import PartialState

    # Processes wait for the slowest at the end, however many hours its share takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    return Share(state.process_index, state.num_processes, state.device, state.wait_for_everyone)


def run_shares(options: ClassifyOptions) -> tuple[int, float, Any]:
    """Start `options.processes` of them, each with its share and its part of the processors.

    Ctrl-C and SIGTERM reach them all, and each one writes what it has.

    Returns:
        The highest exit status, the seconds of sound that they heard, and the first one's `Run`.
    """
    assert options.output is not None
    count = options.processes
    context = multiprocessing.get_context("spawn")
    heard: Any = context.Array("d", count)  # seconds
    receiver, sender = context.Pipe(duplex=False)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        # Read by the processes' libraries when they are loaded.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (processors or os.cpu_count() or 1) // count))
    processes = [
        context.Process(target=_run_share, args=(options, index, heard, sender))
        for index in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.terminate()
                process.join()
    status = max(abs(process.exitcode or 0) for process in processes)
    return status, sum(heard), receiver.recv() if receiver.poll() else None


def _run_share(options: ClassifyOptions, index: int, heard: Any, sender: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    quiet_libraries(options.model)
    from .run import hear_share

    try:
        run = hear_share(options, Share(index, options.processes))
        heard[index] = run.seconds
        if index == 0:
            sender.send(run)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if index == 0:  # the others say the same
            message = shown(" ".join(str(error).split()))
            print(f"ast-classify: error: {message}", file=sys.stderr)
        sys.exit(2)
