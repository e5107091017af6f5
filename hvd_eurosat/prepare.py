"""Turn EuroSAT (a zip, a tar, class folders, a download) or the synthetic sample into a checked, split data folder."""

import argparse
import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path

from hvd_eurosat.data.contradictions import contradictions
from hvd_eurosat.data.images import MAX_SIDE, BadImageError, decode_any, in_threads, list_flaws, resize
from hvd_eurosat.data.inputs import Inputs
from hvd_eurosat.data.layout import SHOWN, SPLITS, Item, is_litter, normal
from hvd_eurosat.data.multispectral import measured, read_bands, read_pixels, recognise
from hvd_eurosat.data.packed import DISK_FULL, verify_packed
from hvd_eurosat.data.sources import Source, open_source
from hvd_eurosat.data.split import Ratios, split_class
from hvd_eurosat.data.splits import PUBLISHED, Wish, arrange, lists_for
from hvd_eurosat.data.tree import (
    CHECKSUMS,
    MANIFEST,
    Manifest,
    Rule,
    Skipped,
    check_classes,
    open_tree,
    read_manifest,
    sha256_of,
)
from hvd_eurosat.errors import RunError, UserError

CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
UNSPLIT = ".unsplit"
LOCK = ".lock"

EXAMPLES = """
examples:
  the real data, split 94:5:1:      python -m hvd_eurosat.prepare --source EuroSAT_RGB.zip --out data/EuroSAT_RGB
  the same, fetched first:          python -m hvd_eurosat.prepare --source download --out data/EuroSAT_RGB
  a small synthetic set to try:     python -m hvd_eurosat.prepare --source sample --out data/sample --ratios 80,10,10
  your own class folders, resized:  python -m hvd_eurosat.prepare --source photos --out data/photos --resize
  torchgeo's spatial split:         python -m hvd_eurosat.prepare --source download --out data/spatial --split spatial
  one folder of a large archive:    python -m hvd_eurosat.prepare --source all.tgz --inside ucm/Images --out data/ucm
  TIFFs of four bands:              python -m hvd_eurosat.prepare --source naip --out data/naip --bands B04,B03,B02,B08
  is it all still there, intact?    python -m hvd_eurosat.prepare --verify data/EuroSAT_RGB


The source is a folder, a .zip, .tar, .tar.gz or .tgz. It holds <Class>/<image> or, already split,
<split>/<Class>/<image>, in any number of single folders. Splits are train (or training), valid (val, validation, dev)
and test (testing), in any capitals. Links are followed. What systems leave among files (Thumbs.db, @eaDir, .DS_Store)
is left out, and so are other files outside the class folders; both are counted. All else must be an image, whatever its
name: 8-bit RGB in JPEG, PNG, TIFF, WebP or BMP. Copies of an image go into one split. An image in folders of two
classes is refused, and so are class folders that differ in capitals alone.

--split and --split-lists take the place of the source's own split or one at random. Lists name every image once, with
or without folders and suffix. Copies go where the lists say. --split-by-place makes blocks by longitude and latitude.

TIFFs of 1 to 64 bands, uint16 or uint8, stay as they are. The manifest has the names and statistics of their bands.

--convert makes RGB of grey, palette, CMYK, alpha (laid on white) and 16 bits a channel (value // 256 is kept).

The result is train/ valid/ test/<Class>/<image>, with manifest.json (what it is and how it was made) and files.sha256
(for sha256sum -c). It appears whole or not at all.
"""


