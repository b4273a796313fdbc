"""Ranks that meet on this machine and run what a test hands them, over gloo.

They are started once for all tests of a file: importing torch takes longer than most cases.
"""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import multiprocessing

PATIENCE_S = 120.0
"""A rank that waits longer has lost the others."""


class Ranks:
    """So many processes of one process group.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        """Start them."""
        self.size = size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """Call a function of a module on every rank; return what each says, by rank.

        Raises:
            AssertionError: a rank raised or fell silent; its traceback is the message.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            # a rank that failed leaves the others waiting for it
            failed = any(problem for _, problem in answers.values())
            said = wait(waiting, timeout=1 if failed else PATIENCE_S)
            if not said:
                self.stop()
                break
            for pipe in said:
                answers[self._pipes.index(pipe)] = pipe.recv()  # type: ignore
        for rank, (_, problem) in answers.items():
            assert problem is None, f"rank {rank}: {problem}"
        assert len(answers) == self.size, f"of {self.size} ranks only {sorted(answers)} answered"
        return [answers[rank][0] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        """Whether all of them run."""
        return all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        """End them all."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from bidistill.world import join

    join()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
