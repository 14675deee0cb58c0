"""Functions run by several processes that know each other: `together(4, function, *arguments)`.

The processes are forks of a server that has PyTorch imported and no thread but its own: starting four takes a second or
two, and none inherits a lock that a thread of the tests held. What a function returns comes back in the order of the
processes; what one raises is raised here.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import traceback
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(count: int, function, *arguments: Any, seconds: float = 120.0) -> list[Any]:
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch", "vivit"])
    queue, port = fork.SimpleQueue(), free_port()
    children = [
        fork.Process(target=_child, args=(queue, i, count, port, seconds, function, arguments)) for i in range(count)
    ]
    for child in children:
        child.start()
    found: dict[int, Any] = {}
    errors: list[str] = []
    try:
        for _ in children:
            if not queue._reader.poll(20 if errors else seconds):
                silent = {rank: children[rank].exitcode for rank in range(count) if rank not in found}
                errors.append(f"no answer from these (with their exit codes) of {count} processes: {silent}")
                break
            rank, value, failed = queue.get()
            found[rank] = f"process {rank} of {count}:\n{value}" if failed else pickle.loads(value)
            errors += [found[rank]] if failed else []
        if errors:  # first what went wrong by itself, then what others say who were left waiting
            raise AssertionError("\n".join(sorted(errors, key=lambda text: "another of the" in text)))
    finally:
        for child in children:
            child.join(0 if len(found) < count else 30)
            child.kill()
            child.join()
    return [found[rank] for rank in range(count)]


def _child(queue: Any, rank: int, count: int, port: int, seconds: float, function, arguments: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * seconds, exit=True)  # one that hangs shows where
    torch.set_num_threads(1)
    try:
        queue.put((rank, pickle.dumps(function(*arguments)), False))  # not by shared memory, which would go with us
    except BaseException:
        queue.put((rank, traceback.format_exc(), True))
    os._exit(0)  # nothing of the tests' own runs twice
