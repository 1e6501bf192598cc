"""Convert the LoRA of a run: `python scripts/export.py --help`."""

import os
from pathlib import Path

from omegaconf import DictConfig

from hyper_sd.cli import entry
from hyper_sd.commands import ExportConfig
from hyper_sd.launcher import require_one_process
from hyper_sd.structured import resolved, structured


@entry("export")
def main(cfg: DictConfig) -> None:
    require_one_process(os.environ, "scripts/export.py")
    config = structured(ExportConfig, resolved(cfg))
    run, out = Path(config.run), Path(config.out) if config.out else None
    if config.format == "unet":
        from hyper_sd.fused import export_fused  # torch: only after the configuration is known to be right

        written, error = export_fused(run, stage=config.stage, dtype=config.dtype, out=out)
        print(f"{written}: a UNet, {config.dtype}; loaded again it is off by {error:.1e} of the output's norm")
    elif config.weights is not None:
        from hyper_sd.export import export_merged

        if config.stage is None:
            raise ValueError("weights: name the stage whose parts are to be weighed, e.g. stage=refl")
        written, error, lost = export_merged(
            run, stage=config.stage, weights=config.weights, merge=config.merge, format=config.format, dtype=config.dtype, out=out
        )
        print(f"{written}: {config.merge} of {config.weights}, which loses {lost:.1e}; in a stock pipeline it is off by {error:.1e}")
    else:
        from hyper_sd.export import export_run

        written, error = export_run(run, stage=config.stage, format=config.format, dtype=config.dtype, out=out)
        print(f"{written}: {config.format} keys, {config.dtype}; in a stock pipeline it is off by {error:.1e} of the output's norm")


if __name__ == "__main__":
    main()
