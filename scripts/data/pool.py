"""A pool of unlabelled sound: openly licensed packages cut into windows, each with its licence."""

import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import yaml
from tqdm.auto import tqdm

from feature_extraction import AudioDecodingError, load_audio

from ..common.bundled import find_bundled
from ..common.files import write_whole
from .options import PoolOptions
from .suffixes import AUDIO_SUFFIXES

_ARCHIVES = (".zip", ".pk3", ".pk4", ".jar")  # what games keep sounds in
_WINDOW_S = 10.0  # what AudioSet models hear at once
_SHORTEST_S = 0.3
_SILENCE = 1e-3  # peak
_STRING_COLUMNS = ("source", "file", "kind", "licence", "author", "file_sha256", "sha256")
_SCHEMA = pyarrow.schema(
    [
        ("audio", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        *((column, pyarrow.string()) for column in _STRING_COLUMNS),
        ("offset", pyarrow.float64()),
        ("length", pyarrow.float64()),
        ("original_rate", pyarrow.int32()),
    ]
)


@dataclass
class Kind:
    """A kind of sound, known by its path, and how much of it to take.

    Attributes:
        windows_per_file: spread evenly over a longer file.
        minutes: from one source.
        path: regular expression, searched in "/" + path in any case; "": none.
    """

    windows_per_file: int
    minutes: float
    path: str = ""


@dataclass
class Source:
    """A source of sounds.

    Attributes:
        name: its folder.
        origin: where to get it, as "Debian 0ad-data" or "GitHub OpenRCT2/OpenSoundEffects".
        version: of the package, or the commit.
        licence: of its sounds.
        sha256: checksum of its sounds, see `checksum`; "": not checked.
        held_out: for measuring; its sounds are kept out of the other sources.
        kind: of the sounds whose path does not tell.
        include: regular expression; only paths in which it is found, in any case.
        exclude: regular expression; no paths in which it is found.
        minutes: by kind, instead of the kind's own.
    """

    name: str
    origin: str
    version: str
    licence: str
    author: str = ""
    sha256: str = ""
    held_out: bool = False
    kind: str = "effect"
    include: str = ""
    exclude: str = ""
    minutes: dict[str, float] = field(default_factory=dict)


@dataclass
class PoolList:
    """What a pool is made of.

    Attributes:
        exclude: regular expression; no paths in which it is found, in any source.
        kinds: by name; the first whose path fits is a sound's.
    """

    exclude: str
    kinds: dict[str, Kind]
    sources: list[Source]


def read_pool_list(name: str) -> PoolList:
    """A list from a YAML file, or a bundled one; held-out sources come first.

    Raises:
        ValueError: if there is no such list, or it is none.
    """
    path = find_bundled(name, "pool", ".yaml", "list of sources")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        kinds = {kind: Kind(**values) for kind, values in content["kinds"].items()}
        sources = [Source(**values) for values in content["sources"]]
        exclude = content.get("exclude", "")
        for pattern in (exclude, *(kind.path for kind in kinds.values())):
            re.compile(pattern)
        for source in sources:
            for pattern in (source.include, source.exclude):
                re.compile(pattern)
            if unknown := {source.kind, *source.minutes} - set(kinds):
                raise ValueError(f"{source.name} has unknown kinds {sorted(unknown)}")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ValueError(f"{path} is no list of sources: {error!r}.") from error
    names = Counter(source.name for source in sources)
    if wrong := [name for name, count in names.items() if count > 1 or Path(name).name != name]:
        raise ValueError(f"{path}: names must differ and be names of folders; got {wrong}.")
    return PoolList(exclude, kinds, sorted(sources, key=lambda source: not source.held_out))


def sound_files(folder: Path, source: Source, exclude: str) -> dict[str, Callable[[], bytes]]:
    """A source's sounds, also those in zip archives: what reads each, by path, sorted."""

    def wanted(path: str) -> bool:
        return (
            Path(path).suffix.lower() in AUDIO_SUFFIXES
            and (not exclude or not re.search(exclude, path, re.IGNORECASE))
            and (not source.exclude or not re.search(source.exclude, path, re.IGNORECASE))
            and (not source.include or bool(re.search(source.include, path, re.IGNORECASE)))
        )

    found: dict[str, Callable[[], bytes]] = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_symlink() or ".git" in file.parts or not file.is_file():
            continue
        if wanted(path):
            found[path] = file.read_bytes
        elif file.suffix.lower() in _ARCHIVES and zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)  # open as long as its members may be read
            for member in sorted(archive.namelist()):
                if wanted(inside := f"{path}!{member}"):
                    found[inside] = partial(archive.read, member)
    return found


