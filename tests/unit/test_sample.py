import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import TCDScheduler
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from hyper_sd.commands import SampleConfig
from hyper_sd.config import TeacherConfig
from hyper_sd.export import call_unet, fixed_inputs, relative_error
from hyper_sd.randomness import Purpose, generator, normal
from hyper_sd.sample import (
    Sampler,
    adapter,
    decode,
    draw_images,
    latent_shape,
    lcm_row,
    recipe_from_json,
    recipe_to_json,
    sample,
    stage_recipe,
    tcd_row,
    teacher_row,
)
from hyper_sd.schedule import SolverGrid
from hyper_sd.stages.tscd import STEP_COUNTS
from hyper_sd.teachers import load_pipeline, load_teacher
from tests.adapters import ADAPTER, random_denoiser, teacher_config, write_adapter
from tests.rollout import rollout
from tests.tiny import BETAS, tiny_sd15, tiny_sdxl

PROMPTS = ["a red circle", "a blue square on a red background", "circle", "", "a blue circle"]
SEED = 7


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return teacher_config(tiny_sd15(tmp_path_factory.mktemp("sd15")))


@pytest.fixture(scope="module")
def pipe(config: TeacherConfig):
    return load_pipeline(config)


@pytest.mark.parametrize(("solver_steps", "segments"), [(n, k) for n in (8, 20, 40, 50, 200) for k in (1, 2, 4, 8) if n % k == 0])
def test_every_tcd_step_ends_on_the_edge_of_its_segment(solver_steps: int, segments: int):
    row = tcd_row(BETAS, segments, solver_steps=solver_steps, eta=0.0)
    scheduler = row.build()
    scheduler.set_timesteps(segments)
    timesteps = [*scheduler.timesteps.tolist(), -1]
    grid = SolverGrid(1000, solver_steps, segments)
    for t, following in itertools.pairwise(timesteps):
        index = torch.tensor((t + 1) * solver_steps // 1000)
        assert grid.tau(index) - 1 == t
        assert grid.tau(grid.edge_index(index)) - 1 == following


def test_the_default_grid_of_tcd_would_miss_the_edges():
    scheduler = TCDScheduler(**BETAS)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() != [125 * i - 1 for i in range(8, 0, -1)]


def test_lcm_uses_the_same_grid():
    scheduler = lcm_row(BETAS, 4, solver_steps=40).build()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_lower_start_moves_all_timesteps_onto_lower_grid_points():
    assert tcd_row(BETAS, 1, solver_steps=40, eta=0.0, start=899).timesteps == (899,)
    assert tcd_row(BETAS, 2, solver_steps=40, eta=0.0, start=899).timesteps == (899, 449)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_tcd_without_eta_is_trailing_ddim(pipe, num_steps: int):
    base = pipe.scheduler.config
    tcd = sample(pipe, PROMPTS, tcd_row(base, num_steps, solver_steps=40, eta=0.0), seed=SEED)
    ddim = sample(pipe, PROMPTS, teacher_row(base, num_steps, 1.0), seed=SEED)
    torch.testing.assert_close(tcd, ddim)


@pytest.mark.parametrize(
    ("prediction", "zero_snr", "num_steps", "eta", "start"),
    [
        ("epsilon", False, 4, 0.0, None),
        ("epsilon", False, 4, 1.0, None),
        ("epsilon", False, 8, 0.3, None),
        ("epsilon", False, 1, 0.0, 899),
        ("sample", False, 2, 0.3, None),
        ("v_prediction", True, 4, 0.3, None),
    ],
)
def test_rollout_of_the_training_network_is_what_the_stock_pipeline_does(
    tmp_path: Path, prediction: str, zero_snr: bool, num_steps: int, eta: float, start: int | None
):
    config = teacher_config(tiny_sd15(tmp_path, prediction_type=prediction, zero_snr=zero_snr))
    pipe = load_pipeline(config)
    row = tcd_row(pipe.scheduler.config, num_steps, solver_steps=40, eta=eta, start=start)
    expected = sample(pipe, PROMPTS, row, seed=SEED)
    teacher = load_teacher(config, torch.device("cpu"), torch.float32)
    found = rollout_like(random_denoiser(teacher), (), row, teacher.encode_prompts(PROMPTS), teacher.latent_shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_guided_rollout_is_what_the_stock_pipeline_does(config: TeacherConfig, pipe):
    row = teacher_row(pipe.scheduler.config, 4, 3.0)
    teacher = load_teacher(config, torch.device("cpu"), torch.float32)
    noise = normal((SEED, Purpose.SAMPLE), range(len(PROMPTS)), teacher.latent_shape)
    uncond, w = teacher.uncond(len(PROMPTS)), torch.full((len(PROMPTS),), 3.0)
    cond = teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        found = rollout(random_denoiser(teacher), (), noise, (999, 749, 499, 249), cond, w=w, uncond=uncond)
    torch.testing.assert_close(found, sample(pipe, PROMPTS, row, seed=SEED), rtol=1e-4, atol=1e-3)


def test_an_image_does_not_depend_on_its_batch(pipe):
    row = tcd_row(pipe.scheduler.config, 4, solver_steps=40, eta=1.0)
    together = sample(pipe, PROMPTS, row, seed=SEED)
    alone = sample(pipe, PROMPTS[3:], row, seed=SEED, index=[3, 4], batch_size=1)
    torch.testing.assert_close(alone, together[3:], rtol=1e-4, atol=1e-4)
    other = sample(pipe, PROMPTS[3:], row, seed=SEED + 1, index=[3, 4])
    assert (other - alone).abs().max() > 0.1


def test_sampling_tells_its_progress_and_leaves_the_pipeline_alone(pipe):
    before, counts = pipe.scheduler, []
    sample(pipe, PROMPTS, teacher_row(pipe.scheduler.config, 2, 1.0), seed=SEED, batch_size=2, advance=counts.append)
    assert counts == [2, 2, 1]
    assert pipe.scheduler is before


def test_decoded_images_are_those_of_the_pipeline(pipe):
    row = teacher_row(pipe.scheduler.config, 2, 1.0)
    latents = sample(pipe, PROMPTS, row, seed=SEED)
    pipe.scheduler = row.build()
    noise = normal((SEED, Purpose.SAMPLE), range(len(PROMPTS)), latent_shape(pipe))
    expected = pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt").images
    images = decode(pipe, latents, batch_size=2)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert images.shape == (len(PROMPTS), 3, 32, 32)


def test_an_adapter_acts_as_in_training_and_leaves_no_trace(tmp_path: Path, config: TeacherConfig, pipe):
    file = tmp_path / "lora.safetensors"
    recipe = stage_recipe(pipe.scheduler.config, (2,), solver_steps=40)
    denoiser = write_adapter(file, config, recipe, stage="tscd_2")
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with adapter(pipe, file):
        found = sample(pipe, PROMPTS, recipe[2], seed=SEED)
    without = sample(pipe, PROMPTS, recipe[2], seed=SEED)
    teacher = load_teacher(config, torch.device("cpu"), torch.float32)
    expected = rollout_like(denoiser, (ADAPTER,), recipe[2], teacher.encode_prompts(PROMPTS), teacher.latent_shape)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (without - found).abs().max() > 0.01 * expected.abs().max()
    assert pipe.unet.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in pipe.unet.state_dict().items())


def test_an_adapter_in_half_precision_runs_beside_the_weights(tmp_path: Path, config: TeacherConfig):
    """Fused into bf16 weights a small change would be rounded away."""
    pipe, file = load_pipeline(config).to(torch.bfloat16), tmp_path / "lora.safetensors"
    write_adapter(file, config, stage_recipe(pipe.scheduler.config, (2,), solver_steps=40))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    stock = load_pipeline(config)
    inputs = fixed_inputs(stock.unet, 1000)
    with adapter(stock, file):
        expected = call_unet(stock.unet, *inputs)
    assert relative_error(call_unet(pipe.unet, *inputs), expected).min() > 0.1
    with adapter(pipe, file):
        assert relative_error(call_unet(pipe.unet, *inputs), expected).max() < 0.02
        layers = [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]
        assert layers and not any(layer.merged for layer in layers)
        assert all(
            torch.equal(value, before[name.replace(".base_layer", "")])
            for name, value in pipe.unet.state_dict().items()
            if "lora_" not in name
        )
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


def test_negative_prompts_are_the_stock_pipelines(pipe):
    row = teacher_row(pipe.scheduler.config, 2, 3.0)
    negatives = ["a blue square", "a red circle", "square"][: len(PROMPTS)]
    negatives += [""] * (len(PROMPTS) - len(negatives))
    found = sample(pipe, PROMPTS, row, seed=SEED, negatives=negatives, batch_size=2)
    plain = sample(pipe, PROMPTS, row, seed=SEED)
    noise = normal((SEED, Purpose.SAMPLE), range(len(PROMPTS)), latent_shape(pipe))
    pipe.scheduler, previous = row.build(), pipe.scheduler
    expected = pipe(
        PROMPTS, negative_prompt=negatives, num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="latent"
    ).images
    pipe.scheduler = previous
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain)[0].abs().max() > 1e-3


