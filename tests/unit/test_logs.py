"""Logs in both formats, failures that repeat, and tasks that fail."""

from __future__ import annotations

import asyncio
import io
import json

import pytest

from proxyd.control.runtime import logs
from proxyd.control.runtime.logs import Summariser, get_logger, log_some
from proxyd.control.runtime.tasks import spawn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _quiet_afterwards():
    yield
    logs.configure(stream=io.StringIO())


def lines(out: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json_lines_where_nobody_reads_along():
    out = io.StringIO()
    logs.configure(stream=out)
    get_logger("test").info("listener opened", address="10.0.0.1", port=80)
    (line,) = lines(out)
    assert line["event"] == "listener opened"
    assert line["address"] == "10.0.0.1"
    assert line["port"] == 80
    assert line["level"] == "info"
    assert line["room"] == "test"
    assert line["time"].endswith("Z")


def test_a_value_that_json_cannot_say_is_said_as_text():
    out = io.StringIO()
    logs.configure("json", stream=out)
    get_logger("test").info("x", value=ValueError("no"), text='a\n"b"')
    (line,) = lines(out)
    assert line["value"] == "no"
    assert line["text"] == 'a\n"b"'


def test_a_line_for_people_on_a_terminal():
    out = Terminal()
    logs.configure(stream=out, environ={"NO_COLOR": "1"})
    get_logger("test").warning("listener failed", port=80)
    (line,) = out.getvalue().splitlines()
    assert "listener failed" in line
    assert "port=80" in line
    assert "\033" not in line


def test_colours_on_a_terminal_only():
    out = Terminal()
    logs.configure(stream=out, environ={})
    get_logger("test").info("x")
    assert "\033" in out.getvalue()
    out = io.StringIO()
    logs.configure("console", stream=out, environ={})
    get_logger("test").info("x")
    assert "\033" not in out.getvalue()


def test_debug_is_said_with_v_only():
    out = io.StringIO()
    logs.configure("json", stream=out)
    get_logger("test").debug("no")
    logs.configure("json", 1, stream=out)
    get_logger("test").debug("yes")
    assert [line["event"] for line in lines(out)] == ["yes"]


def test_a_logger_made_before_configuration_follows_it():
    log = get_logger("early")
    out = io.StringIO()
    logs.configure("json", stream=out)
    log.info("x")
    assert len(lines(out)) == 1


def test_a_log_that_cannot_be_written_stops_nothing():
    out = io.StringIO()
    logs.configure("json", stream=out)
    out.close()
    get_logger("test").error("x")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def out() -> io.StringIO:
    out = io.StringIO()
    logs.configure("json", stream=out)
    return out


def test_a_repeated_failure_is_said_once_and_then_summed_up(out):
    clock = Clock()
    said = Summariser(get_logger("test"), interval=30, clock=clock)
    for _ in range(100):
        said.warning("dial", "endpoint refused", endpoint="10.0.0.1:80")
    assert len(lines(out)) == 1
    clock.now += 31
    said.warning("dial", "endpoint refused", endpoint="10.0.0.2:80")
    first, second = lines(out)
    assert "count" not in first
    assert (second["count"], second["seconds"], second["endpoint"]) == (100, 31, "10.0.0.2:80")


def test_what_was_counted_is_said_when_it_stops(out):
    clock = Clock()
    said = Summariser(get_logger("test"), interval=30, clock=clock)
    said.error("a", "x")
    said.error("a", "x", count=4)
    said.flush()
    assert len(lines(out)) == 1
    clock.now += 31
    said.flush()
    assert [line.get("count") for line in lines(out)] == [None, 4]
    assert len(said) == 0
    said.error("a", "x")
    assert len(lines(out)) == 3


def test_a_mended_failure_is_said_anew(out):
    said = Summariser(get_logger("test"), clock=Clock())
    said.warning("a", "x")
    said.clear("a")
    said.warning("a", "x")
    assert len(lines(out)) == 2


def test_kinds_of_failures_are_bounded(out):
    clock = Clock()
    said = Summariser(get_logger("test"), interval=30, max_keys=10, clock=clock)
    for number in range(1000):
        said.warning(f"key{number}", "failed")
    assert len(said) <= 11
    assert len(lines(out)) == 11
    clock.now += 31
    said.flush()
    assert lines(out)[-1]["count"] == 989
    assert len(said) == 0


async def test_a_failed_task_is_logged_in_one_line_and_reported(out):
    failed: list[BaseException] = []

    async def fail() -> None:
        raise RuntimeError("broken\nin two lines")

    task = spawn(fail(), name="source:test", on_failure=failed.append)
    await asyncio.wait([task])
    await asyncio.sleep(0)
    (line,) = lines(out)
    assert line["task"] == "source:test"
    assert line["error"].startswith("RuntimeError: broken in two lines (")
    assert isinstance(failed[0], RuntimeError)


async def test_a_cancelled_task_is_no_failure(out):
    task = spawn(asyncio.sleep(60), name="x", on_failure=lambda _: pytest.fail("called"))
    assert task.get_name() == "x"
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert not lines(out)


def test_of_many_alike_and_one_other_the_other_is_said_too():
    out = io.StringIO()
    logs.configure(stream=out)
    failed = [{"listener": str(number), "error": "in use"} for number in range(40)]
    failed[35]["error"] = "not allowed"
    log_some(get_logger("test").warning, "listener failed", failed)
    said = lines(out)
    assert [line["listener"] for line in said[:3]] == ["0", "35", "1"]
    assert len(said) == 21
    assert said[-1]["more"] == 20
