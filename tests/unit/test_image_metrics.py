import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_sd.cli import compose
from hyper_sd.commands import DiversityConfig, EvaluateConfig, MetricsConfig
from hyper_sd.config import FeaturesConfig
from hyper_sd.data.scenes import render, sample_scenes
from hyper_sd.extractors import build_extractor, check_extractor
from hyper_sd.image_metrics import diversity, open_metrics
from hyper_sd.judge import Judge
from hyper_sd.metrics import Gaussian, frechet_jackknife
from hyper_sd.mmd import Mmd, gaussian, polynomial
from hyper_sd.paths import asset_dir
from hyper_sd.processes import Processes
from hyper_sd.structured import resolved, structured
from tests.released import write_clip, write_reward

CPU = torch.device("cpu")
JUDGE = FeaturesConfig(kind="judge")


def features(num: int, shift: float = 0.0, seed: int = 0, dim: int = 6) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def direct(x: Tensor, y: Tensor, kernel: Any, *, unbiased: bool) -> float:
    """MMD^2 pair by pair, in float64."""
    x, y = x.double(), y.double()

    def mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        values = torch.stack([kernel(p[None], q[None])[0, 0] for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)])
        return values.mean()

    return float(mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False))


# ---- distances


@pytest.mark.parametrize(("make", "kernel", "unbiased", "scale"), [(Mmd.kid, polynomial, True, 1), (Mmd.cmmd, gaussian, False, 1000)])
def test_a_kernel_distance_is_its_definition(make: Any, kernel: Any, unbiased: bool, scale: float) -> None:
    x, y = features(21), features(17, shift=0.5, seed=1)
    found = make(y).jackknife(x, num_groups=4)
    assert found.value == pytest.approx(scale * direct(x, y, kernel, unbiased=unbiased), rel=1e-4)
    kept = x[torch.arange(21) % 4 != 1]
    assert found.without[1].item() == pytest.approx(scale * direct(kept, y, kernel, unbiased=unbiased), rel=1e-4)


def test_kernels_have_their_known_values() -> None:
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 1.0]])
    assert polynomial(x, y).item() == 27.0  # (4 / 2 + 1)^3
    assert gaussian(x, y).item() == pytest.approx(torch.tensor(-4 / 200).exp().item() - 1)


def test_sets_larger_than_a_block_of_the_kernel_matrix() -> None:
    x, y = features(1500), features(1200, seed=1)
    whole = polynomial(x, x).double()
    expected = (whole.sum() - whole.diagonal().sum()) / (1500 * 1499)
    own = polynomial(y, y).double()
    expected += (own.sum() - own.diagonal().sum()) / (1200 * 1199) - 2 * polynomial(x, y).double().mean()
    assert Mmd.kid(y).jackknife(x).value == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


def test_kid_of_equal_distributions_is_about_zero_and_its_error_says_so() -> None:
    reference = Mmd.kid(features(2000, seed=99))
    runs = [reference.jackknife(features(300, seed=seed)) for seed in range(30)]
    values = torch.tensor([run.value for run in runs])
    errors = torch.tensor([run.standard_error for run in runs])
    assert values.mean().abs() < 3 * values.std() / 30**0.5 + errors.mean()
    assert 0.5 * values.std() < errors.mean() < 2 * values.std()
    assert reference.jackknife(features(300, shift=0.5, seed=7)).value > 10 * errors.mean()


def test_diversity_is_zero_for_one_image_and_one_for_unrelated_ones() -> None:
    same = features(1, dim=4).expand(3, 1, 4)
    apart = torch.eye(4)[:3, None]
    torch.testing.assert_close(diversity(torch.cat([same, apart], dim=1)), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-12)
    pairs = torch.nn.functional.normalize(features(8, dim=5).reshape(4, 2, 5), dim=2)
    expected = torch.stack([1 - (pairs[i] * pairs[j]).sum(1) for i in range(4) for j in range(i)]).mean(0)
    torch.testing.assert_close(diversity(pairs), expected.double())


# ---- what `metrics` names


def scenes(index: Any) -> Tensor:
    return render(sample_scenes(3, index))


