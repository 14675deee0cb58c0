"""`python -m bench [COMMAND]`: without a command, the operations beside their peers."""

from __future__ import annotations

import importlib
import sys

COMMANDS = (
    "models",
    "memory",
    "accelerate",
    "report",
    "tune",
    "static",
    "gate",
    "kept",
    "cuda_gate",
    "cuda_model",
    "gpu",
)


def main() -> int:
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    return importlib.import_module(f"bench.{command}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
