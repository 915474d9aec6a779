"""Teach a model your sounds from a few marks, in seconds.

    ast-teach index marks.csv --output taught
    ast-teach index marks.csv --background quiet/ --wish precision=0.9 --queue uncertain
    ast-teach index --annotations raven_tables/

Marks say what can be heard where: file, start, end, label. A label is a name, several joined by
`;`, `background` for none of them, or `not NAME`. Anything unmarked stays unlabelled. The result is
an ordinary checkpoint with calibrated scores; every figure is measured on held-out recordings.
`--queue` suggests what to mark next.
"""

from collections.abc import Sequence

from .common.lean import quiet_libraries
from .common.options import run_command
from .workbench.options import TeachOptions


def teach(options: TeachOptions) -> int:
    quiet_libraries()
    from .workbench import run

    return run.teach(options)


def main(argv: Sequence[str] | None = None) -> None:
    run_command("ast-teach", TeachOptions, teach, argv)


if __name__ == "__main__":
    main()
