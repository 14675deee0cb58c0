"""What the commands on a GPU machine said, on one page: the output of pytest, compute-sanitizer and the benchmark."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from .gpu_runner import Outcome, last_line

COLUMNS, TABLE_LINES, PAGE_FINDINGS, TAIL_LINES = 100, 24, 20, 30
FAILING = ("FAILED", "TIMED OUT", "not run", "running")


# -- pytest -----------------------------------------------------------------------------------------------------------


def read_tests(outcome: Outcome, junit: Path) -> None:
    """Counts and failures from pytest's junit.xml or, where it died before it wrote one, from its lines."""
    try:
        counts, outcome.findings = _from_junit(ElementTree.parse(junit).getroot())
        note = ""
    except (OSError, ElementTree.ParseError):
        counts, outcome.findings = _from_lines(outcome.output)
        note = f", no report; the last test begun: {_last_test(outcome.output)}"
    words = [word for word in ("failed", "errors", "skipped") if counts[word]]
    outcome.detail = ", ".join(f"{counts[word]} {word}" for word in ("passed", *words)) + note
    bad = counts["failed"] or counts["errors"]
    if (bad and outcome.verdict in ("ok", "stopped")) or (outcome.verdict == "ok" and not counts["passed"]):
        outcome.verdict = "FAILED"
    if outcome.status == 5:  # pytest's status where it selected no test
        outcome.detail += "; no test has these marks"


def _from_junit(root: ElementTree.Element) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    alike: dict[tuple[str, str], list[str]] = {}  # tests of one function that failed for one reason
    for case in root.iter("testcase"):
        name = "::".join(filter(None, [case.get("classname", "").removeprefix("tests."), case.get("name", "")]))
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if not name:  # what an interrupted test leaves
            continue
        if wrong is None:
            counts["passed"] += 1
        elif wrong.tag == "skipped":
            counts["skipped"] += 1
        else:
            counts["failed" if wrong.tag == "failure" else "errors"] += 1
            alike.setdefault((name.partition("[")[0], _reason(wrong)), []).append(name)
    findings = [
        f"{names[0]}: {reason}" + (f" (and {len(names) - 1} more tests of it)" if names[1:] else "")
        for (_, reason), names in alike.items()
    ]
    return counts, findings


def _reason(wrong: ElementTree.Element) -> str:
    """One line: of a file that could not be imported the exception, which names the missing module."""
    message = (wrong.get("message") or "").splitlines() or [""]
    if message[0] != "collection failure":
        return message[0]
    raised = [line[1:].strip() for line in (wrong.text or "").splitlines() if line.startswith("E ")]
    missing = re.search(r"No module named '([\w.]+)'", "\n".join(raised))
    return f"not collected: {f'no module {missing[1]}' if missing else next(reversed(raised), 'see the log')}"


_TEST_LINE = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_TEST_LINE_OF_MANY = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+::.*?) *$", re.MULTILINE)


def _from_lines(output: str) -> tuple[Counter[str], list[str]]:
    """From `pytest -v`, of one process or of several: what it wrote before it was killed."""
    words = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    found = _TEST_LINE.findall(output) + [(name, word) for word, name in _TEST_LINE_OF_MANY.findall(output)]
    return Counter(words[word] for _, word in found), [name for name, word in found if word in ("FAILED", "ERROR")]


def _last_test(output: str) -> str:
    begun = re.findall(r"^(\S+::\S+)", output, re.MULTILINE)
    return begun[-1] if begun else "none"


# -- the small cases, alone and under compute-sanitizer ---------------------------------------------------------------


def read_smoke(outcome: Outcome) -> None:
    """The wrong and crashed calls of `bench.smoke`, and its closing count."""
    lines = outcome.output.splitlines()
    outcome.findings = [" ".join(line.split()) for line in lines if line.startswith(("WRONG ", "CRASHED "))]
    total = next((line for line in lines if line.startswith("smoke: ")), "")
    outcome.detail = total.removeprefix("smoke: ") or last_line(outcome.output)


def backends_of(outcome: Outcome) -> list[str]:
    """The backends that took at least one call of `bench.smoke`; none if it did not come that far."""
    found = re.findall(r"^smoke: .*; backends: (.*)$", outcome.output, re.MULTILINE)
    return [name for name in found[-1].split() if name != "none"] if found else []


_PRECISE = re.compile(r"(?:\bat|Device Frame:)\s*(?P<kernel>\S.*?)\+0x[0-9a-f]+")
_OLDER = re.compile(r"\bat 0x[0-9a-f]+ in (?:\S+:\d+:)?(?P<kernel>.+)")
_BEGINS = re.compile(r"Invalid |Race reported|Uninitialized |Barrier error|Misaligned|Hazard |Potential |Program hit")
_OTHERS = ("at::", "c10::", "cub::", "thrust::", "cutlass", "cudnn", "cublas", "nvjet", "ampere_", "sm80_", "sm90_")


def blamed(output: str) -> Counter[tuple[str, str]]:
    """How often compute-sanitizer blamed a kernel: (kernel, what it did) -> reports.

    An error inside a device function has the kernel that called it as its last device frame.
    """
    found: Counter[tuple[str, str]] = Counter()
    what, kernel = "", ""
    for line in [*output.splitlines(), "========= SUMMARY"]:
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========").strip()
        begins = _BEGINS.search(text)
        if (begins or "SUMMARY" in text) and what:
            found[kernel or "unknown kernel", what] += 1
            what = kernel = ""
        if begins:
            what = re.split(r" between | due to | of size|\.( |$)", text[begins.start() :])[0]
        named = _PRECISE.search(text) or _OLDER.search(text)
        if what and named and (not kernel or "Device Frame" in text):
            kernel = short_kernel(named["kernel"])
    return found


