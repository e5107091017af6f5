"""Turn EuroSAT (a zip, a tar, class folders, a download) or the synthetic sample into a checked, split data folder."""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path

from hvd_eurosat.config.command import Parser
from hvd_eurosat.data import telling
from hvd_eurosat.data.appearing import appearing
from hvd_eurosat.data.copying import Copies, Options, copy, measure, split, without_contradictions
from hvd_eurosat.data.images import MAX_SIDE
from hvd_eurosat.data.inputs import REFLECTANCE, UNITS, Inputs
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.listing import SHOWN, is_litter, normal
from hvd_eurosat.data.multispectral import recognise
from hvd_eurosat.data.packed import verify_packed
from hvd_eurosat.data.processes import cores, in_processes
from hvd_eurosat.data.sources import Source, open_source, stays
from hvd_eurosat.data.split import Ratios
from hvd_eurosat.data.splits import PUBLISHED, Wish, arrange, lists_for
from hvd_eurosat.data.tree import CHECKSUMS, MANIFEST, Manifest, check_classes, open_tree, read_manifest, sha256_of
from hvd_eurosat.errors import RunError, UserError

EXAMPLES = """
examples:
  the real data, split 94:5:1:      python -m hvd_eurosat.prepare --source EuroSAT_RGB.zip --out data/EuroSAT_RGB
  the same, fetched first:          python -m hvd_eurosat.prepare --source download --out data/EuroSAT_RGB
  a small synthetic set to try:     python -m hvd_eurosat.prepare --source sample --out data/sample --ratios 80,10,10
  your own class folders, resized:  python -m hvd_eurosat.prepare --source photos --out data/photos --resize
  torchgeo's spatial split:         python -m hvd_eurosat.prepare --source download --out data/spatial --split spatial
  one folder of a large archive:    python -m hvd_eurosat.prepare --source all.tgz --inside ucm/Images --out data/ucm
  TIFFs of four bands:              python -m hvd_eurosat.prepare --source naip --out data/naip --bands B04,B03,B02,B08
  a million files, not copied:      python -m hvd_eurosat.prepare --source patches --out data/patches --link
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

--link makes links to the images of a folder in place of copies: what changes an image there changes it here, too, and
--verify finds it. What --resize and --convert change is written anew.

The result is train/ valid/ test/<Class>/<image>, with manifest.json (what it is and how it was made) and files.sha256
(for sha256sum -c). It appears whole or not at all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0 done, 1 failed, 2 bad usage or data, 130 interrupted."""
    words = vars(_parse(argv))
    source, out, verified = (words.pop(name) for name in ("source", "out", "verify"))
    try:
        print(verify(verified, words["jobs"]) if verified else _table(prepare(source, out, Options(**words))))
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
    if options.link and not stays(spec):  # before it is drawn or fetched
        raise UserError(f"--link is for folders, whose files stay: the images of {spec} must be copied")
    lists = lists_for(options)
    with appearing(out.resolve()) as folder, open_source(spec, options.seed, options.inside) as given:
        for note in given.layout.notes:
            print(f"note: {note}", file=sys.stderr)
        source, rule, placeless = arrange(given, spec, options, lists)
        inputs = _recognised(source, spec, options)
        copies = copy(source, folder, options, inputs)
        groups, contradictory = without_contradictions(copies, copies.groups())
        skipped = [*placeless, *copies.unusable(), *contradictory]
        telling.of_skipped(skipped, len(given.layout.items), spec, options.skip_bad)
        telling.of_groups(copies, groups, spec, rule)
        telling.of_sizes(copies, spec, options.image_size)
        telling.of_links(copies, spec)
        if not source.layout.split:
            split(copies, groups, options)
        counts = copies.counts()
        manifest = Manifest(
            name=source.name,
            synthetic=source.synthetic,
            classes=check_classes(counts, spec),
            image_size=options.image_size,
            counts=counts,
            seed=options.seed if rule.is_drawn else None,
            ratios=tuple(map(float, options.ratios)) if rule.is_drawn else None,
            split=rule,
            digest=_write_listing(copies),
            skipped=tuple(skipped),
            converted=telling.of_converted(copies, spec),
            inputs=measure(copies, inputs, options.image_size),
            extras=_write_extras(source, folder),
        )
        if given.layout.split:
            what = "keeps its split" if rule.kind == "source" else "gets another split"
            print(f"note: {spec} is split already and {what}", file=sys.stderr)
        if rule.blocks:
            telling.of_blocks(manifest, rule)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _write_listing(copies: Copies) -> str:
    """Writes files.sha256 into the folder; its own sha256."""
    digest = hashlib.sha256()
    with (copies.folder / CHECKSUMS).open("wb") as file:
        for lines in copies.lines():
            file.write(lines.encode())
            digest.update(lines.encode())
    return digest.hexdigest()


