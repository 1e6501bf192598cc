"""Convert the LoRA of a run: `python scripts/export.py --help`."""

from pathlib import Path

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import ExportConfig
from hyper_sd.config import resolved, structured


@entry("export")
def main(cfg: DictConfig) -> None:
    config = structured(ExportConfig, resolved(cfg))
    from hyper_sd.export import export_run  # torch: only after the configuration is known to be right

    out, error = export_run(
        Path(config.run), stage=config.stage, format=config.format, dtype=config.dtype, out=Path(config.out) if config.out else None
    )
    print(f"{out}: {config.format} keys, {config.dtype}; in a stock pipeline it is off by {error:.1e} of the output's norm")


if __name__ == "__main__":
    main()
