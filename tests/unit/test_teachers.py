import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from hyper_sd.config import TeacherConfig, TeacherGuidanceConfig
from hyper_sd.denoiser import Denoiser
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.teachers import Teacher, inspect_teacher, load_pipeline, load_teacher
from hyper_sd.teachers.base import Clamp
from tests.tiny import tiny_sd15, tiny_sdxl

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "", "a blue square on a red background"]


def config(path: Path | str, family: Literal["sd15", "sdxl"] = "sd15", **fields: Any) -> TeacherConfig:
    return TeacherConfig(family=family, path=str(path), guidance=TeacherGuidanceConfig(min=4, max=8), **fields)


def load(path: Path, family: Literal["sd15", "sdxl"] = "sd15", dtype: torch.dtype = torch.float32, **fields: Any) -> Teacher:
    return load_teacher(config(path, family, **fields), CPU, dtype)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def copy(sd15: Path, tmp_path: Path) -> Path:
    """A copy of the SD1.5 pipeline that a test may damage."""
    return Path(shutil.copytree(sd15, tmp_path / "teacher"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def record_unet_calls(pipeline: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]:
    """Run one guided step of the stock pipeline; what it hands to its UNet and what comes back."""
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS, num_inference_steps=1, guidance_scale=5.0, output_type="latent", generator=torch.Generator().manual_seed(0))
    hook.remove()
    return calls


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_forward_and_conditions_are_those_of_the_stock_pipeline(family: Literal["sd15", "sdxl"], request: pytest.FixtureRequest):
    path = request.getfixturevalue(family)
    teacher, pipeline = load(path, family), load_pipeline(config(path, family))
    (args, kwargs, expected) = record_unet_calls(pipeline)[0]
    conds = zip(teacher.uncond(len(PROMPTS)), teacher.encode_prompts(PROMPTS), strict=True)
    cond = tuple(torch.cat([uncond, cond]) for uncond, cond in conds)
    assert torch.equal(cond[0], kwargs["encoder_hidden_states"])
    if family == "sdxl":
        assert torch.equal(cond[1], kwargs["added_cond_kwargs"]["text_embeds"])
        assert torch.equal(cond[2], kwargs["added_cond_kwargs"]["time_ids"])
    output = teacher.forward(args[0], args[1].expand(len(args[0])), cond)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_unconditional_embedding_follows_force_zeros_for_empty_prompt(force_zeros: bool, tmp_path: Path):
    teacher = load(tiny_sdxl(tmp_path, force_zeros_for_empty_prompt=force_zeros), "sdxl")
    empty, uncond = teacher.encode_prompts([""]), teacher.uncond(1)
    for of_prompt, negative in zip(empty[:2], uncond[:2], strict=True):
        assert torch.equal(negative, torch.zeros_like(of_prompt) if force_zeros else of_prompt)
    assert torch.equal(uncond[2], empty[2])


def test_sdxl_time_ids_follow_the_chosen_image_size(sdxl: Path):
    teacher = load(sdxl, "sdxl", image_size=48)
    assert teacher.latent_shape == (4, 12, 12)
    assert teacher.encode_prompts(["a"])[2].tolist() == [[48, 48, 0, 0, 48, 48]]


def test_sd15_unconditional_embedding_is_that_of_the_empty_prompt(sd15: Path):
    teacher = load(sd15)
    (uncond,), (empty,) = teacher.uncond(3), teacher.encode_prompts([""])
    assert uncond.shape[0] == 3
    assert all(torch.equal(row, empty[0]) for row in uncond)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_images_to_latents_and_back(family: Literal["sd15", "sdxl"], request: pytest.FixtureRequest):
    path = request.getfixturevalue(family)
    teacher, vae = load(path, family), load_pipeline(config(path, family)).components["vae"]
    images = torch.rand(2, 3, 32, 32)
    latents = teacher.encode_images(images)
    expected = vae.encode(2 * images - 1).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (2, *teacher.latent_shape)
    torch.testing.assert_close(latents, expected)
    decoded = teacher.decode(latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1))


def test_saturated_pixels_keep_the_gradient_that_brings_them_back():
    pixels = torch.tensor([-0.5, -0.5, 0.5, 0.5, 1.5, 1.5], requires_grad=True)
    towards = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])  # what descent subtracts
    images = Clamp.apply(pixels)
    images.backward(towards)
    assert images.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert pixels.grad is not None and pixels.grad.tolist() == [-1, 0, -1, 1, 0, 1]


