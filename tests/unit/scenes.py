"""Small scenes as people have them: GeoTIFFs, bands in files of their own, Sentinel-2 products of the true layout."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

UTM = "EPSG:32632"
CORNER = Affine(10, 0, 600000, 0, -10, 5200020)
RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
METRES = {"B01": 60, "B09": 60, "B10": 60, "B02": 10, "B03": 10, "B04": 10, "B08": 10}  # all others 20
LOSSLESS = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}


def numbers(seed: int, shape: tuple[int, ...], low: int = 200, high: int = 3000) -> NDArray[np.uint16]:
    """Digital numbers of noise, none of which is 0."""
    return np.random.default_rng(seed).integers(low, high, shape, np.uint16)


def write_raster(
    path: Path,
    pixels: NDArray[np.generic],
    crs: str | None = UTM,
    transform: Affine = CORNER,
    names: Sequence[str] = (),
    colours: Sequence[ColorInterp] = (),
    **options: object,
) -> Path:
    """A raster of pixels [bands, h, w], or [h, w]; names: descriptions of the bands. options: of rasterio.open."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "crs": crs, "transform": transform, "count": count, "dtype": pixels.dtype.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", height=height, width=width, **(profile | options)) as file:
            if colours:
                file.colorinterp = colours
            file.write(pixels)
            for index, name in enumerate(names, start=1):
                file.set_band_description(index, name)
    return path


def write_product(
    folder: Path,
    bands: Mapping[str, NDArray[np.uint16]],
    level: str = "L2A",
    baseline: str = "05.09",
    offset: int | None = -1000,
    tile: str = "T32TPS",
    extra: str = "",
) -> Path:
    """A Sentinel-2 product in SAFE format, its bands as JPEG 2000; SCL among them is the scene classification.

    bands: uint16 [h, w] at 10, 20 or 60 m by name. offset: as in the metadata; None: they have none. extra: more
    XML in the product's metadata.
    """
    stamp = "20230701T101031"
    name = f"S2A_MSI{level}_{stamp}_N{baseline.replace('.', '')}_R022_{tile}_20230701T161801.SAFE"
    root = folder / name
    granule = root / "GRANULE" / f"{level}_{tile}_A041902_20230701T101559"
    for band, pixels in bands.items():
        metres = METRES.get(band, 20)
        plain = level == "L1C"
        place = granule / "IMG_DATA" / ("" if plain else f"R{metres}m")
        file = f"{tile}_{stamp}_{band}.jp2" if plain else f"{tile}_{stamp}_{band}_{metres}m.jp2"
        transform = CORNER @ Affine.scale(metres / 10)
        write_raster(place / file, pixels, transform=transform, **LOSSLESS)
    (granule / "QI_DATA").mkdir(parents=True)
    (granule / "MTD_TL.xml").write_text("<n1:Level_Tile_ID/>")
    (root / "manifest.safe").write_text("<xfdu:XFDU/>")
    (root / f"MTD_MSI{level}.xml").write_text(metadata(level, baseline, offset, extra))
    return root


def metadata(level: str, baseline: str, offset: int | None, extra: str = "") -> str:
    """The elements of a product's metadata that tell what its numbers are, where the specification has them."""
    tag, long = ("RADIO_ADD_OFFSET", "Level-1C") if level == "L1C" else ("BOA_ADD_OFFSET", "Level-2A")
    group = "Radiometric_Offset_List" if level == "L1C" else "BOA_ADD_OFFSET_VALUES_LIST"
    offsets = "".join(f'<{tag} band_id="{number}">{offset}</{tag}>' for number in range(len(BANDS)))
    quantification = (
        '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>'
        if level == "L1C"
        else '<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>'
        '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>'
    )
    spectral = "".join(
        f'<Spectral_Information bandId="{number}" physicalBand="{name.replace("B0", "B")}"/>'
        for number, name in enumerate(BANDS)
    )
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:{long}_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_{long}.xsd">
 <n1:General_Info>
  <Product_Info><PROCESSING_LEVEL>{long}</PROCESSING_LEVEL>
   <PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>
  <Product_Image_Characteristics>
   <Special_Values><SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX>
   </Special_Values>{quantification}
   {"" if offset is None else f"<{group}>{offsets}</{group}>"}
   <Spectral_Information_List>{spectral}</Spectral_Information_List>{extra}
  </Product_Image_Characteristics>
 </n1:General_Info>
</n1:{long}_User_Product>
"""


def zipped(product: Path) -> Path:
    """The product in a zip beside it, as it is downloaded."""
    path = product.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(product.rglob("*")):
            archive.write(file, file.relative_to(product.parent))
    return path
