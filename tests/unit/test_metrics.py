import pytest
import torch
from torch import Tensor

from hyper_sd.metrics import Gaussian, Jackknifed, frechet, frechet_jackknife, gap, mean_and_error, mean_of_draws, symmetric_root

NUM, DIM = 400, 12


def features(seed: int = 0, *, scale: float = 1.0, shift: float = 0.0, num: int = NUM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return scale * torch.randn(num, DIM, generator=generator, dtype=torch.float64) @ mixing + shift


def test_a_set_is_at_no_distance_from_itself():
    own = Gaussian.fit(features())
    assert frechet(own, own) == pytest.approx(0, abs=1e-10)


def test_no_distance_where_some_features_are_dead():
    flat = features()
    flat[:, :5] = 3.0
    own = Gaussian.fit(flat)
    assert frechet(own, own) == pytest.approx(0, abs=1e-6)


def test_gaussians_have_their_analytic_distance():
    mean_a, mean_b = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, -2.0]).double()
    var_a, var_b = torch.tensor([4.0, 9.0]).double(), torch.tensor([1.0, 25.0]).double()
    a, b = (Gaussian(mean, var.diag(), symmetric_root(var.diag())) for mean, var in ((mean_a, var_a), (mean_b, var_b)))
    assert frechet(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_covariances_that_do_not_commute():
    """tr (A^1/2 B A^1/2)^1/2 of 2x2 matrices is sqrt(tr(AB) + 2 sqrt(det(AB)))."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[4.0, -1.0], [-1.0, 1.0]]).double()
    cross = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet(Gaussian(zero, a, symmetric_root(a)), Gaussian(zero, b, symmetric_root(b)))
    assert found == pytest.approx(float(a.trace() + b.trace() - 2 * cross))


def test_the_distance_is_symmetric_and_blind_to_rotations_and_shifts_of_both():
    a, b = features(0), features(1, scale=1.5, shift=0.5)
    expected = frechet(Gaussian.fit(a), Gaussian.fit(b))
    assert expected > 1
    assert frechet(Gaussian.fit(b), Gaussian.fit(a)) == pytest.approx(expected)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    moved = (Gaussian.fit(x @ rotation + 1000) for x in (a, b))
    assert frechet(*moved) == pytest.approx(expected)
    assert frechet(Gaussian.fit(3 * a), Gaussian.fit(3 * b)) == pytest.approx(9 * expected)


def test_a_root_squares_to_its_matrix_and_forgives_rounding():
    matrix = Gaussian.fit(features()).cov
    root = symmetric_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.T)
    assert symmetric_root(-1e-12 * torch.eye(3, dtype=torch.float64)).isfinite().all()


def test_leaving_out_a_group_is_computing_without_it():
    own, reference = features(0), Gaussian.fit(features(1, num=5000))
    found = frechet_jackknife(own.float(), reference, num_groups=4)
    assert found.value == pytest.approx(frechet(Gaussian.fit(own), reference), rel=1e-5)
    without_third = own[torch.arange(NUM) % 4 != 2]
    assert found.without[2].item() == pytest.approx(frechet(Gaussian.fit(without_third), reference), rel=1e-5)


def test_the_standard_error_is_the_spread_over_fresh_samples():
    reference = Gaussian.fit(features(1000, num=20_000))
    runs = [frechet_jackknife(features(seed, shift=0.5), reference) for seed in range(60)]
    spread = torch.tensor([run.value for run in runs]).std().item()
    estimated = torch.tensor([run.standard_error for run in runs]).mean().item()
    assert 0.6 * spread < estimated < 1.6 * spread


def test_more_draws_have_a_smaller_error():
    reference = Gaussian.fit(features(1000, num=20_000))
    draws = [frechet_jackknife(features(seed, shift=0.5), reference) for seed in range(4)]
    mean = mean_of_draws(draws)
    assert mean.value == pytest.approx(sum(draw.value for draw in draws) / 4)
    single = sum(draw.standard_error**2 for draw in draws) ** 0.5 / 4
    assert mean.standard_error == pytest.approx(single, rel=0.2)


def test_the_gap_measures_from_the_teacher_to_few_steps():
    def figure(value: float) -> Jackknifed:
        return Jackknifed(value, torch.full((4,), value, dtype=torch.float64))

    assert gap(figure(2.0), figure(2.0), figure(10.0)).value == 0
    assert gap(figure(10.0), figure(2.0), figure(10.0)).value == 1
    assert gap(figure(3.0), figure(2.0), figure(10.0)).value == pytest.approx(0.125)


def test_what_rows_share_cancels_in_the_error_of_the_gap():
    noise = torch.linspace(-1, 1, 16, dtype=torch.float64)
    shared = gap(Jackknifed(3, 3 + noise), Jackknifed(2, 2 + noise), Jackknifed(10, 10 + noise))
    alone = gap(Jackknifed(3, 3 + noise), Jackknifed(2, 2 - noise), Jackknifed(10, 10 + noise))
    assert shared.standard_error < 1e-12
    assert alone.standard_error > 0.1


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([True, False, True, True]))
    assert mean == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert mean_and_error(torch.tensor([2.0])) == (2.0, None)