def test_a_broken_adapter_leaves_the_pipeline_alone(tmp_path: Path, config: TeacherConfig, pipe):
    file = tmp_path / "lora.safetensors"
    write_adapter(file, config, stage_recipe(pipe.scheduler.config, (2,), solver_steps=40))
    file.write_bytes(file.read_bytes()[:-100])
    row = teacher_row(pipe.scheduler.config, 1, 1.0)
    before = sample(pipe, PROMPTS, row, seed=SEED)
    with pytest.raises(SafetensorError), adapter(pipe, file):
        pass
    assert torch.equal(before, sample(pipe, PROMPTS, row, seed=SEED))


def test_sdxl_samples_at_its_own_and_at_another_size(tmp_path: Path):
    pipe = load_pipeline(teacher_config(tiny_sdxl(tmp_path), "sdxl"))
    row = tcd_row(pipe.scheduler.config, 2, solver_steps=40, eta=0.3)
    assert decode(pipe, sample(pipe, PROMPTS, row, seed=SEED)).shape == (len(PROMPTS), 3, 32, 32)
    assert decode(pipe, sample(pipe, PROMPTS[:1], row, seed=SEED, image_size=64)).shape == (1, 3, 64, 64)


def test_a_recipe_survives_json():
    recipe = stage_recipe(BETAS, STEP_COUNTS, solver_steps=40, eta=0.3, start=899)
    assert list(recipe) == [1, 2, 4, 8]
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    assert recipe_to_json(recipe)["1"]["timesteps"] == [899]
    assert recipe_to_json(recipe)["4"]["config"]["original_inference_steps"] == 40
    assert list(stage_recipe(BETAS, (4,), solver_steps=40)) == [4]


