"""Draw images with a few-step LoRA: `python scripts/sample.py --help`."""

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import SampleConfig
from hyper_sd.structured import resolved, structured


@entry("sample")
def main(cfg: DictConfig) -> None:
    config = structured(SampleConfig, resolved(cfg))
    from hyper_sd.sample import draw_images  # torch: only after the configuration is known to be right

    for file in draw_images(config):
        print(file)


if __name__ == "__main__":
    main()
