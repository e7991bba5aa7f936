# SPDX-License-Identifier: Apache-2.0
"""What got worse or better between two files of benchmarks: ``comparison.py BASELINE NEW``, exit status 1 if worse.

A figure got worse if its value did by more than a margin, and, where the rounds' quartiles are known on both sides, if
these do not overlap. The margin is 0.1 % for what is not random (sizes), 2 % for a ratio with quartiles on both sides,
5 % for one without, and 25 % for anything in a unit, such as milliseconds, which is passed over where processor, cores
or threads are others. What got better is found in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from recording import Row, load

__all__ = ["Comparison", "compare", "main", "verdict"]

EXACT, SPREAD, LONE, ABSOLUTE = 0.001, 0.02, 0.05, 0.25


@dataclass
class Comparison:
    """Rows by what became of them; of a pair the first is the baseline's."""

    worse: list[tuple[Row, Row]] = field(default_factory=list)
    better: list[tuple[Row, Row]] = field(default_factory=list)
    same: list[tuple[Row, Row]] = field(default_factory=list)
    passed_over: list[tuple[Row, Row]] = field(default_factory=list)
    missing: list[Row] = field(default_factory=list)
    new: list[Row] = field(default_factory=list)
    misses: list[Row] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All of it but what stayed the same, in lines for a terminal."""
        lines = [f"another machine: {line}" for line in self.machines]
        for title, pairs in (("worse", self.worse), ("better", self.better)):
            lines += [f"{title}: {_named(new)}: {_figure(old)} -> {_figure(new)}" for old, new in pairs]
        for title, rows in (("missing", self.missing), ("new", self.new)):
            lines += [f"{title}: {_named(row)}: {_figure(row)}" for row in rows]
        for row in self.misses:
            sign = "≥" if row.better == "higher" else "≤"
            lines.append(f"misses its target: {_named(row)}: {_figure(row)}, not {sign} {row.target:g}")
        counts = {name.replace("_", " "): len(rows) for name, rows in vars(self).items() if name != "machines"}
        return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])


def _named(row: Row) -> str:
    return f"{row.benchmark}, {row.what}, {row.name}"


def _figure(row: Row) -> str:
    spread = "" if row.low is None or row.exact else f" ({row.low:.4g} to {row.high:.4g})"
    return f"{row.value:.4g}{'' if row.unit == 'ratio' else f' {row.unit}'}{spread}"


def verdict(old: Row, new: Row) -> str:
    """What became of a figure: "worse", "better", "same" or "passed_over"; the module's docstring has the rule."""
    spread = old.low is not None and new.low is not None
    if old.exact and new.exact:
        margin = EXACT
    elif new.unit == "ratio":
        margin = SPREAD if spread else LONE
    elif any(old.machine.get(fact) != new.machine.get(fact) for fact in ("cpu", "vectors", "cores", "threads")):
        return "passed_over"
    else:
        margin = ABSOLUTE
    change = new.value - old.value
    if new.better is None or abs(change) <= margin * abs(old.value):
        return "same"
    if spread and not (new.low > old.high or new.high < old.low):
        return "same"
    return "better" if (change > 0) == (new.better == "higher") else "worse"


def compare(baseline: Sequence[Row], measured: Sequence[Row]) -> Comparison:
    """Put every row of either side where it belongs."""
    before, after = ({row.key: row for row in rows} for rows in (baseline, measured))
    found = Comparison(
        missing=[row for key, row in before.items() if key not in after],
        new=[row for key, row in after.items() if key not in before],
        misses=[row for row in after.values() if row.misses],
    )
    pairs = [(row, after[key]) for key, row in before.items() if key in after]
    for pair in pairs:
        getattr(found, verdict(*pair)).append(pair)
    changes = (
        f"{fact} {old.machine.get(fact, 'not recorded')}, now {now}"
        for old, new in pairs
        for fact, now in new.machine.items()
        if old.machine.get(fact) != now
    )
    found.machines = list(dict.fromkeys(changes))
    return found


def main(arguments: Sequence[str]) -> int:
    """Print the comparison of two files; returns the exit status: 1 if something got worse, 2 without the files."""
    try:
        baseline, measured = map(load, arguments)
    except FileNotFoundError as error:
        print(
            f"error: no {error.filename}: `make bench` measures, `make bench-save` saves the baseline", file=sys.stderr
        )
        return 2
    found = compare(baseline, measured)
    print(found.text())
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