def test_several_steps_without_one_have_the_eta_they_are_given():
    assert [row.eta for row in stage_recipe(BETAS, (2, 4), solver_steps=40, eta=0.7).values()] == [0.7, 0.7]


def test_an_adapter_for_one_step_alone_starts_where_it_is_told():
    recipe = stage_recipe(BETAS, (1,), solver_steps=40, start=800)
    assert list(recipe) == [1] and recipe[1].scheduler == "LCMScheduler" and recipe[1].timesteps == (800,)
    assert stage_recipe(BETAS, (1,), solver_steps=40)[1].timesteps == (999,)


def test_guidance_goes_into_every_row():
    recipe = stage_recipe(BETAS, STEP_COUNTS, solver_steps=40, guidance=3.0)
    assert {row.guidance_scale for row in recipe.values()} == {3.0}


def test_a_recipe_keeps_the_teachers_schedule():
    base = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": True, "steps_offset": 1}
    for row in (tcd_row(base, 4, solver_steps=40, eta=0.0), lcm_row(base, 4, solver_steps=40), teacher_row(base, 4, 3.0)):
        assert row.config["beta_end"] == 0.012
        assert row.config["prediction_type"] == "v_prediction"
        assert row.config["rescale_betas_zero_snr"] is True
        assert row.config["clip_sample"] is False
        assert row.config["set_alpha_to_one"] is False


