"""A page in the browser that says what recordings sound like, and when.

    ast-demo CHECKPOINT
    ast-demo --write_space my_space/ CHECKPOINT

Upload or record a sound: labels, timeline, events above a threshold to download as CSV, and where
in the spectrogram the model looked. The page needs no network. It is served to this computer only
unless `--host` says otherwise. A sound is decoded and nothing else; it lies in a temporary folder
for a quarter of an hour at most, and no longer than the program runs.

`--write_space` writes a folder to push to a Hugging Face Space, with all the code it needs.
"""

import signal
import sys
from collections.abc import Sequence

from .common.options import run_command
from .inference.options import DemoOptions


def demo(options: DemoOptions) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.write_space:
        from .inference.space import write_space

        write_space(options.write_space, options.model)
        print(f"Wrote {options.write_space}. To push it, see its README.md.")
        return
    from .inference.classifier import Classifier
    from .inference.page import serve

    classifier = Classifier(options.model, batch_size=4)
    serve(classifier, options.host, options.port, options.max_minutes, options.max_megabytes)


def main(argv: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command("ast-demo", DemoOptions, demo, argv)


if __name__ == "__main__":
    main()
