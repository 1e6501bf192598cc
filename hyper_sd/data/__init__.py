"""Training data by kind. A new kind is a new file and one case in `build_source`."""

from hyper_sd.config import DataConfig
from hyper_sd.data.base import Samples, Source

__all__ = ["Samples", "Source", "build_source"]


def build_source(cfg: DataConfig, *, seed: int, image_size: int) -> Source:
    """The source that `data` describes, with images of image_size by image_size pixels; ValueError naming the key if there is none."""
    match cfg.kind:
        case "scenes":
            from hyper_sd.data.scenes_data import ScenesSource

            if cfg.path is not None:
                raise ValueError(f"data.path={cfg.path} is not used by data=scenes; choose data=folder or data=webdataset")
            return ScenesSource(seed, image_size)
        case "folder":
            from hyper_sd.data.folder import FolderSource

            return FolderSource(_path(cfg), seed, image_size, cfg.num_workers)
        case "webdataset":
            from hyper_sd.data.webdataset import WebDatasetSource

            return WebDatasetSource(_path(cfg), seed, image_size, cfg.num_workers)


def _path(cfg: DataConfig) -> str:
    if not cfg.path:
        raise ValueError(
            f"data.path must be set for data={cfg.kind}: a directory of images for folder, a pattern of .tar files for webdataset"
        )
    return cfg.path