def test_bad_recipes_are_refused():
    good = teacher_row(BETAS, 4, 1.0).to_json()
    with pytest.raises(ValueError, match="TCDScheduler, DDIMScheduler, LCMScheduler: got 'EulerDiscreteScheduler'"):
        Sampler.from_json(4, good | {"scheduler": "EulerDiscreteScheduler"})
    with pytest.raises(ValueError, match=r"unknown keys: \['beta'\]"):
        Sampler.from_json(4, good | {"config": {"beta": 1}})
    with pytest.raises(ValueError, match="4 steps has missing or unknown keys"):
        Sampler.from_json(4, {name: value for name, value in good.items() if name != "eta"})
    with pytest.raises(ValueError, match="one entry a step"):
        Sampler.from_json(4, good | {"timesteps": [999]})


def rollout_like(denoiser, role, row: Sampler, cond, shape: tuple[int, ...]) -> Tensor:
    """`rollout` at the timesteps of a sampler, with the noise that `sample` uses."""
    scheduler, num = row.build(), len(cond[0])
    if row.timesteps is None:
        scheduler.set_timesteps(row.num_steps)
    timesteps = row.timesteps or scheduler.timesteps.tolist()
    generators = [generator(SEED, Purpose.SAMPLE, i, 1) for i in range(num)]

    def fresh(step: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in generators])

    noise = normal((SEED, Purpose.SAMPLE), range(num), shape)
    with torch.no_grad():
        return rollout(denoiser, role, noise, timesteps, cond, eta=row.eta or 0.0, fresh=fresh)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, config: TeacherConfig) -> Path:
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_adapter(file, config, stage_recipe(BETAS, STEP_COUNTS, solver_steps=40))
    return file


def sample_config(config: TeacherConfig, file: Path | None, out: Path, **changes: Any) -> SampleConfig:
    return replace(
        SampleConfig(prompt="a red circle", lora=file and str(file), steps=2, num_images=2, seed=3, out=str(out), teacher=config), **changes
    )


def test_images_are_saved_without_replacing_any(tmp_path: Path, config: TeacherConfig, file: Path):
    first = draw_images(sample_config(config, file, tmp_path / "out"))
    assert [path.name for path in first] == ["a_red_circle_2steps_seed3_0.png", "a_red_circle_2steps_seed3_1.png"]
    images = [np.asarray(Image.open(path)) for path in first]
    assert images[0].shape == (32, 32, 3)
    assert not np.array_equal(*images)
    second = draw_images(sample_config(config, file, tmp_path / "out", num_images=1))
    assert [path.name for path in second] == ["a_red_circle_2steps_seed3_2.png"]
    assert np.abs(np.asarray(Image.open(second[0])).astype(int) - images[0]).max() <= 1  # the same seed, in a batch of another size


def test_a_named_image_is_not_replaced(tmp_path: Path, config: TeacherConfig, file: Path):
    out = tmp_path / "new" / "image.png"
    assert draw_images(sample_config(config, file, out, num_images=1)) == [out]
    with pytest.raises(ValueError, match=r"out=.*image\.png: .*image\.png exists"):
        draw_images(sample_config(config, file, out, num_images=1))
    assert draw_images(sample_config(config, None, out)) == [out.with_name("image_0.png"), out.with_name("image_1.png")]


def test_a_step_count_without_a_sampler_is_refused(tmp_path: Path, config: TeacherConfig, file: Path):
    with pytest.raises(ValueError, match=r"steps=3: lora=.* is made for 1 or 2 or 4 or 8 steps"):
        draw_images(sample_config(config, file, tmp_path / "out", steps=3))
    assert not (tmp_path / "out").exists()


def test_without_a_step_count_it_is_four_or_what_the_lora_is_for(tmp_path: Path, config: TeacherConfig, file: Path):
    only = tmp_path / "tscd_8.safetensors"
    write_adapter(only, config, stage_recipe(BETAS, (8,), solver_steps=40))
    for lora, steps in ((file, 4), (only, 8), (None, 4)):
        (image,) = draw_images(sample_config(config, lora, tmp_path / "out", steps=None, num_images=1))
        assert f"_{steps}steps_" in image.name
        image.unlink()


def test_a_lora_of_another_teacher_is_refused(tmp_path: Path, file: Path):
    other = teacher_config(tiny_sd15(tmp_path / "other", latent_channels=8))
    with pytest.raises(ValueError, match="another base model"):
        draw_images(sample_config(other, file, tmp_path / "out"))
