"""Draws are pure functions of integers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hyper_sd.randomness import Draws, Purpose, fold, generator, normal, send, uniforms

SHAPE = (4, 3, 3)


def draw_all(draws: Draws) -> tuple[torch.Tensor, ...]:
    return (
        draws.uniform(Purpose.GUIDANCE),
        draws.integers(Purpose.TIMESTEP, 1, 40),
        draws.normal(Purpose.NOISE, SHAPE),
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2], [4, 1]])
def test_a_samples_draw_does_not_depend_on_the_batch_around_it(order: list[int]) -> None:
    together = draw_all(Draws(7, 3, tuple(range(100, 106))))
    part = draw_all(Draws(7, 3, tuple(100 + row for row in order)))
    for all_rows, rows in zip(together, part, strict=True):
        assert torch.equal(all_rows[order], rows)


def test_integers_with_bounds_of_their_own_do_not_depend_on_the_batch_either() -> None:
    samples, low = tuple(range(20)), torch.arange(20)
    together = Draws(0, 0, samples).integers(Purpose.JUMP, low, low + 9)
    halves = [Draws(0, 0, samples[part]).integers(Purpose.JUMP, low[part], low[part] + 9) for part in (slice(0, 10), slice(10, 20))]
    assert torch.equal(together, torch.cat(halves))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, Purpose.NOISE), (1, 0, Purpose.NOISE)),
        ((0, 0, Purpose.NOISE), (0, 1, Purpose.NOISE)),
        ((0, 1, Purpose.NOISE), (1, 0, Purpose.NOISE)),
        ((0, 0, Purpose.NOISE), (0, 0, Purpose.SAMPLE)),
    ],
)
def test_other_seeds_steps_and_purposes_draw_other_numbers(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    samples = tuple(range(2000))
    a, b = (Draws(seed, step, samples).uniform(Purpose(purpose)) for seed, step, purpose in (first, second))
    assert not bool((a == b).any())
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.08
    a, b = (Draws(seed, step, samples).normal(Purpose(purpose), (1,))[:, 0] for seed, step, purpose in (first, second))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.08


def test_neighbouring_samples_and_columns_are_not_correlated() -> None:
    u = uniforms((0, 0), np.arange(4000), 2)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.06
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.06
    assert u.min() >= 0 and u.max() < 1


@pytest.mark.parametrize(("low", "high"), [(1, 8), (0, 1), (-3, 6), (5, 5)])
def test_integers_reach_both_ends_and_are_uniform(low: int, high: int) -> None:
    num = 20_000
    found = Draws(3, 1, tuple(range(num))).integers(Purpose.JUMP, low, high)
    assert found.dtype == torch.int64
    values, counts = found.unique(return_counts=True)
    assert values.tolist() == list(range(low, high + 1))
    expected = num / len(values)
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), len(values) - 1
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5


def test_normals_are_standard_normal_float32() -> None:
    draw = Draws(0, 0, tuple(range(64))).normal(Purpose.NOISE, (16, 8, 8))
    assert draw.shape == (64, 16, 8, 8) and draw.dtype == torch.float32
    assert abs(float(draw.mean())) < 0.015 and abs(float(draw.std()) - 1) < 0.01
    assert abs(float(draw.pow(4).mean()) - 3) < 0.15
    assert float(torch.corrcoef(draw.flatten(1)).fill_diagonal_(0).abs().max()) < 0.2


def test_seeds_that_agree_in_their_low_32_bits_are_different_seeds() -> None:
    assert fold(1) != fold(1 + (1 << 32))
    assert not torch.equal(normal((1,), [0], (8,)), normal((1 + (1 << 32),), [0], (8,)))


def test_negative_and_huge_keys_are_accepted() -> None:
    assert 0 <= fold(-1, 1 << 80) < 1 << 64
    assert generator(-1, 1 << 80).initial_seed() == fold(-1, 1 << 80)


def test_key_order_and_length_matter() -> None:
    assert len({fold(), fold(0), fold(0, 0), fold(0, 1), fold(1, 0), fold(1)}) == 6


def test_numbers_are_the_same_in_every_process_and_for_ever() -> None:
    script = (
        "from hyper_sd.randomness import *\n"
        "draws = Draws(5, 2, (0, 9))\n"
        "print(fold(1, 2, 3), draws.uniform(Purpose.GUIDANCE).tolist(), draws.integers(Purpose.JUMP, 0, 999).tolist(),"
        " draws.normal(Purpose.NOISE, (2,)).tolist(), generator(4).initial_seed(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:-1] == [
        "15020427595393229491",
        "[0.9041655611674366, 0.9460422331221856]",
        "[186, 672]",
        "[[-0.28085455298423767, 0.7072553038597107], [-0.3466131389141083, 0.15244655311107635]]",
        "7958955049054603978",
    ]


def test_send_keeps_values_and_dtype() -> None:
    draw = torch.arange(3)
    sent = send(draw, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(sent, draw) and sent.dtype == torch.int64