@dataclass(frozen=True)
class Options(Wish):
    """How to prepare, and which split.

    image_size: pixels a side; images of other sizes are refused or, with resize, resized. convert: images of other
    modes are made 8-bit RGB. skip_bad: unusable files, and images that are in two classes, are left out, with a
    warning, instead of refused. inside: the source's folder. bands: of TIFFs, in their order, where nothing else
    says it.
    """

    image_size: int = 64
    resize: bool = False
    convert: bool = False
    skip_bad: bool = False
    inside: str = ""
    bands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A usable image of the source, the name it was written under, its bytes' sha256, its kind if converted, its size.

    size: width and height in pixels, before it was resized.
    """

    item: Item
    name: str
    checksum: str
    was: str
    size: tuple[int, int]

    @property
    def path(self) -> str:
        """Where it was written, below the folder."""
        return f"{self.item.split or UNSPLIT}/{self.item.label}/{self.name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0 done, 1 failed, 2 bad usage or data, 130 interrupted."""
    words = vars(_parse(argv))
    source, out, verified = (words.pop(name) for name in ("source", "out", "verify"))
    try:
        print(verify(verified) if verified else _table(prepare(source, out, Options(**words))))
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def prepare(spec: str, out: Path, options: Options) -> Manifest:
    """Checks, splits and copies the source that spec names (see open_source) to out, whole or not at all.

    Raises UserError, for a bad image too, and RunError.
    """
    lists = lists_for(options)
    with _appearing(out.resolve()) as folder, open_source(spec, options.seed, options.inside) as given:
        for note in given.layout.notes:
            print(f"note: {note}", file=sys.stderr)
        source, rule, placeless = arrange(given, spec, options, lists)
        inputs = _recognised(source, spec, options)
        written, unusable = _copy(source, folder, options, inputs)
        written, contradictory = _without_contradictions(written, folder)
        skipped = [*placeless, *unusable, *contradictory]
        if skipped:
            _tell(skipped, len(given.layout.items), spec, options)
        presplit = source.layout.split
        _tell_of_copies(written, spec, rule)
        _tell_of_sizes(written, spec, options.image_size)
        files = _placed(written) if presplit else _split(source, written, folder, options)
        counts = {split: dict.fromkeys(source.layout.classes, 0) for split in SPLITS}
        for path in files:
            split, label, _ = path.split("/")
            counts[split][label] += 1
        listing = "".join(f"{files[path]}  {path}\n" for path in sorted(files)).encode()
        manifest = Manifest(
            name=source.name,
            synthetic=source.synthetic,
            classes=check_classes(counts, spec),
            image_size=options.image_size,
            counts=counts,
            seed=options.seed if rule.is_drawn else None,
            ratios=tuple(map(float, options.ratios)) if rule.is_drawn else None,
            split=rule,
            digest=hashlib.sha256(listing).hexdigest(),
            skipped=tuple(skipped),
            converted=_converted(written, spec),
            inputs=_measured(inputs, folder, files, options.image_size),
            extras=_write_extras(source, folder),
        )
        if given.layout.split:
            what = "keeps its split" if rule.kind == "source" else "gets another split"
            print(f"note: {spec} is split already and {what}", file=sys.stderr)
        if rule.blocks:
            _tell_of_blocks(manifest, rule)
        (folder / CHECKSUMS).write_bytes(listing)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def verify(root: Path) -> str:
    """Compares the prepared folder root, packed arrays included, with its checksums. Returns the good news.

    Raises RunError, which names what changed, is missing or extra; UserError where there is nothing to compare.
    """
    if not (root / MANIFEST).exists():
        raise UserError(f"{root} has no {MANIFEST}: it was not made by prepare, and there is nothing to compare with")
    try:
        tree = open_tree(root)
    except UserError as error:
        raise RunError(str(error)) from None
    checksums = tree.checksums | read_manifest(root).extras

    def compare(path: str) -> str:
        try:
            return "" if sha256_of(tree.path(path)) == checksums[path] else f"{path}: changed"
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"

    flaws = [flaw for flaw in in_threads(compare, checksums, "comparing") if flaw]
    flaws += [f"{path}: extra" for path in sorted(_listing(root) - checksums.keys() - {MANIFEST, CHECKSUMS})]
    packed = sorted((root / ".packed").glob("*.npy"))
    flaws += filter(None, map(_flaw_of_packed, packed))
    more = [f"… and {len(flaws) - SHOWN:,} more"] if len(flaws) > SHOWN else []
    if flaws:
        raise RunError("\n  ".join([f"{root} is not as it was prepared:", *flaws[:SHOWN], *more]))
    return f"{root}: all {len(checksums):,} files and {len(packed)} packed arrays are as they were written"


def _flaw_of_packed(path: Path) -> str:
    try:
        verify_packed(path)
    except RunError as error:
        return str(error)
    return ""


def _recognised(source: Source, spec: str, options: Options) -> Inputs:
    """What the source's images are. Raises UserError."""
    paths = [item.path for item in source.layout.items]
    if options.convert and not options.bands:
        paths = []
    inputs = recognise(source.read, paths, source.layout.classes, options.bands, spec)
    if inputs.file and (options.resize or options.convert):
        raise UserError(f"--resize and --convert are for 8-bit RGB, and {spec} has {len(inputs.file)} bands")
    if inputs.file:
        print(f"note: {spec} has {inputs.dtype} bands {', '.join(inputs.file)}: {inputs.unit}", file=sys.stderr)
    return inputs