def test_gradients_flow_through_decode_to_the_latents(sd15: Path):
    latents = torch.zeros(1, 4, 8, 8, requires_grad=True)
    load(sd15).decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_everything_is_frozen_and_in_eval(family: Literal["sd15", "sdxl"], request: pytest.FixtureRequest):
    teacher = load(request.getfixturevalue(family), family)
    assert not teacher.net.training
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
    assert not any(part.requires_grad for part in teacher.encode_prompts(["a"]))
    assert not teacher.decode(torch.zeros(1, *teacher.latent_shape)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_network_keeps_the_vae_in_float32(sdxl: Path, dtype: torch.dtype):
    teacher = load(sdxl, "sdxl", dtype)
    latents = teacher.encode_images(torch.rand(1, 3, 32, 32))
    assert latents.dtype == torch.float32 == teacher.decode(latents).dtype
    cond = tuple(part.float() for part in teacher.encode_prompts(["a"]))
    output = teacher.forward(latents, torch.tensor([500]), cond)  # float32 in, cast inside
    assert {parameter.dtype for parameter in teacher.net.parameters()} == {output.dtype} == {dtype}


@pytest.mark.parametrize(("prediction_type", "expected"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedule_and_prediction_come_from_the_scheduler(prediction_type: str, expected: str, zero_snr: bool, tmp_path: Path):
    path = tiny_sd15(tmp_path, prediction_type=prediction_type, zero_snr=zero_snr)
    facts = inspect_teacher(config(path))
    alphas_cumprod = DDIMScheduler.from_pretrained(path, subfolder="scheduler").alphas_cumprod
    assert facts.prediction == expected
    torch.testing.assert_close(facts.schedule.alphas.square(), alphas_cumprod.double())
    assert (facts.schedule.alphas[-1] == 0) == zero_snr


def test_denoiser_refuses_eps_with_zero_terminal_snr_and_takes_v(tmp_path: Path):
    eps = load(tiny_sd15(tmp_path / "eps", zero_snr=True))
    v = load(tiny_sd15(tmp_path / "v", zero_snr=True, prediction_type="v_prediction"))
    spec = LoraSpec(rank=2, alpha=2)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Denoiser(eps.forward, Roles(eps.net, spec, []), eps.schedule, eps.prediction)
    denoiser = Denoiser(v.forward, Roles(v.net, spec, ["student"]), v.schedule, v.prediction)
    prediction = denoiser(("student",), torch.randn(2, *v.latent_shape), torch.tensor([999, 0]), v.encode_prompts(["a", "red"]))
    assert prediction.x0.isfinite().all() and prediction.eps.isfinite().all()


def test_fresh_adapters_leave_the_teacher_as_it_is(sdxl: Path):
    teacher = load(sdxl, "sdxl")
    x_t, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([999, 3]), teacher.encode_prompts(["a", "red"])
    before = teacher.forward(x_t, t, cond)
    roles = Roles(teacher.net, LoraSpec(rank=2, alpha=1), ["student"])
    with roles.use(("student",)):
        assert torch.equal(teacher.forward(x_t, t, cond), before)


def test_another_image_size_channel_count_and_vocabulary(tmp_path: Path):
    path = tiny_sd15(tmp_path, image_size=24, latent_channels=3, vocabulary=("cat", "dog"))
    teacher = load(path)
    assert (teacher.image_size, teacher.latent_shape) == (24, (3, 6, 6))
    assert teacher.encode_images(torch.rand(1, 3, 24, 24)).shape == (1, 3, 6, 6)
    assert teacher.forward(torch.randn(1, 3, 6, 6), torch.tensor([0]), teacher.encode_prompts(["cat"])).shape == (1, 3, 6, 6)


def test_stock_pipeline_is_fresh_and_draws(sd15: Path, sdxl: Path):
    first, second = load_pipeline(config(sd15)), load_pipeline(config(sd15))
    assert isinstance(first, StableDiffusionPipeline) and first.unet is not second.unet and first.safety_checker is None
    xl = load_pipeline(config(sdxl, "sdxl")).to(torch.bfloat16)
    assert isinstance(xl, StableDiffusionXLPipeline) and xl.vae.dtype == torch.bfloat16
    for pipeline in (first, xl):
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_fingerprint_tells_bases_apart_but_not_copies(sd15: Path, sdxl: Path, tmp_path: Path):
    copies = [inspect_teacher(config(path)).fingerprint for path in (sd15, tiny_sd15(tmp_path / "copy"))]
    assert copies[0] == copies[1] == load(sd15).fingerprint
    others = [
        inspect_teacher(config(sdxl, "sdxl")).fingerprint,
        inspect_teacher(config(tiny_sd15(tmp_path / "channels", latent_channels=3))).fingerprint,
        inspect_teacher(config(tiny_sd15(tmp_path / "v", prediction_type="v_prediction"))).fingerprint,
        inspect_teacher(config(tiny_sd15(tmp_path / "snr", zero_snr=True))).fingerprint,
    ]
    assert all(other != copies[0] for other in others)
    assert all(isinstance(value, str) for value in copies[0].values())


def test_fingerprint_survives_defaults_that_another_version_leaves_out_or_writes(copy: Path):
    before = inspect_teacher(config(copy)).fingerprint
    unet = copy / "unet" / "config.json"
    values = json.loads(unet.read_text())
    del values["dual_cross_attention"]  # false, the default
    unet.write_text(json.dumps(values | {"_diffusers_version": "0.0.1", "sample_size": 64}))
    assert inspect_teacher(config(copy)).fingerprint == before
    edit(unet, attention_head_dim=4)
    assert inspect_teacher(config(copy)).fingerprint != before


def test_architecture_names(sd15: Path, sdxl: Path):
    assert inspect_teacher(config(sd15)).architecture == "stable-diffusion-v1/lora"
    assert inspect_teacher(config(sdxl, "sdxl")).architecture == "stable-diffusion-xl-v1-base/lora"


def test_a_path_that_is_no_pipeline_is_refused(sd15: Path, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    for path in (tmp_path / "absent", tmp_path, file, sd15 / "unet"):
        with pytest.raises(ValueError, match=r"teacher.path"):
            inspect_teacher(config(path))


def test_a_hub_id_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"teacher.path=owner/name is not a directory, nor a pipeline that can be read from the hub"):
        inspect_teacher(config("owner/name"))


def test_the_wrong_family_is_refused_and_names_both(sd15: Path, sdxl: Path):
    with pytest.raises(ValueError, match=r"teacher.path=.*StableDiffusionPipeline, but teacher.family=sdxl"):
        load(sd15, "sdxl")
    with pytest.raises(ValueError, match=r"teacher.path=.*StableDiffusionXLPipeline, but teacher.family=sd15"):
        load(sdxl, "sd15")


def test_what_the_configuration_rules_out_is_refused_before_weights_are_read(copy: Path):
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    assert inspect_teacher(config(copy)).image_size == 32
    with pytest.raises(ValueError, match=r"teacher.image_size must be a multiple of 4"):
        load(copy, image_size=33)
    edit(copy / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"teacher.path.*takes 9 channels"):
        load(copy)
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="flow")
    with pytest.raises(ValueError, match=r"teacher.path.*prediction_type=flow"):
        load(copy)


def test_missing_truncated_and_pickled_weights_are_refused(copy: Path):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"teacher.path"):
        load(copy)
    weights.unlink()
    with pytest.raises(ValueError, match=r"teacher.path"):
        load(copy)
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"teacher.path"):
        load(copy)


