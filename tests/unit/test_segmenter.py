"""The frozen segmenter: its loss is the formula, of every image by itself, and reaches the pixels."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from hyper_sd.config import SegmenterConfig, TeacherConfig, TeacherGuidanceConfig
from hyper_sd.data.scenes import IMAGE_SIZE, SHAPES, captions, render, sample_scenes
from hyper_sd.data.scenes_data import scene_instances
from hyper_sd.denoiser import Denoiser
from hyper_sd.instances import Instances
from hyper_sd.objective import Batch, Context, Feedback
from hyper_sd.paths import asset_dir
from hyper_sd.randomness import Draws
from hyper_sd.rewards.segmenter import Mask2Former, Preprocess, build_segmenter, check_segmenter
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.stages.refl import ReFL
from hyper_sd.teachers import load_teacher
from tools.embedded_reward.training import spoil

CPU = torch.device("cpu")
EMBEDDED = SegmenterConfig(path="embedded", file="model.safetensors")
SCENES = sample_scenes(5, np.arange(6))
IMAGES, OBJECTS = render(SCENES), scene_instances(SCENES, IMAGE_SIZE)


@pytest.fixture(scope="module")
def segmenter() -> Mask2Former:
    return build_segmenter(EMBEDDED, SHAPES, CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped files, to be changed."""
    return Path(shutil.copytree(asset_dir("segmenter"), tmp_path / "segmenter"))


def by_formula(segmenter: Mask2Former, image: Tensor, objects: Instances) -> Tensor:
    """The least over all pairings, written out, with the model's own outputs."""
    config: Mask2FormerConfig = segmenter._model.config
    found = segmenter._model(pixel_values=2 * image[None] - 1)
    logits, masks = found.class_queries_logits[0], found.masks_queries_logits[0].flatten(1)
    truth = functional.avg_pool2d(objects.masks.float(), 2).flatten(1)
    best: tuple[float, Tensor] | None = None
    for queries in itertools.permutations(range(len(logits)), len(truth)):
        chosen, wanted = masks[list(queries)], torch.full((len(logits),), len(SHAPES))
        wanted[list(queries)] = objects.labels
        share = chosen.sigmoid()
        dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
        cross = -(truth * functional.logsigmoid(chosen) + (1 - truth) * functional.logsigmoid(-chosen)).mean(1)
        weight = torch.where(wanted == len(SHAPES), config.no_object_weight, 1.0)
        classes = -(weight * logits.log_softmax(1)[torch.arange(len(logits)), wanted]).sum() / weight.sum()
        likely = logits.softmax(1)[list(queries), objects.labels].sum()
        cost = config.mask_weight * cross.sum() + config.dice_weight * dice.sum() - config.class_weight * likely
        loss = config.class_weight * classes + config.mask_weight * cross.mean() + config.dice_weight * dice.mean()
        best = (cost.item(), loss) if best is None or cost.item() < best[0] else best
    assert best is not None
    return best[1]


@torch.no_grad()
def test_the_loss_is_that_of_the_formula(segmenter: Mask2Former) -> None:
    blurred = functional.avg_pool2d(functional.pad(IMAGES, (2, 2, 2, 2), mode="replicate"), 5, 1)
    assert {len(one.labels) for one in OBJECTS} == {1, 2}
    wanted = torch.stack([by_formula(segmenter, *pair) for pair in zip(blurred, OBJECTS, strict=True)])
    torch.testing.assert_close(segmenter.loss(blurred, OBJECTS), wanted, rtol=1e-4, atol=1e-4)


