"""The embedded sample: synthetic patches of the ten EuroSAT classes, drawn rather than photographed.

It lets `make train`, the tests and the tutorial run with nothing fetched. No pixel comes from a satellite: an
accuracy reached here says that the code learns, and nothing about EuroSAT. What the pictures keep of the real ones is
what makes those hard: light, haze and hue vary so much that the mean colour names few classes, and texture has to.
"""

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, TiffImagePlugin, TiffTags

from hvd_eurosat.data.inputs import EUROSAT_CLASSES

SIZE = 64
SCENE_ROWS, SCENE_COLUMNS = 12, 16  # patches

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Colour = tuple[float, float, float]

# RGB in 0..255, near to what the real patches show: the blue is haze.
WHEAT, SOIL, CLAY, STUBBLE = (196, 158, 132), (142, 112, 104), (178, 124, 108), (150, 142, 122)
GRASS, CROP, SCRUB, WOOD = (52, 92, 82), (44, 86, 68), (92, 96, 84), (38, 64, 70)
ROAD, TRACK, ASPHALT = (150, 150, 156), (170, 156, 144), (92, 96, 106)
SHADOW = (40, 46, 58)
ROOF_RED, ROOF_GREY, ROOF_WHITE = (164, 112, 102), (128, 128, 138), (236, 234, 238)
NAVY, TEAL, SILT = (28, 50, 84), (62, 120, 124), (88, 112, 110)

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
_SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


# --- building blocks: each returns float64 [64, 64] (a field or a mask) or [64, 64, 3] (colours, 0..255) ---


def _noise(rng: np.random.Generator, cells: int) -> Array:
    """Smooth random field, about zero mean and unit deviation, that changes over SIZE / cells pixels."""
    grid = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return 1.3 * np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64)


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, np.pi))


def _axes(rng: np.random.Generator, angle: float, warp: float) -> tuple[Array, Array]:
    """Coordinates in pixels along and across a direction, zero in the middle, bent by `warp` pixels."""
    bend = _noise(rng, 3) * warp
    x, y = _X - SIZE / 2 + bend, _Y - SIZE / 2 + bend.T
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _plots(rng: np.random.Generator, angle: float, width: float, length: float, warp: float) -> Labels:
    """Plot number of every pixel: strips of about `width` pixels, each cut every `length` pixels or so."""
    along, across = _axes(rng, angle, warp)
    strip = np.searchsorted(_cuts(rng, width), across)
    starts = rng.uniform(-length, 0, 99)[strip]
    return strip * 64 + np.clip((along - starts + SIZE) / length, 0, 63).astype(np.intp)


def _cuts(rng: np.random.Generator, step: float) -> Array:
    return np.cumsum(rng.uniform(0.5, 1.5, int(3 * SIZE / step)) * step) - SIZE * 1.2


def _edges(labels: Labels) -> Array:
    """Mask of the pixels whose right or lower neighbour is of another plot."""
    mask = np.zeros((SIZE, SIZE))
    mask[:, :-1] = labels[:, 1:] != labels[:, :-1]
    mask[:-1] = np.maximum(mask[:-1], labels[1:] != labels[:-1])
    return mask


def _colours(rng: np.random.Generator, palette: Sequence[Colour], count: int, spread: float) -> Array:
    """`count` colours [count, 3] of the palette, each made lighter or darker by `spread` levels."""
    chosen = np.array(palette, np.float64)[rng.integers(len(palette), size=count)]
    return chosen + rng.normal(0, spread, (count, 1)) + rng.normal(0, spread / 4, (count, 3))


def _fill(rng: np.random.Generator, labels: Labels, palette: Sequence[Colour], spread: float) -> Array:
    _, index = np.unique(labels, return_inverse=True)
    return _colours(rng, palette, int(index.max()) + 1, spread)[index.reshape(SIZE, SIZE)]


def _blend(image: Array, mask: Array, colour: npt.ArrayLike) -> Array:
    return image + mask[..., None] * (np.asarray(colour, np.float64) - image)


def _line(rng: np.random.Generator, width: float, meander: float) -> Array:
    """Soft-edged mask of a band of `width` pixels that crosses the patch, bent by `meander` pixels."""
    _, across = _axes(rng, _angle(rng), meander)
    return np.clip((width + 1) / 2 - np.abs(across - rng.uniform(-14, 14)), 0, 1)


