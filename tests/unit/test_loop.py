"""What the meter makes of the logs of a step."""

import warnings

import pytest

from hyper_sd.meter import warn_of_collapse


@pytest.mark.parametrize(("variety", "warns"), [(0.9, False), (0.31, False), (0.2, True), (0.0, True)])
def test_a_student_without_variety_is_warned_of(variety: float, warns: bool) -> None:
    values = {"student/variety": variety, "student/std_real": 1.0, "fake/loss": 0.1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_collapse("stages.score", values, 30)
    assert [str(warning.message).startswith("stages.score: the student collapses: at step 30") for warning in caught] == [True] * warns
