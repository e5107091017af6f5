"""The rasters of a map: valid cloud-optimised GeoTIFFs that a GIS shows as they are meant.

What GDAL keeps of categories it keeps beside a TIFF, in NAME.tif.aux.xml, which QGIS and gdalinfo read with it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hvd_eurosat.errors import RunError
from hvd_eurosat.scene.parts import NONE
from hvd_eurosat.scene.result import LandCover
from hvd_eurosat.training.files import write_text

CLASSES, CONFIDENCE, PROBABILITIES = "classes.tif", "confidence.tif", "probabilities.tif"
TILE = 512
OPAQUE = 255


def write_rasters(cover: LandCover, out: Path, workplace: Path, probabilities: bool) -> None:
    """classes.tif, confidence.tif and, if wanted, probabilities.tif in `out`, made in `workplace` on the same disk.

    Raises RunError where they cannot be written.
    """
    numbered = {f"CLASS_{number}": name for number, name in enumerate(cover.names)}
    tags = {**cover.tags, "CLASSES": json.dumps(list(cover.names))}
    categories = "".join(f"<Category>{escape(name)}</Category>" for name in cover.names)
    sidecar = (
        f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{categories}</CategoryNames></PAMRasterBand></PAMDataset>'
    )
    write_text(out / f"{CLASSES}.aux.xml", sidecar)
    _write(out / CLASSES, workplace, cover, cover.classes[None], ["land cover"], {**tags, **numbered}, "MODE")
    _write(out / CONFIDENCE, workplace, cover, cover.confidence[None], ["confidence, percent"], tags, "AVERAGE")
    if probabilities:
        _write(out / PROBABILITIES, workplace, cover, cover.percents, cover.names, tags, "AVERAGE")


def _write(
    path: Path,
    workplace: Path,
    cover: LandCover,
    values: NDArray[np.uint8],
    bands: Any,
    tags: Mapping[str, str],
    overviews: str,
) -> None:
    plain, cog = workplace / f"plain-{path.name}", workplace / path.name
    height, width = values.shape[1:]
    shape = {"driver": "GTiff", "count": len(values), "height": height, "width": width, "dtype": "uint8"}
    place = {"crs": cover.grid.crs, "transform": cover.transform, "nodata": NONE}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(plain, "w", **shape, **place, BIGTIFF="IF_SAFER") as raster:
                if overviews == "MODE":
                    colours = {n: (*bytes.fromhex(c[1:]), OPAQUE) for n, c in enumerate(cover.colours)}
                    raster.write_colormap(1, {**colours, NONE: (0, 0, 0, 0)})
                raster.write(values)
                raster.update_tags(**tags)
                for number, name in enumerate(bands, start=1):
                    raster.set_band_description(number, name)
            rasterio.shutil.copy(
                plain, cog, driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=TILE, OVERVIEW_RESAMPLING=overviews
            )
        _verify(cog, values)
        with cog.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(cog, path)
        plain.unlink()
    except (RasterioError, CPLE_BaseError, OSError) as error:
        raise RunError(f"cannot write {path}: {error}") from None


def _verify(path: Path, values: NDArray[np.uint8]) -> None:
    """Raise OSError unless the file holds these: of a disk that fills while a COG is written GDAL says nothing."""
    with rasterio.open(path) as raster:
        if not all(np.array_equal(raster.read(number), band) for number, band in enumerate(values, start=1)):
            raise OSError("it does not hold what was written")
