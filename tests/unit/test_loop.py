"""What the meter makes of the logs of a step."""

import warnings

import pytest

from hyper_sd.meter import warn_of_collapse


@pytest.mark.parametrize(
    ("figures", "warns"),
    [
        ({"variety": 0.9, "std_sample": 0.9}, False),
        ({"variety": 0.31, "std_sample": 0.31}, False),
        ({"variety": 0.2, "std_sample": 0.9}, True),
        ({"std_sample": 0.2}, True),  # a micro-batch of one has no variety
        ({"variety": 0.0}, True),
    ],
)
def test_a_student_without_variety_is_warned_of(figures: dict[str, float], warns: bool) -> None:
    values = {**{f"student/{name}": value for name, value in figures.items()}, "student/std_real": 1.0, "fake/loss": 0.1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_collapse("stages.score", values, 30)
    assert [str(warning.message).startswith("stages.score: the student collapses: at step 30") for warning in caught] == [True] * warns
