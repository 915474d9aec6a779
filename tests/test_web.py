"""The page that runs in the visitor's browser: its files; and in Chromium against Python."""

import contextlib
import functools
import http.server
import io
import json
import shutil
import threading

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from feature_extraction import ASTFeatureExtractor, load_audio
from modeling_ast import ASTForAudioClassification
from modeling_ast.export_ast import export_onnx
from modeling_ast.onnx_ast import OnnxClassifier
from scripts.common.bundled import hub_configs_folder
from scripts.inference.web import _RUNTIME_FILES, write_web

from .conftest import shared


@pytest.fixture
def fake_runtime(tmp_path):
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in _RUNTIME_FILES:
        (folder / name).write_text(name)
    return folder


def test_the_folder_is_complete_and_asks_nobody_else(tiny_onnx, fake_runtime, tmp_path):
    write_web(tiny_onnx, tmp_path / "page", "tiny", fake_runtime)
    names = {str(p.relative_to(tmp_path / "page")) for p in (tmp_path / "page").rglob("*.*")}
    page = {"index.html", "app.js", "worker.js", "recorder.js", "model.onnx", "model.json"}
    assert names == page | {f"ort/{name}" for name in _RUNTIME_FILES}
    facts = json.loads((tmp_path / "page" / "model.json").read_text())
    assert facts["labels"] == ["a_dog", "b", "c", "d", "e"]
    assert (facts["samplingRate"], facts["windowSamples"]) == (16000, 20720)  # 1.295 s
    for name in ("index.html", "app.js", "worker.js", "recorder.js"):
        text = (tmp_path / "page" / name).read_text()
        assert "//" not in text.replace("// ", "").replace("//\n", ""), name  # no address


def test_mistakes(tiny_onnx, fake_runtime, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not empty"):
        write_web(tiny_onnx, fake_runtime, "tiny", fake_runtime)
    (fake_runtime / _RUNTIME_FILES[0]).unlink()
    with pytest.raises(ValueError, match=r"has no ort\.wasm\.min\.mjs"):
        write_web(tiny_onnx, tmp_path / "page", "tiny", fake_runtime)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is not installed"):
        write_web(tiny_onnx, tmp_path / "other", "tiny")


@contextlib.contextmanager
def served(folder):
    """The folder's address, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    Handler.extensions_map = {**Handler.extensions_map, ".mjs": "text/javascript"}
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


@contextlib.contextmanager
def browser(address):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    page = webdriver.Chrome(options=options, service=service)
    try:
        page.set_script_timeout(300)
        page.get(address)
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(page, 60).until(
            lambda p: p.execute_script("return document.body.dataset.state") == "ready",
            str(page.get_log("browser")),
        )
        yield page
    finally:
        page.quit()


IN_BROWSER = """
const [samples, done] = arguments;
const page = await import(new URL("app.js", location).href);
const answer = await page.classify(Float32Array.from(samples));
done({
  probabilities: [...answer.probabilities],
  windows: answer.windows.map((w) => ({start: w.start, end: w.end, logits: [...w.logits]})),
});
"""


@pytest.mark.slow  # fetches a package, starts a browser
def test_logits_in_the_browser_are_pythons(tiny_onnx, tmp_path):
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    write_web(tiny_onnx, tmp_path / "page", "tiny")
    random = np.random.default_rng(0)
    classifier = OnnxClassifier(tiny_onnx)
    with served(tmp_path / "page") as (address, asked), browser(address) as page:
        for samples in (400, 16000, 20720, 20880, 60000):
            sound = (0.1 * random.standard_normal(samples)).astype(np.float32)
            found = page.execute_async_script(IN_BROWSER, sound.tolist())
            expected = classifier(sound, top_k=None, return_timestamps=True)
            spans, heard = (
                [(w["start"], w["end"]) for w in answer["windows"]] for answer in (expected, found)
            )
            np.testing.assert_allclose(heard, spans, atol=1e-9)
            start, end = (round(second * 16000) for second in spans[0])
            features = classifier.feature_extractor(sound[start:end])
            logits = classifier.model(**features).logits[0].numpy()
            np.testing.assert_allclose(found["windows"][0]["logits"], logits, atol=1e-3)
            scores = {entry["label"]: entry["score"] for entry in expected["labels"]}
            names = ["a_dog", "b", "c", "d", "e"]
            np.testing.assert_allclose(
                found["probabilities"], [scores[name] for name in names], atol=1e-3
            )
    assert {path.split("?")[0] for path in asked} <= {
        *("/", "/app.js", "/worker.js", "/model.json", "/model.onnx"),
        *(f"/ort/{name}" for name in _RUNTIME_FILES),
    }


@pytest.mark.slow  # exports, fetches a package, starts a browser
def test_real_sounds_in_the_browser(tmp_path):
    """The bundled model in 8 bits: under 20 MB, and Python's best label for 50 clips.

    Browsers round 8-bit products differently, so labels within 0.01 of each other count as tied.
    """
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    bundled = hub_configs_folder() / "ast-tiny-esc10"
    model = ASTForAudioClassification.from_pretrained(bundled)
    extractor = ASTFeatureExtractor.from_pretrained(bundled)
    file = export_onnx(model, extractor, tmp_path, ["int8"])["int8"]
    write_web(file, tmp_path / "page", bundled.name)
    size = sum(path.stat().st_size for path in (tmp_path / "page").rglob("*") if path.is_file())
    assert size < 20e6, f"{size / 1e6:.1f} MB"
    classifier = OnnxClassifier(file)
    rows = pyarrow.parquet.read_table(shared("data/esc10/data/fold5.parquet")).to_pylist()[:50]
    wrong, tied = [], []
    with served(tmp_path / "page") as (address, _), browser(address) as page:
        for number, row in enumerate(rows):
            # As a WAV, so that both hear the same samples.
            wav = io.BytesIO()
            sound = load_audio(row["audio"]["bytes"])
            soundfile.write(wav, sound, 16000, format="WAV", subtype="FLOAT")
            path = tmp_path / f"{number}.wav"
            path.write_bytes(wav.getvalue())
            page.find_element("id", "file").send_keys(str(path))
            from selenium.webdriver.support.ui import WebDriverWait

            WebDriverWait(page, 60).until(
                lambda p, name=path.name: (
                    p.find_element("id", "status").text.startswith(f"{name}:")
                    and "real time" in p.find_element("id", "status").text
                )
            )
            top = page.find_element("css selector", "#labels tbody td").text
            best = classifier(sound, top_k=2)
            names = [answer["label"].replace("_", " ") for answer in best]
            if top != names[0]:
                is_tie = top == names[1] and best[0]["score"] - best[1]["score"] < 0.01
                (tied if is_tie else wrong).append((number, top, best))
        assert not wrong
        page.set_window_size(420, 900)
        page.save_screenshot(str(tmp_path / "page.png"))
    print(f"{size / 1e6:.1f} MB; other ties: {tied}; screenshot {tmp_path / 'page.png'}")
