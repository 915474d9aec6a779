"""Index hours of sound and find what sounds alike.

    ast-index recordings/ --output index
    ast-index --output index --like call.wav:2.5-4 --clips found
    ast-index --output index --label owl --model taught --table owls.csv
    torchrun --nproc_per_node 8 -m ast_scripts.index recordings/ --output index

It keeps an embedding of every window. If it is interrupted, run the same command again: it resumes
where it stopped. Recordings can be added at any time. The search is exact: it compares all windows.
"""

import signal
import sys
from collections.abc import Sequence

from .common.lean import quiet_libraries
from .common.options import run_command
from .workbench.options import IndexOptions


def index(options: IndexOptions) -> int:
    quiet_libraries()
    from .workbench import run

    return run.index(options)


def main(argv: Sequence[str] | None = None) -> None:
    # A scheduler that ends this process lets it write what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command(
        "ast-index", IndexOptions, index, argv, resumes=lambda options: bool(options.sounds)
    )


if __name__ == "__main__":
    main()
