import torch

from hyper_sd.data.scenes import EMPTY, NUM_PLACES
from hyper_sd.judge import all_right


def scene(**changes: int) -> torch.Tensor:
    """One object at the first place: shape 2, colour 3, size 1, background 4; changes by column name."""
    columns = {"shape": 0, "empty_shape": 1, "color": NUM_PLACES, "empty_color": NUM_PLACES + 1, "size": 2 * NUM_PLACES, "background": 12}
    labels = torch.tensor([[2, EMPTY, EMPTY, EMPTY, 3, 0, 0, 0, 1, 0, 0, 0, 4]])
    for name, value in changes.items():
        labels[0, columns[name]] = value
    return labels


def test_every_attribute_counts() -> None:
    assert all_right(scene(), scene())
    for name in ("shape", "color", "size", "background"):
        assert not all_right(scene(**{name: 0}), scene()), name


def test_colour_of_an_empty_place_does_not_count_but_its_emptiness_does() -> None:
    assert all_right(scene(empty_color=5), scene())
    assert not all_right(scene(empty_shape=0), scene())
