"""The pages in a real browser: nothing on its console, what is clicked opens, at every width."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.browser import Browser, Page, browser, load
from hvd_eurosat.run.comparison import find_runs, write_comparison
from hvd_eurosat.run.page import write_page
from tests.system.conftest import need
from tests.unit.runs import grow_run

SIZES = [(1280, False), (1280, True), (390, False)]
TALLEST = "Math.max(0, ...[...document.querySelectorAll('tr')].map((row) => row.clientHeight))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    need("chromium")
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """done, live and dead, each with its page, and their comparison."""
    folder = tmp_path_factory.mktemp("runs")
    grow_run(folder / "done", train__seed=0)
    grow_run(folder / "live", "running", 2, {"updated": time.time(), "seconds_left": 90.0}, optim__lr=0.25)
    grow_run(folder / "dead", "failed", 1, {"error": "the disk is full"})
    for name in ("done", "live", "dead"):
        write_page(folder / name)
    write_comparison(find_runs([folder]), folder / "index.html")
    return folder


CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
  const light = () => {
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words || !element.getClientRects().length) continue;
    const around = [];
    for (let one = element; one; one = one.parentElement) around.unshift(getComputedStyle(one).backgroundColor);
    around.forEach(over);
    const ground = light(), style = getComputedStyle(element);
    over(element instanceof SVGElement ? style.fill : style.color);
    const ink = light(), ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (ratio < 4.5) found.push(`${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()"""  # of each element with words, those whose contrast is below that of WCAG 2.2, level AA


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["done", "live", "dead", "."])
def test_words_stand_out_from_their_ground(chromium: Browser, runs: Path, name: str, dark: bool) -> None:
    assert load(chromium, runs / name / "index.html", dark=dark).ask(CONTRAST) == []


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("name", ["done", "live", "dead", "."])
def test_nothing_is_complained_of_and_nothing_sticks_out(
    chromium: Browser, runs: Path, name: str, width: int, dark: bool
) -> None:
    page = load(chromium, runs / name / "index.html", width, dark=dark)
    assert page.ask(OVERFLOW) == 0
    assert page.ask(TALLEST) < 250, "words of a table are broken into letters"
    assert page.complaints == []


def test_a_number_of_the_matrix_shows_its_images(chromium: Browser, runs: Path) -> None:
    page = load(chromium, runs / "done" / "index.html")
    page.click('button.cell[data-cell="1-2"]')
    assert page.ask("viewer.open")
    assert page.ask("document.querySelector('#viewer h3').textContent") == "Pasture, taken for River"
    assert page.ask("document.querySelectorAll('#viewer img').length") == 12
    sure = page.ask("[...document.querySelectorAll('#viewer figure')].map((figure) => Number(figure.dataset.sure))")
    assert sure == sorted(sure, reverse=True)
    assert page.ask("[...document.querySelectorAll('#viewer img')].every((image) => image.naturalWidth === 64)")
    page.press("Escape")
    assert not page.ask("viewer.open")
    assert page.complaints == []


def test_it_works_by_keyboard(chromium: Browser, runs: Path) -> None:
    page = load(chromium, runs / "done" / "index.html")
    page.ask("document.querySelector('button.cell[data-cell=\"1-2\"]').focus()")
    page.press("Enter")
    assert page.ask("viewer.open")
    page.press("Escape")
    page.ask("document.querySelector('svg[data-chart]').focus()")
    page.press("ArrowRight")
    assert "epoch 1" in legend(page)


def legend(page: Page) -> str:
    """What the first chart says."""
    return " ".join(str(page.ask("document.querySelector('.legend').textContent")).split())


def test_curves_say_their_values(chromium: Browser, runs: Path) -> None:
    page = load(chromium, runs / "done" / "index.html")
    page.hover("svg[data-chart]")
    assert legend(page) == "epoch 2training 0.5000validation 0.5500"


def test_tables_sort(chromium: Browser, runs: Path) -> None:
    page = load(chromium, runs / "done" / "index.html")
    names = "[...document.querySelectorAll('#classes tbody tr')].map((row) => row.cells[0].textContent)"
    page.click("#classes th:nth-child(2) button")
    assert page.ask(names)[0] == "Pasture"
    page.click("#classes th:nth-child(2) button")
    assert page.ask(names)[-1] == "Pasture"
    page.tell("Page.reload")
    page.ask("new Promise((done) => setTimeout(done, 500))")
    assert page.ask(names)[-1] == "Pasture"


def test_what_was_opened_stays_open(chromium: Browser, runs: Path) -> None:
    """When the page of a running job reloads itself."""
    page = load(chromium, runs / "live" / "index.html")
    is_open = "document.querySelector('details').open"
    assert not page.ask(is_open)
    page.ask("""new Promise((done) => {
        document.querySelector("details").addEventListener("toggle", () => done());
        document.querySelector("details summary").click(); })""")
    page.tell("Page.reload")
    page.ask("new Promise((done) => setTimeout(done, 500))")
    assert page.ask(is_open)
    assert page.complaints == []


def test_two_runs_are_set_against_each_other(chromium: Browser, runs: Path) -> None:
    page = load(chromium, runs / "index.html")
    for place, name in (("one", "done"), ("other", "live")):
        page.ask(f"""{{ const s = document.getElementById("{place}");
            s.value = [...s.options].find((option) => option.textContent === "{name}").value;
            s.dispatchEvent(new Event("change")) }}""")
    rows = page.ask(
        "[...document.querySelectorAll('#differences tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert rows == [["optim.lr", "0.005", "0.25"]]


def test_a_page_that_is_not_written_any_more_says_so(chromium: Browser, runs: Path, tmp_path: Path) -> None:
    grow_run(tmp_path / "live", "running", 2, {"updated": time.time()})
    file = write_page(tmp_path / "live")
    hidden = "document.getElementById('silent').hidden"
    assert load(chromium, file).ask(hidden)
    text = file.read_text()
    place = text.index('data-written="') + len('data-written="')
    file.write_text(text[:place] + "1" + text[text.index('"', place) :])
    assert not load(chromium, file).ask(hidden)
