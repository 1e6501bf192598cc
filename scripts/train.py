"""Distil a teacher: `python scripts/train.py --help`."""

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.config import run_config


@entry("train")
def main(cfg: DictConfig) -> None:
    config = run_config(cfg)
    from hyper_sd.plan import run_plan  # torch: only after the configuration is known to be right

    run_plan(config)


if __name__ == "__main__":
    main()
