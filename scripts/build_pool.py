"""Build a pool of unlabelled sound from openly licensed packages, for training with a teacher.

    python -m ast_scripts.build_pool path/to/sources --output runs/pool

path/to/sources has a folder for each source of the list, with its name and unpacked: a Debian
package by `dpkg -x`, a repository by `git clone` at the commit in the list. The sounds of each
source must have the checksum in the list. They become windows of at most 10 s, without silent ones
and without sounds that an earlier source has; of music and speech only a part is taken.

Writes one Parquet file per source: train-NAME.parquet, or test-NAME.parquet for sources that are
held out, whose sounds are kept out of the others. Columns: audio (FLAC), source, file, offset and
length in seconds, kind, licence, author, original_rate, and the SHA-256 of file and window.
README.md is the table of sources for the model card. Files are written whole or not at all; after
an interruption, the same command resumes.
"""

from collections.abc import Sequence

from .common.options import run_command
from .data.options import PoolOptions


def run(options: PoolOptions) -> None:
    from .data.pool import build_pool

    print(build_pool(options))


def main(argv: Sequence[str] | None = None) -> None:
    run_command("build_pool", PoolOptions, run, argv, resumes=lambda _: True)


if __name__ == "__main__":
    main()
