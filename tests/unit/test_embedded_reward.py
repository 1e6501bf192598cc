"""The shipped rewards on scenes that they were not trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from hyper_sd.cli import compose
from hyper_sd.config import RewardConfig, run_config
from hyper_sd.data.scenes import captions, render, sample_scenes
from hyper_sd.paths import asset_dir
from hyper_sd.rewards import build_reward
from hyper_sd.rewards.embedded import EmbeddedKind, EmbeddedReward, new_reward, save_reward, words
from tools.embedded_reward.training import change_one, spoil

CPU = torch.device("cpu")
KINDS: tuple[EmbeddedKind, ...] = ("embedded", "embedded_heldout")
SCENES = sample_scenes(7, np.arange(96))
PROMPTS, RENDERS = captions(SCENES), render(SCENES)


@pytest.fixture(scope="module", params=KINDS)
def reward(request: pytest.FixtureRequest) -> EmbeddedReward:
    config = run_config(compose("train", ["recipe=demo_tscd", f"+reward@rewards.mine={request.param}"])).rewards["mine"]
    built = build_reward(config, torch.device("cpu"))
    assert isinstance(built, EmbeddedReward)
    return built


def test_its_own_render_is_above_near_misses(reward: EmbeddedReward) -> None:
    own = reward.score(RENDERS, PROMPTS)
    assert own.shape == (96,) and own.dtype == torch.float32 and own.abs().max() <= 1
    for worse in (render(change_one(SCENES, 7, 0)), spoil(RENDERS, torch.Generator().manual_seed(0)), RENDERS.roll(1, 0)):
        assert (own > reward.score(worse, PROMPTS)).float().mean() > 0.97


def test_gradients_reach_the_pixels(reward: EmbeddedReward) -> None:
    images = RENDERS[:2].double().requires_grad_()
    double = EmbeddedReward(reward.image_tower, reward.text_tower).double()
    try:
        texts = double.embed_words(words(PROMPTS[:2]))
        (gradient,) = torch.autograd.grad((double.embed_images(images) * texts).sum(), images)
        step = torch.zeros_like(images)
        step[1, 2, 16, 9] = 1e-5
        with torch.no_grad():
            difference = ((double.embed_images(images + step) - double.embed_images(images - step)) * texts).sum() / 2e-5
    finally:
        reward.float()
    torch.testing.assert_close(gradient[1, 2, 16, 9], difference, rtol=1e-4, atol=1e-9)
    assert torch.autograd.grad(reward.score(floats := RENDERS[:2].clone().requires_grad_(), PROMPTS[:2]).sum(), floats)[0].any()
    assert all(not param.requires_grad for param in reward.parameters())


def test_a_batch_is_its_samples_one_by_one(reward: EmbeddedReward) -> None:
    together = reward.score(RENDERS[:5], PROMPTS[:5])
    alone = torch.cat([reward.score(RENDERS[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)


def test_any_size_and_any_words(reward: EmbeddedReward) -> None:
    large = functional.interpolate(RENDERS[:4], scale_factor=2, mode="nearest")
    torch.testing.assert_close(reward.score(large, PROMPTS[:4]), reward.score(RENDERS[:4], PROMPTS[:4]), rtol=0, atol=0.1)
    assert reward.score(RENDERS[:3], ["", "a photo of a fox", "word " * 99]).isfinite().all()


def test_the_two_share_no_weight_with_each_other_or_the_judge_and_fit_the_budget() -> None:
    files = [asset_dir("reward") / f"{kind}.safetensors" for kind in KINDS] + [asset_dir("judge") / "judge.safetensors"]
    tensors = [{value.numpy().tobytes() for value in load_file(file).values() if value.numel() > 256} for file in files]
    assert not (tensors[0] & tensors[1] | tensors[0] & tensors[2] | tensors[1] & tensors[2])
    assert sum(file.stat().st_size for file in files[:2]) < 3e6


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_has_another_model(kind: EmbeddedKind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = new_reward(kind)
    save_reward(other, kind, tmp_path)
    config = RewardConfig(kind=kind, path=str(tmp_path), alpha=1.0)
    torch.testing.assert_close(build_reward(config, CPU).score(RENDERS, PROMPTS), other.score(RENDERS, PROMPTS), rtol=0, atol=0.01)
    file = tmp_path / f"{kind}.safetensors"
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"reward\.file: these are not the weights of this EmbeddedReward"):
        build_reward(config, CPU)
    file.unlink()
    with pytest.raises(ValueError, match=rf"reward\.path=\S+ holds no {kind}\.safetensors"):
        build_reward(config, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_figures_are_those_of_the_files(kind: EmbeddedKind) -> None:
    facts = json.loads((asset_dir("reward") / f"{kind}.json").read_text())
    assert facts["above_one_attribute_changed"] > 0.98 and facts["above_spoilt"] > 0.98
    config = run_config(compose("train", ["recipe=demo_tscd", f"+reward@rewards.mine={kind}"])).rewards["mine"]
    assert config.alpha > facts["fresh_renders"]  # else nothing would be asked for
    own = build_reward(config, torch.device("cpu")).score(RENDERS, PROMPTS)
    assert own.mean().item() == pytest.approx(facts["fresh_renders"], abs=4 * facts["fresh_renders_std"] / 96**0.5)
