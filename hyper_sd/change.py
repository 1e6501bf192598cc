"""What a stage changed: its rows against those of the stage before it at the same step counts, on the same prompts and noise."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hyper_sd.measure import Row
from hyper_sd.metrics import Jackknifed, gap, mean_and_error


def changes(
    stages: Mapping[str, Mapping[int, Row]],
    ceiling: Mapping[str, Tensor],
    teacher: Row,
    undistilled: Mapping[int, Row],
    alike: Mapping[str, Mapping[int, Row]],
) -> dict[str, Any]:
    """By stage: the stage before it, and for every step count that both have the differences after - before with their standard errors.

    `alike` has rows of a stage as the one after it is sampled, which go before its own. Of a reward also `closed`, the share of the
    distance to `ceiling`, the scores of fresh renders, that was made good.
    """
    result = {}
    for before, after in zip(stages, list(stages)[1:], strict=False):
        earlier = {**stages[before], **alike.get(before, {})}
        if counts := [n for n in stages[after] if n in earlier]:
            rows = {str(n): _change(earlier[n], stages[after][n], ceiling, teacher, undistilled.get(min(n, 2))) for n in counts}
            result[after] = {"before": before, "steps": rows}
    return result


def _change(before: Row, after: Row, ceiling: Mapping[str, Tensor], teacher: Row, undistilled: Row | None) -> dict[str, Any]:
    return {
        "accuracy": None if before.right is None or after.right is None else _difference(before.right.double(), after.right.double()),
        "gap": _gap_difference(before, after, teacher, undistilled),
        "rewards": {
            name: {**_difference(scores, after.scores[name]), "closed": _closed(scores, after.scores[name], ceiling.get(name))}
            for name, scores in before.scores.items()
        },
    }


def _difference(before: Tensor, after: Tensor) -> dict[str, float | None]:
    value, error = mean_and_error(after - before)
    return {"difference": value, "standard_error": error}


def _closed(before: Tensor, after: Tensor, ceiling: Tensor | None) -> float | None:
    if ceiling is None or (missing := float(ceiling.mean() - before.mean())) <= 0:
        return None  # nothing was missing
    return float(after.mean() - before.mean()) / missing


def _gap_difference(before: Row, after: Row, teacher: Row, undistilled: Row | None) -> dict[str, float | None] | None:
    figures = [row.frechet if row is not None else None for row in (before, after, teacher, undistilled)]
    first, second, best, worst = figures
    if first is None or second is None or best is None or worst is None or worst.value <= best.value:
        return None
    old, new = gap(first, best, worst), gap(second, best, worst)
    difference = Jackknifed(new.value - old.value, new.without - old.without)
    return {"difference": difference.value, "standard_error": difference.standard_error}