def short_kernel(name: str) -> str:
    """`void ns::kernel<64, bf16>(Params)` -> `ns::kernel`."""
    name = name.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].strip() or name


def is_ours(kernel: str) -> bool:
    """Not one of PyTorch's kernels or its libraries'."""
    return not kernel.startswith(_OTHERS)


def read_sanitizer(outcome: Outcome) -> None:
    """Kernels that compute-sanitizer blamed, ours first. A run without its closing line has checked nothing."""
    reports = blamed(outcome.output)
    ordered = sorted(reports.items(), key=lambda item: (not is_ours(item[0][0]), -item[1]))
    outcome.findings = [f"{kernel}: {what}, {_times(times, 'report')}" for (kernel, what), times in ordered]
    crashes = Outcome(output=outcome.output)
    read_smoke(crashes)
    outcome.findings += crashes.findings
    summaries = re.findall(
        r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed.*)$", outcome.output, re.M
    )
    if not summaries:
        said = next((x[9:].strip() for x in outcome.output.splitlines() if re.match(r"=+ (Error|Internal)", x)), "")
        outcome.detail = f"no closing count{': ' if said else ''}{said}; small cases: {crashes.detail}"
    else:
        kernels = sorted({kernel for kernel, _ in reports})
        outcome.detail = _times(int(summaries[0]), "report") + (f" against {', '.join(kernels)}" if kernels else "")
        outcome.detail += f"; small cases: {crashes.detail}" if crashes.findings else ""
    if outcome.findings or any(int(count) for count in summaries):
        outcome.verdict = "FAILED" if outcome.verdict in ("ok", "stopped") else outcome.verdict
    elif outcome.verdict == "ok" and not summaries:
        outcome.verdict = "FAILED"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# -- the benchmark ----------------------------------------------------------------------------------------------------


def read_bench(outcome: Outcome, folder: Path, before: Mapping[Path, int]) -> None:
    """The end of its table, and how many records it wrote. before: lines that each file had when it began."""
    results = re.split(r"^(?:Without a time|Not here)$", outcome.output, maxsplit=1, flags=re.M)[0]
    outcome.tail = [line.rstrip() for line in results.splitlines() if line.strip()][-TAIL_LINES:]
    statuses: Counter[str] = Counter()
    for path, lines in record_lines(folder).items():
        for line in lines[before.get(path, 0) :]:
            try:
                statuses[json.loads(line).get("status", "unknown")] += 1
            except (ValueError, AttributeError):
                statuses["cut short"] += 1
    each = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    outcome.detail = f"{_times(statuses.total(), 'record')}{': ' if each else ''}{each}"
    if outcome.verdict == "ok" and not statuses["ok"]:
        outcome.verdict = "FAILED"
    if outcome.verdict == "FAILED":
        outcome.findings = [last_line(outcome.output)]


def record_lines(folder: Path) -> dict[Path, list[str]]:
    return {path: path.read_text(errors="replace").splitlines() for path in sorted(folder.glob("*.jsonl"))}


# -- the page ---------------------------------------------------------------------------------------------------------


def passed(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether nothing failed and all that had to run did."""
    return not any(outcome.verdict in FAILING for outcome in outcomes.values())


def _cut(text: str, width: int) -> str:
    """On one line of at most `width` characters. Of `name: reason` the long name gives way before the reason."""
    text = " ".join(text.split()).replace("|", "/")
    name, colon, reason = text.partition(": ")
    spare = max(width - len(colon) - len(reason), width // 3)
    if colon and len(text) > width and len(name) > spare:
        text = name[: spare - 3] + "..." + colon + reason
    return text if len(text) <= width else text[: width - 3] + "..."


def table(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Steps, and under each the first things it found wrong: at most 24 lines of at most 100 columns."""
    room = TABLE_LINES - 2 - len(outcomes)
    wrong = {name: outcome.findings for name, outcome in outcomes.items() if outcome.findings}
    rows: list[tuple[str, str, str, str]] = [("step", "verdict", "took", "what came of it")]
    for name, outcome in outcomes.items():
        rows.append((name, outcome.verdict, f"{outcome.seconds:.0f} s", outcome.detail))
        if name not in wrong:
            continue
        share = room // len(wrong)
        shown = wrong[name] if len(wrong[name]) <= share else wrong[name][: share - 1]
        rows += [("", "", "", f"- {finding}") for finding in shown]
        if len(shown) < len(wrong[name]):
            rows.append(("", "", "", f"- and {len(wrong[name]) - len(shown)} more: log.txt"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    widths.append(COLUMNS - sum(widths) - 13)  # four cells: five bars and a space on each side of a cell
    lines = ["| " + " | ".join(_cut(x, w).ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def page(title: str, facts: list[str], outcomes: Mapping[str, Outcome], verdict: str) -> str:
    """The summary in Markdown: where it ran, what failed in full words, the benchmark's last lines, the table."""
    lines = [f"# {title}: {verdict}", "", *(f"- {fact}" for fact in facts), ""]
    room = PAGE_FINDINGS // max(1, sum(bool(outcome.findings) for outcome in outcomes.values()))
    for name, outcome in outcomes.items():
        if outcome.findings:
            found, left = outcome.findings[:room], len(outcome.findings[room:])
            more = [f"- and {left} more: log.txt"] if left else []
            lines += [f"## {name}", "", *(f"- `{_cut(finding, 300)}`" for finding in found), *more, ""]
        if outcome.tail:
            lines += [f"## {name}: the end of its output", "", "```", *(x[:160] for x in outcome.tail), "```", ""]
    return "\n".join([*lines, "## Steps", "", *table(outcomes), ""])