def _roofs(
    rng: np.random.Generator,
    image: Array,
    angle: float,
    pitch: float,
    share: float,
    size: tuple[float, float],
    palette: Sequence[Colour],
) -> Array:
    """Rectangles with sides of `size` pixels and a shadow, on a `share` of the points of a grid of `pitch` pixels."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    steps = np.arange(-SIZE * 0.75, SIZE * 0.75, pitch)
    sites = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    sites = sites[rng.random(len(sites)) < share]
    sites = (sites + rng.uniform(-0.2, 0.2, sites.shape) * pitch) @ turn + SIZE / 2
    # Drawn at twice the size: straight edges that are not along the pixels stay smooth.
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).resize((2 * SIZE, 2 * SIZE), 0)
    draw = ImageDraw.Draw(canvas)
    for site, colour in zip(sites, _colours(rng, palette, len(sites), 18), strict=True):
        corners = 2 * (rng.uniform(*size, 2) / 2 * _SQUARE @ turn + site)
        draw.polygon([(x - 1.5, y - 1.5) for x, y in corners], fill=SHADOW)
        draw.polygon([(x, y) for x, y in corners], fill=tuple(int(c) for c in np.clip(colour, 0, 255)))
    return np.asarray(canvas.reduce(2), np.float64)


def _country(rng: np.random.Generator) -> Array:
    """What lies around roads and rivers: fields, meadows or woods."""
    palette = ((WHEAT, SOIL, GRASS, CROP), (GRASS, CROP, WOOD), (SCRUB, SOIL, GRASS), (WOOD, WOOD, GRASS))
    labels = _plots(rng, _angle(rng), rng.uniform(14, 34), rng.uniform(20, 60), 3)
    return _fill(rng, labels, palette[rng.integers(4)], 8) + _noise(rng, 24)[..., None] * 3


# --- the ten classes: each returns the ground as float64 [64, 64, 3] in 0..255, before light and air ---


def _annual_crop(rng: np.random.Generator) -> Array:
    angle = _angle(rng)
    labels = _plots(rng, angle, rng.uniform(16, 40), rng.uniform(30, 90), 1)
    image = _fill(rng, labels, (WHEAT, WHEAT, SOIL, CLAY, STUBBLE, CROP), 12)
    _, across = _axes(rng, angle, 0)
    rows = np.sin(across * rng.uniform(0.6, 1.4)) * rng.uniform(0, 3) + _noise(rng, 4) * 4
    return _blend(image, _edges(labels) * rng.uniform(0, 0.5), TRACK) + rows[..., None]


def _forest(rng: np.random.Generator) -> Array:
    texture = _noise(rng, 32) * rng.uniform(3, 7) + _noise(rng, 12) * 3 + _noise(rng, 4) * 3
    image = np.array(WOOD, np.float64) + texture[..., None]
    return _blend(image, _line(rng, 1, 6) * (rng.random() < 0.25) * 0.4, TRACK)


def _herbaceous(rng: np.random.Generator) -> Array:
    relief = np.zeros((SIZE, SIZE))
    for cells, weight in ((5, 1.0), (11, 0.8), (23, 0.6), (40, 0.5)):
        relief += (np.abs(_noise(rng, cells)) - 0.8) * weight
    mix = np.clip(0.5 + _noise(rng, 5) * 0.4, 0, 1)[..., None]
    low, high = _colours(rng, (SCRUB, SCRUB, SOIL, STUBBLE), 2, 8)
    image: Array = low + mix * (high - low) * 0.6 + relief[..., None] * rng.uniform(9, 18)
    return image


def _highway(rng: np.random.Generator) -> Array:
    image = _country(rng)
    for _ in range(rng.integers(1, 4)):
        image = _blend(image, _line(rng, rng.uniform(2.4, 4), 2), ROAD)
    return _roofs(rng, image, _angle(rng), 12, 0.08, (2, 6), (ROOF_RED, ROOF_GREY, ROOF_WHITE))


def _industrial(rng: np.random.Generator) -> Array:
    angle = _angle(rng)
    labels = _plots(rng, angle, 18, 26, 0)
    image = _fill(rng, labels, (ASPHALT, ASPHALT, GRASS, SOIL), 10) + _noise(rng, 32)[..., None] * 8
    image = _blend(image, _edges(labels), ROAD)
    palette = (ROOF_WHITE, ROOF_WHITE, ROOF_GREY, ASPHALT)
    return _roofs(rng, image, angle, rng.uniform(9, 15), 0.75, (4, 15), palette)


def _pasture(rng: np.random.Generator) -> Array:
    labels = _plots(rng, _angle(rng), rng.uniform(14, 30), rng.uniform(16, 40), 5)
    image = _fill(rng, labels, (GRASS, GRASS, GRASS, CROP, SCRUB), 5) + _noise(rng, 6)[..., None] * 3
    return _blend(image, _edges(labels) * rng.uniform(0.6, 1), WOOD)


def _permanent_crop(rng: np.random.Generator) -> Array:
    labels = _plots(rng, _angle(rng), rng.uniform(9, 18), rng.uniform(12, 30), 2)
    image = _fill(rng, labels, (WHEAT, SOIL, STUBBLE, SCRUB, CROP), 10)
    along, across = _axes(rng, _angle(rng), 0.5)
    pitch = 2 * np.pi / rng.uniform(3, 5)
    trees = np.maximum(np.sin(along * pitch), 0) * np.maximum(np.sin(across * pitch), 0)
    image = _blend(image, trees * rng.uniform(0.6, 0.9), WOOD)
    return _blend(image, _edges(labels) * rng.uniform(0.2, 0.7), TRACK)


def _residential(rng: np.random.Generator) -> Array:
    angle = _angle(rng)
    labels = _plots(rng, angle, rng.uniform(9, 14), rng.uniform(14, 40), 1)
    image = _fill(rng, labels, (GRASS, WOOD, ASPHALT, SCRUB), 8) + _noise(rng, 40)[..., None] * 6
    palette = (
        (ROOF_RED, ROOF_RED, ROOF_GREY),
        (ROOF_GREY, ROOF_GREY, ROOF_WHITE),
        (ROOF_RED, WHEAT, ROOF_GREY),
    )
    image = _roofs(rng, image, angle, rng.uniform(4, 6), rng.uniform(0.5, 0.9), (2, 4.5), palette[rng.integers(3)])
    return _blend(image, _edges(labels) * 0.7, ROAD)


def _river(rng: np.random.Generator) -> Array:
    image = _country(rng)
    image = _roofs(rng, image, _angle(rng), 12, rng.uniform(0, 0.2), (2, 5), (ROOF_RED, ROOF_GREY, WHEAT))
    water = _colours(rng, (NAVY, TEAL, NAVY), 1, 6)[0]
    return _blend(image, _line(rng, rng.uniform(10, 22), rng.uniform(2, 6)), water)


def _sea_lake(rng: np.random.Generator) -> Array:
    image = _colours(rng, (NAVY, NAVY, TEAL, SILT), 1, 8)[0] + (_noise(rng, 2) * 4 + _noise(rng, 48))[..., None]
    _, across = _axes(rng, _angle(rng), 6)
    shore = np.clip(across - rng.uniform(20, 34), 0, 1) * (rng.random() < 0.2)
    return _blend(image, shore, _country(rng))


_DRAW: tuple[Callable[[np.random.Generator], Array], ...] = (
    _annual_crop,
    _forest,
    _herbaceous,
    _highway,
    _industrial,
    _pasture,
    _permanent_crop,
    _residential,
    _river,
    _sea_lake,
)
SCENES = dict(zip(EUROSAT_CLASSES, _DRAW, strict=True))


def _observe(rng: np.random.Generator, ground: Array) -> Image.Image:
    """The ground [H, W, 3] as the sensor sees it: light, haze and hue of the day, blur of the optics, noise."""
    light, haze = rng.lognormal(0, 0.14), rng.uniform(0, 0.25)
    air = np.array((84, 96, 118)) * rng.uniform(0.5, 1.4)
    cast = rng.normal(0, 3, 3) + np.array((1, 0, -1)) * rng.normal(0, 2)
    image = np.clip(ground * light * (1 - haze) + air * haze + cast, 0, 255).astype(np.uint8)
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6))
    noisy = np.asarray(blurred) + rng.normal(0, rng.uniform(0.5, 2), (*ground.shape[:2], 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def generate(per_class: int = 200, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Draw the sample, class after class.

    Yields the path `<Class>/<Class>_<n>.jpg` (n from 1) and the bytes of a 64x64 RGB JPEG. One picture depends on
    (seed, class, n) alone, so that a smaller sample is part of a larger one, and repeats to the byte on one machine.
    """
    for number, (name, scene) in enumerate(SCENES.items()):
        for n in range(1, per_class + 1):
            rng = np.random.default_rng((seed, number, n))
            buffer = io.BytesIO()
            _observe(rng, scene(rng)).save(buffer, "JPEG", quality=95)
            yield f"{name}/{name}_{n}.jpg", buffer.getvalue()


