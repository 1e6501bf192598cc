"""Prepare training data: `python scripts/prepare.py --help`."""

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import PrepareConfig
from hyper_sd.structured import resolved, structured


@entry("prepare")
def main(cfg: DictConfig) -> None:
    config = structured(PrepareConfig, resolved(cfg))
    from hyper_sd.prepare.build import prepare  # torch: only after the configuration is known to be right
    from hyper_sd.processes import Processes

    processes = Processes(config.cpu_threads)
    prepare(config, processes)
    processes.close()


if __name__ == "__main__":
    main()
