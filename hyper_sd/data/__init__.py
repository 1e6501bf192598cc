"""Training data by kind. A new kind is a new file and one case in `_open_kind`."""

from collections.abc import Mapping
from dataclasses import replace

from hyper_sd.config import DataConfig
from hyper_sd.data.bad import BadSamples, check_opened
from hyper_sd.data.base import Samples, Source
from hyper_sd.data.prefetch import Prefetcher
from hyper_sd.randomness import Purpose, fold

__all__ = ["BadSamples", "Prefetcher", "Samples", "Source", "build_source"]


def build_source(
    cfg: DataConfig, *, seed: int, image_size: int, fingerprint: Mapping[str, str] | None = None, instances: bool = False
) -> Source:
    """The source that `data` describes, with images of image_size by image_size pixels, and the `instances` they show.

    Raises ValueError, naming the key, if there is none, if too much of it is bad, if it has no instances and they are asked for, and
    for samples that were prepared for another teacher than the one with this fingerprint.
    """
    source = _open(cfg, seed, image_size, fingerprint, instances)
    if instances and not source.categories:
        raise ValueError(f"data={cfg.kind} has no instances, which a stage with perceptual_weight needs; choose data=coco or data=scenes")
    return source


def _open(cfg: DataConfig, seed: int, image_size: int, fingerprint: Mapping[str, str] | None, instances: bool = False) -> Source:
    source = _open_kind(cfg, seed, image_size, fingerprint, instances)
    if cfg.kind != "mix":  # whose parts were opened by themselves: one may be endless, and has no share
        check_opened(source, cfg.max_bad_fraction)
    return source


def _open_kind(cfg: DataConfig, seed: int, image_size: int, fingerprint: Mapping[str, str] | None, instances: bool) -> Source:
    match cfg.kind:
        case "scenes":
            from hyper_sd.data.scenes_data import ScenesSource

            if cfg.path is not None:
                raise ValueError(f"data.path={cfg.path} is not used by data=scenes; choose data=folder or data=webdataset")
            return ScenesSource(seed, image_size, instances)
        case "folder":
            from hyper_sd.data.folder import FolderSource

            return FolderSource(_path(cfg), seed, image_size, cfg.num_workers, cfg.caption_column, cfg.min_side)
        case "coco":
            from hyper_sd.data.coco import CocoSource

            if not cfg.annotations or not cfg.captions:
                raise ValueError("data.annotations and data.captions must be set for data=coco: json files in the format of COCO")
            return CocoSource(_path(cfg), cfg.annotations, cfg.captions, seed, image_size, cfg.num_workers)
        case "webdataset":
            from hyper_sd.data.webdataset import WebDatasetSource

            return WebDatasetSource(_path(cfg), seed, image_size, cfg.num_workers, cfg.caption_column, cfg.min_side)
        case "prompts":
            from hyper_sd.data.prompts import PromptsSource

            return PromptsSource(_path(cfg), seed, cfg.caption_column)
        case "cache":
            from hyper_sd.data.cache import CacheSource

            return CacheSource(_path(cfg), seed, cfg.batch_size, cfg.num_workers, fingerprint)
        case "hf":
            raise ValueError("data=hf is not trained on as it is: scripts/prepare.py data=hf makes a cache of it, for data=cache")
        case "mix":
            from hyper_sd.data.mix import MixSource

            if not cfg.sources:
                raise ValueError("data.sources must be set for data=mix: a list of {kind: ..., path: ..., weight: ...}")
            parts = [replace(cfg, kind=part.kind, path=part.path, caption_column=part.caption_column, sources=()) for part in cfg.sources]
            opened = [_open(part, fold(seed, Purpose.MIX, number), image_size, fingerprint) for number, part in enumerate(parts)]
            return MixSource(opened, [part.weight for part in cfg.sources], cfg.batch_size, seed)


def _path(cfg: DataConfig) -> str:
    if not cfg.path:
        raise ValueError(
            f"data.path must be set for data={cfg.kind}: a directory of images for folder and coco, a pattern of .tar files for "
            "webdataset, a file for prompts, what scripts/prepare.py wrote for cache"
        )
    return cfg.path