def checksum(files: dict[str, Callable[[], bytes]]) -> str:
    """SHA-256 over lines of SHA-256 and path of each file, in the order of the paths."""
    total = hashlib.sha256()
    for path, read in sorted(files.items()):
        total.update(f"{hashlib.sha256(read()).hexdigest()}  {path}\n".encode(errors="replace"))
    return total.hexdigest()


def build_pool(options: PoolOptions) -> str:
    """Write the pool, a Parquet file per source, and README.md.

    Returns:
        Hours by source, licence and kind, as Markdown: what README.md holds.

    Raises:
        ValueError: for a wrong list, and for sources that are missing or not those of the list.
    """
    if not options.sources:
        raise ValueError("Name the folder of the sources: build_pool FOLDER (see --help).")
    pool = read_pool_list(options.list)
    folders = {source.name: Path(options.sources) / source.name for source in pool.sources}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing and not options.skip_missing:
        raise ValueError(
            f"{options.sources} lacks {len(missing)} of {len(folders)} sources: "
            f"{', '.join(missing[:5])}… Get them, or leave them out with --skip_missing."
        )
    sources = [source for source in pool.sources if source.name not in missing]
    output = Path(options.output)
    seen: set[str] = set()  # SHA-256 of files and windows
    files = []
    # Which sounds a source has left depends on those before it: each state includes the last.
    kinds = {name: asdict(kind) for name, kind in pool.kinds.items()}
    state = json.dumps([options.sampling_rate, pool.exclude, kinds])
    for source in tqdm(sources, desc="sources"):
        state = hashlib.sha256((state + json.dumps(asdict(source))).encode()).hexdigest()
        file = output / f"{'test' if source.held_out else 'train'}-{source.name}.parquet"
        if not file.is_file() or _state_of(file) != state.encode():
            rows = _windows(folders[source.name], source, pool, options.sampling_rate, seen)
            write_whole(file, partial(_write, list(rows), state))
        table = pyarrow.parquet.read_table(file, columns=["file_sha256", "sha256"])
        seen.update(*(column.to_pylist() for column in table.columns))
        files.append(file)
    text = _table(sources, files)
    write_whole(output / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    return text


def _windows(
    folder: Path, source: Source, pool: PoolList, sampling_rate: int, seen: set[str]
) -> Iterator[dict[str, Any]]:
    """Rows of a source."""
    files = sound_files(folder, source, pool.exclude)
    found = checksum(files)
    if source.sha256 and found != source.sha256:
        raise ValueError(
            f"{folder}: its {len(files)} sounds have the checksum {found}, not {source.sha256} as "
            f"in the list. Get {source.origin} {source.version}."
        )
    seen = set(seen)
    seconds = dict.fromkeys(pool.kinds, 0.0)
    # Where not everything is taken, the choice must not favour the folder that comes first.
    for path in sorted(
        files, key=lambda path: hashlib.sha256(path.encode(errors="replace")).digest()
    ):
        kind_name = _kind(path, source, pool)
        kind = pool.kinds[kind_name]
        if seconds[kind_name] >= 60 * source.minutes.get(kind_name, kind.minutes):
            continue
        content = files[path]()
        file_sha256 = hashlib.sha256(content).hexdigest()
        if file_sha256 in seen:
            continue
        seen.add(file_sha256)
        try:
            info = soundfile.info(io.BytesIO(content))
            for offset in _offsets(info.duration, kind.windows_per_file):
                sound = load_audio(content, sampling_rate, offset=offset, duration=_WINDOW_S)
                length = len(sound) / sampling_rate
                if length < _SHORTEST_S or np.abs(sound).max() < _SILENCE:
                    continue
                samples = np.clip(np.rint(sound * 32767), -32768, 32767).astype(np.int16)
                sha256 = hashlib.sha256(samples.tobytes()).hexdigest()
                if sha256 in seen:
                    continue
                seen.add(sha256)
                encoded = io.BytesIO()
                soundfile.write(encoded, samples, sampling_rate, format="FLAC")
                seconds[kind_name] += length
                yield {
                    "audio": {"bytes": encoded.getvalue(), "path": f"{path}@{offset:g}.flac"},
                    "source": source.name,
                    "file": path,
                    "kind": kind_name,
                    "licence": source.licence,
                    "author": source.author,
                    "file_sha256": file_sha256,
                    "sha256": sha256,
                    "offset": offset,
                    "length": length,
                    "original_rate": info.samplerate,
                }
        except (soundfile.SoundFileError, AudioDecodingError):
            continue  # old packages have broken files; the checksum tells that it is not the copy


def _kind(path: str, source: Source, pool: PoolList) -> str:
    for name, kind in pool.kinds.items():
        if kind.path and re.search(kind.path, f"/{path}", re.IGNORECASE):
            return name
    return source.kind


def _offsets(duration_s: float, most: int) -> list[float]:
    """Starts of windows one after the other; if there are too many, `most` spread evenly."""
    count = max(1, int(np.ceil((duration_s - _SHORTEST_S) / _WINDOW_S)))
    chosen = np.arange(count)
    if count > most:
        # Without the ends, where recordings fade in and out.
        chosen = np.unique(np.linspace(0, count - 1, most + 2)[1:-1].round().astype(int))
    return [float(index * _WINDOW_S) for index in chosen]


def _write(rows: list[dict[str, Any]], state: str, path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows, _SCHEMA.with_metadata({"pool": state}))
    pyarrow.parquet.write_table(table, path, row_group_size=200, compression="none")


def _state_of(file: Path) -> bytes | None:
    return (pyarrow.parquet.read_schema(file).metadata or {}).get(b"pool")


def _table(sources: list[Source], files: list[Path]) -> str:
    """Hours by source, licence and kind, in Markdown."""
    rows = []
    by_kind: dict[bool, dict[str, float]] = {False: {}, True: {}}
    by_licence: dict[str, float] = {}
    for source, file in zip(sources, files, strict=True):
        table = pyarrow.parquet.read_table(file, columns=["kind", "length"])
        lengths = np.asarray(table["length"].to_pylist(), float) / 3600
        for kind, hours in zip(table["kind"].to_pylist(), lengths, strict=True):
            by_kind[source.held_out][kind] = by_kind[source.held_out].get(kind, 0.0) + hours
        by_licence[source.licence] = by_licence.get(source.licence, 0.0) + lengths.sum()
        rows.append((source, len(lengths), lengths.sum()))
    lines = []
    for held_out, title in ((False, "Pool"), (True, "Held out")):
        kinds = by_kind[held_out]
        windows = sum(count for source, count, _ in rows if source.held_out == held_out)
        parts = ", ".join(f"{kind} {hours:.2f} h" for kind, hours in _most_first(kinds))
        lines += [f"{title}: {sum(kinds.values()):.2f} h, {windows} windows ({parts}).", ""]
    lines += ["| source | from | windows | hours | licence | authors |", "| --- " * 6 + "|"]
    for source, count, hours in sorted(rows, key=lambda row: -row[2]):
        name = f"{source.name} (held out)" if source.held_out else source.name
        where = f"{source.origin} {source.version}"
        lines.append(
            f"| {name} | {where} | {count} | {hours:.2f} | {source.licence} | {source.author} |"
        )
    lines += ["", "| licence | hours |", "| --- | --- |"]
    lines += [f"| {licence} | {hours:.2f} |" for licence, hours in _most_first(by_licence)]
    return "\n".join(lines) + "\n"


def _most_first(hours: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(hours.items(), key=lambda item: -item[1])
