"""Real processes that begin at once: forked from a server that has imported everything. They can be killed and stopped."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tests.runs import train

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs"])


class Life(ForkServerProcess):
    """One process of a run; what it prints is in `log`."""

    def __init__(self, log: Path, rank: int, environment: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]):
        super().__init__(target=_live, args=(str(log), environment, target, args), name=f"rank {rank}")
        self.log = log
        self.start()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def end(self, timeout: float = 120) -> int:
        """Its exit code, or minus the signal that ended it."""
        self.join(timeout)
        assert self.exitcode is not None, f"{self.name} has no end: {self.output[-3000:]}"
        return self.exitcode


@contextmanager
def living(
    log: Path, target: Callable[..., Any], *args: Any, world: int = 1, environment: dict[str, str] | None = None
) -> Iterator[list[Life]]:
    """`target(*args)` in so many processes that find each other; nothing of them is left at the end."""
    lives = []
    for rank, addresses in enumerate(_addresses(world)):
        lives.append(Life(log.with_name(f"{log.name}.{rank}"), rank, addresses | (environment or {}), target, args))
    try:
        yield lives
    finally:
        for life in lives:
            life.kill()
            life.join()


@contextmanager
def running(teacher: Path, run_dir: Path, *extra: str, world: int = 1) -> Iterator[list[Life]]:
    """A training run."""
    with living(run_dir.with_name(f"{run_dir.name}.log"), train, teacher, run_dir, *extra, world=world) as lives:
        yield lives


def wait_until(condition: Callable[[], object], life: Life, timeout: float = 120, pause: float = 0.0005) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert life.is_alive(), f"{life.name} ended early: {life.output[-3000:]}"
        assert time.monotonic() < until, f"waited too long for {life.name}: {life.output[-3000:]}"
        time.sleep(pause)


def _addresses(world: int) -> list[dict[str, str]]:
    """What a launcher tells each process; nothing for a single one."""
    if world == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _live(log: str, environment: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    torch.set_num_threads(1)
    target(*args)
