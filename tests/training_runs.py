"""Fine-tuning commands in separate processes that end in the middle, at a chosen point.

As a program, for torchrun: `python -m tests.training_runs INTERRUPTION COMMAND ARGUMENT …`
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable

import matplotlib.pyplot  # noqa: F401  (so that it is imported once)
import safetensors.torch
import torch

from scripts import finetune, finetune_accelerate
from scripts.training import run_folder

COMMANDS = {"ast-finetune": finetune.main, "ast-finetune-accelerate": finetune_accelerate.main}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(interruption: str, run: str) -> None:
    """Arrange for this process to meet `interruption`, "what:n", in the run folder `run`.

    step:n      SIGKILL in optimizer step n of this process
    write:n     SIGKILL when a half of the n-th file of a state has been written
    rename:n    SIGKILL when the n-th folder has all its files, before it gets its name
    tidy:n      SIGKILL at the n-th folder that is to be removed
    full:n      from step n, the disk is full for files larger than 20 kB
    missing:n   the run folder is deleted in step n
    """
    what, _, number = interruption.partition(":")
    calls = 0

    def nth_call_of(function: Callable, act: Callable) -> Callable:
        def replacement(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == int(number):
                act(*args)
            return function(*args, **kwargs)

        return replacement

    def write_half(_, file, *rest) -> None:
        with open(file, "wb") as half:
            half.write(b"half of it")
        _kill()

    def fill(*_) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    if what == "write":
        safetensors.torch.save_file = nth_call_of(safetensors.torch.save_file, write_half)
    elif what == "rename":
        os.rename = nth_call_of(os.rename, lambda *_: _kill())
    elif what == "tidy":
        shutil.rmtree = nth_call_of(shutil.rmtree, lambda *_: _kill())
    else:
        act = {"step": lambda *_: _kill(), "full": fill, "missing": lambda *_: shutil.rmtree(run)}
        run_folder.Progress.add_step = nth_call_of(run_folder.Progress.add_step, act[what])


def run_command(
    interruption: str | None, command: str, arguments: list[str], errors: str = ""
) -> None:
    """Run a command; its exit status is this process's."""
    torch.set_num_threads(1)
    # Loaders' workers: fork as usual; this process itself comes from a fork server.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [command, *arguments]
    if interruption:
        interrupt(interruption, arguments[arguments.index("--output") + 1])
    if errors:
        sys.stderr = open(errors, "w")  # noqa: SIM115  (open until the process ends)
    COMMANDS[command]()


if __name__ == "__main__":
    run_command(sys.argv[1], sys.argv[2], sys.argv[3:])
