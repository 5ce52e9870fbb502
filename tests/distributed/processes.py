"""Two processes that stay, to run functions together: gloo on one host, and never longer than a limit."""

import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

LIMIT = 150.0  # seconds, for what is run, on a machine that is busy, too; a hang is a failure
GRACE = 3.0  # seconds, for a process when another has failed
TIMEOUT = timedelta(seconds=20)  # a collective's


def _serve(rank: int, size: int, meeting: str, timeout: timedelta, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout
    )
    while True:
        function, arguments, options = pickle.loads(pipe.recv_bytes())
        try:
            answer = True, function(*arguments, **options)
        except BaseException:  # pytest.fail() raises one
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


class Processes:
    """``size`` processes of one group; ``with`` ends them."""

    def __init__(self, size: int = 2, timeout: timedelta = TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = str(Path(mkdtemp(prefix="adalora-fast-processes-")) / "meeting")
        ends = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in ends]
        self.members = [
            context.Process(target=_serve, args=(rank, size, meeting, timeout, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for member in self.members:
            member.start()
        for _, theirs in ends:
            theirs.close()

    def answers(
        self, function: Callable, *arguments, limit: float = LIMIT, **options
    ) -> list[tuple[bool, Any]]:
        """(whether it returned, what it returned or its traceback) of every process.

        A process that died answers ``(False, "died")``, one that is too slow ``(False, "hangs")``.
        """
        job = pickle.dumps((function, arguments, options))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(limit if all(fine for fine, _ in answers) else GRACE):
                answers.append((False, "hangs"))
                continue
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                answers.append((False, "died"))
        return answers

    def run(self, function: Callable, *arguments, **options) -> list[Any]:
        """What ``function`` returns in every process; all must come through."""
        answers = self.answers(function, *arguments, **options)
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"process {rank}: {answer}"
        return [answer for _, answer in answers]

    def end(self) -> None:
        """They do not outlive the tests."""
        for member in self.members:
            member.kill()
        for member in self.members:
            member.join()
