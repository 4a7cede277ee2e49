"""The report and the landscapes in a headless Chromium, as a reader uses them; skipped where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.browser import browsing, find_chromium
from nnlearn.figures.page import Layers, Page, RunRecord, Series, write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no chromium; NNLEARN_CHROMIUM may name it"),
]
LANDSCAPE = Path(__file__).parent.parent / "docs" / "_static" / "landscape.html"
FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
# The share of pixels of a canvas that are drawn.
INK = """((canvas) => {
  const copy = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
  const pen = copy.getContext("2d", {willReadFrequently: true});
  pen.drawImage(canvas, 0, 0);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let drawn = 0;
  for (let i = 3; i < pixels.length; i += 4) drawn += pixels[i] > 0;
  return 4 * drawn / pixels.length;
})(document.querySelectorAll("canvas")[%d])"""


@pytest.fixture(scope="module")
def tab():
    with browsing() as tab:
        yield tab


def big_runs():
    """50 runs of 10,000 steps: ten settings, five seeds."""
    random, step, runs = np.random.default_rng(0), np.arange(1, 10001), []
    for setting in range(10):
        rate = 10 ** (-4 + setting / 3)
        for seed in range(5):
            loss = 2 * np.exp(-step * rate / 20) + 0.1 + 0.05 * random.random(10000)
            checks = step[199::200]
            series = {name: Series(step, loss * random.random(10000)) for name in ("grad_norm", "update_norm", "aux/a")}
            series = {"loss": Series(step, loss), "learning_rate": Series(step, rate * (1 - step / 10001))} | series
            series["accuracy"] = Series(checks, 1 - loss[199::200] / 3)
            maps = {name: random.random((1000, 20)) + 0.1 for name in ("update_ratio", "grad_norm", "param_norm")}
            layers = Layers(step[::10], tuple(f"block_{at}/kernel" for at in range(20)), maps)
            config = {"rate": rate, "width": 2**setting, "seed": seed}
            scores = {"accuracy": float(series["accuracy"].value[-1])}
            runs.append(RunRecord("run", series, ("accuracy",), config, scores, layers, 10000, "all steps"))
    return runs


def test_a_report_of_50_runs(tab, tmp_path):
    page = write_page(tmp_path / "big.html", big_runs(), Page("Fifty runs", findings=[], mode="max"))
    assert page.stat().st_size < 5e6
    assert tab.open(page) < 3
    assert tab.run(INK % 0) > 0.01  # the curves are there

    box = json.loads(tab.run("JSON.stringify(document.querySelector('#curves canvas').getBoundingClientRect())"))
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse("mouseMoved", *middle)
    tab.run(FRAME)
    assert tab.run("document.querySelector('#curves .panel output').textContent").startswith("step ")

    tab.mouse("mousePressed", *middle)
    tab.mouse("mouseMoved", middle[0] + 60, middle[1])
    tab.mouse("mouseReleased", middle[0] + 60, middle[1])
    begin, end = tab.run("state.zoom")
    assert 3000 < begin < end < 9000
    tab.run("document.querySelector('#curves canvas').focus()")
    tab.key("Escape")
    assert tab.run("state.zoom") is None

    tab.run("document.querySelector('#runs tbody input').click()")
    assert tab.run("state.shown.size") == 9
    tab.run("document.querySelector('#runs .bar button:last-of-type').click()")  # none
    tab.run(FRAME)
    few = tab.run(INK % 0)
    tab.run("document.querySelector('#runs .bar button').click()")  # all
    tab.run(FRAME)
    assert few < tab.run(INK % 0)
    tab.run("document.querySelectorAll('#runs th button')[0].click()")
    rates = tab.run("[...document.querySelectorAll('#runs tbody tr')].map((row) => +row.children[1].textContent)")
    assert len(rates) == 10 and sorted(rates) in (rates, rates[::-1])

    check_theme_and_width(tab)
    assert tab.problems == [] and tab.requests == []


def check_theme_and_width(tab):
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(background)
    tab.run("document.getElementById('theme').click()")
    assert tab.run(background) != light
    tab.run("document.getElementById('theme').click()")
    tab.prefer("dark")
    tab.run(FRAME)
    assert tab.run(background) != light and tab.run("document.getElementById('theme').textContent") == "Light theme"
    tab.prefer("light")
    tab.resize(400, 800)
    tab.run(FRAME)
    assert tab.run("document.documentElement.scrollWidth") == 400
    tab.resize(1280, 900)


def test_the_keyboard_reaches_everything(tab, tmp_path):
    tab.open(write_page(tmp_path / "small.html", big_runs()[:10], Page("Ten runs")))
    controls = "[...document.querySelectorAll('button, input, select, canvas[tabindex], summary, .table')]"
    wanted = tab.run(f"{controls}.filter((each) => each.offsetParent).length")
    seen = "window.reached = new Set(), document.addEventListener('focusin', (event) => reached.add(event.target)), 0"
    tab.run(seen)
    for _ in range(wanted + 5):
        tab.key("Tab")
    assert tab.run("reached.size") == wanted > 20
    tab.run("document.querySelector('#curves canvas').focus()")
    texts = []
    for name in ("ArrowRight", "ArrowRight", "End", "ArrowDown"):
        tab.key(name)
        texts.append(tab.run("document.querySelector('#curves .panel output').textContent"))
    assert len(set(texts)) == 4 and texts[2].startswith("step 9,9"), texts
    tab.key("+")
    assert tab.run("state.zoom !== null")
    tab.key("Escape")
    tab.run("document.getElementById('theme').focus()")
    tab.key("Enter")
    assert tab.run("document.documentElement.dataset.theme") == "dark"
    assert tab.problems == [] and tab.requests == []


def test_the_landscapes(tab):
    assert tab.open(LANDSCAPE) < 3
    assert tab.run("document.querySelectorAll('tbody tr').length") == 3
    for name in tab.run("[...document.querySelector('select').options].map((each) => each.value)"):
        tab.run(f"{{const c = document.querySelector('select'); c.value = {json.dumps(name)}; c.onchange}}; 0")
        tab.run("document.querySelector('select').dispatchEvent(new Event('change'))")
        tab.run(FRAME)
        assert tab.run("state.name") == name
    tab.run("document.querySelector('input[type=range]').focus()")
    before = tab.run("document.querySelector('.landscape output').textContent")
    tab.key("ArrowRight")
    tab.run(FRAME)
    assert tab.run("document.querySelector('.landscape output').textContent") != before
    check_theme_and_width(tab)
    assert tab.problems == [] and tab.requests == []
