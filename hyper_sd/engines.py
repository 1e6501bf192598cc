"""`start_engine`: the engine that the launcher asks for."""

import os

from hyper_sd.config import EngineConfig
from hyper_sd.deepspeed_engine import DeepSpeedEngine
from hyper_sd.engine import Engine
from hyper_sd.launcher import Launch
from hyper_sd.plain_engine import PlainEngine


def start_engine(config: EngineConfig) -> Engine:
    """Join the processes of this run. Raises ValueError if they, or the engine, are not what the launcher was told."""
    return DeepSpeedEngine(config) if Launch.read(os.environ).zero_stage else PlainEngine(config)
