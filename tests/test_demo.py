"""The page's functions, the page in headless Chromium (slow), and the Space folder."""

import configparser
import contextlib
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from feature_extraction import AudioDecodingError
from modeling_ast.events_ast import Event, EventRules
from scripts import demo
from scripts.inference.classifier import Classifier
from scripts.inference.live import Line, Listener
from scripts.inference.page import (
    build_app,
    can_explain,
    describe_model,
    explain,
    listen,
    serve,
    write_example,
)
from scripts.inference.space import write_space

from .conftest import REPOSITORY, shared
from .sounds import PITCHES, encode, tone, write_class_folders

SPACE = REPOSITORY / "hub_configs" / "space"


@pytest.fixture(scope="module")
def classifier(native_folder):
    return Classifier(str(native_folder))


@pytest.fixture
def recording(tmp_path) -> Path:
    path = tmp_path / "recording.flac"
    path.write_bytes(encode(tone(1000.0, seed=0, seconds=3)))
    return path


def test_a_file_is_heard_window_by_window(classifier, recording):
    sound = listen(classifier, recording, max_minutes=1)
    assert sound.waveform.shape == (48000,)
    assert sound.heard.duration == 3.0
    assert sound.heard.scores.shape == (len(sound.heard.spans), 5)
    # Of a sound of several windows the page names what is highest anywhere, not on average.
    assert sound.is_long
    assert sound.best_label == classifier.label_names[sound.heard.scores.max(axis=0).argmax()]


def test_broken_and_long_files_are_refused_readably(classifier, recording, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"this is no sound" * 100)
    with pytest.raises(AudioDecodingError, match=r"Cannot read broken\.wav as audio") as error:
        listen(classifier, broken, max_minutes=1)
    assert str(tmp_path) not in str(error.value)  # the server's folders are nobody's business
    with pytest.raises(ValueError, match=r"recording\.flac is longer than 0.04 minutes"):
        listen(classifier, recording, max_minutes=0.04)


def test_explanation_shows_the_best_labels_best_window(classifier, recording, tmp_path):
    sound = listen(classifier, recording, max_minutes=1)
    caption = explain(classifier, sound, tmp_path / "map.png")
    assert sound.best_label.replace("_", " ") in caption
    column = classifier.label_names.index(sound.best_label)
    start, _ = sound.heard.spans[sound.heard.scores[:, column].argmax()]
    assert f"{start:.1f} s to" in caption
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_models_without_attention_are_not_explained(classifier, monkeypatch):
    assert can_explain(classifier)
    monkeypatch.setattr(classifier.pipeline.model.config, "merged_tokens_per_layer", 2)
    assert not can_explain(classifier)


def function(app, name):
    return next(block.fn for block in app.fns.values() if block.fn.__name__ == name)


