"""The workbench in headless Chromium: index, find, mark, review, teach, on real sound (slow)."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import REPOSITORY, shared
from .test_demo import browser, wait_for  # noqa: F401

CLASSES = {0: "dog", 1: "rain", 5: "sneeze", 8: "rooster"}  # of ESC-10
CLIPS = 10


def write_clips(fold: int, folder: Path, count: int) -> list[Path]:
    """Files named CLASS_NUMBER.ogg."""
    table = pq.read_table(shared(f"data/esc10/data/fold{fold}.parquet")).to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for label, name in CLASSES.items():
        for number, row in enumerate([r for r in table if r["label"] == label][:count]):
            path = folder / f"{name}_{fold}{number}.ogg"
            path.write_bytes(row["audio"]["bytes"])
            paths.append(path)
    return paths


class Page:
    """A served workbench."""

    def __init__(self, index: Path, marks: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "scripts.demo", "--index", str(index)]
        self.process = subprocess.Popen(
            [*command, "--marks", str(marks), "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if self.address in line:
                return
        pytest.fail("".join(lines))

    def end(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=60)


@pytest.mark.slow
def test_the_whole_loop_in_a_browser(browser, tmp_path):  # noqa: F811
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    write_clips(1, tmp_path / "field", CLIPS)
    write_clips(2, tmp_path / "field", CLIPS)
    held_out = write_clips(5, tmp_path / "held_out", 1)
    command = [sys.executable, "-m", "scripts.index", str(tmp_path / "field")]
    command += ["--output", str(tmp_path / "index")]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    marks = tmp_path / "marks.csv"
    page = Page(tmp_path / "index", marks)

    def element(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def shown(selector):
        found = browser.find_elements(By.CSS_SELECTOR, selector)
        return [one for one in found if one.is_displayed()]

    def open_tab(name):
        tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        next(tab for tab in tabs if tab.text == name).click()

    def marked():
        if not marks.exists():
            return []
        with marks.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    pictures = REPOSITORY / "runs"
    pictures.mkdir(exist_ok=True)
    try:
        # Find: an example's likes, heard and seen; the right ones marked at once.
        browser.get(page.address)
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "button[role=tab]"))
        open_tab("Find")
        wait_for(lambda: shown("#find"))
        element("#find").click()
        boxes = wait_for(lambda: shown("#find_message textarea"))
        assert "Upload or record" in boxes[0].get_property("value")
        element("#example_sound input[type=file]").send_keys(str(held_out[0]))
        wait_for(lambda: shown("#example_sound audio, #example_sound .waveform-container"))
        time.sleep(1)
        element("#find").click()
        wait_for(lambda: len(shown("#found .card img")) == 12)
        names = [one.text for one in shown("#found .card .name")]
        right = [number for number, name in enumerate(names, start=1) if "dog" in name][:4]
        assert len(right) >= 3, names
        browser.save_screenshot(str(pictures / "workbench_find.png"))
        for box in shown("#right_ones input[type=checkbox]"):
            if int(box.get_attribute("name") or box.get_property("value")) in right:
                box.click()
        element("#find_label textarea, #find_label input").send_keys("dog")
        element("#mark_found").click()
        wait_for(lambda: len(marked()) == len(right))

        # A spectrogram plays from where it is clicked.
        picture = shown("#found .card .picture")[0]
        ActionChains(browser).move_to_element(picture).click().perform()
        audio = shown("#found .card audio")[0]
        place = wait_for(
            lambda: browser.execute_script(
                "return arguments[0].currentTime / arguments[0].duration", audio
            )
        )
        assert 0.3 < place < 0.75

        # Review by keys: labels by number once they exist, else typed.
        open_tab("Review")
        wait_for(lambda: shown("#start"))
        element("#start").click()

        def current():
            cards = shown("#review_card .card")
            return cards[0].find_element(By.CSS_SELECTOR, ".name").text if cards else ""

        def review_one(before):
            name = wait_for(lambda: current() if current() != before else "")
            label = name.split("_")[0]
            count = len(marked())
            keyed = {one.text.split(" (")[0]: one.text for one in shown("[id^=label]") if one.text}
            if label in keyed:
                key = keyed[label].rstrip(")")[-1]
                element("body").send_keys(key)
            else:
                box = element("#other_label textarea, #other_label input")
                box.send_keys(label, Keys.ENTER)
                browser.execute_script("document.activeElement.blur()")
            wait_for(lambda: len(marked()) == count + 1)
            assert marked()[-1]["label"] == label
            return name

        name = ""
        while len(marked()) < 20:
            name = review_one(name)
        wait_for(lambda: current() != name)
        browser.save_screenshot(str(pictures / "workbench_review.png"))

        # Undo takes the mark from the file, and a kill takes nothing.
        element("body").send_keys("u")
        wait_for(lambda: len(marked()) == 19)
        review_one("")
        page.end(signal.SIGKILL)
        assert len(marked()) == 20
        page = Page(tmp_path / "index", marks)

        # Teach; a recording that was never indexed gets its label.
        browser.get(page.address)
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "button[role=tab]"))
        open_tab("Teach")
        wait_for(lambda: shown("#teach"))
        element("#teach").click()
        wait_for(lambda: "held-out" in element("#outcome").text)
        wait_for(lambda: element("#download_checkpoint").is_enabled())
        # Not rain: from the four marks that it gets here, it is not yet learned.
        tried = [path for path in held_out if path.name.startswith(("dog", "sneeze"))]
        assert len(tried) == 2
        for path in tried:
            element("#try_sound input[type=file]").send_keys(str(path))
            wanted = path.name.split("_")[0]
            wait_for(lambda wanted=wanted: [h.text for h in shown("#try_labels h2")] == [wanted])
            clear = shown("#try_sound button[aria-label=Clear]")
            if path != tried[1]:
                clear[0].click()
                wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#try_sound input"))
        browser.save_screenshot(str(pictures / "workbench_teach.png"))

        # On a phone nothing is wider than the screen.
        browser.set_window_size(390, 844)
        for tab in ("Find", "Review", "Teach"):
            open_tab(tab)
            time.sleep(0.5)
            width = browser.execute_script("return document.documentElement.scrollWidth")
            assert width <= browser.execute_script("return window.innerWidth"), tab
    finally:
        browser.save_screenshot(str(pictures / "workbench_last.png"))
        page.end()
