"""The report in a real browser: no complaint, no request, every slider moves its numbers to the right values,
no scrolling sideways on a phone, and hostile text is text."""

import re

import numpy as np
import pytest
from report_formulas import PYTHON
from report_run import HOSTILE, write_run

from lab.browser import PATH, Browser
from lab.report import CHAPTERS, Config, main
from lab.screenshots import palette
from lab.sections.explorers import enumerated
from lab.sections.formulas import Slider, explorers
from nanoalign.terminal import visible

pytestmark = pytest.mark.skipif(not PATH, reason="no headless browser: apt-get install chromium brings one")


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    main(Config(run=str(folder)))
    return str(folder / "report.html")


def test_it_opens_without_a_complaint_or_a_request_and_nothing_in_it_runs(browser, page):
    browser.open(page)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("file://")] == [] and len(
        browser.requests
    ) == 1
    assert browser.run("window.owned") is None
    shown = browser.run("[...document.querySelectorAll('.said')].map((e) => e.textContent)")
    assert visible(HOSTILE) in [text.removesuffix(" 0?") for text in shown]
    assert browser.run("document.querySelectorAll('.said *').length") == 0  # no markup came of any text


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_scrolls_sideways(browser, page, width, dark):
    browser.open(page, width, 800, dark)
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.run("document.querySelectorAll('[hidden]').forEach((e) => (e.hidden = false))")
    assert browser.run("document.documentElement.scrollWidth") == width
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", light))) < 200) == dark


def same(shown: str, value) -> bool:
    """Is what an output shows the value, to four digits?"""
    numbers = [float(x.replace("\u2212", "-")) for x in shown.split()]
    values = value if isinstance(value, list) else [value]
    pairs = zip(numbers, values)
    return len(numbers) == len(values) and all(abs(a - b) <= 6e-4 * abs(b) + 1e-12 for a, b in pairs)


MOVE = """((id, value) => { const one = document.getElementById(id); one.value = value;
  for (const kind of ["input", "change"]) one.dispatchEvent(new Event(kind, { bubbles: true }));
  return one.value; })"""
OUTPUTS = """Object.fromEntries([...document.querySelectorAll("#explore-%s output[data-output]")]
  .map((one) => [one.dataset.output, one.textContent]))"""


def test_every_slider_moves_its_numbers_to_the_values_of_the_projects_functions(browser, page, double):
    browser.open(page)
    moved = 0
    for explorer in explorers(enumerated()):
        values = {c.name: c.value if isinstance(c, Slider) else c.options[0] for c in explorer.controls}
        for control in explorer.controls:
            key = f"{explorer.name}-{control.name}"
            if isinstance(control, Slider):
                aim = control.low + 0.63 * (control.high - control.low)
                values[control.name] = float(browser.run(f"{MOVE}('{key}', {aim})"))
                label = browser.run(f"document.querySelector('output[for={key}]').textContent")
                assert same(label, values[control.name])
            else:
                values[control.name] = browser.run(f"{MOVE}('{key}', '{control.options[-1]}')")
            expected = PYTHON[explorer.name](**values, **explorer.arrays)
            for name, shown in browser.run(OUTPUTS % explorer.name).items():
                assert same(shown, expected[name]), (explorer.name, values, name, shown, expected[name])
            moved += 1
        assert browser.run(f"document.querySelectorAll('#explore-{explorer.name} svg > *').length") > 3
    assert moved >= 25 and browser.errors == []


def test_the_keyboard_moves_a_slider_and_finds_every_control_labelled(browser, page):
    browser.open(page)
    browser.run("document.getElementById('dpo-chosen').focus()")
    before = browser.run("document.querySelector('#explore-dpo output[data-output=margin]').textContent")
    browser.press("ArrowRight", 39)
    after = browser.run("document.querySelector('#explore-dpo output[data-output=margin]').textContent")
    assert (before, after) == ("1", "1.05")
    unnamed = "[...document.querySelectorAll('input, select')].filter((one) => !one.labels.length)"
    assert browser.run(f"{unnamed}.length") == 0
    untold = "[...document.querySelectorAll('svg')].filter((one) => !one.getAttribute('aria-label'))"
    assert browser.run(f"{untold}.length") == 0


def test_every_link_leads_somewhere(browser, page):
    browser.open(page)
    links = "[...document.querySelectorAll('a[href]')].map((a) => a.getAttribute('href'))"
    found = browser.run(links)
    assert set(found) >= {f"#{key}" for key in CHAPTERS}
    lost = [link for link in set(found) if not browser.run(f"!!document.querySelector('{link}')")]
    assert lost == []


def test_the_filter_shows_a_family_and_the_slider_over_beta_the_nearest_measured_run(browser, page):
    browser.open(page)
    shown = (
        "[...document.querySelectorAll('[data-group=%s]')].filter((e) => !e.hidden).map((e) => e.dataset.of)"
    )
    assert set(browser.run(shown % "family")) == {"harm"}
    browser.run(f"{MOVE}('family', '<b onclick=x>')")
    assert set(browser.run(shown % "family")) == {"<b onclick=x>"}
    browser.run(f"{MOVE}('beta-measured', 0.16)")
    assert browser.run(shown % "beta") == ["0.2"]
    assert browser.run(f"{MOVE}('beta-measured', 0.09)") and browser.run(shown % "beta") == ["0.0"]
    text = browser.run("document.querySelector('#hacking').innerText")
    assert "hacked" in text and "nearest measured run: 0" in text


MIDDLE = """(() => { const svg = document.querySelector("#run-dpo [data-curve] svg"); svg.scrollIntoView();
  const box = svg.getBoundingClientRect();
  return { x: box.left + box.width / 2, y: box.top + box.height / 2 }; })()"""


def test_a_pointer_reads_a_curve(browser, page):
    browser.open(page, still=True)  # no smooth scrolling
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", **browser.run(MIDDLE))
    reading = browser.run("document.querySelector('#run-dpo .reading').textContent")
    assert re.fullmatch(r"step \d+: [\d.]+", reading)


def test_a_picture_keeps_its_commonest_colours_and_takes_the_nearest_for_the_others(browser):
    few = np.array([[[255, 0, 0], [0, 0, 255], [7, 8, 9]]] * 2, np.uint8)
    assert np.array_equal(browser.pixels(palette(few)), few)
    common, rare = ([[i, green, 0] for i in range(256)] for green in (0, 1))
    found = browser.pixels(palette(np.array([common * 2 + rare[:44]], np.uint8)))
    assert np.array_equal(found, np.array([common * 3])[:, :556])
