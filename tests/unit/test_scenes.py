"""The procedural scenes: captions, labels and pixels agree, and a scene is a function of (seed, index)."""

import math
import re

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.data.scenes import (
    BACKGROUNDS,
    COLORS,
    EMPTY,
    IMAGE_SIZE,
    NUM_PLACES,
    PLACES,
    SHAPES,
    SIZES,
    captions,
    masks,
    render,
    sample_scenes,
)
from hyper_sd.data.scenes_data import ScenesSource

NUM = 1500
SCENES = sample_scenes(0, np.arange(NUM))
IMAGES = render(SCENES)
HALF = IMAGE_SIZE // 2
AREAS = {  # over the squared radius
    "circle": math.pi,
    "square": (2 * 0.86) ** 2,
    "triangle": 0.5 * 1.92 * 1.92,
    "ring": math.pi * (1 - 0.56**2),
    "cross": 4 * 0.6 - 0.6**2,
}
RADII = {"small": 3.7, "large": 6.4}


def quadrant(image: Tensor, place: int) -> Tensor:
    y, x = HALF * (place // 2), HALF * (place % 2)
    return image[:, y : y + HALF, x : x + HALF]


def background(row: int) -> Tensor:
    """What `render` draws where there is no object: between the dark and the light of its colour, as its clouds say (3, 32, 32)."""
    dark, light = (torch.tensor(end)[:, None, None] for end in list(BACKGROUNDS.values())[SCENES.background[row]])
    clouds = functional.interpolate(torch.from_numpy(SCENES.clouds[row]).float()[None, None], size=IMAGE_SIZE, mode="bilinear")[0]
    return dark + (0.5 + 0.28 * clouds).clamp(0, 1) * (light - dark)


def objects() -> list[tuple[int, int]]:
    return [(row, place) for row in range(NUM) for place in range(NUM_PLACES) if SCENES.shape[row, place] != EMPTY]


def coverage(row: int, place: int) -> Tensor:
    """Share of each pixel's way from the background to the object's colour, found from the pixels (16, 16)."""
    bg = quadrant(background(row), place)
    color = torch.tensor(list(COLORS.values())[SCENES.color[row, place]])[:, None, None]
    return ((quadrant(IMAGES[row], place) - bg) * (color - bg)).sum(0) / (color - bg).square().sum(0)


def test_a_scene_depends_on_its_seed_and_index_alone() -> None:
    index = np.array([917, 3, 44])
    part = sample_scenes(0, index)
    assert torch.equal(part.labels(), SCENES.labels()[index])
    assert captions(part) == [captions(SCENES)[i] for i in index]
    assert torch.equal(render(part), IMAGES[index])
    assert not torch.equal(sample_scenes(1, index).labels(), part.labels())


def test_images_are_float32_in_range() -> None:
    assert IMAGES.shape == (NUM, 3, 32, 32) and IMAGES.dtype == torch.float32
    assert float(IMAGES.min()) >= 0 and float(IMAGES.max()) <= 1


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 5 and {"ring", "cross"} <= set(SHAPES)
    assert len(COLORS) == 8 and len(SIZES) == 2 and len(PLACES) == 4


def test_clouds_are_standard_normal() -> None:
    assert abs(SCENES.clouds.mean()) < 0.02 and abs(SCENES.clouds.std() - 1) < 0.02
    neighbours = np.corrcoef(SCENES.clouds[:, :-1].ravel(), SCENES.clouds[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02


def test_every_attribute_is_drawn_evenly_and_half_of_the_scenes_have_two_objects() -> None:
    present = SCENES.shape != EMPTY
    num_objects = present.sum(1)
    assert set(num_objects) == {1, 2}
    assert 0.5 <= (num_objects == 2).mean() <= 0.75
    for values, num in (
        (SCENES.shape[present], len(SHAPES)),
        (SCENES.color[present], len(COLORS)),
        (SCENES.size[present], len(SIZES)),
        (SCENES.background, len(BACKGROUNDS)),
        (np.nonzero(present)[1], NUM_PLACES),
        (SCENES.first, NUM_PLACES),
    ):
        share = np.bincount(values, minlength=num) / len(values)
        assert len(share) == num and np.abs(share * num - 1).max() < 0.2


def test_captions_say_what_the_labels_say() -> None:
    pattern = re.compile(r"a (\w+) (\w+) (\w+) at the (\w+ \w+)")
    for row, caption in enumerate(captions(SCENES)):
        found = [(PLACES.index(p), SHAPES.index(s), list(COLORS).index(c), SIZES.index(z)) for z, c, s, p in pattern.findall(caption)]
        wanted = [
            (p, SCENES.shape[row, p], SCENES.color[row, p], SCENES.size[row, p]) for p in range(NUM_PLACES) if SCENES.shape[row, p] != EMPTY
        ]
        assert sorted(found) == wanted
        assert found[0][0] == SCENES.first[row]
        assert caption.endswith(f"on a {list(BACKGROUNDS)[SCENES.background[row]]} background")


def test_labels_hold_every_attribute() -> None:
    labels = SCENES.labels()
    assert labels.shape == (NUM, 13) and labels.dtype == torch.int64
    shape, color, size, bg = labels.split((4, 4, 4, 1), dim=1)
    assert np.array_equal(shape.numpy(), SCENES.shape) and np.array_equal(color.numpy(), SCENES.color)
    assert np.array_equal(size.numpy(), SCENES.size) and np.array_equal(bg[:, 0].numpy(), SCENES.background)


def test_empty_places_show_the_background() -> None:
    for row in range(NUM):
        for place in range(NUM_PLACES):
            if SCENES.shape[row, place] == EMPTY:
                inside = [quadrant(image, place)[:, 1:-1, 1:-1] for image in (IMAGES[row], background(row))]
                torch.testing.assert_close(*inside, atol=1e-5, rtol=0)  # a large triangle next door may touch the border


def test_objects_have_the_colour_of_their_label() -> None:
    palette = torch.tensor(list(COLORS.values()))
    for row, place in objects():
        pixels = quadrant(IMAGES[row], place).flatten(1).T
        farthest = pixels[coverage(row, place).flatten().argmax()]
        assert int((palette - farthest).norm(dim=1).argmin()) == SCENES.color[row, place]


def test_objects_cover_the_area_of_their_shape_and_size() -> None:
    for row, place in objects():
        shape, size = SHAPES[SCENES.shape[row, place]], SIZES[SCENES.size[row, place]]
        radius = RADII[size] * (1 + 0.06 * SCENES.jitter[row, place, 2])
        assert abs(float(coverage(row, place).sum()) / (AREAS[shape] * radius**2) - 1) < 0.17


def test_only_rings_are_hollow_and_only_triangles_are_upright() -> None:
    for row, place in objects():
        mask = coverage(row, place).clamp(0, 1)
        weights = mask / mask.sum()
        axis = torch.arange(HALF) + 0.5
        y, x = float((weights.sum(1) * axis).sum()), float((weights.sum(0) * axis).sum())
        shape = SHAPES[SCENES.shape[row, place]]
        hollow = float(mask[int(y), int(x)]) < 0.5
        assert hollow == (shape == "ring")
        skew = float((weights.sum(1) * (axis - y) ** 3).sum()) / float((weights.sum(1) * (axis - y) ** 2).sum()) ** 1.5
        assert (skew < -0.25) == (shape == "triangle")


def test_masks_are_what_the_render_shows_of_each_object() -> None:
    """Background and objects, mixed by the masks, are the picture."""
    scenes = SCENES.rows(np.arange(200))
    covered = masks(scenes)
    assert covered.shape == (200, NUM_PLACES, IMAGE_SIZE, IMAGE_SIZE) and covered.min() == 0 and covered.max() == 1
    empty = torch.from_numpy(scenes.shape == EMPTY)
    assert not covered[empty].any() and (covered[~empty].flatten(1).amax(1) == 1).all()
    palette, jitter = torch.tensor(list(COLORS.values())), torch.from_numpy(scenes.jitter).float()
    image = torch.stack([background(row) for row in range(200)])
    for place in range(NUM_PLACES):
        color = (palette[torch.from_numpy(scenes.color[:, place])] + 0.03 * jitter[:, place, 3:]).clamp(0, 1)
        image = image + covered[:, place, None] * (color[:, :, None, None] - image)
    torch.testing.assert_close(image, IMAGES[:200])


def test_instances_are_the_objects_at_any_size() -> None:
    """A run that asks for them gets one mask of each object; one that does not gets none."""
    for size in (IMAGE_SIZE, 48):
        samples = ScenesSource(0, size, instances=True).batch(range(20))
        assert samples.images is not None and len(samples.instances) == 20
        for image, found in zip(samples.images, samples.instances, strict=True):
            assert (
                found.masks.shape == (len(found.labels), size, size)
                and found.masks.dtype == torch.bool
                and found.masks.flatten(1).any(1).all()
            )
            inside, outside = image[:, found.masks.any(0)], image[:, ~found.masks.any(0)]
            assert (inside.mean(1) - outside.mean(1)).abs().max() > 0.05  # no object has the colour of a background
    assert ScenesSource(0, 32, instances=True).categories == SHAPES
    assert ScenesSource(0, 32).categories == () and ScenesSource(0, 32).batch([0]).instances == ()