def verify(root: Path, jobs: int = 1) -> str:
    """Compares the prepared folder root, packed arrays included, with its checksums. Returns the good news.

    Raises RunError, which names what changed, is missing or extra; UserError where there is nothing to compare.
    """
    if not (root / MANIFEST).exists():
        raise UserError(f"{root} has no {MANIFEST}: it was not made by prepare, and there is nothing to compare with")
    try:
        tree = open_tree(root)
    except UserError as error:
        raise RunError(str(error)) from None
    extras = read_manifest(root).extras
    names, sums = tree.checksums.names, tree.checksums.sums

    def compare(numbers: range) -> list[tuple[int, str]]:
        flaws = ((n, _flaw(tree.path(names[n]), names[n], sums[n])) for n in numbers)
        return [(n, flaw) for n, flaw in flaws if flaw]

    with closing(in_processes(compare, len(names), "comparing", jobs)) as parts:
        flaws = [flaw for _, flaw in sorted(flaw for _, part in parts for flaw in part)]
    flaws += filter(None, (_flaw(root / name, name, checksum) for name, checksum in extras.items()))
    known = extras.keys() | {MANIFEST, CHECKSUMS}
    extra = sorted(path for path in _listing(root) if path not in known and path not in tree.checksums)
    flaws += [f"{path}: extra" for path in extra]
    packed = sorted((root / ".packed").glob("*.npy"))
    flaws += filter(None, map(_flaw_of_packed, packed))
    more = [f"… and {len(flaws) - SHOWN:,} more"] if len(flaws) > SHOWN else []
    if flaws:
        raise RunError("\n  ".join([f"{root} is not as it was prepared:", *flaws[:SHOWN], *more]))
    files = len(names) + len(extras)
    return f"{root}: all {files:,} files and {len(packed)} packed arrays are as they were written"


def _flaw(path: Path, name: str, checksum: str) -> str:
    """What a file is that is not as it was, if it is not."""
    try:
        return "" if sha256_of(path) == checksum else f"{name}: changed"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"


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
    if options.unit:
        inputs = inputs.in_unit(options.unit, spec)
    if inputs.file and (options.resize or options.convert):
        raise UserError(f"--resize and --convert are for 8-bit RGB, and {spec} has {len(inputs.file)} bands")
    if inputs.file:
        print(f"note: {spec} has {inputs.dtype} bands {', '.join(inputs.file)}: {inputs.unit}", file=sys.stderr)
    return inputs


def _write_extras(source: Source, folder: Path) -> dict[str, str]:
    """Writes what comes with the source beside its images; the files' sha256 by their names."""
    for name, data in source.extras.items():
        (folder / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in source.extras.items()}


def _listing(root: Path) -> Iterator[str]:
    """The names of the files below root."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_litter(name)]
        below = Path(folder).relative_to(root)
        yield from (normal((below / name).as_posix()) for name in files if not is_litter(name))


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
    parser = Parser(prog="python -m hvd_eurosat.prepare", description=__doc__, epilog=EXAMPLES)
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
    add("--unit", choices=UNITS, help=f"what the numbers of TIFFs are; 16-bit ones may be {REFLECTANCE}")
    add("--resize", action="store_true", help="resize images of other sizes (to PNG), do not refuse them")
    add("--convert", action="store_true", help="make images of other modes 8-bit RGB (to PNG), do not refuse them")
    add(
        "--skip-bad",
        action="store_true",
        help="leave unusable files out, and images that are in two classes; do not stop at them",
    )
    add("--link", action="store_true", help="hard links, no copies; symbolic ones to another file system")
    most = cores()
    add("--jobs", metavar="N", type=_whole(1, 1024), default=most, help=f"processes (default {most}: the cores here)")
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


def _add_splits(parser: Parser) -> None:
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