def test_the_loss_of_an_image_depends_on_nothing_else(segmenter: Mask2Former) -> None:
    """Neither on the rest of the batch, nor on the global random numbers, of which it takes none."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = segmenter.loss(IMAGES, OBJECTS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    alone = [segmenter.loss(IMAGES[i : i + 1], OBJECTS[i : i + 1]) for i in reversed(range(6))]
    torch.testing.assert_close(together, torch.cat(alone).flip(0), rtol=1e-4, atol=1e-4)
    assert (together.shape, together.dtype) == ((6,), torch.float32) and together.unique().numel() == 6


def test_gradients_reach_the_pixels(segmenter: Mask2Former) -> None:
    """A step along the gradient changes each loss by its length; a short one, since masked attention has thresholds."""
    images = functional.avg_pool2d(functional.pad(IMAGES, (1, 1, 1, 1), mode="replicate"), 3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(segmenter.loss(images, OBJECTS).sum(), images)
    lengths = gradient.flatten(1).norm(dim=1)
    step = 2e-4 * gradient / lengths[:, None, None, None]
    with torch.no_grad():
        change = segmenter.loss(images + step, OBJECTS) - segmenter.loss(images - step, OBJECTS)
    assert (lengths > 0).all()
    torch.testing.assert_close(change / 4e-4, lengths, rtol=0.02, atol=0.05)
    assert not any(p.requires_grad for p in segmenter._model.parameters())


@torch.no_grad()
def test_the_shipped_one_tells_good_images_from_bad(segmenter: Mask2Former) -> None:
    scenes = sample_scenes(6, np.arange(64))
    images, objects = render(scenes), scene_instances(scenes, IMAGE_SIZE)
    good = segmenter.loss(images, objects)
    assert good.mean() < 2
    assert (good < segmenter.loss(images.roll(1, 0), objects)).float().mean() > 0.95
    assert segmenter.loss(spoil(images, torch.Generator().manual_seed(0)), objects).mean() > 2 * good.mean()


def test_a_student_that_has_come_to_nothing_has_a_loss_that_is_not_finite(segmenter: Mask2Former) -> None:
    """Which the training loop skips; matching must not fail before."""
    assert not segmenter.loss(IMAGES[:1] * torch.nan, OBJECTS[:1]).isfinite().any()


@pytest.mark.parametrize("side", [64, 384])
def test_preprocessing_is_that_of_the_reference_processor(side: int) -> None:
    """Within one grey level of 256, since the reference rounds to them: 0.0186 in units of a normalised pixel."""
    image = Image.open(Path(__file__).parents[2] / "docs" / "grid.png").convert("RGB").crop((300, 60, 412, 172))
    reference = Mask2FormerImageProcessorPil(size={"height": side, "width": side})
    expected = reference(image, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
    error = (Preprocess.read(reference.to_dict(), "segmenter")(pixels) - expected).abs()
    assert error.shape == (1, 3, side, side)
    assert error.mean() < 0.005 and error.max() < 0.0187


def test_categories_are_found_by_name(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    facts["id2label"] = {"0": "person", "1": "aeroplane", "2": "diningtable", "3": "Sofa", "4": "tvmonitor"}
    (folder / "config.json").write_text(json.dumps(facts))
    config = replace(EMBEDDED, path=str(folder))
    assert check_segmenter(config, ("tv", "airplane", "couch", "dining table", "person")) == [4, 1, 3, 2, 0]
    with pytest.raises(ValueError, match=r"2 of the 3 categories of the data are none of them \(first: dog\)"):
        check_segmenter(config, ("person", "dog", "cat"))


@pytest.mark.parametrize("given", [384, {"shortest_edge": 384, "longest_edge": 1333}, {"height": 384, "width": 384}])
def test_every_way_of_naming_a_size_is_read(given: object) -> None:
    read = Preprocess.read({"size": given, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "segmenter")
    assert (read.height, read.width) == (384, 384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, r"segmenter\.path must be set"),
        ({"path": "/nowhere"}, r"segmenter\.path=/nowhere is no directory"),
        ({"path": "facebook/mask2former-swin-tiny-coco-instance"}, r"segmenter\.revision=None must be the full hash of a commit"),
        ({"file": "other.safetensors"}, r"segmenter\.path=\S+ holds no other\.safetensors"),
        ({"sha256": "0" * 64}, r"segmenter\.sha256=0{64} is not that of"),
    ],
)
def test_wrong_files_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segmenter(replace(EMBEDDED, **changes), SHAPES)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "detr"}, r"segmenter\.path=\S+ holds a detr; it must be a mask2former"),
        ("preprocessor_config.json", {"resample": 3}, r"segmenter: preprocessor_config\.json must resize bilinearly"),
        ("preprocessor_config.json", {"size": 40, "size_divisor": 32}, r"to a size that is a multiple of size_divisor: got size=40"),
        ("preprocessor_config.json", {"size": {}}, r"segmenter: preprocessor_config\.json must resize bilinearly"),
        ("config.json", {"num_queries": 9}, r"segmenter\.file: these weights do not fit|these are not the weights"),
    ],
)
def test_another_model_is_refused(folder: Path, file: str, changes: dict[str, object], message: str) -> None:
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(facts | changes))
    with pytest.raises(ValueError, match=message):
        build_segmenter(replace(EMBEDDED, path=str(folder)), SHAPES, CPU)


@pytest.mark.slow
def test_training_on_it_lowers_its_loss_on_generated_images(segmenter: Mask2Former) -> None:
    """A feedback adapter on the embedded teacher, whose estimates from much noise are blurred, in a few updates on eight scenes."""
    teacher = load_teacher(
        TeacherConfig(family="sd15", path="embedded", guidance=TeacherGuidanceConfig(min=2.0, max=2.0)), CPU, torch.float32
    )
    roles = Roles(teacher.net, LoraSpec(rank=8, alpha=8.0), ("student", "feedback"))
    ctx = Context(
        Denoiser(teacher.forward, roles, teacher.schedule, teacher.prediction), roles, Feedback(teacher.decode, {}, 4, segmenter.loss)
    )
    scenes = sample_scenes(11, np.arange(8))
    cond, prompts = teacher.encode_prompts(captions(scenes)), tuple(captions(scenes))
    x0 = teacher.encode_images(render(scenes))
    batch = Batch(x0, cond, teacher.uncond(8), Draws(0, 0, tuple(range(8))), prompts, scene_instances(scenes, IMAGE_SIZE))
    stage = ReFL(reward_weight=0.0, reference_weight=0.0, perceptual_weight=1.0, perceptual_rollout=(1,), perceptual_start=999)
    (objective,) = stage.objectives(ctx)
    roles.trainable(objective.trains)
    optimizer = torch.optim.Adam(roles.params(objective.trains), lr=5e-4)
    losses = []
    for _ in range(12):
        loss = objective.loss(batch, {})
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(loss.value.item())
    assert sum(losses[-4:]) / 4 < 0.75 * losses[0], losses
