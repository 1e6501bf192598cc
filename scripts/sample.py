"""Draw images with a few-step LoRA: `python scripts/sample.py --help`."""

import os

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import SampleConfig
from hyper_sd.launcher import require_one_process
from hyper_sd.structured import resolved, structured


@entry("sample")
def main(cfg: DictConfig) -> None:
    require_one_process(os.environ, "scripts/sample.py")
    config = structured(SampleConfig, resolved(cfg))
    from hyper_sd.sample import draw_images  # torch: only after the configuration is known to be right

    for file in draw_images(config):
        print(file)


if __name__ == "__main__":
    main()
