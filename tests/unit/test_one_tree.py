"""One rule for what a data tree is: five ways to its images agree, on trees made of all that people bring."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from hvd_eurosat import evaluate, predict, prepare, train
from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Config, Data
from hvd_eurosat.config.verbs import EvaluateSettings, PredictSettings
from hvd_eurosat.data import batches
from hvd_eurosat.data.inputs import PICTURES
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.errors import UserError

SIDE = 32
CLASSES = ("Bäche", "Wald")
NFD = unicodedata.normalize("NFD", CLASSES[0])
SPELLINGS = (("train", "training", "Train"), ("valid", "val", "Validation", "DEV"), ("test", "Testing", "TEST"))
LITTER = ("Thumbs.db", "DESKTOP.INI", "._1.jpg", "Icon\r", "@eaDir/1.jpg/t.jpg", ".ipynb_checkpoints/1.jpg",
          "1.tif.aux.xml", "$RECYCLE.BIN/1.jpg", "lost+found/1.jpg", "1.jpg:Zone.Identifier",
          "__MACOSX/._a", "1.tif.ovr")  # fmt: skip
KINDS = {".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".png": "PNG", ".tif": "TIFF",
         ".webp": "WEBP", ".bmp": "BMP", "": "PNG", ".txt": "BMP"}  # fmt: skip


@dataclass
class Grown:
    """A tree: where its splits are, its images by pixels, and the names of files for which it is refused."""

    root: Path
    splits: list[Path] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    seed: int = 0

    def image(self, path: Path, kind: str, mode: str = "RGB", turned: bool = False) -> None:
        """A file of noise that nothing else has."""
        self.seed += 1
        pixels = np.random.default_rng(self.seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        stream, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6 if turned else 1
        Image.fromarray(pixels).convert(mode).save(
            stream, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
        if mode == "RGB":
            seen = np.asarray(Image.open(stream)) if kind == "JPEG" else pixels
            self.images.add(digest(np.rot90(seen, -1) if turned else seen))


def digest(pixels: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def litter(tree: Grown, folder: Path, n: int) -> None:
    write(folder / LITTER[n % len(LITTER)], b"litter")
    tree.image(path := folder / "@EADIR" / "a.jpg" / "thumbnail.jpg", "JPEG")
    tree.images.discard(digest(Image.open(path)))


def sidecar(tree: Grown, folder: Path, n: int) -> None:
    write(folder.parent / ("labels.csv", "LICENSE")[n % 2], b"BM: left out, though a bitmap begins like this")


def kind(tree: Grown, folder: Path, n: int) -> None:
    ending, of = list(KINDS.items())[n % len(KINDS)]
    tree.image(folder / f"kind{n}{ending}", of)


def turned(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder / f"turned{n}.png", "PNG", turned=True)


def nested(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder / "older" / f"nested{n}.jpg", "JPEG")


def decomposed(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder.parent / NFD / f"decomposed{n}.jpg", "JPEG")


def linked(tree: Grown, folder: Path, n: int) -> None:
    tree.image(elsewhere := tree.root.parent / f"linked{len(tree.images)}" / f"linked{n}.jpg", "JPEG")
    with contextlib.suppress(FileExistsError):
        (folder / elsewhere.name).symlink_to(elsewhere.parent)


def loop(tree: Grown, folder: Path, n: int) -> None:
    with contextlib.suppress(FileExistsError):
        (folder / "round").symlink_to(folder.parent, target_is_directory=True)


def spaced(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder / f"at 10.00\u202fAM \u200d{n}.png", "PNG")


GOOD = (litter, sidecar, kind, turned, nested, decomposed, linked, loop, spaced)


def grey(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder / f"grey{n}.png", "PNG", "L")
    tree.bad.add(f"grey{n}.png")


def no_image(tree: Grown, folder: Path, n: int) -> None:
    write(folder / f"notes{n}.txt", b"no image")
    tree.bad.add(f"notes{n}.txt")


def broken_link(tree: Grown, folder: Path, n: int) -> None:
    with contextlib.suppress(FileExistsError):
        (folder / f"broken{n}.jpg").symlink_to("nowhere")
    tree.bad.add(f"broken{n}.jpg")


def self_link(tree: Grown, folder: Path, n: int) -> None:
    with contextlib.suppress(FileExistsError):
        (folder / f"self{n}.jpg").symlink_to(f"self{n}.jpg")
    tree.bad.add(f"self{n}.jpg")


def pipe(tree: Grown, folder: Path, n: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkfifo(folder / f"pipe{n}")
    tree.bad.add(f"pipe{n}")


def two_classes(tree: Grown, folder: Path, n: int) -> None:
    number = CLASSES.index(folder.name)
    tree.image(folder / f"one{number}{n}.jpg", "JPEG")
    other = folder.parent / CLASSES[1 - number] / f"two{number}{n}.jpg"
    if n % 2:
        other.symlink_to(folder / f"one{number}{n}.jpg")
    else:
        other.hardlink_to(folder / f"one{number}{n}.jpg")
    tree.bad |= {f"one{number}{n}.jpg", other.name}


BAD = (grey, no_image, broken_link, self_link, pipe, two_classes)


def loose(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder.parent / f"loose{n}.jpg", "JPEG")
    tree.bad.add(f"loose{n}.jpg")


def deep(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder.parent / "Acker" / "inner" / f"deep{n}.jpg", "JPEG")
    tree.bad.add(f"deep{n}.jpg")


def capitals(tree: Grown, folder: Path, n: int) -> None:
    tree.image(folder.parent / folder.name.upper() / f"other{n}.jpg", "JPEG")
    tree.bad.add(folder.name.upper())


MISLAID = (loose, deep, capitals)  # of which the first stops


@st.composite
def growers(draw: st.DrawFn) -> Callable[[Path], Grown]:
    """How to make a tree: wrappers, spellings of the splits, and oddities of which none, some or one is a flaw."""
    wrappers = draw(st.lists(st.sampled_from(("photos", "Images", "2750")), max_size=2, unique=True))
    spellings = [draw(st.sampled_from(names)) for names in SPELLINGS]
    place = st.tuples(st.integers(0, 2), st.sampled_from(CLASSES), st.integers(0, 99))
    odd = draw(st.lists(st.tuples(st.sampled_from(GOOD), place), max_size=6, unique=True))
    flaws = draw(st.sampled_from((None, BAD, MISLAID)))
    if flaws is MISLAID:  # a file that is no image, beside an image that is out of its place, is a second flaw
        odd = [(make, at) for make, at in odd if make is not sidecar]
    if flaws:
        number = 3 if flaws is BAD else 1
        odd += draw(st.lists(st.tuples(st.sampled_from(flaws), place), min_size=1, max_size=number))

    def grow(folder: Path) -> Grown:
        tree = Grown(folder / "tree")
        tree.splits = [tree.root.joinpath(*wrappers, spelling) for spelling in spellings]
        for split in tree.splits:
            for label in CLASSES:
                for name in ("a.jpg", "b.png"):
                    tree.image(split / label / name, KINDS[name[1:]])
        for make, (number, label, n) in odd:
            make(tree, tree.splits[number] / label, n)
        return tree

    return grow


class EnoughError(Exception):
    """Training has its images."""


@dataclass
class Ways:
    """The five ways to the images of a tree: each gives the pixels of all, or the files for which it is refused."""

    world: World
    seen: set[str] = field(default_factory=set)

    def note(self, images: Any) -> None:
        """Of uint8 [N, S, S, 3]."""
        self.seen |= {digest(pixels) for pixels in np.asarray(images)}

    def infer(self, world: World, model: Any, shown: Any, *_: Any) -> list[Any]:
        """In place of the network."""
        results = []
        for batch in shown:
            self.note(batch.images[: batch.total].permute(0, 2, 3, 1))
            results.append(np.zeros((batch.total, 1, len(CLASSES)), np.float32))
        return results

    def ask(self, names: set[str], steps: list[Callable[[], object]]) -> tuple[set[str], set[str], str]:
        """What a way sees in its steps, which of the names its refusals have, and these."""
        self.seen, said = set(), ""
        for step in steps:
            try:
                step()
            except EnoughError:
                pass
            except UserError as error:
                said += str(error)
        return self.seen, {name for name in names if name in said}, said

    def train(self, root: Path) -> None:
        keys = {"train": {"batch_size": 1}, "model": {"arch": "resnet18", "weights": "none"}}
        train.train(
            self.world,
            Config(data={"root": root, "image_size": SIDE}, run={"dir": root.parent / "run"}, **keys),
        )

    def prepare_and_train(self, root: Path) -> None:
        out, said = root.parent / "prepared", io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = prepare.main(["--source", str(root), "--out", str(out), "--image-size", str(SIDE)])
        if status:
            raise UserError(said.getvalue())
        self.train(out)

    def evaluate(self, **keys: object) -> Callable[[], object]:
        return lambda: evaluate.main(self.world, EvaluateSettings(checkpoint="c", **keys))

    def predict(self, root: Path) -> None:
        predict.main(self.world, PredictSettings(checkpoint="c", input=[root], out=root.parent / "predictions"))


@pytest.fixture
def ways(alone: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    ways = Ways(alone)
    model = SimpleNamespace(fc=SimpleNamespace(out_features=len(CLASSES)))
    saved = SimpleNamespace(
        classes=list(CLASSES),
        precision="fp32",
        wants=PICTURES,
        digest="of other images",
        data=Data(image_size=SIDE),
        config=Config(data=Data(image_size=SIDE)).model_dump(mode="json"),
        build_model=lambda device: model,
        views=lambda asked: 1,
        batch_size=lambda asked, device: 128,
        temperature=lambda views: 1.0,
    )
    open_images = batches.open_images

    def opened(*arguments: Any) -> Any:
        images = open_images(*arguments)
        for split in images.values():
            ways.note(split.images)
        raise EnoughError

    for verb in (evaluate, predict):
        monkeypatch.setattr(verb.checkpoint, "load", lambda path: saved)
        monkeypatch.setattr(verb, "infer", ways.infer)
    monkeypatch.setattr(train, "open_images", opened)
    return ways


@settings(
    max_examples=60,
    phases=[Phase.generate],
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(grow=growers())
def test_five_ways_agree(ways: Ways, capsys: pytest.CaptureFixture[str], grow: Callable[[Path], Grown]) -> None:
    """They see the same images, or are refused for the same files."""
    with TemporaryDirectory() as folder:
        tree = grow(Path(folder))
        found = {
            "prepare and train": ways.ask(tree.bad, [lambda: ways.prepare_and_train(tree.root)]),
            "train": ways.ask(tree.bad, [lambda: ways.train(tree.root)]),
            "evaluate --data.root": ways.ask(
                tree.bad, [ways.evaluate(data={"root": tree.root}, split=name) for name in SPLITS]
            ),
            "evaluate --input": ways.ask(tree.bad, [ways.evaluate(input=split) for split in tree.splits]),
            "predict": ways.ask(tree.bad, [lambda: ways.predict(tree.root)]),
        }
        content = "\n".join(sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()))
        capsys.readouterr()
    for way, (seen, named, said) in found.items():
        if tree.bad:
            assert named == tree.bad, f"{way}: {said}\n{content}"
        else:
            assert seen == tree.images, f"{way}: {said}\n{content}"
