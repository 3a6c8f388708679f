"""OFQ on a small vision transformer, by the pieces of benchmarks/ofq_vit.py: it learns, and CGA ends flips back.

Nothing is said of StatsQ against LSQ: on networks as small as these they are not ordered.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import ofq_vit
from benchmarks.ofq_vit import ARMS, train_it

from featherweight import train

FULL: dict[str, Any] = {"forward": {"kind": "full"}, "attention": {}}


def patterns(count: int = 300) -> Any:
    """Ten patterns of 8 x 8, each image one of them in noise."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(10, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ofq_vit.split(kinds[labels] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), labels)


def taught(data: Any, steps: int) -> Any:
    """A network in full precision."""
    torch.manual_seed(0)
    teacher = ofq_vit.network(data, width=24, layers=2, heads=3, patch=4)
    done = train_it(teacher, ofq_vit.scheduled(FULL, 5e-3), data, steps, batch=32, seed=0)
    assert done.accuracy > 0.8
    assert done.flipped == []
    return teacher


def test_a_small_vision_transformer_of_two_bits_learns_patterns() -> None:
    data = patterns()
    teacher = taught(data, 40)
    found = {}
    for band in (0.5, 0.005):  # half a step to either side of an edge is everywhere: nothing is frozen
        backward = {"kind": "cga", "band": band, "begin": 0.75}
        level = {"kind": "linear", "learning_rate": 5e-3, "warmup": 0.05, "final": 1.0}
        recipe = {**ofq_vit.scheduled(ARMS["OFQ"], 5e-3), "backward": backward, "schedule": level}
        found[band] = train_it(copy.deepcopy(teacher), recipe, data, 48, batch=32, seed=0)
    for done in found.values():
        assert sum(done.losses[-10:]) < 0.8 * sum(done.losses[:10])
        assert done.accuracy > 0.5
    assert found[0.5].losses[:36] == found[0.005].losses[:36]
    assert sum(found[0.005].reversed) < 0.5 * sum(found[0.5].reversed)
    assert sum(found[0.005].flipped) < 0.5 * sum(found[0.5].flipped)


def test_every_arm_of_the_benchmark_is_a_recipe() -> None:
    for name, arm in ARMS.items():
        recipe = train.train_recipe(ofq_vit.scheduled(arm, 1e-3))
        assert recipe.attention.inputs
        assert recipe.attention.product == ("QKR" in name or name == "OFQ")
        assert recipe.forward.bits == recipe.activation.bits == 2  # type: ignore[attr-defined]
    preset, ofq = train.train_recipe("ofq"), train.train_recipe(ofq_vit.scheduled(ARMS["OFQ"], 5e-4))
    assert preset.choices == ofq.choices
    assert preset.attention == ofq.attention


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = ofq_vit.digits()
    assert data.images.shape == (1438, 1, 8, 8)
    assert data.held_out_images.shape == (359, 1, 8, 8)
    assert -1 <= float(data.images.min()) < float(data.images.max()) <= 1
    torch.manual_seed(0)
    model = ofq_vit.network(data, width=24, layers=1, heads=3, patch=4)
    train_it(model, ofq_vit.scheduled(FULL, 5e-3), data, 60, batch=32, seed=0)
    done = train_it(model, ofq_vit.scheduled(ARMS["OFQ"], 5e-3), data, 30, batch=32, seed=0)
    assert sum(done.losses[-5:]) < 0.9 * sum(done.losses[:5])
    assert done.accuracy > 0.3


def test_images_are_moved_as_a_whole() -> None:
    images = torch.arange(2 * 36, dtype=torch.float32).view(2, 1, 6, 6) + 1
    generator = torch.Generator().manual_seed(1)
    found = ofq_vit.moved(images, 1, generator)
    assert found.shape == images.shape
    assert not torch.equal(found, images)
    for image, source in zip(found, images, strict=True):
        wide = torch.nn.functional.pad(source, (1,) * 4)
        cuts = [wide[:, y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
        assert any(torch.equal(image, cut) or torch.equal(image, cut.flip(2)) for cut in cuts)
    assert ofq_vit.moved(images, 0, generator) is images


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 2), ("test", 1)):
        for label in range(10):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (8, 8), (25 * label, 0, 255)).save(folder / f"{number}.jpg")
    data = ofq_vit.from_folder(tmp_path, 1)
    assert data.images.shape == (10, 3, 8, 8)
    assert data.labels.tolist() == data.held_out_labels.tolist() == list(range(10))
    assert float(data.images[9, 0].mean()) > 0.6
    with pytest.raises(SystemExit, match="has 0 folders, and 10 classes"):
        ofq_vit.from_folder(tmp_path / "train", None)
