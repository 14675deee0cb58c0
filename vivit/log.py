"""What a run writes down as it goes: one JSON object per line, and the same numbers for TensorBoard where asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import unwritten, whole


class Log:
    """One JSON object per line, flushed; on resume, lines after the checkpoint's step are cut off.

    board: also as scalars for TensorBoard, into the folder `tensorboard` beside `path`.
    """

    def __init__(self, path: Path, upto: int, board: bool = False):
        kept = []
        if upto and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break  # half a line: killed while writing it
                if record["step"] <= upto:
                    kept.append(line)
        with whole(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.path = path
        self.file = open(path, "a")  # noqa: SIM115  # lives as long as the run
        self.board = writer(path.parent / "tensorboard", upto) if board else None

    def write(self, **record: Any) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise unwritten(self.path, error) from error
        if self.board is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self.board.add_scalar(key, value, record["step"])
            self.board.flush()


class Silent:
    """The log of a process that has none."""

    def write(self, **record: Any) -> None: ...


def writer(folder: Path, upto: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tensorboard = true needs TensorBoard, which is not installed here ({error})"
            '\n  -> pip install "vivit-kernels[tensorboard]", or leave it out: log.jsonl has the same numbers',
            name="tensorboard",
        ) from error
    return SummaryWriter(str(folder), purge_step=upto + 1)
