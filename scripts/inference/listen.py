"""What `ast-listen` does: one thread receives the sound, this one classifies it and prints."""

import csv
import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from modeling_ast.events_ast import EventRules

from ..common.files import write_whole
from ..common.shown import clock, readable, shown
from ..common.tables import csv_cell
from .classifier import Classifier
from .clips import AROUND_S, clip_name
from .live import Line, Listener
from .live_sources import Ffmpeg, Microphone, Source, SourceLostError, WavStream
from .options import ListenOptions
from .results import file_of, path_of
from .run import read_names

_COLUMNS = ["state", "time", "start", "end", "label", "score", "latency_s"]
_SILENT_S = 10.0  # without any sound: report it, and reconnect
_LONGEST_PAUSE_S = 30.0  # between attempts to reconnect
_STEADY_S = 60.0  # a connection that lasted this long was good: the next pause is short again


def listen(options: ListenOptions) -> int:
    """Run the command until the sound ends, or Ctrl-C. Returns the exit status."""
    # Find wrong thresholds before the model is loaded.
    assert options.threshold is not None
    rules = EventRules(options.threshold, options.release_threshold, options.minimum_length_s)
    classifier = Classifier(
        options.model,
        batch_size=1,
        chunk_length_s=options.chunk_length_s,
        labels=None if options.labels is None else read_names(options.labels),
    )
    source = open_source(options, classifier.sampling_rate)
    listener = Listener(
        classifier, rules, options.hop_length_s, options.buffer_s, waits=source.waits
    )
    feeder = Feeder(source, listener, _say)
    printer = Printer(options, listener, feeder)
    window_s = listener.length / listener.rate
    _say(
        f"Listening to {shown(source.name)} in windows of {window_s:g} s every "
        f"{listener.hop / listener.rate:g} s; Ctrl-C ends."
    )
    feeder.start()
    try:
        _hear(listener, feeder, printer)
    except KeyboardInterrupt:
        pass
    finally:
        listener.ring.close()
        printer.print(listener.finish())
        more = f", {feeder.reconnects} reconnects" if source.comes_back else ""
        if source.overflows:
            more += f", {source.overflows} overflows in the device"
        _say(f"{listener.figures}{more}.")
    if feeder.error is not None:
        raise ValueError(f"{source.name}: {feeder.error}")
    return 0


def open_source(options: ListenOptions, rate: int) -> Source:
    """The microphone, standard input or a stream, as the options say.

    Raises:
        ValueError: if it cannot be opened, or is a file, which is for `ast-classify`.
    """
    if options.source is None:
        return Microphone(rate, options.device)
    if options.source == "-":
        if sys.stdin.isatty():
            raise ValueError(
                "Standard input is the keyboard; expected a WAV stream: arecord -t wav -f S16_LE "
                "-r 16000 | ast-listen -"
            )
        return WavStream(sys.stdin.buffer, rate, waits=True if options.wait else None)
    if "://" in options.source:
        return Ffmpeg(options.source, rate)
    raise ValueError(
        f"{options.source!r} is not live sound: expected - (a WAV stream on standard input) or an "
        "address (rtsp://…), or nothing for the microphone. Files are for ast-classify."
    )


class Feeder(threading.Thread):
    """Moves a source's sound into the listener's ring, and reconnects if it is lost.

    Args:
        source: of the sound.
        listener: classifies it.
        say: tells the user.
    """

    def __init__(self, source: Source, listener: Listener, say: Callable[[str], None]):
        super().__init__(daemon=True)
        self.source, self.ring, self.rate = source, listener.ring, listener.rate
        self.reconnects = 0
        self.error: str | None = None  # what ended it
        self.began: datetime | None = None  # when the first sound arrived
        self._say = say
        self._last = time.monotonic()  # that sound came

    def run(self) -> None:
        pause = 1.0
        try:
            while not self.ring.is_closed:
                connected = time.monotonic()
                try:
                    self._take()
                    return
                except SourceLostError as lost:
                    if self.began is None:  # a wrong name rather than a bad line
                        self.error = str(lost)
                        return
                    self._say(f"{shown(self.source.name)} is lost: {shown(lost)}")
                if time.monotonic() - connected > _STEADY_S:
                    pause = 1.0
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        # Otherwise nobody would see what ended the thread.
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ring.close()

    def _take(self) -> None:
        is_first = True
        for block in self.source.blocks():
            if self.ring.is_closed:
                return
            if not len(block):
                continue
            now = time.monotonic()
            if self.began is None:
                self.began = datetime.now().astimezone() - timedelta(seconds=len(block) / self.rate)
            elif is_first:
                gap = max(0.0, now - self._last - len(block) / self.rate)
                self.reconnects += 1
                self._say(f"{shown(self.source.name)} is back; {gap:.1f} s were not heard.")
                self.ring.skip(round(gap * self.rate))
            is_first = False
            self.ring.write(block)
            self._last = time.monotonic()


