"""map.html in a real browser: what it shows, that slider and click work, and that it asks nobody for anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from PIL import Image
from rasterio.crs import CRS

from docs.browser import browser, load
from hvd_eurosat.scene.grid import Grid
from hvd_eurosat.scene.page import write_page
from hvd_eurosat.scene.parts import NONE
from hvd_eurosat.scene.result import LandCover, areas
from hvd_eurosat.scene.windows import Windows
from tests.system.conftest import need

NAMES = ("Forest", "River", "Residential")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A map of 4 x 5 windows of 64 pixels; those of a row are of one class, and the first has none."""
    one = Windows(250, 300, 64, 64)
    classes = np.arange(4, dtype=np.uint8)[:, None].repeat(5, 1) % 3
    percents = np.full((3, 4, 5), 10, np.uint8)
    np.put_along_axis(percents, classes[None].astype(np.intp), 80, 0)
    classes[0, 0] = NONE
    preview = np.full((250, 300, 4), 200, np.uint8)
    preview[..., 3] = 255
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 600_000, 0, -10, 5_200_000), 300, 250)
    cover = LandCover("scene: land cover", NAMES, grid, one, classes, percents, preview, 1, {})
    write_page(cover, areas(cover), tmp_path)
    return tmp_path / "map.html"


READY = """new Promise((done) => {
  const look = () => document.body.dataset.ready ? done() : setTimeout(look, 50);
  look();
})"""
ASKED = "performance.getEntriesByType('resource').map((one) => one.name).filter((name) => !/^(data|blob):/.test(name))"


def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    need("chromium")
    with browser() as made:
        shown = load(made, page, 1280, 800)
        shown.ask(READY)
        assert shown.ask("document.querySelectorAll('#legend .row').length") == len(NAMES)

        def at(x: float, y: float) -> tuple[float, float]:
            """Where a pixel of the scene is on the screen."""
            box = shown.ask("(({left, top, width}) => [left, top, width])(at('stage').getBoundingClientRect())")
            return box[0] + x * box[2] / 300, box[1] + y * box[2] / 300

        def told() -> str:
            return str(shown.ask("at('told').innerText"))

        for place, words in (
            ((100, 100), ["River", "80 %", "10 %", "x 601,000", "(EPSG:32632)", "(latitude, longitude)"]),
            ((100, 30), ["Forest", "80 %"]),
            ((30, 30), ["No class"]),
            ((299, 249), ["Forest", "80 %"]),
        ):
            shown.click_at(*at(*place))
            assert all(word.replace(",", "") in told().replace(",", "") for word in words), told()
        frame = "(({left, top, width}) => [left, top, width].map(parseFloat))(at('window').style)"
        assert shown.ask(frame) == [300 - 64, 250 - 64, 64], "the last window is moved in"

        shown.picture(tmp_path / "before.png")
        slider = shown.ask("(({left, top, height}) => [left, top + height / 2])(at('opacity').getBoundingClientRect())")
        shown.click_at(slider[0] + 2, slider[1])
        assert float(shown.ask("at('map').style.opacity")) < 0.1
        shown.picture(tmp_path / "after.png")
        pixel = tuple(round(n) for n in at(100, 30))
        before, after = (
            Image.open(tmp_path / f"{name}.png").convert("RGB").getpixel(pixel) for name in ("before", "after")
        )
        assert before != after
        assert after == (255, 255, 255), "the scene, brightened"

        wide = shown.ask("at('stage').getBoundingClientRect().width")
        shown.mouse("mouseWheel", *at(100, 100), deltaX=0, deltaY=-300)
        assert shown.ask("at('stage').getBoundingClientRect().width") > 1.5 * wide
        shown.click_at(*at(100, 100))
        assert "River" in told()
        x, y = at(100, 100)
        shown.mouse("mousePressed", x, y, button="left", clickCount=1)
        shown.mouse("mouseMoved", x + 50, y + 20, button="left")
        shown.mouse("mouseReleased", x + 50, y + 20, button="left", clickCount=1)
        assert at(100, 100) == pytest.approx((x + 50, y + 20))
        assert shown.complaints == []
        assert shown.ask(ASKED) == []
