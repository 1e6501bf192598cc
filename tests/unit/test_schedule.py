"""Schedule, conversions and the solver grid."""

import pytest
import torch

from hyper_sd.schedule import PredictionType, Schedule, SolverGrid, to_x0_eps
from tests.networks import from_x0_eps, sd_schedule, sd_scheduler

T = 1000
DIVISORS = [n for n in range(1, T + 1) if T % n == 0]
GRIDS = [(k, n) for n in DIVISORS for k in DIVISORS if n % k == 0]


@pytest.mark.parametrize(("segments", "solver_steps"), GRIDS)
def test_neighbour_and_edge_lie_in_the_segment_of_every_point(segments: int, solver_steps: int) -> None:
    grid = SolverGrid(T, solver_steps, segments)
    index = torch.arange(1, solver_steps + 1)
    tau, u, edge = grid.tau(index), grid.tau(index - 1), grid.tau(grid.edge_index(index))
    length = T // segments
    assert tau[-1] == T and u[0] == 0, "the top of the trajectory and the clean end are reached"
    assert torch.equal(tau.diff(), torch.full((solver_steps - 1,), T // solver_steps)), "the points are uniform"
    assert bool((edge % length == 0).all() & (edge <= u).all() & (u < tau).all() & (tau <= edge + length).all())
    assert set(edge.tolist()) == set(range(0, T, length)), "every segment is used"
    assert set(edge.tolist()) <= {0, *tau.tolist()}, "edges are grid points"
    by_definition = [max(e for e in range(0, T, length) if e < point) for point in tau.tolist()]
    assert edge.tolist() == by_definition


@pytest.mark.parametrize("steps", [1, 2, 8, 40, 1000])
def test_a_segment_a_step_makes_the_edge_the_neighbour(steps: int) -> None:
    grid = SolverGrid(T, steps, steps)
    index = torch.arange(1, steps + 1)
    assert torch.equal(grid.edge_index(index), index - 1)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segment_tops_are_the_timesteps_of_trailing_ddim(segments: int) -> None:
    scheduler = sd_scheduler()
    scheduler.set_timesteps(segments)
    grid = SolverGrid(T, 40, segments)
    index = torch.arange(1, 41)
    edges = grid.tau(grid.edge_index(index)).unique()
    assert scheduler.timesteps.tolist() == [int(edge) + T // segments - 1 for edge in edges.flip(0)]


@pytest.mark.parametrize(
    ("segments", "solver_steps", "message"),
    [
        (8, 50, "stage.segments must divide stage.solver_steps: got segments=8, solver_steps=50; try solver_steps=40 or segments=5"),
        (8, 4, "stage.segments must divide stage.solver_steps: got segments=8, solver_steps=4; try solver_steps=8 or segments=4"),
        (3, 40, "stage.segments must divide stage.solver_steps: got segments=3, solver_steps=40; try segments=2"),
        (8, 48, "stage.solver_steps must divide the teacher's 1000 steps: got solver_steps=48; try solver_steps=40"),
        (3, 30, "stage.solver_steps must divide the teacher's 1000 steps: got solver_steps=30; try another stage.segments"),
        (0, 40, "stage.segments must be at least 1: got segments=0"),
        (8, 0, "stage.solver_steps must be at least 1: got solver_steps=0"),
        (-1, 40, "stage.segments must be at least 1: got segments=-1"),
    ],
)
def test_a_grid_that_does_not_fit_says_what_would(segments: int, solver_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match="stage") as caught:
        SolverGrid(T, solver_steps, segments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prediction", "variance_preserving"),
    [("eps", True), ("v", True), ("x0", True), ("flow", True), ("eps", False), ("x0", False), ("flow", False)],
)
def test_conversions_round_trip(prediction: PredictionType, variance_preserving: bool) -> None:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 16, 3, dtype=torch.float64)
    alpha = torch.linspace(0.05, 0.99, 16, dtype=torch.float64)[:, None]
    sigma = (1 - alpha.square()).sqrt() if variance_preserving else 1 - alpha
    x_t = alpha * x0 + sigma * eps
    output = from_x0_eps(x0, eps, alpha, sigma, prediction)
    found_x0, found_eps = to_x0_eps(output, x_t, alpha, sigma, prediction)
    torch.testing.assert_close(found_x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_eps, eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_any_output_stands_for_an_x0_and_an_eps_that_make_x_t(prediction: PredictionType) -> None:
    torch.manual_seed(0)
    output, x_t = torch.randn(2, 1000, 3, dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in sd_schedule()(torch.arange(T)))
    x0, eps = to_x0_eps(output, x_t, alpha, sigma, prediction)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(from_x0_eps(x0, eps, alpha, sigma, prediction), output, rtol=1e-11, atol=1e-11)


def test_schedule_is_float64_and_the_clean_end_is_the_first_step() -> None:
    schedule = Schedule.from_alphas_cumprod(sd_scheduler().alphas_cumprod.float())  # diffusers keeps float32
    t = torch.tensor([[-1, 0], [1, 999]])
    alpha, sigma = schedule(t)
    assert alpha.shape == sigma.shape == t.shape and alpha.dtype == sigma.dtype == torch.float64
    assert alpha[0, 0] == alpha[0, 1] and sigma[0, 0] == sigma[0, 1]
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2, 2, dtype=torch.float64), rtol=1e-15, atol=0)
    assert schedule.num_steps == T and abs(float(alpha[1, 1]) - 0.0682650) < 1e-6


@pytest.mark.parametrize("last", [0.0, 2**-24])  # what schedulers write for a terminal alpha_bar of zero
def test_eps_is_refused_at_zero_terminal_snr_and_v_and_x0_are_not(last: float) -> None:
    alphas_cumprod = torch.linspace(0.99, 0.1, T)
    alphas_cumprod[-1] = last
    schedule = Schedule.from_alphas_cumprod(alphas_cumprod)
    schedule.check("v")
    schedule.check("x0")
    sd_schedule().check("eps")
    with pytest.raises(ValueError, match=r"teacher.path: .* eps .*zero terminal SNR.*v or x0"):
        schedule.check("eps")
