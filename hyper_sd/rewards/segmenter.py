"""A frozen instance segmenter, whose loss against the objects that an image should show is a reward turned round (paper section 3.2).

    loss = class_weight CE(classes, labels) + mask_weight BCE(masks, truth) + dice_weight dice(masks, truth)

of Mask2Former's last layer, after queries and objects were matched at least cost, with the weights of the model's own training (Cheng et
al. 2022, arXiv 2112.01527). The model was trained on random points of the masks; here it is every point of the model's mask grid, so
that the loss is a function of image and objects alone. Each image's is normalised by its own objects and depends on no other image.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.modeling_mask2former import (
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sigmoid_cross_entropy_loss,
)

from hyper_sd.config import SegmenterConfig
from hyper_sd.instances import Instances
from hyper_sd.paths import asset_dir
from hyper_sd.rewards.base import normalise, resize
from hyper_sd.rewards.weights import check, find, load_model, read

EMBEDDED = "embedded"  # segmenter.path of the one for the embedded teacher's scenes
_BILINEAR = 2  # PIL's number for it
_COCO_NAMES = {  # how the label file of some COCO models spells them, and COCO itself
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_BUFFERS = ("relative_position_index", "attn_mask")  # that older files carry and the model makes itself


class Segmenter(Protocol):
    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        """Float32 (B,), lower is better, of images (B, 3, H, W) in [0, 1] and what they should show; gradients flow to the images."""
        ...


@dataclass(frozen=True)
class Preprocess:
    """The differentiable half of an image processor: to height by width, (images - mean) / std."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.height, self.width):
            images = resize(images, self.height, self.width, mode="bilinear")
        return normalise(images, self.mean, self.std)

    @classmethod
    def read(cls, config: Mapping[str, Any], key: str) -> "Preprocess":
        """What preprocessor_config.json says; ValueError for anything but a bilinear resize. Of square images, one side says it all."""
        size = config.get("size")
        side = size.get("shortest_edge") if isinstance(size, Mapping) else size
        height, width = (size.get(name, side) if isinstance(size, Mapping) else side for name in ("height", "width"))
        divisor, resample = config.get("size_divisor") or 1, config.get("resample", _BILINEAR)
        if not height or not width or height % divisor or width % divisor or resample != _BILINEAR:
            raise ValueError(
                f"{key}: preprocessor_config.json must resize bilinearly (resample=2) to a size that is a multiple of size_divisor: got "
                f"size={size}, size_divisor={divisor}, resample={resample}"
            )
        return cls(height, width, tuple(config["image_mean"]), tuple(config["image_std"]))


class Mask2Former:
    """A frozen float32 model; classes (C,) is the model's class of each category of the data."""

    def __init__(self, model: Any, preprocess: Preprocess, classes: Tensor):
        self._model, self._preprocess, self._classes = model, preprocess, classes

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        found = self._model(pixel_values=self._preprocess(images.float()))
        logits, masks = found.class_queries_logits, found.masks_queries_logits
        labels = [self._classes[one.labels.to(images.device)] for one in instances]
        truth = [_on_grid(one.masks.to(images.device), masks.shape[-2:]) for one in instances]
        pairs = self._match(logits.detach(), masks.detach(), labels, truth)
        return torch.stack([self._one(*sample) for sample in zip(logits, masks.flatten(2), labels, truth, pairs, strict=True)])

    def _one(self, logits: Tensor, masks: Tensor, labels: Tensor, truth: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of an image: logits (Q, K + 1), masks (Q, P), labels (N,), truth (N, P), pairs of query and object."""
        config, (queries, objects) = self._model.config, pairs
        nothing = logits.shape[1] - 1
        wanted = labels.new_full((len(logits),), nothing)
        wanted[queries] = labels[objects]
        weight = torch.ones_like(logits[0])
        weight[nothing] = config.no_object_weight
        num = len(labels)
        return (
            config.class_weight * functional.cross_entropy(logits, wanted, weight)
            + config.mask_weight * sigmoid_cross_entropy_loss(masks[queries], truth[objects], num)
            + config.dice_weight * dice_loss(masks[queries], truth[objects], num)
        )

    def _match(self, logits: Tensor, masks: Tensor, labels: Sequence[Tensor], truth: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Queries and objects of every image, paired at least cost."""
        from scipy.optimize import linear_sum_assignment

        config, costs = self._model.config, []
        for number in range(len(labels)):
            queries = masks[number].flatten(1)
            costs.append(
                config.mask_weight * pair_wise_sigmoid_cross_entropy_loss(queries, truth[number])
                + config.dice_weight * pair_wise_dice_loss(queries, truth[number])
                - config.class_weight * logits[number].softmax(-1)[:, labels[number]]
            )
        at_once = torch.cat(costs, dim=1).nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).cpu()  # one wait for the device
        parts = at_once.split([len(one) for one in labels], dim=1)
        return [(torch.from_numpy(rows), torch.from_numpy(columns)) for rows, columns in map(linear_sum_assignment, parts)]


def build_segmenter(config: SegmenterConfig, categories: Sequence[str], device: torch.device, key: str = "segmenter") -> Mask2Former:
    """The segmenter on `device`, for objects of these categories. Everything that can be refused is refused before its weights load."""
    classes = check_segmenter(config, categories, key)
    files = _files(config)
    model_config = Mask2FormerConfig.from_json_file(find(files, key, "config.json"))
    tensors = {name: value for name, value in read(find(files, key), key).items() if not name.endswith(_BUFFERS)}
    model = load_model(Mask2FormerForUniversalSegmentation, model_config, tensors, key).to(device)
    return Mask2Former(model, _preprocess(files, key), torch.tensor(classes, device=device))


def check_segmenter(config: SegmenterConfig, categories: Sequence[str], key: str = "segmenter") -> list[int]:
    """The model's class of each category, found by name.

    Raises ValueError for a file that is missing or has another checksum, another kind of model, and a category that the model does not
    know. No weight is loaded; what is on the hub is fetched.
    """
    if find_spec("scipy") is None:
        raise ValueError(f"{key}: matching objects needs scipy; install hyper-sd[perceptual], or set stages.<name>.perceptual_weight=0")
    files = _files(config)
    with find(files, key, "config.json").open() as file:
        facts = json.load(file)
    if facts.get("model_type") != Mask2FormerConfig.model_type:
        raise ValueError(f"{key}.path={config.path} holds a {facts.get('model_type')}; it must be a mask2former")
    _preprocess(files, key)
    check(files, key)
    known = {_name(label): int(number) for number, label in facts["id2label"].items()}
    if unknown := [name for name in categories if _name(name) not in known]:
        raise ValueError(
            f"{key}.path={config.path} was trained on {len(known)} classes ({', '.join(list(known)[:5])}, ...), and {len(unknown)} of the "
            f"{len(categories)} categories of the data are none of them (first: {unknown[0]}); choose another segmenter or other data"
        )
    return [known[_name(name)] for name in categories]


def _preprocess(files: SegmenterConfig, key: str) -> Preprocess:
    with find(files, key, "preprocessor_config.json").open() as file:
        return Preprocess.read(json.load(file), key)


def _files(config: SegmenterConfig) -> SegmenterConfig:
    return replace(config, path=str(asset_dir("segmenter"))) if config.path == EMBEDDED else config


def _name(label: str) -> str:
    return _COCO_NAMES.get(label.lower(), label.lower())


def _on_grid(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, H, W) as shares of each cell of a coarser grid, (N, h w)."""
    return functional.interpolate(masks.float()[None], tuple(size), mode="area")[0].flatten(1)
