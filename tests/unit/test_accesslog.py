"""The access log: whole records, rotation, and never waiting for a slow, full or missing file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.control.runtime import logs
from proxyd.control.runtime.accesslog import AccessLog, as_json, readable
from proxyd.relay.ipc.messages import Connection
from tests.support.waiting import wait_for

# No call may take longer, whatever the file does; the machine may be busy.
AT_ONCE = 10.0


def record(number: int = 0, **fields: object) -> Connection:
    given = {
        "client": "192.0.2.9:4000",
        "frontend": "10.96.0.10:80",
        "service": "prod/web:http",
        "endpoint": "10.244.0.1:8080",
        "attempts": 1,
        "bytes_in": number,
        "bytes_out": 7,
        "seconds": 0.25,
        "reason": "closed",
        "finished": 1700000000.5,
    }
    return Connection(**{**given, **fields})


@contextlib.contextmanager
def writing(path: Path | str, **options: int) -> Iterator[AccessLog]:
    log = AccessLog(str(path), **options)
    try:
        yield log
    finally:
        began = time.monotonic()
        log.close()
        assert time.monotonic() - began < AT_ONCE


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["bytesIn"] for line in path.read_text().splitlines()]


@pytest.fixture
def said(tmp_path) -> Iterator[Callable[[], list[dict[str, object]]]]:
    """What was logged."""
    with (tmp_path / "log").open("w") as stream:
        logs.configure("json", stream=stream)
        yield lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        logs.configure()


def test_a_record_as_json(tmp_path):
    path = tmp_path / "access.log"
    with writing(path) as log:
        log.write([record(5)])
        wait_for(lambda: log.written == 1)
        # Before it is closed.
        assert json.loads(path.read_text()) == {
            "time": "2023-11-14T22:13:20.500Z",
            "client": "192.0.2.9:4000",
            "frontend": "10.96.0.10:80",
            "service": "prod/web:http",
            "endpoint": "10.244.0.1:8080",
            "attempts": 1,
            "bytesIn": 5,
            "bytesOut": 7,
            "seconds": 0.25,
            "reason": "closed",
        }
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_record_for_people():
    assert readable(record(5)) == (
        "prod/web:http  192.0.2.9:4000 -> 10.96.0.10:80 -> 10.244.0.1:8080  5 B in  7 B out  0.250 s  closed\n"
    )
    failed = readable(record(endpoint="", attempts=3, reason="no endpoint"))
    assert "-> no endpoint " in failed
    assert failed.endswith("no endpoint  3 attempts\n")


def test_standard_output(tmp_path, capfd):
    with writing("-") as log:
        log.write([record(1), record(2)])
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [
        as_json(record(1)),
        as_json(record(2)),
    ]


def test_without_a_path_nothing_is_kept():
    with writing("") as log:
        log.write([record()] * 10, 5)
        assert (log.written, log.dropped, log.queued) == (0, 0, 0)


def test_everything_queued_is_written_at_the_end(tmp_path):
    path = tmp_path / "access.log"
    with writing(path) as log:
        for number in range(5000):
            log.write([record(number)])
    assert numbers(path) == list(range(5000))
    assert (log.written, log.dropped) == (5000, 0)


def test_it_appends_and_is_opened_anew_after_rotation(tmp_path):
    path = tmp_path / "access.log"
    path.write_text('{"bytesIn": 0}\n')
    with writing(path) as log:
        log.write([record(1)])
        wait_for(lambda: log.written == 1)
        path.rename(tmp_path / "access.log.1")
        log.write([record(2)])
        wait_for(lambda: log.written == 2)
        log.reopen()
        wait_for(path.exists)
        log.write([record(3)])
        wait_for(lambda: log.written == 3)
    assert numbers(tmp_path / "access.log.1") == [0, 1, 2]
    assert numbers(path) == [3]


def test_a_full_disk(said):
    with writing("/dev/full") as log:
        for _ in range(20):
            log.write([record()] * 10)
        wait_for(lambda: log.dropped == 200)
        assert log.written == 0
    errors = [line for line in said() if line["level"] == "error"]
    assert [(line["event"], line["error"]) for line in errors] == [
        ("the access log can't be written: records are dropped", "No space left on device")
    ]


def test_a_missing_folder_is_said_before_there_is_a_record(tmp_path, said):
    path = tmp_path / "no" / "access.log"
    with writing(path) as log:
        wait_for(said)
        assert said()[0]["error"] == "No such file or directory"
        log.write([record(1)])
        wait_for(lambda: log.dropped == 1)
        path.parent.mkdir()
        log.reopen()
        log.write([record(2)])
        wait_for(lambda: log.written == 1)
        wait_for(lambda: len(said()) == 2)
    assert numbers(path) == [2]
    assert said()[1]["event"] == "the access log is written again"
    assert said()[1]["dropped"] == 1


def test_a_fifo_that_nobody_has_open(tmp_path, said):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with writing(path) as log:
        began = time.monotonic()
        log.write([record()] * 10)
        assert time.monotonic() - began < AT_ONCE
        wait_for(lambda: log.dropped == 10)
    assert [line["error"] for line in said()] == ["nobody reads this pipe"]


def test_a_fifo_that_is_not_read(tmp_path, said):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        with writing(path, max_queued=1000) as log:
            slowest = 0.0
            log.write([record(number) for number in range(300)])
            wait_for(lambda: log.queued == 0)  # the thread has them, more than the pipe has room for
            for number in range(300, 5000):
                began = time.monotonic()
                log.write([record(number)])
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < AT_ONCE
            # A pipe's room, a batch in the thread's hands and the queue: all else is lost, and counted.
            assert log.queued == 1000
            lost = log.dropped
            assert 2500 < lost < 4000
            wait_for(said)
            assert len(said()) == 1
            assert said()[0]["event"] == "the access log is slower than connections end: records are dropped"

            data = b""

            def read() -> bool:
                nonlocal data
                with contextlib.suppress(BlockingIOError):
                    data += os.read(reader, 65536)
                return log.written == 5000 - lost and data.count(b"\n") == 5000 - lost

            wait_for(read)
            # Each record is whole, and they are in order.
            got = [json.loads(line)["bytesIn"] for line in data.splitlines()]
            assert got == sorted(set(got))
            assert (log.dropped, log.queued) == (lost, 0)
            wait_for(lambda: len(said()) == 2)
            assert said()[1] | {"time": ""} == {
                "time": "",
                "level": "info",
                "event": "the access log is written again",
                "room": "access",
                "path": str(path),
                "dropped": lost,
            }
    finally:
        os.close(reader)


def test_what_the_workers_lost_is_counted(tmp_path):
    with writing(tmp_path / "access.log") as log:
        log.write([record()], dropped=7)
        assert log.dropped == 7


def test_a_record_that_was_cut_is_ended_when_there_is_room(tmp_path, said):
    path = tmp_path / "access.log"
    limit = 10 << 20
    with path.open("wb") as file:
        file.truncate(limit - 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(path) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            log.write([record(number) for number in range(100)])
            wait_for(lambda: log.written + log.dropped == 100)
            assert path.stat().st_size == limit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        written = log.written
        assert 0 < written < 100
        log.write([record(100)])
        wait_for(lambda: log.written == written + 1)
    lines = path.read_bytes().lstrip(b"\0").splitlines()
    assert [json.loads(line)["bytesIn"] for line in lines] == [*range(written), 100]
    assert [line["level"] for line in said()] == ["error", "info"]


def test_a_file_in_the_place_of_a_full_pipe(tmp_path):
    fifo = path = tmp_path / "access.log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        with writing(fifo) as log:
            log.write([record(number) for number in range(100)])
            wait_for(lambda: log.queued == 0)
            fifo.rename(tmp_path / "fifo")
            log.reopen()
            wait_for(path.exists)
            log.write([record(100)])
            wait_for(lambda: log.written + log.dropped == 101)
        assert 0 < log.dropped < 100
    finally:
        os.close(reader)
    assert numbers(path) == [100]
