"""What the launcher told this process: how many processes there are, and which engine they train with. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIGS = "configs/accelerate/*.yaml with `accelerate launch --config_file`"
PLAIN, SHARDING = "ddp.yaml, which shards nothing", "deepspeed_zero3.yaml, which shards the frozen network"


@dataclass(frozen=True)
class Launch:
    """`zero_stage` is DeepSpeed's; 0 is the plain engine."""

    num_processes: int = 1
    zero_stage: int = 0

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Launch":
        """What `accelerate launch` and torchrun leave in the environment. Raises ValueError for what no engine here can do."""
        _refuse(environ)
        stage = _zero_stage(environ) if _is_set(environ, "ACCELERATE_USE_DEEPSPEED") else 0
        return cls(int(environ.get("WORLD_SIZE", "1")), stage)

    @property
    def engine(self) -> str:
        return f"zero{self.zero_stage}" if self.zero_stage else "plain"


def require_one_process(environ: Mapping[str, str], command: str) -> None:
    """Raise ValueError if a launcher started several processes of a command that would all write the same files."""
    if (launch := Launch.read(environ)).num_processes > 1:
        raise ValueError(f"{command} runs in one process: the launcher started {launch.num_processes}; start it with python")


def _refuse(environ: Mapping[str, str]) -> None:
    if _is_set(environ, "ACCELERATE_USE_FSDP"):
        raise ValueError(f"the launcher asks for FSDP, which is no engine here; use configs/accelerate/{SHARDING}")
    for other in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_set(environ, f"ACCELERATE_USE_{other}"):
            raise ValueError(f"the launcher asks for {other}, which is no engine here; use one of {CONFIGS}")
    if (precision := environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise ValueError(
            f"the launcher's mixed_precision must be no: got {precision}; teacher.dtype chooses the dtype of the "
            "frozen network, and adapters are fp32"
        )
    if _is_set(environ, "ACCELERATE_USE_DEEPSPEED") and _is_set(environ, "ACCELERATE_USE_CPU"):
        raise ValueError("the launcher asks for DeepSpeed with use_cpu, and accelerate would then leave DeepSpeed out; set use_cpu: false")


def _zero_stage(environ: Mapping[str, str]) -> int:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = json.loads(Path(file).read_text()) if file != "none" else {}
    if given := config.keys() & {"optimizer", "scheduler"}:
        raise ValueError(f"{file}: {', '.join(sorted(given))} must not be given there; the keys of optimizer and lr_scheduler say it")
    stage = int(config.get("zero_optimization", {}).get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage == 0:
        raise ValueError(f"the launcher's zero_stage must be 1, 2 or 3: got 0; use configs/accelerate/{PLAIN}")
    return stage


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes")