def test_figures_are_those_of_the_parts(tmp_path: Path) -> None:
    """Every metric, beside the same thing computed directly; the images are more than fit in one chunk."""
    reward = write_reward("clip_score", tmp_path)
    names = ("clip_score", "kid", "fid", "diversity")
    cfg = MetricsConfig(names=names, rewards={"clip_score": reward}, features=JUDGE)
    metrics = open_metrics(cfg, scenes, 600, Processes(1))
    images = render(sample_scenes(4, torch.arange(40).numpy()))
    prompts = ["a red circle", "a blue square"] * 20
    seeds = torch.stack([metrics.features(images[:20], 20), metrics.features(images[20:], 20)])
    figures = metrics.figures([metrics.measure(images, prompts, 40)], seeds)
    judge = Judge.load(asset_dir("judge"))
    real, own = judge.features(scenes(torch.arange(600).numpy())), judge.features(images)
    assert list(figures) == list(names)
    assert figures["fid"].value == pytest.approx(frechet_jackknife(own, Gaussian.fit(real)).value, rel=1e-4)
    assert figures["kid"].value == pytest.approx(Mmd.kid(real).jackknife(own).value, rel=1e-4)
    assert figures["diversity"].value == pytest.approx(diversity(torch.stack([own[:20], own[20:]])).mean().item(), rel=1e-5)
    scores = metrics.rewards.rewards["clip_score"].score(images, prompts)
    assert figures["clip_score"].value == pytest.approx(scores.mean().item(), rel=1e-5)
    assert figures["clip_score"].standard_error == pytest.approx(scores.double().std().item() / 40**0.5, rel=1e-4)


def test_clip_features_are_unit_vectors(tmp_path: Path) -> None:
    files = write_clip(tmp_path)
    extract = build_extractor(FeaturesConfig(kind="clip", path=files.path, file=files.file), CPU)
    torch.testing.assert_close(extract(torch.rand(3, 3, 40, 40)).norm(dim=1), torch.ones(3))


class Detector(torch.nn.Module):
    """The interface of the published Inception: uint8 images of any size."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        pooled = images.float().mean((2, 3))
        return pooled if return_features else pooled.softmax(1)


def test_a_torchscript_inception_gets_whole_grey_levels(tmp_path: Path) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Detector()).save(str(file))
    cfg = FeaturesConfig(kind="inception", path=str(tmp_path), file=file.name, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    check_extractor(cfg, 512)
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 5, 7)
    assert build_extractor(cfg, CPU)(images).tolist() == [[0.0, 128.0, 255.0]] * 2


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (JUDGE, "features=judge knows images of 32 pixels, this teacher draws 512; choose features=clip"),
        (FeaturesConfig(kind="inception", path="/tmp", file="x.pt"), "features=inception is a program"),
        (FeaturesConfig(kind="inception", path="a/b", revision="0" * 40, file="x.pt", sha256="0" * 64), "read from a local directory only"),
        (FeaturesConfig(kind="inception", path="/tmp", file="x.pt", sha256="0" * 64), "features.path=/tmp holds no x.pt"),
        (FeaturesConfig(kind="clip", path="/nowhere", file="x"), "features.path=/nowhere is no directory"),
    ],
)
def test_features_that_cannot_be_measured_on(features: FeaturesConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_extractor(features, 512)


def command(*overrides: str) -> EvaluateConfig:
    return structured(EvaluateConfig, resolved(compose("evaluate", ["run=x", *overrides])))


def test_the_command_takes_every_reward_and_every_distance() -> None:
    names = [*sorted(command().rewards), "fid", "kid", "cmmd", "diversity"]
    config = command(f"metrics=[{','.join(names)}]", "rewards.hps_v2.path=/models", "features=clip", "diversity.seeds=3")
    assert config.metrics == tuple(names)
    assert {"clip_score", "pickscore", "hps_v2", "hps_v2_1", "aesthetic", "image_reward"} <= config.rewards.keys()
    assert config.measured.chosen_rewards["hps_v2"].path == "/models"
    assert config.measured.extractor is not None and config.measured.extractor.kind == "clip"
    assert config.diversity == DiversityConfig(prompts=64, seeds=3)
    assert command("metrics=[clip_score]").measured.extractor is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("metrics=[imagereward]",), r"metrics: there is no 'imagereward'; did you mean image_reward\? Allowed here: .*, fid, kid, cmmd"),
        (("diversity.seeds=1",), r"diversity\.seeds: got 1 \(int\), expected int >= 2"),
        (("rewards.clip_score.kind=clip",), r"rewards\.clip_score\.kind: got 'clip' \(str\), expected one of clip_score, pickscore"),
    ],
)
def test_metrics_that_do_not_exist(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(*overrides)


def test_distances_need_features() -> None:
    with pytest.raises(ValueError, match="metrics=fid is measured on features: choose features=clip, features=inception or features=judge"):
        MetricsConfig(names=("fid",))
