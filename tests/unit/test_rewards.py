import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hyper_sd.config import FilesConfig, RewardConfig
from hyper_sd.objective import Context, Feedback, Loss, WeightedReward
from hyper_sd.rewards import build_reward, build_rewards, check_rewards
from hyper_sd.rewards.base import CLIP_MEAN, CLIP_STD, Reward, crop, normalise, pad
from hyper_sd.rewards.head import new_head
from hyper_sd.rewards.hps_v2 import config_of, from_open_clip
from hyper_sd.rewards.image_reward import configs_of, split_blip
from hyper_sd.stages.feedback import reward_loss
from tests.networks import tiny_batch, tiny_denoiser
from tests.released import KINDS, layout, write_clip, write_reward

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square on a red background", "square")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RewardConfig]:
    return {kind: write_reward(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def rewards(configs: dict[str, RewardConfig]) -> dict[str, Reward]:
    return {kind: build_reward(config, CPU) for kind, config in configs.items()}


def smooth_images(height: int = 40, width: int = 52) -> Tensor:
    """Three images of waves, away from black and white."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 8, width), indexing="ij")
    phase = torch.arange(9.0).reshape(3, 3, 1, 1)
    return 0.5 + 0.2 * torch.sin(x * (1 + phase / 9) + phase) * torch.cos(y - phase)


def pictures() -> dict[str, Image.Image]:
    """Rendered pictures: text and shapes with hard edges, larger and smaller than a model's square, wide and tall."""
    page = Image.open(Path(__file__).parents[2] / "docs" / "grid.png").convert("RGB")
    drawn = Image.new("RGB", (301, 500), (250, 240, 20))
    canvas = ImageDraw.Draw(drawn)
    canvas.ellipse((30, 40, 260, 300), fill=(200, 10, 30), outline=(255, 255, 255), width=7)
    canvas.line((0, 499, 300, 0), fill=(0, 0, 0), width=3)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 150, dtype=np.uint8)[None, :, None], (97, 1, 3)))
    return {"page": page, "tile": page.crop((300, 60, 400, 160)), "drawn": drawn, "ramp": ramp}


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


# ---- published layouts


def on_meta(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def model_shapes(build: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(build().state_dict())


def test_every_published_key_of_image_reward_has_its_place_in_the_full_size_models() -> None:
    published = on_meta(layout("image_reward"))
    assert len(published) == 625
    vision, text, head = split_blip(published)
    vision_config, text_config = configs_of(vision, text)
    assert (vision_config.num_attention_heads, vision_config.image_size, vision_config.num_hidden_layers) == (16, 224, 24)
    assert (text_config.num_attention_heads, text_config.encoder_hidden_size, text_config.num_hidden_layers) == (12, 1024, 12)
    assert shapes_of(vision) == model_shapes(lambda: BlipVisionModel(vision_config))
    assert shapes_of(text) == model_shapes(lambda: BlipTextModel(text_config, add_pooling_layer=False))
    assert {name.removeprefix("layers."): shape for name, shape in shapes_of(head).items()} == model_shapes(lambda: new_head(768))
    unused = {name for name in published if re.search("vision_proj|text_proj|position_ids", name)}
    assert len(vision) + len(text) + len(head) + len(unused) == 625
    assert len(unused) == 5


def test_every_published_key_of_hps_v2_has_its_place_in_the_full_size_model() -> None:
    published = on_meta(layout("hps_v2"))
    assert len(published) == 686
    converted = from_open_clip(published)
    config = config_of(converted, eos_token_id=49407)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.text_config.hidden_act) == (224, 14, "gelu")
    assert shapes_of(converted) == model_shapes(lambda: CLIPModel(config))


@pytest.mark.parametrize(
    ("kind", "num", "text", "vision"), [("clip_score", 590, (768, 12), (1024, 24)), ("pickscore", 910, (1024, 24), (1280, 32))]
)
def test_published_clip_models_are_those_of_transformers(kind: str, num: int, text: tuple[int, int], vision: tuple[int, int]) -> None:
    published = {name: tuple(shape) for name, shape in layout(kind).items() if not name.endswith("position_ids")}
    sizes = [
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 16}
        for width, layers in (text, vision)
    ]
    config = CLIPConfig(projection_dim=text[0], text_config=sizes[0], vision_config=sizes[1] | {"patch_size": 14})
    assert len(published) == num
    assert published == model_shapes(lambda: CLIPModel(config))


def test_the_published_aesthetic_head_is_ours() -> None:
    assert {name.removeprefix("layers."): tuple(shape) for name, shape in layout("aesthetic").items()} == model_shapes(
        lambda: new_head(768)
    )


