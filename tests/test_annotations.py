"""Annotations in every common format, and what is wrong with their rows."""

import pytest

from scripts.data.annotations import Annotation, read_annotations

RECORDINGS = ["rec/a.wav", "rec/b.flac"]
EVENTS = {
    "rec/a.wav": [Annotation(0.5, 1.25, "dog"), Annotation(3.0, 4.0, "sea gull")],
    "rec/b.flac": [Annotation(0.125, 9.0, "rain")],
}
CSV = "file,start,end,label\na.wav,0.5,1.25,dog\na.wav,3,4,sea gull\nb.flac,0.125,9,rain\n"
DCASE = CSV.replace(",", "\t").replace(
    "file\tstart\tend\tlabel", "filename\tonset\toffset\tevent_label"
)
RAVEN = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
    "\tSpecies\n"
    "1\tSpectrogram 1\t1\t0.5\t1.25\t0\t8000\tdog\n"
    "1\tWaveform 1\t1\t0.5\t1.25\t0\t8000\tdog\n"
    "2\tSpectrogram 1\t1\t3.0\t4.0\t0\t8000\tsea gull\n"
)
AUDACITY = "0,500000\t1,250000\tdog\n\\\t100.0\t2000.0\n3.000000\t4.000000\tsea gull\n"


@pytest.mark.parametrize("table", [CSV, "\ufeff" + CSV.replace("\n", "\r\n"), DCASE,
                                   CSV.replace(",", ";")])  # fmt: skip
def test_one_table_for_all(tmp_path, table):
    path = tmp_path / "events.tsv"
    path.write_text(table, encoding="utf-8")
    found = read_annotations(path, RECORDINGS)
    assert found.of_recording == EVENTS
    assert found.label_names == ["dog", "rain", "sea gull"]
    assert (found.problems, found.rows) == ([], 3)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.wav.txt", "a.Table.1.selections.txt", "deep/er/a.txt"]
)
@pytest.mark.parametrize("track", [RAVEN, AUDACITY])
def test_one_track_per_recording(tmp_path, name, track):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(track)
    (tmp_path / "a.wav").write_bytes(b"beside them")
    (tmp_path / "b.txt").write_text("")
    found = read_annotations(tmp_path, RECORDINGS)
    assert found.of_recording == {"rec/a.wav": EVENTS["rec/a.wav"], "rec/b.flac": []}
    assert found.problems == []


def test_raven_table_of_several_recordings(tmp_path):
    lines = RAVEN.splitlines()
    begin_files = ["Begin File", "a.wav", "a.wav", "a.wav"]
    table = "\n".join(f"{line}\t{name}" for line, name in zip(lines, begin_files, strict=True))
    (tmp_path / "all.txt").write_text(table)
    assert read_annotations(tmp_path, RECORDINGS).of_recording == {"rec/a.wav": EVENTS["rec/a.wav"]}


def test_recordings_of_the_same_name_are_told_by_their_folders(tmp_path):
    recordings = ["x/day1/a.wav", "x/day2/a.wav", "c.wav"]
    path = tmp_path / "events.csv"
    path.write_text(
        "file,start,end,label\nday2/a.wav,0,1,dog\nx/day1/a.wav,1,2,cat\n"
        "C:\\sounds\\c.wav,2,3,cow\na.wav,5,6,owl\n"
    )
    found = read_annotations(path, recordings)
    assert found.of_recording == {
        "x/day2/a.wav": [(0, 1, "dog")],
        "x/day1/a.wav": [(1, 2, "cat")],
        "c.wav": [(2, 3, "cow")],
    }
    assert found.problems == [
        f"{path}, line 5: 'a.wav' matches none of the recordings, or several."
    ]


def test_bad_rows_are_named_by_their_line(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text(
        "file,start,end,label\n"
        "a.wav,5,6,dog\n"
        "a.wav,9,10.5,dog\n"
        "a.wav,11,12,dog\n"
        "a.wav,4,3,dog\n"
        "a.wav,4,4,dog\n"
        "a.wav,-1,3,dog\n"
        "nobody.wav,4,5,dog\n"
        "a.wav,four,5,dog\n"
        "a.wav,4,5,\n"
        "a.wav,4\n"
        "a.wav,8,10.01,dog\n"
    )
    found = read_annotations(path, RECORDINGS, duration_of={"rec/a.wav": 10.0}.get)
    assert found.of_recording == {"rec/a.wav": [(5, 6, "dog"), (8, 10.0, "dog")]}
    assert found.rows == 11
    expected = {
        3: "it ends at 10.5 s, after the end of the sound, which lasts 10 s",
        4: "it starts at 11 s, outside the sound, which lasts 10 s",
        5: "it ends at 3 s but starts at 4 s",
        6: "it ends at 4 s but starts at 4 s",
        7: "it starts at -1 s, outside the sound",
        8: "'nobody.wav' matches none of the recordings",
        9: "start 'four' and end '5' must be times in seconds",
        10: "there is no label",
        11: "must be times in seconds",
    }
    assert len(found.problems) == len(expected)
    for problem, (line, reason) in zip(found.problems, expected.items(), strict=True):
        assert f"line {line}: " in problem
        assert reason in problem
    assert found.describe_problems().startswith("Annotations skipped: 9. ")


def test_a_recording_without_events_is_annotated(tmp_path):
    path = tmp_path / "dcase.tsv"
    path.write_text("filename\tonset\toffset\tevent_label\na.wav\t\t\t\nb.flac\t1\t2\train\n")
    found = read_annotations(path, RECORDINGS)
    assert found.of_recording == {"rec/a.wav": [], "rec/b.flac": [(1, 2, "rain")]}


def test_what_cannot_be_used_at_all(tmp_path):
    with pytest.raises(ValueError, match="No such file or folder of annotations"):
        read_annotations(tmp_path / "missing", RECORDINGS)
    with pytest.raises(ValueError, match="holds no annotations: expected Raven"):
        read_annotations(tmp_path, RECORDINGS)
    for text, message in (
        (
            "file,start,end\na.wav,1,2\n",
            "no column for the label; its columns are file, start, end",
        ),
        ("file,label\na.wav,dog\n", "no column for the start and end"),
        ("1.0,2.0,dog\n", "has no header"),
        ('file,start,end,label\n"a.wav,1,2,dog\na.wav,2,3,dog\n', "unexpected end of data"),
        ("file,start,end,label\na.wav,1,2," + 140_000 * "a", "field larger than field limit"),
        ("file,start,end,label\nx.wav,1,2,dog\n", "Nothing in .* line 2: 'x.wav' matches none of"),
    ):
        path = tmp_path / "events.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_annotations(path, RECORDINGS)
    path.write_bytes(b"file,start\xff")
    with pytest.raises(ValueError, match="Cannot read the annotations"):
        read_annotations(path, RECORDINGS)


def test_a_label_column_of_another_name(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("file,start,end,Vogelart\na.wav,1,2,Amsel\n")
    found = read_annotations(path, RECORDINGS, label_column="Vogelart")
    assert found.label_names == ["Amsel"]
