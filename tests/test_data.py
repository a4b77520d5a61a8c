"""Data sets in memory."""

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import torch
from publishing import COUNTS, World

from vdbench import config, data
from vdbench.data import DataError


def test_load_gives_the_published_values(world: World) -> None:
    loaded = world.load()
    for images, labels, split in (
        (loaded.train_images, loaded.train_labels, "train"),
        (loaded.eval_images, loaded.eval_labels, "test"),
    ):
        raw_images, raw_labels = world.arrays[split]
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (COUNTS[split], 1, 28, 28)
        np.testing.assert_array_equal((images[:, 0] * 255).round().numpy(), raw_images)
        np.testing.assert_array_equal(labels.numpy(), raw_labels)
        assert images.min() == 0 and images.max() == 1


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_examples_are_training_examples_and_the_test_set_is_not_read(world: World) -> None:
    world.fetch()
    full = world.load()
    (world.cache / "mnist" / "test-images").write_bytes(b"whoever reads this is refused")
    split = world.load(validation_size=8)
    held_out, kept = rows(split.eval_images), rows(split.train_images)
    assert len(held_out) == 8 and len(kept) == 22
    assert held_out | kept == rows(full.train_images) and not held_out & kept
    labels = {image.numpy().tobytes(): int(y) for image, y in zip(full.train_images, full.train_labels, strict=True)}
    for images, ys in ((split.eval_images, split.eval_labels), (split.train_images, split.train_labels)):
        assert [labels[image.numpy().tobytes()] for image in images] == ys.tolist()


def test_validation_split_is_shuffled_and_the_same_under_any_seed(world: World) -> None:
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits.append(world.load(validation_size=8))
        assert torch.initial_seed() == seed
    assert torch.equal(splits[0].eval_images, splits[1].eval_images)
    assert torch.equal(splits[0].train_images, splits[1].train_images)
    assert rows(splits[0].eval_images) != rows(world.load().train_images[-8:])


@pytest.mark.parametrize("size", [-1, 30, 31])
def test_validation_size_that_leaves_nothing_is_an_error(world: World, size: int) -> None:
    with pytest.raises(DataError, match=f"validation_size is {size}: mnist has 30 training examples"):
        world.load(validation_size=size)


def test_digits_are_the_scans_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    monkeypatch.setenv("VDBENCH_MIRROR", "/nowhere")  # embedded: no folder is looked at
    loaded = data.load("digits")
    scans: Any = load_digits()
    everything = torch.cat([loaded.train_images, loaded.eval_images])
    assert everything.shape == (1797, 1, 28, 28) and everything.min() == 0 and everything.max() == 1
    small = everything[:, 0, 3:-2:3, 3:-2:3]  # the middle of every 3 x 3 block
    originals = {image.astype(np.float32).tobytes(): y for image, y in zip(scans.images, scans.target, strict=True)}
    ys = torch.cat([loaded.train_labels, loaded.eval_labels])
    assert [originals[(image * 16).numpy().tobytes()] for image in small] == ys.tolist()
    blocks = small.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    assert torch.equal(torch.nn.functional.pad(blocks, (2, 2, 2, 2)), everything[:, 0])


def test_digits_split_is_fixed_disjoint_and_balanced() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.train_images, second.train_images) and torch.equal(first.eval_images, second.eval_images)
    assert not rows(first.train_images) & rows(first.eval_images)  # all 1,797 scans differ
    train, test = Counter(first.train_labels.tolist()), Counter(first.eval_labels.tolist())
    assert {label: (train[label] + test[label]) // 5 for label in range(10)} == test
    assert data.fetch("digits") == {
        "dataset": "digits",
        "files": {},
        "examples": {"train": train.total(), "test": test.total()},
    }


def test_digits_other_than_expected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    scans: Any = sklearn.datasets.load_digits()
    scans.images[0, 0, 0] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: scans)
    with pytest.raises(DataError, match=r"expected scans with sha256 .* found .* in scikit-learn"):
        data.load("digits")


def test_unknown_data_set_is_an_error_that_lists_the_known() -> None:
    for use in (data.load, data.fetch, data.available):
        with pytest.raises(DataError, match="no data set named mnits; there are: mnist, digits"):
            use("mnits")


def test_a_suite_can_name_every_data_set_and_no_other() -> None:
    assert set(get_args(config.DatasetName)) == set(data.DATASETS)


def test_mnist_is_what_torchvision_publishes() -> None:
    from torchvision.datasets import MNIST

    assert {f"{file.name}.gz" for file in data.MNIST.all_files} == {name for name, _ in MNIST.resources}
    assert list(data.MNIST.servers()) == MNIST.mirrors


@pytest.mark.real_data
def test_real_mnist() -> None:
    where = data.available("mnist")
    if where == "to download":
        pytest.skip("MNIST is neither in the cache nor in VDBENCH_MIRROR")
    loaded = data.load("mnist")
    assert loaded.train_images.shape == (60_000, 1, 28, 28) and loaded.eval_images.shape == (10_000, 1, 28, 28)
    # Known of MNIST: mean 0.1307 and standard deviation 0.3081; the first digits are 5, 0, 4 and 7, 2, 1.
    assert round(loaded.train_images.mean().item(), 4) == 0.1307
    assert round(loaded.train_images.std().item(), 4) == 0.3081
    assert loaded.train_labels[:3].tolist() == [5, 0, 4] and loaded.eval_labels[:3].tolist() == [7, 2, 1]
    assert torch.bincount(loaded.eval_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