def test_page_functions(classifier, recording, tmp_path):
    pytest.importorskip("gradio")
    app = build_app(classifier, tmp_path, max_minutes=1)
    new_sound = function(app, "new_sound")
    message, hint, results, sound, scores, figure, table, download, image = new_sound(
        str(recording), 0.05
    )
    assert message["visible"] is False
    assert hint["visible"] is False
    assert results["visible"] is True
    assert len(scores["value"]) == 5
    assert scores["label"] == "Highest score at any time"
    events = sound.heard.events(EventRules(0.05))
    assert [row[1] for row in table["value"]] == [event.label.replace("_", " ") for event in events]
    with open(download["value"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [event.label for event in events]
    assert [float(row["start"]) for row in rows] == pytest.approx([e.start for e in events])
    assert len(figure.axes) >= 4
    assert Path(image).is_relative_to(tmp_path)

    _, table, download = function(app, "new_threshold")(sound, 0.95)
    rows = table["value"]
    assert len(rows) < len(events)
    assert len(Path(download["value"]).read_text().splitlines()) == 1 + len(rows)
    _, table, _ = function(app, "new_threshold")(sound, 1.0)
    assert table == {**table, "value": [], "label": "No sound reaches the threshold: lower it to "
                     "see more"}  # fmt: skip
    cleared = new_sound(None, 0.5)
    assert cleared[1]["visible"] is True  # what to do
    assert cleared[2]["visible"] is False
    assert cleared[3:7] == [None] * 4
    assert cleared[-1] is None

    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound at all")
    message, hint, *others = new_sound(str(broken), 0.5)
    assert message["visible"] is True
    assert message["value"].startswith("Cannot read broken.wav as audio")
    assert hint["visible"] is False
    assert others == cleared[2:]


def test_live_rows_appear_and_are_over(classifier, tmp_path):
    """Chunks as a browser's microphone sends them: whole numbers, two channels, any rate."""
    pytest.importorskip("gradio")
    app = build_app(classifier, tmp_path)
    hear_live, end_live = function(app, "hear_live"), function(app, "end_live")
    assert hear_live(None, None)[0] is None
    session = None
    for seed in range(4):
        sound = np.stack([tone(1000.0, seed=seed, seconds=1)] * 2, axis=1).repeat(3, axis=0)
        chunk = (48000, (sound * 32767).astype(np.int16))
        session, rows, figures = hear_live(chunk, session)
    heard = session._listener.figures
    assert heard.heard_s == pytest.approx(4, abs=1.1)
    assert figures == str(heard)
    assert rows == session.rows
    loud = [Event(0.0, 1.0, "a_b", 0.5), Event(0.0, 2.0, "a_b", 0.75)]
    later = Event(3.0, 4.0, "c", 0.5)
    lines = iter([[Line(False, e, 0.1) for e in (loud[0], later)], [Line(True, loud[1], 0.1)]])
    session.events.clear()
    ready = iter([True, True, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listener, "is_ready", property(lambda _: next(ready)))
        patch.setattr(Listener, "step", lambda _: next(lines))
        session.hear(sound)
    over = ["0:00.0 – 0:02.0", "a b", "75%"]
    assert session.rows == [["0:03.0 – now", "c", "50%"], over]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listener, "finish", lambda _: [Line(True, later, 0.0)])
        rows, _ = end_live(session)
    assert [row for row in rows if row[1] in ("c", "a b")] == [
        ["0:03.0 – 0:04.0", "c", "50%"],
        over,
    ]
    assert session._listener.figures.heard_s == session._listener.ring.end / 16000  # all of it
    hear_live(chunk, session)
    assert session.rows == rows  # a late chunk changes nothing


def test_page_says_what_it_knows_and_has_an_example(classifier, tmp_path):
    assert "knows 5 sounds: LABEL 0 · LABEL 1 ·" in describe_model(classifier)
    waveform, rate = soundfile.read(write_example(tmp_path))
    assert rate == 16000
    assert len(waveform) == 16 * rate
    pytest.importorskip("gradio")
    app = build_app(classifier, tmp_path)
    assert soundfile.info(function(app, "example")()).duration == 16
    texts = " ".join(str(block.value) for block in app.blocks.values() if hasattr(block, "value"))
    assert "knows 5 sounds" in texts
    assert "record one, or try the example" in texts


def test_served_to_this_computer_only_and_nothing_is_kept(classifier, monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_RUN_HISTORY", "")
    seen = {}

    def launch(app, **options):
        assert app.analytics_enabled is False
        seen.update(options, folder=Path(os.environ["GRADIO_TEMP_DIR"]))
        assert seen["folder"].is_dir()

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    serve(classifier)
    assert seen["server_name"] == "127.0.0.1"
    assert seen["share"] is False
    assert seen["max_file_size"] == "100mb"
    assert not seen["folder"].exists()


def test_command_errors_are_one_line(tmp_path, monkeypatch, capsys):
    def error_of(*arguments):
        with pytest.raises(SystemExit) as stopped:
            demo.main([*map(str, arguments)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "ast-demo: error: No such checkpoint folder" in error_of(tmp_path / "missing")
    assert "--max_minutes must be above 0, got -1" in error_of("x", "--max-minutes", "-1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in error_of("--write-space", tmp_path / "full")


def test_missing_gradio_says_what_to_install(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[demo\]'"):
        build_app(classifier, tmp_path)


@pytest.mark.slow
def test_space_holds_all_it_needs(native_folder, tmp_path):
    """Its app starts in a process that cannot see this repository."""
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    write_space(space, str(native_folder))
    assert {path.name for path in SPACE.iterdir()} <= {path.name for path in space.iterdir()}
    script = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '_frozen_importlib' in repr(f)]\n"
        f"hidden = ('', {str(REPOSITORY)!r})\n"
        f"sys.path[:] = [{str(space)!r}] + [p for p in sys.path if p not in hidden]\n"
        "import gradio, runpy\n"
        "def launch(app, **options):\n"
        "    import ast_scripts, modeling_ast, feature_extraction\n"
        "    for module in (ast_scripts, modeling_ast, feature_extraction):\n"
        f"        assert module.__file__.startswith({str(space)!r}), module.__file__\n"
        "    print('launched', options['server_name'], app.config['title'])\n"
        "gradio.Blocks.launch = launch\n"
        f"runpy.run_path({str(space / 'app.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "launched 0.0.0.0" in done.stdout


def test_space_of_a_hub_model(tmp_path):
    write_space(tmp_path / "space", "someone/model")
    assert '"someone/model"' in (tmp_path / "space" / "app.py").read_text()
    written = {str(path.relative_to(tmp_path / "space")) for path in tmp_path.rglob("*.py")}
    for package, source in (("ast_scripts", "scripts"), ("modeling_ast", "modeling_ast")):
        files = {
            f"{package}/{path.relative_to(REPOSITORY / source)}"
            for path in (REPOSITORY / source).rglob("*.py")
        }
        assert files <= written
    header = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in header
    assert "app_file: app.py" in header


def test_space_requires_what_the_package_does():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    options = config["options"]["install_requires"].split()
    options += config["options.extras_require"]["demo"].split()
    assert sorted((SPACE / "requirements.txt").read_text().split()) == sorted(options)


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory) -> Path:
    """A small model that tells high, low and middle tones apart."""
    folder = tmp_path_factory.mktemp("trained")
    write_class_folders(folder / "tones", clips_per_class=40)
    command = [sys.executable, "-m", "scripts.finetune_accelerate", str(folder / "tones")]
    command += ["--model", "scratch", "--hidden_size", "48", "--num_hidden_layers", "2"]
    command += ["--max_length", "48", "--num_mel_bins", "64", "--num_epochs", "8"]
    command += ["--learning_rate", "1e-3", "--time_mask", "0", "--frequency_mask", "0"]
    command += ["--num_workers", "0", "--output_dir", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "checkpoint"


@contextlib.contextmanager
def served(*arguments):
    """The address of a served page; once it is over, no error may have been logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "scripts.demo", *arguments, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if f"http://127.0.0.1:{port}" in line:
            break
    else:
        pytest.fail("".join(lines))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=60)
    assert "Traceback" not in output


@pytest.fixture
def page(trained_checkpoint):
    with served(str(trained_checkpoint)) as address:
        yield address


@pytest.fixture
def browser(tmp_path):
    with started_browser(tmp_path) as opened:
        yield opened


@contextlib.contextmanager
def started_browser(folder, *arguments):
    """Chromium that reaches nothing but this machine; downloads go into the folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,2300",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # no network
        *arguments,
    ):
        options.add_argument(argument)
    downloads = {"download.default_directory": str(folder / "downloads")}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    try:
        yield opened
    finally:
        opened.quit()


def wait_for(condition, seconds=120):
    """The result of `condition` once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {condition}")


@pytest.mark.slow
def test_page_in_a_browser(page, browser, tmp_path):
    """A file goes in, its label comes out; a broken one shows a message; no other host is asked."""
    from selenium.webdriver.common.by import By

    def text(selector):
        return "\n".join(e.text for e in browser.find_elements(By.CSS_SELECTOR, selector))

    browser.get(page)
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#sound input[type=file]"))
    sounds = [tone(PITCHES[name], seed=7, seconds=1.5) for name in ("low", "high", "mid")]
    recording = tmp_path / "three tones.flac"
    recording.write_bytes(encode(np.concatenate(sounds)))
    browser.find_element(By.CSS_SELECTOR, "#sound input[type=file]").send_keys(str(recording))
    wait_for(lambda: "low" in text("#labels"))
    wait_for(lambda: all(name in text("#events") for name in PITCHES))
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#timeline img"))
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#explanation img"))
    wait_for(lambda: browser.find_element(By.ID, "download").is_enabled())
    browser.find_element(By.ID, "download").click()
    wait_for((tmp_path / "downloads" / "events.csv").exists)
    with open(tmp_path / "downloads" / "events.csv", encoding="utf-8", newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == set(PITCHES)
    time.sleep(1)  # for the screenshot only: pictures fade in
    pictures = REPOSITORY / "runs"
    pictures.mkdir(exist_ok=True)
    browser.save_screenshot(str(pictures / "live_page.png"))

    single = tmp_path / "single.wav"
    soundfile.write(single, tone(PITCHES["high"], seed=9, seconds=0.5), 16000)
    browser.get(page)
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#sound input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#sound input[type=file]").send_keys(str(single))
    assert wait_for(lambda: text("#labels h2")) == "high"

    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"this is no sound" * 100)
    browser.get(page)
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#sound input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#sound input[type=file]").send_keys(str(broken))
    box = "#message textarea"
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, box))
    message = browser.find_element(By.CSS_SELECTOR, box).get_property("value")
    assert message.startswith("Cannot read broken.wav as audio")
    browser.save_screenshot(str(pictures / "live_page_broken_file.png"))

    addresses = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.add(message["params"]["request"]["url"])
    assert addresses
    foreign = {a for a in addresses if not re.match(rf"{page}|data:|blob:|chrome", a)}
    assert not foreign


@pytest.mark.slow
def test_live_tab_hears_a_dog(tmp_path):
    """A bark of ESC-10 as the browser's microphone: rows appear, and are over after "Stop".

    Then a visitor who leaves while recording, and one who refuses the microphone.
    """
    import pyarrow.parquet as pq
    from selenium.webdriver.common.by import By

    table = pq.read_table(shared("data/esc10/data/fold5.parquet")).to_pylist()
    clip = next(row["audio"]["bytes"] for row in table if row["label"] == 0)
    samples, rate = soundfile.read(io.BytesIO(clip))
    microphone = tmp_path / "microphone.wav"
    soundfile.write(microphone, np.concatenate([samples, np.zeros(2 * rate)]), rate)
    fake = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}")

    with served() as address, started_browser(tmp_path, *fake) as browser:

        def text(selector):
            return "\n".join(e.text for e in browser.find_elements(By.CSS_SELECTOR, selector))

        def button(name):
            buttons = browser.find_elements(By.CSS_SELECTOR, "#microphone button")
            return next((b for b in buttons if b.text == name), None)

        def heard_s():
            figures = re.search(r"heard ([\d.]+) s", text("#live_figures"))
            return float(figures[1]) if figures else 0.0

        def open_tab(microphone):
            permission = {"permission": {"name": "microphone"}, "setting": microphone}
            browser.execute_cdp_cmd("Browser.setPermission", permission)
            browser.get(address)
            tabs = (By.CSS_SELECTOR, "button[role=tab]")
            named = wait_for(lambda: [t for t in browser.find_elements(*tabs) if t.text == "Live"])
            named[0].click()
            wait_for(lambda: button("Record")).click()

        open_tab("granted")
        wait_for(lambda: "Dog" in text("#live_events") and "now" in text("#live_events"))
        assert "0 drops" in text("#live_figures")
        pictures = REPOSITORY / "runs"
        pictures.mkdir(exist_ok=True)
        browser.save_screenshot(str(pictures / "live_tab.png"))
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        time.sleep(1)  # for the screenshot only
        browser.save_screenshot(str(pictures / "live_tab_phone.png"))
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= phone["width"]  # nothing to scroll sideways
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        button("Stop").click()
        wait_for(lambda: text("#live_events") and "now" not in text("#live_events"))
        assert "Dog" in text("#live_events")

        before = wait_for(heard_s)
        button("Record").click()
        wait_for(lambda: 0 < heard_s() < before)  # anew
        open_tab("granted")  # leaves while recording
        wait_for(heard_s)
        open_tab("denied")
        wait_for(lambda: "allow access to the microphone" in text("body"))
