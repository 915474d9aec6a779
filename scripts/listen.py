"""Name what is heard now: a line as each event begins, and one when it is over.

    ast-listen
    arecord -t wav -f S16_LE -r 16000 | ast-listen -
    ast-listen rtsp://camera/stream --format json --clips heard/

Without a source, this listens to the microphone (pip install '.[listen]'). The ffmpeg program reads
addresses, and reconnects if the connection is lost. Memory does not grow with time. Times mean the
same as in ast-classify. Standard error reports sound dropped because the model could not keep up,
lost connections, and at the end the latency and the real-time factor.
"""

import signal
from collections.abc import Sequence

from .common.checkpoints import check_checkpoints
from .common.lean import quiet_libraries
from .common.options import run_command
from .inference.options import ListenOptions
from .inference.speed import sped_up


def listen(options: ListenOptions) -> int:
    check_checkpoints(options.model)
    options = sped_up(options)
    quiet_libraries(options.model)
    from .inference import listen

    return listen.listen(options)


def main(argv: Sequence[str] | None = None) -> None:
    # What ends this process ends it as Ctrl-C does: with the events so far and its figures.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command("ast-listen", ListenOptions, listen, argv)


if __name__ == "__main__":
    main()
