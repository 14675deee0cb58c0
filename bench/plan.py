"""What to measure, in which order, and what fits into the time there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .cases import Case

# A peer of the slow kind takes this many times the machine's floor: only used to guess how long a group will take,
# and corrected by what the groups before it took.
_SLOWNESS = 12.0
# A contestant whose name begins so compiles once per case, dtype and grad mode.
_COMPILED = ("compiled", "flex_attention")
_COMPILE_SECONDS = {"cpu": 8.0, "cuda": 12.0}
_CALLS_AROUND = 7  # check, memory, warm-up


@dataclass(frozen=True)
class Group:
    """Contestants of one group are compared with each other, and with nothing else."""

    case: Case
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.case.op} {self.case.name} {self.dtype} {self.direction}"


@dataclass
class Effort:
    """How thoroughly: rounds in which every contestant has a turn of some seconds."""

    rounds: int = 5
    seconds: float = 0.2


@dataclass
class Planner:
    """Guesses seconds and learns from the groups that were measured."""

    device: str
    ceilings: dict[str, dict[str, float]]  # per dtype, as records have them
    effort: Effort
    factor: float = 1.0
    spent: float = field(default=0.0, init=False)
    guessed: float = field(default=0.0, init=False)

    def raw(self, group: Group, names: list[str]) -> float:
        """Seconds for a group, before correction."""
        case, direction = group.case, group.direction
        itemsize = 4 if group.dtype == "float32" else 2
        rates = self.ceilings[group.dtype]
        floor = max(
            case.bytes(direction, itemsize) / 1e9 / rates["copy_gbps"],
            case.flops(direction) / 1e12 / rates.get("matmul_tflops", 1.0),
            case.exps(direction) / 1e9 / rates.get("exp_gops", float("inf")),
        )
        call = _SLOWNESS * floor
        compiles = sum(name.startswith(_COMPILED) for name in names) * _COMPILE_SECONDS[self.device]
        each = self.effort.rounds * max(self.effort.seconds, call) + _CALLS_AROUND * call
        reference = 4 * case.flops("forward+backward") / 1e12 / rates.get("matmul_tflops", 1.0)
        return len(names) * each + compiles + reference + 0.5

    def seconds(self, group: Group, names: list[str]) -> float:
        return self.raw(group, names) * self.factor

    def learn(self, group: Group, names: list[str], took: float) -> None:
        """The factor follows all groups so far, bounded so that one odd group cannot derail the plan."""
        self.spent += took
        self.guessed += self.raw(group, names)
        self.factor = min(8.0, max(0.05, self.spent / self.guessed))


def order(cases: Sequence[Case], dtypes: Sequence[str], directions: Sequence[str]) -> list[Group]:
    """The most important first: by the rank of the case plus the place of its dtype, so that rank 1 in the first dtype
    comes before rank 1 in the second; within a case all directions, which share inputs and reference."""
    ranked = sorted(
        ((case, dtype) for case in cases for dtype in dtypes),
        key=lambda entry: entry[0].rank + dtypes.index(entry[1]),
    )  # stable: cases.py lists the important ones first
    return [Group(case, dtype, direction) for case, dtype in ranked for direction in directions]


def fitting(groups: list[Group], seconds: list[float], budget: float | None) -> list[bool]:
    """Which groups fit, in order; one that does not is left out, and later, smaller ones may still."""
    if budget is None:
        return [True] * len(groups)
    kept, total = [], 0.0
    for cost in seconds:
        kept.append(total + cost <= budget)
        total += cost if kept[-1] else 0.0
    return kept
