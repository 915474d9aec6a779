"""Mix labelled clips: turn a single-label set into a synthetic multi-label one.

    python -m ast_scripts.mix_clips path/to/esc10 --output runs/mixtures

A mixture is the sum of one to three clips of different classes, each scaled to the same peak and
then turned down by 0 to 6 dB. All come from one fold, so the folds stay separate. Writes
fold*.parquet: audio (FLAC), labels (a list), fold, sources (the names of the clips).

    python -m ast_scripts.mix_clips path/to/esc10 --output runs/soundscapes --soundscape_s 30

With --soundscape_s it makes soundscapes instead: the clips' loud stretches at random times, which
may overlap, in noise. events.csv lists when each occurs, for `ast-finetune --annotations`.
"""

from collections.abc import Sequence

from .common.options import run_command
from .data.options import MixOptions


def run(options: MixOptions) -> None:
    from .data.mixtures import mix_clips

    print("Wrote " + ", ".join(map(str, mix_clips(options))))


def main(argv: Sequence[str] | None = None) -> None:
    run_command("mix_clips", MixOptions, run, argv)


if __name__ == "__main__":
    main()
