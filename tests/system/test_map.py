"""map.html in a real browser: it shows the map, slider and click work, it asks nobody for anything. And a full disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from PIL import Image
from rasterio.crs import CRS

from docs.browser import browser, load
from hvd_eurosat.config.schema import Data, Model
from hvd_eurosat.model.resnet import build
from hvd_eurosat.scene.grid import Grid
from hvd_eurosat.scene.page import write_page
from hvd_eurosat.scene.parts import FOLDER, NONE
from hvd_eurosat.scene.result import LandCover, areas
from hvd_eurosat.scene.windows import Windows
from tests.parallel.conftest import Job, command, run
from tests.parallel.mapped import FILES, differing
from tests.system.conftest import need
from tests.unit.conftest import saved_checkpoint
from tests.unit.scenes import RGB, write_raster

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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 KB."""
    need()
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", tmp_path / "disk"], check=True)
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_full_disk_loses_nothing(disk: Path, tmp_path: Path) -> None:
    """First not all blocks have room, then not what is made of them; with more room the same command goes on."""
    settings, data = Model(arch="resnet18"), Data(image_size=32)
    network = build("resnet18", len(NAMES), "all", seed=0).eval()
    checkpoint = saved_checkpoint(tmp_path / "1.pt", network, list(NAMES), settings, data, image_side=32)
    pixels = np.random.default_rng(0).integers(1, 256, (3, 900, 260), np.uint8)
    scene, out = write_raster(tmp_path / "scene.tif", pixels, colours=RGB, photometric="RGB"), disk / "map"

    def mapped(out: Path) -> Job:
        words = ("--checkpoint", checkpoint, "--scene", scene, "--stride", 16, "--batch_size", 32)
        return run(command("python", 1, "map", *words, "--out", out))

    def blocks() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (out / FOLDER).glob("*.part")}

    assert mapped(tmp_path / "whole").returncode == 0
    done: dict[str, int] = {}
    for room in ("1200k", "64m"):
        job = mapped(out)
        assert job.returncode == 1, job.stderr
        (line,) = [line for line in job.stderr.splitlines() if "error: " in line]
        assert line.startswith(f"error: cannot write {out}")
        assert (".part: No space left" in line) == (room == "1200k"), line
        assert done.items() < blocks().items(), "they are there still, and more"
        done = blocks()
        assert not (out / "map.json").exists()
        there = [name for name in FILES if (out / name).exists()]
        assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in there)
        subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)
    job = mapped(out)
    assert job.returncode == 0, job.stderr
    assert differing(out, tmp_path / "whole") == []
