"""The bench's tables, page and plot, from figures that are known."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import page
from bench.metrics import BY_KEY
from bench.report import Results, text

ABOUT = {
    "date": "2030-01-02",
    "minutes": 25.0,
    "others_cpus": 0.1,
    "machine": {"cpu": "A & B", "cpus": 2, "memory_gb": 8.0, "kernel": "6.1", "system": "Debian"},
    "versions": {"proxyd": "1.0", "haproxy": "2.6"},
    "settings": {"rounds": 5, "seconds": 2.0, "pinned": True},
}


@pytest.fixture
def results() -> Results:
    made = Results(["proxyd", "haproxy", "nginx"], dict(ABOUT))
    for ours in (90.0, 100.0, 500.0, 95.0, 105.0):
        made.add("proxyd", {"connections.cpu": ours, "connections.rate": 9000.0, "latency.p50": 30.0})
    for theirs in (120.0, 125.0, 130.0):
        made.add("haproxy", {"connections.cpu": theirs, "connections.rate": 10000.0, "latency.p50": -2.0})
        made.add("nginx", {"connections.cpu": theirs + 100, "connections.rate": 12000.0})
    return made


def line(table: str, title: str) -> list[str]:
    """The cells of a line of the printed table, without its title."""
    return next(each for each in table.splitlines() if title in each).split(title)[1].split()


def test_medians_and_the_ratio_to_the_best_peer(results: Results) -> None:
    table = text(results)
    assert line(table, "CPU per connection, µs") == ["100", "125", "225", "0.80", "±5%"]
    # The best rate is the highest one.
    assert line(table, "connections, /s") == ["9,000", "10,000", "12,000", "0.75", "±0%"]


def test_a_ratio_to_nothing_is_not_shown(results: Results) -> None:
    assert line(text(results), "added, p50, µs") == ["30.0", "-2.00", "-", "-", "±0%"]


def test_results_are_the_same_after_saving(results: Results, tmp_path: Path) -> None:
    results.failures.append("udp, round 1: it failed")
    path = tmp_path / "deep" / "results.json"
    results.save(path)
    again = Results.load(path)
    assert text(again) == text(results)
    assert page.tables(again) == page.tables(results)
    assert "it failed" in page.tables(again)


def test_a_section_that_was_measured_anew_takes_the_place_of_the_old_one(results: Results) -> None:
    results.add("nginx", {"udp.live.cpu": 5.0})
    kept = {key: dict(found) for key, found in results.figures.items()}
    results.failures = ["udp, round 1: no answer", "bulk, round 2: no answer"]
    again = Results(results.proxies, {"versions": {"proxyd commit": "abc"}})
    again.add("proxyd", {"udp.live.cpu": 7.0})
    results.renew(again)
    assert results.figures == {key: found for key, found in kept.items() if not key.startswith("udp.")} | {
        "udp.live.cpu": {"proxyd": [7.0]}
    }
    assert results.failures == ["bulk, round 2: no answer"]
    assert results.about["again"] == {"udp": "abc"}


def test_the_page_keeps_what_people_wrote(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "performance.md"
    monkeypatch.setattr(page, "PAGE", written)
    monkeypatch.setattr(page, "PLOT", tmp_path / "performance.svg")
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.publish(results)
    page.publish(results)
    told = written.read_text()
    assert told.startswith(f"before\n{page.BEGIN}\n")
    assert told.endswith(f"{page.END}\nafter\n")
    assert "old" not in told
    assert told.count("| CPU per connection, µs | 100 | 125 | 225 | 0.80 | ±5% |") == 1
    assert "Run of 2030-01-02" in told


def test_a_page_without_marks_is_left_alone(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "performance.md"
    monkeypatch.setattr(page, "PAGE", written)
    written.write_text("mine\n")
    with pytest.raises(ValueError, match="must have the lines"):
        page.publish(results)
    assert written.read_text() == "mine\n"


def test_bars_are_as_long_as_the_ratios(results: Results) -> None:
    root = ET.fromstring(page.plot(results))
    space = "{http://www.w3.org/2000/svg}"
    widths = {}
    for bar in root.iter(f"{space}rect"):
        if bar.get("x") == str(page._LEFT) and bar.get("height") != "10":
            widths[bar.get("fill")] = float(bar.get("width", ""))
    ours, haproxy, nginx = (widths[page._COLOURS[name]] for name in results.proxies)
    assert ours / haproxy == pytest.approx(0.8, abs=0.01)
    assert nginx / haproxy == pytest.approx(1.8, abs=0.01)
    assert "connection 0.80" in root.findtext(f"{space}title", "")


def test_the_page_of_this_repository_has_its_marks() -> None:
    told = page.PAGE.read_text()
    assert (told.count(page.BEGIN), told.count(page.END)) == (1, 1)


def test_every_figure_has_a_name_of_its_own() -> None:
    titles = [(metric.section, metric.title) for metric in BY_KEY.values()]
    assert len(titles) == len(set(titles))
    assert all(re.fullmatch(r"[a-z]+(\.[a-z0-9]+)+", key) for key in BY_KEY)
