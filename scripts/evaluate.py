"""Measure a run or a LoRA file beside its teacher: `python scripts/evaluate.py --help`."""

from pathlib import Path

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import EvaluateConfig
from hyper_sd.structured import resolved, structured


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    config = structured(EvaluateConfig, resolved(cfg))
    from hyper_sd.evaluate import evaluate_again, evaluate_lora  # torch: only after the configuration is known to be right
    from hyper_sd.processes import Processes
    from hyper_sd.report import facts_of, table, write

    processes = Processes()
    evaluation = evaluate_lora(config, processes) if config.run is None else evaluate_again(config, processes)
    if processes.is_main:
        folder = config.out if config.run is None else config.run
        results = evaluation.to_json()
        if folder is not None:
            write(Path(folder), results, evaluation.grids(), facts_of(Path(folder)))
        print(table(results))
    processes.close()


if __name__ == "__main__":
    main()
