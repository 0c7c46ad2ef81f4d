"""docs/performance.md and its plot, from the results of a run: what stands between the page's two marks is written anew."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from bench.metrics import METRICS, Metric
from bench.report import OURS, Results, heads, number, rows

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
PLOT = DOCS / "performance.svg"
BEGIN, END = "<!-- written by the bench: begin -->", "<!-- written by the bench: end -->"

# Colours that are told apart in light and in dark, and without colour by their order.
_COLOURS = {OURS: "#e4572e", "haproxy": "#4c8bbf", "nginx": "#5a9a68", "envoy": "#9a7bb5"}
_BAR, _GAP, _LEFT, _RIGHT, _WIDTH, _TOP = 9, 12, 190, 120, 790, 78
_MOST = 3.0  # times the best peer; a longer bar is cut and says how long it would be
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 10px; fill: #57606a }
.line { stroke: #8c959f; stroke-width: 1 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9da7b3 } .line { stroke: #6e7681 } }
"""


def publish(results: Results) -> None:
    """Write the page's tables and the plot.

    Raises:
        ValueError: the page has lost its marks.
    """
    page = PAGE.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE} must have the lines {BEGIN!r} and {END!r} once")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}")
    PLOT.write_text(plot(results))


def tables(results: Results) -> str:
    """The middle of the page."""
    about = results.about
    machine, settings = about["machine"], about["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    pinned = "the proxy on a CPU of its own" if settings["pinned"] else "nothing pinned"
    parts = [
        (
            f"Run of {about['date']}, {about['minutes']:.0f} minutes: {machine['cpu']}, {machine['cpus']} CPUs,"
            f" {machine['memory_gb']} GB, Linux {machine['kernel']}, {machine['system']}; {settings['rounds']} rounds,"
            f" stretches of {settings['seconds']:g} s, {pinned}. {versions}. Other programs kept"
            f" {about['others_cpus']} CPUs busy meanwhile."
        ),
        *(
            f"Measured in a later run of its own: {name}, at proxyd commit {commit}."
            for name, commit in about.get("again", {}).items()
        ),
        f"![CPU, latency and memory as multiples of the best peer's]({PLOT.name})",
    ]
    for section, metrics in results.sections():
        parts.append(f"### {section.title}")
        parts.append("\n".join(_table([heads(results), *rows(results, metrics)])))
    if results.failures:
        parts.append("### Failed\n\n" + "\n".join(f"- {failure}" for failure in results.failures))
    return "\n\n".join(parts)


def _table(table: list[list[str]]) -> list[str]:
    head, *body = table
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def plot(results: Results) -> str:
    """Bars: each proxy's median as a multiple of the best peer's; shorter is better."""
    metrics = [
        metric
        for metric in METRICS
        if metric.plot and results.best_peer(metric) > 0 and not math.isnan(results.median(metric.key, OURS))
    ]
    step = _BAR * len(results.proxies) + _GAP
    height = _TOP + step * len(metrics) + 10
    scale = (_WIDTH - _LEFT - _RIGHT) / _MOST
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">',
        f"<title>{escape(_words(results, metrics))}</title>",
        f"<style>{_STYLE}</style>",
        f'<text x="{_LEFT}" y="18">multiples of the best peer; shorter is better</text>',
    ]
    at = float(_LEFT)
    for proxy in results.proxies:
        parts.append(f'<rect x="{at:.0f}" y="29" width="10" height="10" fill="{_COLOURS[proxy]}"/>')
        parts.append(f'<text x="{at + 15:.0f}" y="38">{proxy}</text>')
        at += 90
    for index, metric in enumerate(metrics):
        parts += _group(results, metric, _TOP + step * index, scale)
    for times in range(1, int(_MOST) + 1):
        x = _LEFT + scale * times
        dashes = "" if times == 1 else ' stroke-dasharray="1 5"'
        parts.append(
            f'<line class="line" x1="{x:.0f}" y1="{_TOP - 8}" x2="{x:.0f}" y2="{height - 8}"{dashes}/>'
        )
        parts.append(f'<text class="small" x="{x:.0f}" y="{_TOP - 12}" text-anchor="middle">{times}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _group(results: Results, metric: Metric, top: float, scale: float) -> list[str]:
    best = results.best_peer(metric)
    middle = top + _BAR * len(results.proxies) / 2 + 4
    parts = [f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(metric.plot)}</text>']
    for index, proxy in enumerate(results.proxies):
        value = results.median(metric.key, proxy)
        if math.isnan(value):
            continue
        times = max(0.0, value / best)
        width, y = min(times, _MOST) * scale, top + _BAR * index
        parts.append(
            f'<rect x="{_LEFT}" y="{y:.0f}" width="{width:.1f}" height="{_BAR - 1}" fill="{_COLOURS[proxy]}"/>'
        )
        if proxy == OURS or times > _MOST:
            label = f"{number(value)} {metric.unit}" + (f" ({times:.0f} times)" if times > _MOST else "")
            parts.append(
                f'<text class="small" x="{_LEFT + width + 5:.0f}" y="{y + 8:.0f}">{escape(label)}</text>'
            )
    return parts


def _words(results: Results, metrics: list[Metric]) -> str:
    """The plot for whoever does not see it."""
    told = (
        f"{metric.plot} {results.ratio(metric):.2f}"
        for metric in metrics
        if not math.isnan(results.ratio(metric))
    )
    return f"proxyd's figures as multiples of the best peer's: {'; '.join(told)}"
