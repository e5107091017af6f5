"""Sentinel-2 products: their files, in a folder or a zip, and what their metadata say.

Names and elements are those of the "Sentinel-2 Products Specification Document" (S2-PDGS-TAS-DI-PSD, issue 14 and 15).
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from hvd_eurosat.data.bands import SENTINEL2, canonical
from hvd_eurosat.data.listing import is_litter
from hvd_eurosat.errors import UserError
from hvd_eurosat.scene.files import zipped
from hvd_eurosat.scene.markup import MAX_BYTES, elements

METADATA = re.compile(r"(MTD_MSI|S2[A-Z]_\w+_MTD_SAF)L(1C|2A)\w*\.xml", re.I)
MAX_DEPTH, MAX_FILES = 8, 100_000
OFFSETS_SINCE = 4.0  # the processing baseline, of January 2022
WANTED = {
    "PROCESSING_BASELINE",
    "QUANTIFICATION_VALUE",
    "BOA_QUANTIFICATION_VALUE",
    "L2A_BOA_QUANTIFICATION_VALUE",
    "RADIO_ADD_OFFSET",
    "BOA_ADD_OFFSET",
    "Spectral_Information",
}


@dataclass(frozen=True)
class Listing:
    """The files of a folder or zip: the path for GDAL by the path below it, with forward slashes, sorted."""

    path: Path
    files: Mapping[str, str]

    def read(self, name: str) -> bytes:
        """The bytes of a small file, no more than just over MAX_BYTES. Raises UserError."""
        try:
            if not self.path.is_dir():
                with zipfile.ZipFile(self.path) as archive, archive.open(name) as member:
                    data = member.read(MAX_BYTES + 1)
            else:
                with (self.path / name).open("rb") as file:
                    data = file.read(MAX_BYTES + 1)
        except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
            raise UserError(f"cannot read {self.path / name} ({error})") from None
        return data


@dataclass(frozen=True)
class Metadata:
    """What a product says of its numbers: reflectance = (DN - offset of the band) / quantification.

    offsets: by band, the opposite of the metadata's ADD_OFFSET; None where a product must have them and does not.
    """

    level: str
    baseline: str
    quantification: float
    offsets: Mapping[str, float] | None


def listing(path: Path) -> Listing:
    """The files below a folder, or in a zip. Raises UserError where a zip is unsafe or either has too many files."""
    try:
        files = _of_folder(path) if path.is_dir() else _of_zip(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(files) > MAX_FILES:
        raise UserError(f"{path} has more than {MAX_FILES:,} files: name the scene in it")
    return Listing(path, dict(sorted(files.items())))


def _of_folder(root: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not is_litter(name)] if len(below.parts) < MAX_DEPTH else []
        files |= {(below / name).as_posix(): os.path.join(folder, name) for name in names if not is_litter(name)}
        if len(files) > MAX_FILES:
            break
    return files


def _of_zip(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError:
        raise
    except Exception as error:  # zipfile lets through whatever damaged bytes lead it to
        raise UserError(f"{path} is not a whole zip file ({error}): was its download cut short?") from None
    for member in members:
        parts = member.filename.removesuffix("/").split("/")
        windows = PureWindowsPath(member.filename)
        if not {"", ".", ".."}.isdisjoint(parts) or windows.drive or "\\" in member.filename:
            raise UserError(f"{path} is not safe: {member.filename!r} in it leads out of it")
        if member.flag_bits & 1:
            raise UserError(f"{path} is encrypted: unpack it, and give the folder")
    names = [member.filename for member in members if not member.is_dir()]
    return {name: zipped(path, name) for name in names if not any(map(is_litter, name.split("/")))}


def metadata_file(files: Listing) -> str | None:
    """The product's metadata among the files. Raises UserError where there are those of several."""
    found = [name for name in files.files if METADATA.fullmatch(PurePosixPath(name).name)]
    if len(found) > 1:
        raise UserError(f"{files.path} holds several products ({found[0]}, {found[1]}): name one of them")
    return found[0] if found else None


def metadata_above(path: Path) -> Path | None:
    """The metadata of the product that a file lies in, if it does."""
    for folder in list(path.resolve().parents)[:5]:
        try:
            found = sorted(name for name in os.listdir(folder) if METADATA.fullmatch(name))
        except OSError:
            return None
        if found:
            return folder / found[0]
    return None


def read_metadata(data: bytes, path: str) -> Metadata:
    """What the product's metadata, the bytes of an XML file, say. Raises UserError for any other file."""
    found = elements(data, path, WANTED)
    numbers = {
        canonical(attributes.get("physicalBand", "")): attributes.get("bandId", "")
        for tag, attributes, _ in found
        if tag == "Spectral_Information"
    } or {name: str(number) for number, name in enumerate(SENTINEL2)}
    names = {number: name for name, number in numbers.items()}
    level = str(METADATA.fullmatch(PurePosixPath(path).name)[2]).upper()  # type: ignore[index]
    baseline = next((text for tag, _, text in found if tag == "PROCESSING_BASELINE"), "")
    values = [text for tag, _, text in found if tag.endswith("QUANTIFICATION_VALUE")]
    offsets = {
        names.get(attributes.get("band_id", ""), ""): -_number(text, tag, path)
        for tag, attributes, text in found
        if tag.endswith("_ADD_OFFSET")
    }
    if not values or not baseline:
        raise UserError(f"{path} has no {'PROCESSING_BASELINE' if values else 'QUANTIFICATION_VALUE'}: it is damaged")
    quantification = _number(values[0], "QUANTIFICATION_VALUE", path)
    if quantification <= 0:
        raise UserError(f"{path}: a QUANTIFICATION_VALUE of {quantification:g} cannot be")
    plain = _number(baseline, "PROCESSING_BASELINE", path) < OFFSETS_SINCE
    known = offsets or (dict.fromkeys(SENTINEL2, 0.0) if plain else None)
    return Metadata(f"L{level}", baseline, quantification, known)


def _number(text: str, tag: str, path: str) -> float:
    if not re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9})?", text):
        raise UserError(f"{path}: {tag} is {text[:40]!r}, no number")
    return float(text)
