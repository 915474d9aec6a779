"""Say what recordings sound like, from one file to a cluster's worth of them.

    ast-classify rec.wav other.mp3
    ast-classify recordings/ --output results --formats csv audacity --plot
    ast-classify recordings/ --output results --processes 2
    torchrun --nproc_per_node 8 -m ast_scripts.classify recordings/ --output results

Without --output, the most likely labels are printed; for a long recording, a timetable of what was
heard. With it, the windows, events and embeddings of every sound go into that folder. If it is
interrupted, run the same command again: it resumes where it stopped, even within a recording.
Sounds that cannot be read are reported and skipped; the exit status is then 1. It is 2 for a wrong
model or option.
"""

import signal
import sys
from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.lean import quiet_libraries
from .common.options import run_command
from .inference.options import ClassifyOptions
from .inference.speed import sped_up


def classify(options: ClassifyOptions) -> int:
    check_checkpoints(options.model)
    options = sped_up(options)
    quiet_libraries(options.model)
    from .inference import run

    return run.classify(options)


def main(argv: Sequence[str] | None = None) -> None:
    # A scheduler that ends this process lets it write what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command(
        "ast-classify",
        ClassifyOptions,
        classify,
        argv,
        resumes=lambda options: options.output is not None,
    )


if __name__ == "__main__":
    main()
