"""Shards: every sample once, padding that does not count, the same global batches on any number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_eurosat.cluster.world import World
from hvd_eurosat.config.schema import Data, Place
from hvd_eurosat.data import batches
from hvd_eurosat.data.ahead import made_ahead
from hvd_eurosat.data.augment import (
    augment,
    mix,
    network_input,
    normalise,
    recolour,
    resized,
    shift,
    turn_and_flip,
    view_of,
)
from hvd_eurosat.data.batches import Batch, Images, TrainBatches, by_content, open_images, ordered_batches
from hvd_eurosat.data.layout import SPLITS
from hvd_eurosat.data.mixing import mix_pairs, mixed_input, quantiles
from hvd_eurosat.data.packed import Packed
from hvd_eurosat.data.tree import open_tree
from hvd_eurosat.errors import UserError
from tests.unit.conftest import Grow

EPOCH = torch.tensor(5)  # which a batch whose images are there does not ask for


def make_images(count: int) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    packed = Packed(pixels, np.arange(count, dtype=np.int64), tuple(map(str, range(count))))
    return Images(packed, torch.device("cpu"))


def counted(batch: Batch) -> list[int]:
    return batch.indices[batch.weights > 0].tolist()


@pytest.mark.parametrize(("count", "ranks", "size"), [(60, 1, 7), (61, 2, 8), (50, 3, 5), (65, 64, 1), (66, 2, 33)])
def test_every_sample_counts_once_in_an_epoch(count: int, ranks: int, size: int) -> None:
    images = make_images(count)
    shards = [list(TrainBatches(images, size, rank, ranks, seed=3).epoch(1)) for rank in range(ranks)]
    assert sorted(index for shard in shards for batch in shard for index in counted(batch)) == list(range(count))
    assert all(len(batch.indices) == len(batch.complete(EPOCH).images) == size for shard in shards for batch in shard)
    for step in zip(*shards, strict=True):
        assert {batch.total for batch in step} == {sum(len(counted(batch)) for batch in step)}


def test_global_batches_are_the_same_sets_on_any_number_of_ranks() -> None:
    images = make_images(96)
    steps = []
    for ranks in (1, 2, 4):
        shards = [TrainBatches(images, 24 // ranks, rank, ranks, seed=3).epoch(5) for rank in range(ranks)]
        steps.append([sorted(i for batch in step for i in counted(batch)) for step in zip(*shards, strict=True)])
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize(("count", "size"), [(96, 4), (97, 5)])
def test_an_epoch_goes_on_where_it_was_left(count: int, size: int) -> None:
    """On as many ranks the same batches, padding included; from 4 ranks to 2 to 3 every sample once."""
    images = make_images(count)
    whole = list(TrainBatches(images, size, 1, 2, seed=3).epoch(1))
    rest = list(TrainBatches(images, size, 1, 2, seed=3).epoch(1, 6 * size))
    assert [batch.indices.tolist() for batch in whole[3:]] == [batch.indices.tolist() for batch in rest]
    seen, samples = [], 0
    for ranks, steps in ((4, 2), (2, 3), (3, count)):
        shards = [TrainBatches(images, size, rank, ranks, seed=3).epoch(1, samples) for rank in range(ranks)]
        for step, _ in zip(zip(*shards, strict=True), range(steps), strict=False):
            seen += [index for batch in step for index in counted(batch)]
            samples += step[0].total
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("mixes", [False, True])
def test_batches_that_travel_are_made_ahead(monkeypatch: pytest.MonkeyPatch, mixes: bool) -> None:
    """To a GPU from this host's memory: by a thread, the same ones; simulated by the CPU's own memory."""
    images = make_images(23)
    expected = list(TrainBatches(images, 4, 0, 1, seed=3, mixes=mixes).epoch(1, 4))
    makers, hold = set(), Images.hold

    def spied(self: Images, *arguments: Any) -> Batch:
        makers.add(threading.current_thread().name)
        return hold(self, *arguments)

    monkeypatch.setattr(Images, "travels", True)
    monkeypatch.setattr(Images, "hold", spied)
    monkeypatch.setattr(batches, "_pinned", lambda count, like: like.new_empty(count, *like.shape[1:]))
    found = list(TrainBatches(images, 4, 0, 1, seed=3, mixes=mixes).epoch(1, 4))
    assert makers == {"ahead_0"}
    assert len(found) == len(expected) == 5
    for one, other in zip(map(dataclasses.asdict, found), map(dataclasses.asdict, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    shown = list(ordered_batches(images, 5))
    assert torch.equal(torch.cat([batch.images for batch in shown])[:23], images.images.permute(0, 3, 1, 2))
    assert [batch.total for batch in shown] == [5, 5, 5, 5, 3]


def test_a_thread_that_is_ahead_is_so_by_two() -> None:
    """And no further, for each holds memory; its error is raised where the batch would be; left early, it ends."""
    begun: list[int] = []

    def make(number: int) -> int:
        begun.append(number)
        if number == 4:
            raise OSError("the disk is gone")
        return number

    threads = threading.active_count()
    coming = made_ahead((partial(make, number) for number in itertools.count()), 2)
    assert next(coming) == 0
    assert next(coming) == 1
    assert len(begun) <= 4
    coming.close()
    assert threading.active_count() == threads
    with pytest.raises(OSError, match="the disk is gone"):
        list(made_ahead((partial(make, number) for number in range(5)), 2))


def test_each_epoch_has_its_own_order() -> None:
    batches = TrainBatches(make_images(40), 40, 0, 1, seed=0)
    orders = [next(batches.epoch(epoch)).indices.tolist() for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="9 ranks are more than the 8 training images: start 8 at most"):
        TrainBatches(make_images(8), 1, 0, 9, seed=0)
    with pytest.raises(
        UserError, match=r"batch_size 5 is larger than a rank's shard of 4 .*: give 4 or less, or start 1 r"
    ):
        TrainBatches(make_images(8), 5, 0, 2, seed=0)
    with pytest.raises(
        UserError, match=r"batch_size 9 is larger than a rank's shard of 8 training images: give 8 or less$"
    ):
        TrainBatches(make_images(8), 9, 0, 1, seed=0)


@pytest.mark.parametrize("images", [8, 9, 40, 41])
def test_the_cure_for_too_large_a_batch_is_one(images: int) -> None:
    """The smaller batch fits, and so do the fewer ranks, of which one more would be too many."""
    made = make_images(images)

    def fits(ranks: int, batch: int) -> str:
        with contextlib.suppress(UserError):
            TrainBatches(made, batch, 0, ranks, seed=0)
            return ""
        with pytest.raises(UserError) as error:
            TrainBatches(made, batch, 0, ranks, seed=0)
        return str(error.value)

    for ranks, batch in itertools.product(range(1, images + 1), range(2, images + 2)):
        if not (refused := fits(ranks, batch)):
            continue
        found = re.fullmatch(r".*: give (\d+) or less(?:, or start (\d+) ranks? at most)?", refused)
        assert found
        assert not fits(ranks, int(found[1]))
        assert fits(ranks, int(found[1]) + 1)
        most = int(found[2] or 0)
        assert not most or not fits(most, batch)
        assert fits(most + 1, batch)


def test_data_is_known_by_what_it_shows(grow: Grow, tmp_path: Path) -> None:
    """A copy of another time is the same; another image or another name is not."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    for split in SPLITS:
        grow(f"data/{split}", {"Forest": 2, "River": 2}, size=(32, 32))

    def digest(root: Path) -> str:
        tree = open_tree(root)
        return by_content(tree, open_images(world, tree, SPLITS, Data(image_size=32), Place())).digest

    whole = digest(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / ".packed")
    copy = shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    assert open_tree(copy).digest != open_tree(tmp_path / "data").digest
    assert digest(copy) == whole
    image = copy / "valid" / "River" / "River_1.jpg"
    image.rename(image.with_name("River_9.jpg"))
    assert digest(copy) != whole
    image.with_name("River_9.jpg").rename(image)
    image.write_bytes((copy / "valid" / "River" / "River_2.jpg").read_bytes())
    assert digest(copy) != whole


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_ordered_batches_are_the_same_on_any_number_of_shards(shards: int) -> None:
    images = make_images(50)
    whole = [(batch.indices.tolist(), counted(batch)) for batch in ordered_batches(images, 8)]
    parts = [list(ordered_batches(images, 8, shard, shards)) for shard in range(shards)]
    joined = [parts[n % shards][n // shards] for n in range(len(whole))]
    assert [(batch.indices.tolist(), counted(batch)) for batch in joined] == whole
    assert [index for _, real in whole for index in real] == list(range(50))


def test_the_eight_views_are_the_flips_and_quarter_turns() -> None:
    image = torch.arange(3 * 16).view(1, 3, 4, 4)
    views = turn_and_flip(image.expand(8, 3, 4, 4), torch.arange(8))
    turns = [torch.rot90(flipped, n, (2, 3)) for flipped in (image, image.flip(3)) for n in range(4)]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert all(any(torch.equal(view, turn[0]) for turn in turns) for view in views)
    assert all(torch.equal(view_of(image, number), view[None]) for number, view in enumerate(views))


@pytest.mark.parametrize(
    "data",
    [
        Data(),
        Data(augment=False, max_shift=3),
        Data(augment=False, random_horizontal_flip=0.5, random_rotate=20, jitter_crop=0.3, random_zoom=0.2),
        Data(augment=False, random_brightness=0.3, random_contrast=0.3, random_gain=0.1),
        Data(augment=False, random_erase=1.0),
    ],
)
def test_augmentation_depends_on_seed_epoch_and_index_alone(data: Data) -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    indices = torch.tensor([5, 1, 9, 1000, 77, 3])
    whole = augment(images, indices, seed=1, epoch=2, data=data)
    parts = [augment(images[n : n + 2], indices[n : n + 2], seed=1, epoch=2, data=data) for n in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augment(images, indices, seed=1, epoch=3, data=data))
    assert not torch.equal(whole, augment(images, indices, seed=2, epoch=2, data=data))


def test_a_sample_is_mixed_with_the_same_one_in_the_same_way_on_any_number_of_ranks() -> None:
    """Another one in each epoch; the image and the share."""
    images = make_images(60)
    tables = [quantiles(0.4, images.device), quantiles(1.0, images.device)]

    def mixed(ranks: int, epoch: int) -> dict[int, tuple[object, float, int]]:
        found: dict[int, tuple[object, float, int]] = {}
        for rank in range(ranks):
            for drawn in TrainBatches(images, 10, rank, ranks, seed=3, mixes=True).epoch(epoch):
                batch = drawn.complete(EPOCH)
                others = batch.partners
                assert others is not None
                inputs = batch.images, batch.indices, others.images, others.indices, 3, torch.tensor(epoch), 8, Data()
                each = (batch.indices, *mixed_input(*inputs, *tables), others.labels)
                for index, image, share, label in zip(*(tensor.tolist() for tensor in each), strict=True):
                    found[index] = image, share, label
        return found

    assert mixed(1, 5) == mixed(2, 5) == mixed(3, 5) != mixed(3, 6)
    assert len({label for _, _, label in mixed(2, 5).values()}) > 30


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_shares_are_those_of_a_beta_distribution(alpha: float) -> None:
    """Whose mean is 1/2 and whose variance 1 / (8 alpha + 4)."""
    drawn = quantiles(alpha, torch.device("cpu"))
    assert drawn is not None
    assert drawn.mean() == pytest.approx(0.5)
    assert drawn.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.02)


def test_mixed_images_have_what_their_labels_say() -> None:
    """Of a black and a white one: all pixels the share's grey, or as many black ones as its share."""
    black, white = torch.zeros(300, 3, 16, 16, dtype=torch.uint8), torch.full((300, 3, 16, 16), 255, dtype=torch.uint8)
    table = quantiles(1.0, black.device)
    for mixup, cutmix, kinds in ((table, None, 1), (None, table, 1), (table, table, 2)):
        images, share = mix_pairs(black, white, torch.arange(300), 1, 2, mixup, cutmix)
        means = images.double().mean((1, 2, 3)) / 255
        assert torch.allclose(means, 1 - share, atol=0.002)
        levels = torch.tensor([len(image.unique()) for image in images])
        assert (levels == 1).sum() > (20 if mixup is not None else 0) - 1
        assert len({int(n) for n in levels}) >= kinds
        assert share.min() < 0.2  # a square at the border is cut off
        assert share.max() > 0.8


def test_colours_change_as_told() -> None:
    """A band at a time; about the mean; no further than black and white."""
    images = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    images[:, :, :2] = 200
    brighter = recolour(images, torch.tensor([[1.0, 1.2, 2.0]]), torch.tensor([1.0]))
    assert brighter[0, :, 3, 3].tolist() == [100, 120, 200]
    assert brighter[0, :, 0, 0].tolist() == [200, 240, 255]
    flatter = recolour(images, torch.ones(1, 3), torch.tensor([0.5]))
    assert flatter[0, :, 3, 3].tolist() == [125] * 3
    assert flatter[0, :, 0, 0].tolist() == [175] * 3


def test_rectangles_are_erased_with_the_mean_colour() -> None:
    """In so many images as told, of 2 to 33 % of them, anywhere."""
    data = Data(augment=False, random_erase=0.5)
    images = torch.zeros(2000, 3, 16, 16, dtype=torch.uint8)
    erased = augment(images, torch.arange(2000), 1, 2, data)
    colours = {tuple(pixel) for pixel in erased.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist()}
    assert colours == {(0, 0, 0), (124, 116, 104)}
    areas = (erased[:, 0] > 0).double().mean((1, 2))
    assert 900 < int((areas > 0).sum()) < 1100
    assert areas[areas > 0].min() > 0.01
    assert areas.max() < 0.4
    assert (erased[:, 0] > 0).any(0).double().mean() > 0.99


def test_the_network_input_is_one_graph_for_all_epochs() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    data = Data(max_shift=3, random_horizontal_flip=0.5, random_rotate=20, jitter_crop=0.3, random_zoom=0.2)
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    compiled = torch.compile(network_input, dynamic=False, fullgraph=True, backend=backend)
    for epoch in torch.arange(3):
        arguments = (images, torch.arange(6), 1, epoch, 48, data)
        assert torch.equal(compiled(*arguments), network_input(*arguments))
    assert len(graphs) == 1


def test_mixing_is_one_graph_for_all_epochs() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    data = Data(random_brightness=0.3, random_contrast=0.3, random_gain=0.1, random_erase=0.5)
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    tables = quantiles(0.4, images.device), quantiles(1.0, images.device)
    compiled = torch.compile(mixed_input, dynamic=False, fullgraph=True, backend=backend)
    for epoch in torch.arange(3):
        arguments = (images, torch.arange(6), images.flip(0), torch.arange(6).flip(0), 1, epoch, 96, data, *tables)
        for theirs, ours in zip(compiled(*arguments), mixed_input(*arguments), strict=True):
            assert torch.equal(theirs, ours)
    assert len(graphs) == 1


def test_eight_epochs_show_each_image_in_all_eight_views() -> None:
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    views = {tuple(augment(image, torch.tensor([7]), 0, epoch, Data()).flatten().tolist()) for epoch in range(8)}
    assert len(views) == 8


def test_shift_mirrors_at_the_border() -> None:
    image = torch.arange(25).view(1, 1, 5, 5)
    moved = shift(image, torch.tensor([0]), torch.tensor([-2]))
    assert moved[0, 0, 0].tolist() == [2, 1, 0, 1, 2]


def test_shifts_need_no_other_augmentation() -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    shifted = augment(images, torch.arange(6), seed=1, epoch=2, data=Data(augment=False, max_shift=4))
    found = [
        [
            (dy, dx)
            for dy in range(-4, 5)
            for dx in range(-4, 5)
            if torch.equal(after[None], moved(before[None], dy, dx))
        ]
        for before, after in zip(images, shifted, strict=True)
    ]
    assert [len(places) for places in found] == [1] * 6
    assert len({place for places in found for place in places}) > 1


def moved(images: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    return shift(images, torch.tensor([dy]), torch.tensor([dx]))


NEIGHBOURS = [(seed, seed + 1) for seed in (0, 1, 7, 2**31 - 2)]


@pytest.mark.parametrize(("seed", "other"), NEIGHBOURS)
@pytest.mark.parametrize("keys", [(), (3, 1), (3, 2), (3, 10)])
def test_seeds_have_random_bits_of_their_own(seed: int, other: int, keys: tuple[int, ...]) -> None:
    """Equal by chance in one of eight places, whatever the number of images or epochs between them."""
    indices, count = torch.arange(10_000), 8_000
    for images in range(-3, 4):
        for epochs in range(-2, 3) if keys else [0]:
            theirs = (keys[0] + epochs, *keys[1:]) if keys else ()
            same = mix(seed, indices, *keys) % 8 == mix(other, indices + images, *theirs) % 8
            assert 900 < int(same[:count].sum()) < 1_100, (images, epochs)


@pytest.mark.parametrize(("seed", "other"), NEIGHBOURS)
def test_seeds_have_orders_of_their_own(seed: int, other: int) -> None:
    mine, theirs = (
        {
            tuple(next(TrainBatches(make_images(40), 40, 0, 1, seed=s).epoch(epoch)).indices.tolist())
            for epoch in range(20)
        }
        for s in (seed, other)
    )
    assert len(mine) == len(theirs) == 20
    assert not mine & theirs


def test_random_bits_are_uniform() -> None:
    counts = torch.bincount(mix(3, torch.arange(80_000), 1) % 8)
    assert counts.min() > 9_600
    assert counts.max() < 10_400


def test_normalisation_is_that_of_the_imagenet_weights() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert torch.allclose(normalise(images, Data()).flatten(), expected, atol=1e-6)


def test_shrunk_images_are_averages_of_what_was_there() -> None:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    images[:, :, :, 32:] = 200
    small = resized(images, 32)
    assert small.dtype == torch.uint8
    assert small[0, 0, 16].tolist()[:15] + small[0, 0, 16].tolist()[17:] == [0] * 15 + [200] * 15
    assert resized(images, 64) is images
