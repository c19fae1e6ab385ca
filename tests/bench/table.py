"""The tables of the figures, for a terminal and in Markdown, and the figures as JSON."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.bench.figures import Check, Figures

BEGIN = "<!-- what `make bench` writes begins here -->"
END = "<!-- what `make bench` writes ends here -->"


class Sheet(NamedTuple):
    """One table: its title, headings, and rows of text."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def sheets(figures: Figures) -> list[Sheet]:
    """Return a table of the ratios and goals, then one for each part."""
    parts = dict.fromkeys(case.part for case in figures.samples)
    return [_checks_sheet(figures.checks), *(_part_sheet(figures, part) for part in parts)]


def show(console: Console, facts: dict[str, str], figures: Figures) -> None:
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", highlight=False)
    for sheet in sheets(figures):
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for i, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="left" if i < 2 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)


def to_json(facts: dict[str, str], figures: Figures) -> str:
    """Return the facts, the checks and every round's sample."""
    samples = [{**case._asdict(), "measures": measures} for case, measures in figures.samples.items()]
    checks = [{**check._asdict(), "reached": check.reached} for check in figures.checks]
    return json.dumps({"facts": facts, "checks": checks, "samples": samples}, indent=2)


def write(path: Path, facts: dict[str, str], figures: Figures) -> None:
    """Replace the text between the two markers in a Markdown file."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    text = "\n".join(_markdown(facts, figures))
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def _markdown(facts: dict[str, str], figures: Figures) -> Iterator[str]:
    for name, fact in facts.items():
        yield f"- {name}: {fact}"
    for sheet in sheets(figures):
        yield f"\n### {sheet.title}\n"
        yield _line(sheet.headings)
        yield _line("---" if i < 2 else "---:" for i in range(len(sheet.headings)))
        yield from (_line(row) for row in sheet.rows)
    yield ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _checks_sheet(checks: list[Check]) -> Sheet:
    rows = [
        [check.text, check.setting, f"{_number(check.value)} {check.unit}", _goal(check), _verdict(check)]
        for check in checks
    ]
    return Sheet("Ratios and goals", ["what", "where", "found", "goal", "reached"], rows)


def _goal(check: Check) -> str:
    if check.goal is None:
        return ""
    return f"{'≤' if check.at_most else '≥'} {_number(check.goal)} {check.unit}"


def _verdict(check: Check) -> str:
    return {True: "yes", False: "no", None: ""}[check.reached]


def _part_sheet(figures: Figures, part: str) -> Sheet:
    cases = {case: measures for case, measures in figures.samples.items() if case.part == part}
    names = list(dict.fromkeys(name for measures in cases.values() for name in measures))
    rows = [
        [case.subject, case.setting, *(_samples(measures.get(name)) for name in names)]
        for case, measures in cases.items()
    ]
    return Sheet(part.capitalize(), ["what", "where", *names], rows)


def _samples(samples: list[float] | None) -> str:
    """Return the median, with the minimum and maximum of several rounds."""
    if not samples:
        return ""
    least, middle, greatest = (_number(value) for value in (min(samples), median(samples), max(samples)))
    return middle if least == greatest else f"{middle} ({least} to {greatest})"


def _number(value: Any) -> str:
    """Return about three digits."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