# ---- preprocessing


@pytest.mark.parametrize("name", ["page", "tile", "drawn", "ramp"])
def test_cropping_is_that_of_the_reference_processor(name: str) -> None:
    """Within one grey level of 256, since the reference rounds to them: 0.015 in units of a normalised pixel, and 0.004 on average."""
    image = pictures()[name]
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    error = (normalise(crop(to_tensor(image), 224)) - expected).abs()
    assert error.shape == (1, 3, 224, 224)
    assert error.mean() < 0.004 and error.max() < 0.016


@pytest.mark.parametrize("name", ["page", "tile", "drawn", "ramp"])
def test_padding_is_that_of_pil_on_a_black_square(name: str) -> None:
    image = pictures()[name]
    scale = 224 / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = Image.new("RGB", (224, 224))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((224 - width) // 2, (224 - height) // 2))
    expected = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(square, return_tensors="pt")["pixel_values"]
    error = (normalise(pad(to_tensor(image), 224)) - expected).abs()
    assert error.mean() < 0.004 and error.max() < 0.016


def test_the_normalisation_is_that_of_the_reference() -> None:
    reference = CLIPImageProcessorPil()
    assert (tuple(reference.image_mean), tuple(reference.image_std)) == (CLIP_MEAN, CLIP_STD)


def test_saturated_pixels_keep_their_gradient() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1  # bicubic overshoots on both sides of an edge
    edge.requires_grad_()
    resized = crop(edge, 32)
    assert resized.min() == 0 and resized.max() == 1
    (gradient,) = torch.autograd.grad(resized.sum(), edge)
    torch.testing.assert_close(gradient.mean((2, 3)), torch.full((1, 3), 16.0))  # 32^2 / 8^2: of every pixel of the result


# ---- scores


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_pixels(rewards: dict[str, Reward], kind: str) -> None:
    """A step along the gradient changes each score by its length, as far as float32 can say."""
    images = smooth_images().requires_grad_()
    scores = rewards[kind].score(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    lengths = gradient.flatten(1).norm(dim=1)
    step = 0.02 * gradient / lengths[:, None, None, None]
    with torch.no_grad():
        change = rewards[kind].score(images + step, PROMPTS) - rewards[kind].score(images - step, PROMPTS)
    assert (lengths > 0).all()
    torch.testing.assert_close(change / 0.04, lengths, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_scored_as_its_images_one_by_one(rewards: dict[str, Reward], kind: str) -> None:
    images = smooth_images()
    together = rewards[kind].score(images, PROMPTS)
    alone = torch.cat([rewards[kind].score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(images))])
    assert (together.shape, together.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.unique().numel() == 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "aesthetic"])
def test_the_prompt_matters(rewards: dict[str, Reward], kind: str) -> None:
    images = smooth_images()[:1]
    assert rewards[kind].score(images, ["a red circle"]) != rewards[kind].score(images, ["a blue square"])


@pytest.mark.parametrize("kind", ["clip_score", "pickscore"])
def test_a_clip_reward_is_what_transformers_computes(configs: dict[str, RewardConfig], rewards: dict[str, Reward], kind: str) -> None:
    folder = configs[kind].path
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    image = pictures()["drawn"]
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})(image, return_tensors="pt")
    words = tokenizer(["a red circle"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**words, pixel_values=pixels["pixel_values"]).logits_per_image[0]
    expected = expected if kind == "pickscore" else 100 * expected / model.logit_scale.exp()
    torch.testing.assert_close(rewards[kind].score(to_tensor(image), ["a red circle"]), expected.detach(), rtol=1e-3, atol=1e-2)


AUTHORS_OWN = {  # scores that the code of image-reward 1.5 and hpsv2 1.2.0 gives the same tiny weights, pixels and tokens
    "image_reward": (0.5205977559089661, 0.904874324798584, 1.0397531986236572),
    "hps_v2": (-0.0360114686191082, 0.010467298328876495, 0.10880960524082184),
}


@pytest.mark.parametrize("kind", AUTHORS_OWN)
def test_converted_weights_score_as_in_the_authors_own_code(rewards: dict[str, Reward], kind: str) -> None:
    torch.testing.assert_close(rewards[kind].score(smooth_images(), PROMPTS), torch.tensor(AUTHORS_OWN[kind]), rtol=1e-4, atol=1e-5)


def test_the_aesthetic_score_is_its_layers_on_the_unit_embedding(configs: dict[str, RewardConfig], rewards: dict[str, Reward]) -> None:
    config = configs["aesthetic"]
    assert config.base is not None
    model, images = CLIPModel.from_pretrained(config.base.path), smooth_images()
    with torch.no_grad():
        values = model.get_image_features(pixel_values=normalise(crop(images, 28))).pooler_output
        values = values / values.norm(dim=1, keepdim=True)
        layers = torch.load(Path(config.path or "") / "aesthetic.pt", weights_only=True)
        for place in (0, 2, 4, 6, 7):
            values = values @ layers[f"layers.{place}.weight"].T + layers[f"layers.{place}.bias"]
    torch.testing.assert_close(rewards["aesthetic"].score(images, PROMPTS), values[:, 0], rtol=1e-4, atol=1e-6)


def test_rewards_on_one_tower_share_its_forward_pass(configs: dict[str, RewardConfig], tmp_path: Path) -> None:
    clip = write_clip(tmp_path)
    both = {
        "clip_score": replace(configs["clip_score"], path=clip.path),
        "aesthetic": replace(configs["aesthetic"], base=clip),
        "image_reward": configs["image_reward"],
    }
    together = build_rewards(both, CPU)
    calls: list[int] = []
    tower: Any = together.rewards["aesthetic"]
    assert tower.tower is together.rewards["clip_score"].tower  # pyright: ignore[reportAttributeAccessIssue]
    tower.tower.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    scores = together.scores(smooth_images(), PROMPTS)
    assert (list(scores), len(calls)) == (list(both), 1)
    for name, config in both.items():
        torch.testing.assert_close(scores[name], build_reward(config, CPU).score(smooth_images(), PROMPTS))


@pytest.mark.parametrize("slice", [3, 2])
def test_rewards_on_one_tower_share_its_forward_pass_in_training(configs: dict[str, RewardConfig], tmp_path: Path, slice: int) -> None:
    """A forward for each decoded slice, whatever rewards hang on the tower; loss, gradient and logs are those of each reward alone."""
    clip = write_clip(tmp_path)
    both = {
        "clip_score": replace(configs["clip_score"], path=clip.path, alpha=90.0, weight=0.3),
        "image_reward": replace(configs["image_reward"], alpha=9.0),
        "aesthetic": replace(configs["aesthetic"], base=clip, alpha=9.0, weight=2.0),
    }
    together = build_rewards(both, CPU)
    batch = replace(tiny_batch(range(3)), prompts=PROMPTS)

    def loss(rewards: dict[str, WeightedReward]) -> tuple[Loss, Tensor]:
        x0 = smooth_images().requires_grad_()
        ctx = Context(denoiser, denoiser.roles, Feedback(lambda latents: 0.9 * latents, rewards, slice))
        found = reward_loss(ctx, x0, batch)
        return found, torch.autograd.grad(found.value, x0)[0]

    denoiser = tiny_denoiser(("student",))
    alone = [loss(build_rewards({name: config}, CPU).weighted({name: config})) for name, config in both.items()]
    calls: list[int] = []
    tower: Any = together.rewards["aesthetic"]
    tower.tower.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    shared, gradient = loss(together.weighted(both))
    assert len(calls) == -(-3 // slice)
    torch.testing.assert_close(shared.value, sum(found.value for found, _ in alone))
    torch.testing.assert_close(gradient, sum(part for _, part in alone))
    for found, _ in alone:
        for name, log in found.logs.items():
            torch.testing.assert_close(shared.logs[name], log)
    assert all(shared.logs[f"grad_{name}"] > 0 for name in both)


def test_constants_that_an_evaluation_made_can_be_trained_through() -> None:
    images, mean = smooth_images(), (0.123, 0.4, 0.5)  # no other test's
    with torch.inference_mode():
        normalise(images, mean)
    (gradient,) = torch.autograd.grad(normalise(images.requires_grad_(), mean).sum(), images)
    torch.testing.assert_close(gradient, (1 / torch.tensor(CLIP_STD))[None, :, None, None].expand_as(images))


@pytest.mark.parametrize("kind", ["hps_v2", "aesthetic", "image_reward"])
def test_a_safetensors_file_is_as_good_as_the_pickled_original(
    configs: dict[str, RewardConfig], rewards: dict[str, Reward], kind: str
) -> None:
    original = Path(configs[kind].path or "") / f"{kind}.pt"
    tensors = torch.load(original, weights_only=True)
    converted = original.with_suffix(".safetensors")
    save_file({name: value.contiguous() for name, value in tensors.get("state_dict", tensors).items()}, converted)
    config = replace(configs[kind], file=converted.name, sha256=hashlib.sha256(converted.read_bytes()).hexdigest())
    assert torch.equal(build_reward(config, CPU).score(smooth_images(), PROMPTS), rewards[kind].score(smooth_images(), PROMPTS))


# ---- mistakes


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no directory": ({"path": "/nowhere"}, r"reward\.path=/nowhere is no directory; give one that holds .* or a hub id"),
    "no file": ({"file": "other.pt"}, r"reward\.path=\S+ holds no other\.pt"),
    "checksum": ({"sha256": "0" * 64}, r"reward\.sha256=0{64} is not that of \S+image_reward\.pt, which has [0-9a-f]{64}"),
    "no commit": ({"path": "THUDM/ImageReward"}, r"reward\.revision=None must be the full hash of a commit for the hub id"),
    "branch": ({"path": "THUDM/ImageReward", "revision": "main"}, r"reward\.revision=main must be the full hash"),
    "offline": (
        {"path": "THUDM/ImageReward", "revision": "5736be03b2652728fb87788c9797b0570450ab72"},
        r"image_reward\.pt cannot be had from the hub",
    ),
    "no base": ({"base": None}, r"reward\.base must be set for kind=image_reward: the files of the tokenizer"),
    "no tokenizer": ({"base": FilesConfig(path="/nowhere", file="vocab.txt")}, r"reward\.base\.path=/nowhere is no directory"),
    "no path": ({"path": None}, r"reward\.path must be set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_refused_with_one_clear_error(configs: dict[str, RewardConfig], mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        build_reward(replace(configs["image_reward"], **changes), CPU)


def test_nothing_is_loaded_before_everything_is_checked(configs: dict[str, RewardConfig], tmp_path: Path) -> None:
    """The first reward's file would fail when it is read; the second's is missing, which is found before."""
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    broken = replace(configs["image_reward"], path=str(tmp_path), file="broken.pt")
    both = {"first": broken, "second": replace(configs["hps_v2"], file="missing.pt")}
    with pytest.raises(ValueError, match=r"rewards\.second\.path=\S+ holds no missing\.pt"):
        build_rewards(both, CPU)
    with pytest.raises(ValueError, match=r"rewards\.first\.file: \S+broken\.pt cannot be read as weights"):
        build_rewards({"first": broken}, CPU)


def test_a_clip_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"rewards\.mine\.path=\S+ holds no vocab\.json"):
        check_rewards({"mine": RewardConfig(kind="clip_score", path=clip.path, file=clip.file, alpha=1.0)})


@pytest.mark.parametrize("kind", ["clip_score", "hps_v2", "aesthetic"])
def test_weights_of_another_model_are_refused(configs: dict[str, RewardConfig], kind: str, tmp_path: Path) -> None:
    """transformers would only warn, and leave the model random."""
    config = configs[kind]
    folder = Path(config.path or "")
    other = torch.load(Path(configs["image_reward"].path or "") / "image_reward.pt", weights_only=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != config.file:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "other.safetensors"
    save_file(other, tmp_path / name)
    with pytest.raises(ValueError, match=r"reward\.file"):
        build_reward(replace(config, path=str(tmp_path), file=name), CPU)


@pytest.mark.parametrize(
    "lacking", ["blip.visual_encoder.norm.weight", "mlp.layers.6.bias", "blip.text_encoder.encoder.layer.1.output.dense.weight"]
)
def test_a_released_file_that_lacks_a_tensor_is_refused(configs: dict[str, RewardConfig], lacking: str, tmp_path: Path) -> None:
    config = configs["image_reward"]
    tensors = torch.load(Path(config.path or "") / "image_reward.pt", weights_only=True)
    less = {name: value for name, value in tensors.items() if name != lacking}
    for name, changed in (("less.safetensors", less), ("more.safetensors", tensors | {"x": torch.ones(1)})):
        save_file(changed, tmp_path / name)
        with pytest.raises(ValueError, match=r"reward\.file: these are not the weights of this \w+: 1 (missing|unexpected) keys, first"):
            build_reward(replace(config, path=str(tmp_path), file=name), CPU)


def test_code_in_a_pickle_does_not_run(configs: dict[str, RewardConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "harmful.pt").open("wb") as stream:
        pickle.dump({"a": Harmful()}, stream, protocol=2)
    torch.save({"a": Harmful()}, tmp_path / "zipped.pt")
    for name in ("harmful.pt", "zipped.pt"):
        with pytest.raises(ValueError, match=r"cannot be read as weights"):
            build_reward(replace(configs["image_reward"], path=str(tmp_path), file=name), CPU)
    assert not (tmp_path / "harm").exists()