def _hear(listener: Listener, feeder: Feeder, printer: "Printer") -> None:
    silent_since, end = time.monotonic(), 0
    drops = 0
    while True:
        if listener.is_ready:
            printer.print(listener.step())
            if listener.figures.drops > drops:
                drops = listener.figures.drops
                _say(
                    f"dropped: {listener.figures.dropped_s:.1f} s so far. The model is slower than "
                    "the sound: a longer --hop_length_s or --speed fast helps."
                )
        elif listener.ring.is_closed:
            return
        else:
            listener.ring.wait(listener.next_end, 1.0)
        if listener.ring.end != end or listener.ring.waits:
            silent_since, end = time.monotonic(), listener.ring.end
        elif time.monotonic() - silent_since > _SILENT_S:
            _say(f"{shown(feeder.source.name)} has given no sound for {_SILENT_S:g} s.")
            feeder.source.interrupt()
            silent_since = time.monotonic()


class Printer:
    """Lines on standard output, and cut-outs, as events begin and end."""

    def __init__(self, options: ListenOptions, listener: Listener, feeder: Feeder):
        self._options, self._listener, self._feeder = options, listener, feeder
        self._writer: Any = csv.writer(sys.stdout, lineterminator="\n")
        if options.format == "csv":
            self._writer.writerow(_COLUMNS)
            sys.stdout.flush()

    def print(self, lines: list[Line]) -> None:
        """One line each, at once."""
        for line in lines:
            if self._options.format == "text":
                print(self._text(line))
            else:
                row = self._row(line)
                if self._options.format == "json":
                    print(json.dumps(row, ensure_ascii=False))
                else:
                    self._writer.writerow([csv_cell(value) for value in row.values()])
            sys.stdout.flush()
            if line.is_over and self._options.clips is not None:
                self._cut_out(line, self._options.clips)

    def _time(self, seconds: float) -> datetime | None:
        """Clock time of a second of the sound; None for a file, which has none."""
        began = self._feeder.began
        if began is None or self._feeder.source.waits:
            return None
        return began + timedelta(seconds=seconds)

    def _row(self, line: Line) -> dict[str, Any]:
        event, when = line.event, self._time(line.event.start)
        return {
            "state": "over" if line.is_over else "begins",
            "time": None if when is None else when.isoformat(timespec="milliseconds"),
            "start": round(event.start, 3),
            "end": round(event.end, 3) if line.is_over else None,
            "label": event.label,
            "score": round(event.score, 4),
            "latency_s": None if self._feeder.source.waits else round(line.latency_s, 3),
        }

    def _text(self, line: Line) -> str:
        event, when = line.event, self._time(line.event.start)
        at = clock(event.start, 1) if when is None else f"{when:%H:%M:%S}"
        name = f"{at:>9}  {readable(event.label):24}  {100 * event.score:5.1f} %"
        if line.is_over:
            return f"{name}  over after {event.end - event.start:.1f} s"
        late = "" if self._feeder.source.waits else f"  {line.latency_s:.2f} s later"
        return f"{name}{late}"

    def _cut_out(self, line: Line, folder: Path) -> None:
        import soundfile

        event, listener = line.event, self._listener
        samples = listener.cut(event.start - AROUND_S, event.end + AROUND_S)
        when = self._time(event.start)
        sound = "live" if when is None else f"{when:%Y-%m-%d_%H-%M-%S}"
        name = clip_name(sound, event.start, event.end, event.score, "")
        path = file_of(folder / path_of(event.label.replace("/", "_")), name, ".wav")
        write_whole(
            path,
            lambda unfinished: soundfile.write(
                unfinished, samples, listener.rate, subtype="PCM_16", format="WAV"
            ),
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