def draw_scene(seed: int = 0) -> dict[str, bytes]:
    """A scene of the classes, SCENE_ROWS x SCENE_COLUMNS patches in one light, and its truth, one pixel a patch.

    scene.tif is uint8 RGB, scene_truth.tif uint8, the class's place in SCENES; both lie somewhere in EPSG:32632.
    """
    rng = np.random.default_rng((seed, len(SCENES)))
    shape = SCENE_ROWS, SCENE_COLUMNS
    # Neighbours are alike: of smooth random fields, one a class, the highest wins.
    fields = [Image.fromarray(rng.standard_normal((4, 5), np.float32)) for _ in SCENES]
    smooth = [np.asarray(field.resize(shape[::-1], Image.Resampling.BICUBIC)) for field in fields]
    truth = np.argmax(smooth, 0).astype(np.uint8)
    draw = list(SCENES.values())
    rows = [np.concatenate([draw[label](rng) for label in row], 1) for row in truth]
    picture = _observe(rng, np.concatenate(rows, 0))
    return {"scene.tif": _geotiff(picture, 10), "scene_truth.tif": _geotiff(Image.fromarray(truth), 10 * SIZE)}


def _geotiff(image: Image.Image, metres: float) -> bytes:
    """With the tags of OGC's GeoTIFF 1.1 standard: a pixel's size, the upper left corner, and the CRS EPSG:32632."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype |= {33550: TiffTags.DOUBLE, 33922: TiffTags.DOUBLE, 34735: TiffTags.SHORT}
    tags[33550] = (metres, metres, 0.0)
    tags[33922] = (0.0, 0.0, 0.0, 600000.0, 5200000.0, 0.0)
    # Three keys: a projected CRS, pixels are areas, EPSG's number.
    tags[34735] = (1, 1, 1, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", tiffinfo=tags, compression="tiff_deflate")
    return buffer.getvalue()