def _measured(inputs: Inputs, folder: Path, files: dict[str, str], size: int) -> Inputs:
    """With the statistics of the training images, where these have bands of their own."""
    if not inputs.file:
        return inputs
    paths = [path for path in files if path.startswith(f"{SPLITS[0]}/")]
    images = in_threads(lambda path: read_pixels((folder / path).read_bytes(), inputs, size, size), paths, "measuring")
    return measured(inputs, images)


def _copy(source: Source, folder: Path, options: Options, inputs: Inputs) -> tuple[list[Written], list[Skipped]]:
    """Checks each image and writes it below folder, into its split's or the unsplit class folder."""
    for split in SPLITS if source.layout.split else (UNSPLIT,):
        for label in source.layout.classes:
            (folder / split / label).mkdir(parents=True)

    def copy(item: Item) -> Written | Skipped:
        try:
            data, was, size = _checked(source.read(item.path), options, inputs)
        except BadImageError as error:
            return Skipped(file=item.path, reason=str(error))
        name = item.name if was is None else f"{Path(item.name).stem}.png"
        try:
            with (folder / (item.split or UNSPLIT) / item.label / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            raise UserError(f"{item.path}: another image of its class would be called {name} too: rename one") from None
        return Written(item, name, hashlib.sha256(data).hexdigest(), was or "", size)

    results = list(in_threads(copy, source.layout.items, "checking images"))
    skipped = sorted((r for r in results if isinstance(r, Skipped)), key=lambda bad: bad.file)
    return [r for r in results if isinstance(r, Written)], skipped


def _checked(data: bytes, options: Options, inputs: Inputs) -> tuple[bytes, str | None, tuple[int, int]]:
    """The bytes to write, what a picture was that had to become a PNG (None of a file that stays as it is), its size.

    Raises BadImageError.
    """
    size = options.image_size
    if inputs.file:
        read_bands(data, inputs.file, inputs.dtype, size)
        return data, None, (size, size)
    image, was = decode_any(data, None if options.resize else size, options.convert)
    if not was and image.size == (size, size):
        return data, None, image.size
    png = BytesIO()
    resize(image, size).save(png, "PNG")
    return png.getvalue(), was, image.size


def _write_extras(source: Source, folder: Path) -> dict[str, str]:
    """Writes what comes with the source beside its images; the files' sha256 by their names."""
    for name, data in source.extras.items():
        (folder / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in source.extras.items()}


def _by_content(written: list[Written]) -> list[list[Written]]:
    """The images that have the same bytes together, each group by path."""
    groups: dict[str, list[Written]] = {}
    for image in sorted(written, key=lambda image: image.item.path):
        groups.setdefault(image.checksum, []).append(image)
    return list(groups.values())


def _without_contradictions(written: list[Written], folder: Path) -> tuple[list[Written], list[Skipped]]:
    """Removes images that are in two classes. Returns the others, and these."""
    flaws = contradictions([image.item for image in images] for images in _by_content(written))
    for image in written:
        if image.item.path in flaws:
            (folder / image.path).unlink()
    kept = [image for image in written if image.item.path not in flaws]
    return kept, [Skipped(file=path, reason=reason) for path, reason in flaws.items()]


def _tell_of_copies(written: list[Written], spec: str, rule: Rule) -> None:
    """A warning where images are there several times: in several splits, where the source makes them."""
    groups = [images for images in _by_content(written) if len(images) > 1]
    if rule.kind == "random" and groups:
        copies = sum(len(images) - 1 for images in groups)
        print(
            f"warning: {copies:,} of {len(written):,} images of {spec} are copies of others; copies share a split",
            file=sys.stderr,
        )
    places = [[split for split in SPLITS if any(i.item.split == split for i in images)] for images in groups]
    torn = Counter(" and ".join(splits) for splits in places if len(splits) > 1)
    if torn:
        counts = ", ".join(f"{count:,} in {splits}" for splits, count in sorted(torn.items()))
        why = ", as the lists say" if rule.kind == "lists" else ""
        print(f"warning: {torn.total():,} images of {spec} are in several splits{why}: {counts}", file=sys.stderr)


def _tell_of_blocks(manifest: Manifest, rule: Rule) -> None:
    """How near to the ratios whole blocks came."""
    totals = [sum(manifest.counts[split].values()) for split in SPLITS]
    got = ":".join(f"{100 * total / sum(totals):.1f}" for total in totals)
    asked = ":".join(f"{100 * part / sum(manifest.ratios or (1,)):.1f}" for part in manifest.ratios or ())
    blocks = ", ".join(f"{count:,} {split}" for split, count in rule.blocks.items())
    print(f"note: blocks of {rule.degrees:g} degrees, {blocks}: {got} of the images, for {asked}", file=sys.stderr)


def _tell_of_sizes(written: list[Written], spec: str, side: int) -> None:
    """A note on what was resized, for afterwards all look alike."""
    resized = [image.size for image in written if image.size != (side, side)]
    if resized:
        largest, others = max(resized, key=math.prod), sum(1 for width, height in resized if width != height)
        squeezed = f"; squeezed, for they are no squares: {others:,}" if others else ""
        what = f"resized {len(resized):,} images of {spec} to {side}x{side}, the largest from {largest[0]}x{largest[1]}"
        print(f"note: {what}{squeezed}", file=sys.stderr)


def _tell(skipped: list[Skipped], total: int, spec: str, options: Options) -> None:
    flaws = {bad.file: bad.reason for bad in skipped}
    summary = f"{len(flaws):,} of {total:,} files of {spec} cannot be used"
    if not options.skip_bad:
        raise UserError(list_flaws(f"{summary} (--skip-bad leaves them out)", flaws))
    print(f"warning: {list_flaws(f'{summary} and are left out', flaws)}", file=sys.stderr)


def _converted(written: list[Written], spec: str) -> dict[str, tuple[str, ...]]:
    """The converted images of the source by what they were, which is told."""
    kinds: dict[str, list[str]] = {}
    for image in written:
        if image.was:
            kinds.setdefault(image.was, []).append(image.item.path)
    if kinds:
        counts = ", ".join(f"{len(files):,} of {kind}" for kind, files in sorted(kinds.items()))
        total = sum(map(len, kinds.values()))
        print(f"note: converted {total:,} images of {spec} to 8-bit RGB: {counts}", file=sys.stderr)
    return {kind: tuple(sorted(files)) for kind, files in sorted(kinds.items())}


def _placed(written: list[Written]) -> dict[str, str]:
    """The checksum by path of images that were written to their splits at once."""
    return {image.path: image.checksum for image in written}


def _split(source: Source, written: list[Written], folder: Path, options: Options) -> dict[str, str]:
    """Moves the images from the unsplit folder to their splits, copies together: their checksum by path."""
    files = {}
    by_label: dict[str, dict[str, list[Written]]] = {label: {} for label in source.layout.classes}
    for copies in _by_content(written):
        by_label[copies[0].item.label][copies[0].item.name] = copies
    for label, images in by_label.items():
        for split, names in split_class(label, images, options.ratios, options.seed).items():
            (folder / split / label).mkdir(parents=True)
            for image in (copy for name in names for copy in images[name]):
                path = f"{split}/{label}/{image.name}"
                (folder / image.path).rename(folder / path)
                files[path] = image.checksum
    shutil.rmtree(folder / UNSPLIT)
    return files


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A new folder beside out that becomes out at the end, or vanishes on any error, with all it needed.

    Raises UserError where out is taken or cannot be written, RunError where the disk is full.
    """
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    made: list[Path] = []
    try:
        _refuse_taken(out)
        made += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial.mkdir()
        with (partial / LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
            os.sync()  # once, not once an image
            partial.rename(out)
            (out / LOCK).unlink()
        made.clear()
    except OSError as error:
        raise _explained(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _refuse_taken(out: Path) -> None:
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which cannot be replaced as a whole: name a folder in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: give another --out or remove it first")


def _remove_leftovers(out: Path) -> None:
    """Removes what killed runs for the same out left. Raises UserError when one of them is alive."""
    for folder in out.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(out.name)}\.partial-[0-9a-f]{{8}}", folder.name):
            with suppress(FileNotFoundError), (folder / LOCK).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"another prepare is writing {out} just now") from None
                except OSError:  # a file system without locks: it may be at work
                    print(f"warning: {folder} stays: remove it if no other prepare is writing it", file=sys.stderr)
                    continue
            shutil.rmtree(folder)


def _explained(error: OSError, out: Path) -> UserError | RunError:
    if error.errno in DISK_FULL:
        return RunError(f"no room for {out}: {error.strerror}; nothing was written")
    if error.errno in CANNOT_WRITE:
        return UserError(f"cannot write {out}: {error.strerror}")
    return RunError(f"cannot write {out}: {error}")


def _listing(root: Path) -> set[str]:
    paths = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_litter(name)]
        below = Path(folder).relative_to(root)
        paths |= {normal((below / name).as_posix()) for name in files if not is_litter(name)}
    return paths


def _table(manifest: Manifest) -> str:
    rows = [(label, [manifest.counts[split][label] for split in SPLITS]) for label in manifest.classes]
    totals = [sum(manifest.counts[split].values()) for split in SPLITS]
    width = max(len(label) for label in (*manifest.classes, "class"))
    lines = [f"{'class':{width}} {'train':>8} {'valid':>8} {'test':>8} {'all':>8}"]
    for label, numbers in (*rows, ("all", totals)):
        lines.append(f"{label:{width}} " + " ".join(f"{n:>8,}" for n in (*numbers, sum(numbers))))
    shares = " / ".join(f"{n:,} {split}" for n, split in zip(totals, SPLITS, strict=True))
    return "\n".join([*lines, f"{sum(totals):,} images: {shares}"])


def _ratios(text: str) -> Ratios:
    parts = text.split(",")
    if len(parts) != 3 or not all(re.fullmatch(r"\d{1,9}(\.\d{1,9})?", part) and Fraction(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive numbers like 94,5,1")
    return Fraction(parts[0]), Fraction(parts[1]), Fraction(parts[2])


def _degrees(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?", text) or not 0 < float(text) <= 180:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of degrees above 0 and to 180, like 0.1")
    return float(text)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvd_eurosat.prepare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", metavar="FILE|DIR|sample|download", help="where the images come from")
    what.add_argument("--verify", metavar="DIR", type=Path, help="compare a prepared folder with its checksums")
    add("--out", metavar="DIR", type=Path, help="the folder to make")
    add("--seed", metavar="N", type=_whole(0, 2**32 - 1), help="draws the split (default 0)")
    add("--ratios", metavar="A,B,C", type=_ratios, help="train,valid,test (default 94,5,1)")
    _add_splits(parser)
    add("--image-size", metavar="N", type=_whole(1, MAX_SIDE), default=64, help="pixels a side (default 64)")
    add(
        "--inside",
        metavar="PATH",
        default="",
        help="the folder in the source that holds the data, where there are several",
    )
    add(
        "--bands",
        metavar="NAME,NAME,…",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="what the bands of TIFFs are, in their order; EuroSAT's 13 are known, and so are those that files name",
    )
    add("--resize", action="store_true", help="resize images of other sizes (to PNG), do not refuse them")
    add("--convert", action="store_true", help="make images of other modes 8-bit RGB (to PNG), do not refuse them")
    add(
        "--skip-bad",
        action="store_true",
        help="leave unusable files out, and images that are in two classes; do not stop at them",
    )
    options = parser.parse_args(argv)
    if options.source is not None and options.out is None:
        parser.error("--source needs --out DIR")
    lists = next((name for name in ("split", "split_lists") if getattr(options, name)), "")
    for name in ("seed", "ratios"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(Wish, name))
        elif lists and not (name == "seed" and options.source == "sample"):  # which draws the sample, too
            parser.error(f"--{name} makes no difference with --{lists.replace('_', '-')}: leave it out")
    return options


def _add_splits(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--split",
        choices=PUBLISHED,
        default="",
        help="a published split of EuroSAT, whose lists torchgeo has: fetch it",
    )
    which.add_argument(
        "--split-lists",
        nargs=3,
        metavar=("TRAIN", "VALID", "TEST"),
        type=Path,
        default=(),
        help="three files of names, one on each line, that make the split",
    )
    which.add_argument(
        "--split-by-place",
        metavar="DEGREES",
        type=_degrees,
        help="GeoTIFFs by where they lie: blocks of so many degrees go whole to one split",
    )


if __name__ == "__main__":
    sys.exit(main())
