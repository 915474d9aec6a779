"""Serve a page that says what recordings sound like, and when.

    ast-demo CHECKPOINT
    ast-demo --index index --marks marks.csv
    ast-demo --write_space my_space/ CHECKPOINT

Upload or record a sound to see labels, a timeline, events above a threshold (to download as CSV),
and where in the spectrogram the model looked. The page needs no network and is served to this
computer only, unless `--host` says otherwise. Sounds are only decoded, never run; they stay in a
temporary folder for at most 15 minutes and no longer than the program runs.

With `--index`, a folder that ast-index wrote, the page is a workbench: Find windows that sound like
an example, Review what the model is unsure of, mark what you hear (each mark is saved at once),
Teach, and download the checkpoint.

`--write_space` writes a folder to push to a Hugging Face Space, with all the code it needs.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .common.checkpoints import check_checkpoints
from .common.lean import quiet_libraries
from .common.options import run_command
from .inference.options import DemoOptions
from .inference.speed import sped_up


def demo(options: DemoOptions) -> None:
    if not options.write_space:
        check_checkpoints(options.model)
    if options.index is not None and options.speed != "exact":
        raise ValueError("--speed goes without --index: teaching needs the checkpoint itself.")
    if not options.write_space:
        options = sped_up(options)
    quiet_libraries(options.model)
    if options.write_space:
        from .inference.space import write_space

        write_space(options.write_space, options.model)
        print(f"Wrote {options.write_space}. To push it, see its README.md.")
        return
    from .inference.classifier import Classifier
    from .inference.page import serve

    limits = (options.host, options.port, options.max_minutes, options.max_megabytes)
    if options.index is None:
        serve(Classifier(options.model, batch_size=4), *limits, tabs=without_index)
        return
    from .workbench import page
    from .workbench.bench import Workbench

    # The index's own model, unless the command line names another.
    model = None if options.model == DemoOptions.model else options.model
    bench = Workbench(options.index, options.marks or options.index / "marks.csv", model)
    serve(
        bench.classifier,
        *limits,
        tabs=lambda folder: page.tabs(bench, folder, options.max_minutes),
        script=page.KEYS,
        css=page.CSS,
    )


def without_index(_: Path) -> list[tuple[str, Callable[[], None]]]:
    """A tab that says how to get the others."""

    def say() -> None:
        import gradio

        gradio.Markdown(
            "Here you find sounds in hours of recordings, mark some, and teach a model from them. "
            "Index your recordings first, then start the page with the index:\n\n"
            "    ast-index recordings/ --output index\n    ast-demo --index index"
        )

    return [("Find, review, teach", say)]


def main(argv: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command("ast-demo", DemoOptions, demo, argv)


if __name__ == "__main__":
    main()