def test_a_decoder_with_checkpointing_gives_the_same_gradient_from_less_memory(sd15: Path) -> None:
    """In eval mode too, which frozen modules are in."""
    teacher = load(sd15)
    latents = torch.randn(1, *teacher.latent_shape, requires_grad=True)

    def decoded() -> tuple[torch.Tensor, int]:
        saved: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.setdefault(id(value), value), lambda value: value):
            images = teacher.decode(latents)
        return torch.autograd.grad(images.square().sum(), latents)[0], sum(value.numel() for value in saved.values())

    plain, kept = decoded()
    teacher.pipeline.vae.enable_gradient_checkpointing()
    checkpointed, kept_then = decoded()
    assert torch.equal(plain, checkpointed) and kept_then < kept / 2


def test_that_prompts_are_cut_is_said_once(sd15: Path) -> None:
    teacher, said = load(sd15, "sd15"), list[logging.LogRecord]()
    logger, handler = logging.getLogger(StableDiffusionPipeline.__module__), logging.Handler()
    handler.emit = said.append
    logger.addHandler(handler)
    for number in range(3):
        teacher.encode_prompts([f"a red circle {number} " * 100])
    logger.removeHandler(handler)
    assert len([record for record in said if "truncated" in record.msg]) <= 1  # none if an earlier test was told
