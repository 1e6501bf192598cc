"""Distil a teacher: `python scripts/train.py --help`."""

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.config import run_config


@entry("train")
def main(cfg: DictConfig) -> None:
    config = run_config(cfg)
    # these import torch: only after the configuration is known to be right
    if config.plans:
        from hyper_sd.ablation import run_ablation

        run_ablation(config)
    else:
        from hyper_sd.plan import run_plan

        run_plan(config)


if __name__ == "__main__":
    main()
