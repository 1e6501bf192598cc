"""Finding the process that died or hangs, so that the others end with its name instead of waiting for it."""

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from hyper_sd.processes import Processes

T = TypeVar("T")

_PATIENCE_S = (3.0, 60.0)  # how long an answer may take: at least, at most
READING, TRAINING = "reading samples", "training"  # what a process is doing at a step, in this order
_ALARM = "alarm"
_number = itertools.count()  # of watchdogs in this process, the same in all others


class LostProcess(RuntimeError):
    """Another process died or hangs; the message names it."""


class Watchdog:
    """A thread beside each of several processes. The threads talk through the store in which the processes found each other.

    Whoever makes no progress for `timeout_s`, or loses the connection to a peer, raises an alarm that all others answer: who does
    not is lost, and if all do, who is furthest behind hangs. Then `report(message)` is called, lost processes of this host are
    killed, and this process ends with exit code 1. Does nothing for a single process.
    """

    def __init__(self, processes: Processes, timeout_s: float, report: Callable[[str], None]):
        self._rank, self._world = processes.rank, processes.world_size
        self._timeout_s, self._report = timeout_s, report
        self._patience_s = min(max(timeout_s / 4, _PATIENCE_S[0]), _PATIENCE_S[1])
        self._progress, self._beaten = (-1, ""), time.monotonic()
        self._leaving, self._lost_a_peer = threading.Event(), False
        self._verdict = ""
        self._members: list[tuple[str, int]] = []

    def beat(self, step: int, doing: str) -> None:
        """The main thread has come to this step of the run, and goes on to this."""
        self._progress, self._beaten = (step, doing), time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._world > 1:
            self._members = [("", 0)] * self._world
            dist.all_gather_object(self._members, (socket.gethostname(), os.getpid()))
            self._thread = threading.Thread(target=self._watch, args=(next(_number),), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lost_a_peer = self._world > 1 and error is not None and is_of_a_connection(error)
        self._leaving.set()
        if self._world > 1:
            self._thread.join()
        if self._lost_a_peer:
            raise LostProcess(self._verdict) from error

    def _watch(self, number: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=self._patience_s)
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher that restarts its processes keeps the store
        with ThreadPoolExecutor(1) as pool:

            def ask(question: Callable[..., T], *args: Any) -> T:
                return pool.submit(question, *args).result(self._patience_s)

            try:
                store = dist.PrefixStore(f"watchdog/{life}/{number}", dist.TCPStore(address, port, timeout=limit, wait_for_workers=False))
                while not self._leaving.wait(min(1.0, self._timeout_s / 8)):
                    stuck = self._progress[0] >= 0 and time.monotonic() - self._beaten > self._timeout_s
                    if stuck or ask(store.check, [_ALARM]):
                        break
                if self._leaving.is_set() and not self._lost_a_peer:
                    return
                self._verdict = self._name_the_lost(self._answers(store, ask))
            except (RuntimeError, TimeoutError):
                self._verdict = self._lost([0]) + ", or the launcher: the store that the processes meet in does not answer"
            if not self._leaving.is_set():
                self._end()

    def _answers(self, store: dist.Store, ask: Callable[..., Any]) -> dict[int, tuple[int, str]]:
        """Raise the alarm, and collect where the processes are that answer it."""
        ask(store.set, _ALARM, "1")
        ask(store.set, f"answer/{self._rank}", json.dumps(self._progress))
        answers: dict[int, tuple[int, str]] = {}
        until = time.monotonic() + self._patience_s
        while len(answers) < self._world and time.monotonic() < until:
            for rank in range(self._world):
                if rank not in answers and ask(store.check, [f"answer/{rank}"]):
                    step, doing = json.loads(ask(store.get, f"answer/{rank}"))
                    answers[rank] = (step, doing)
            time.sleep(0.1)
        return answers

    def _name_the_lost(self, answers: dict[int, tuple[int, str]]) -> str:
        if missing := [rank for rank in range(self._world) if rank not in answers]:
            return self._lost(missing)
        last = min(step for step, _ in answers.values())
        reading = {rank for rank, (step, doing) in answers.items() if step == last and doing == READING}
        behind = sorted(reading or {rank for rank, (step, _) in answers.items() if step == last})
        if len(behind) == self._world:
            return f"all processes hang at step {last}, {answers[0][1]}"
        return f"{self._names(behind)} hangs at step {last}, {answers[behind[0]][1]}"

    def _lost(self, ranks: Sequence[int]) -> str:
        """Say that these do not answer. One that hangs may take no other signal, and would be left when all others are gone."""
        for host, pid in (self._members[rank] for rank in ranks if rank != self._rank):
            if host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return f"{self._names(ranks)} died or hangs"

    def _names(self, ranks: Sequence[int]) -> str:
        return " and ".join(f"rank {rank} (process {self._members[rank][1]} on {self._members[rank][0]})" for rank in ranks)

    def _end(self) -> None:
        """The main thread is in a call that does not come back."""
        faulthandler.dump_traceback()
        print(f"error: {self._verdict}; no progress for engine.timeout_seconds={self._timeout_s:g}", file=sys.stderr, flush=True)
        self._report(self._verdict)
        os._exit(1)


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
