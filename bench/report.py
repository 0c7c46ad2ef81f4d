"""Results of a run: medians, spread, ratios to the best peer; as text and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.metrics import METRICS, SECTIONS, Metric, Section

OURS = "proxyd"


@dataclass
class Results:
    """Figures of all rounds: metric -> proxy -> one figure a round."""

    proxies: Sequence[str]
    about: dict[str, Any] = field(default_factory=dict)  # machine, versions, settings
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, proxy: str, found: dict[str, float]) -> None:
        """Take the figures of one turn."""
        for key, value in found.items():
            self.figures.setdefault(key, {}).setdefault(proxy, []).append(value)

    def renew(self, other: Results) -> None:
        """Take the sections that another run on the same machine has in place of the same ones here."""
        renewed = {section.name for section, _ in other.sections()}
        for metric in METRICS:
            if metric.section in renewed:
                self.figures.pop(metric.key, None)
        self.figures |= other.figures
        self.failures = [one for one in self.failures if one.partition(",")[0] not in renewed]
        self.failures += other.failures
        commit = other.about["versions"]["proxyd commit"]
        self.about["again"] = self.about.get("again", {}) | dict.fromkeys(sorted(renewed), commit)

    def median(self, key: str, proxy: str) -> float:
        """NaN where the proxy has no such figure."""
        values = self.figures.get(key, {}).get(proxy)
        return statistics.median(values) if values else math.nan

    def spread(self, key: str, proxy: str) -> float:
        """Half the distance between the quartiles, as a share of the median; NaN for fewer than three rounds."""
        values = self.figures.get(key, {}).get(proxy, [])
        middle = self.median(key, proxy)
        if len(values) < 3 or not middle:
            return math.nan
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / abs(middle)

    def best_peer(self, metric: Metric) -> float:
        """Median of the best peer; NaN where there is none."""
        medians = [self.median(metric.key, proxy) for proxy in self.proxies if proxy != OURS]
        medians = [each for each in medians if not math.isnan(each)]
        if not medians or not metric.better:
            return math.nan
        return min(medians) if metric.better == "lower" else max(medians)

    def ratio(self, metric: Metric) -> float:
        """proxyd's median to the best peer's; NaN where that says nothing (at or below zero)."""
        best, ours = self.best_peer(metric), self.median(metric.key, OURS)
        return ours / best if best > 0 and ours > 0 else math.nan

    def sections(self) -> Iterator[tuple[Section, list[Metric]]]:
        """What was measured, in order."""
        for section in SECTIONS:
            metrics = [each for each in METRICS if each.section == section.name and each.key in self.figures]
            if metrics:
                yield section, metrics

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            key: {
                proxy: {"median": self.median(key, proxy), "rounds": [round(each, 6) for each in values]}
                for proxy, values in self.figures[key].items()
            }
            for key in self.figures
        }
        whole = {
            "about": self.about,
            "failures": self.failures,
            "proxies": list(self.proxies),
            "figures": summary,
        }
        path.write_text(json.dumps(whole, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote."""
        whole = json.loads(path.read_text())
        figures = {
            key: {proxy: each["rounds"] for proxy, each in found.items()}
            for key, found in whole["figures"].items()
        }
        return cls(whole["proxies"], whole["about"], figures, whole["failures"])


def number(value: float) -> str:
    """Three digits that count, no exponents; "-" for none."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def noise(results: Results, metric: Metric) -> str:
    """The largest spread among the proxies."""
    spreads = [results.spread(metric.key, proxy) for proxy in results.proxies]
    spreads = [each for each in spreads if not math.isnan(each)]
    return f"±{max(spreads):.0%}" if spreads else "-"


def rows(results: Results, metrics: Sequence[Metric]) -> list[list[str]]:
    """Title, a median for each proxy, ratio, noise."""
    return [
        [
            f"{metric.title}, {metric.unit}" if metric.unit else metric.title,
            *(number(results.median(metric.key, proxy)) for proxy in results.proxies),
            "-" if math.isnan(ratio := results.ratio(metric)) else f"{ratio:.2f}",
            noise(results, metric),
        ]
        for metric in metrics
    ]


def heads(results: Results) -> list[str]:
    """Heads of the columns of `rows`."""
    return ["", *results.proxies, "ratio", "noise"]


def text(results: Results) -> str:
    """All tables for a terminal; under each title which way is better."""
    parts = []
    for section, metrics in results.sections():
        table = [heads(results), *rows(results, metrics)]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        parts.append(f"\n{section.title}")
        for row in table:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            parts.append(f"  {'  '.join(cells)}")
    parts.append(
        "\nratio: proxyd's median to the best peer's; rates are better higher, everything else lower"
    )
    return "\n".join(parts)
