"""What is sent to a service manager's socket, and what is not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.control.observe.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    if request.param == "path":
        made = Manager(f"{tmp_path_factory.mktemp('n')}/notify")
    else:
        made = Manager(f"@proxyd-test-{os.getpid()}-{time.monotonic_ns()}")
    yield made
    made.close()


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.notifier = Notifier(address)

    def read(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self.notifier.close()
        self.socket.close()


def test_the_states(manager):
    notifier = manager.notifier
    notifier.ready("serving: 2 services")
    notifier.status("serving: 3 services")
    notifier.status("serving: 3 services")  # nothing new
    notifier.alive()
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    after = time.monotonic_ns() // 1000
    notifier.ready("serving: 3 services")
    notifier.stopping("draining", 40.5)
    messages = manager.read()
    reloading = messages.pop(3)
    assert messages == [
        "READY=1\nSTATUS=serving: 2 services",
        "STATUS=serving: 3 services",
        "WATCHDOG=1",
        "READY=1\nSTATUS=serving: 3 services",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=40500000\nSTATUS=draining",
    ]
    state, when, text = reloading.splitlines()
    assert (state, text) == ("RELOADING=1", "STATUS=reloading")
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= after


def test_a_status_is_one_line_that_ends(manager):
    manager.notifier.status("a\nREADY=1\tb" + "\u00e9" * 1000)
    (message,) = manager.read()
    assert message.startswith("STATUS=a READY=1 b")
    assert "\n" not in message
    assert len(message) < 400


def test_what_finds_no_room_goes_with_the_next(manager):
    notifier = manager.notifier
    sent = 0
    while sent < 5000 and not notifier._state:
        notifier.ready("serving: 1 service")  # until the queue of the manager is full
        sent += 1
    assert notifier._state, "the queue never filled"
    notifier.alive()  # must neither block nor raise
    notifier.stopping("draining", 1)
    assert not any("STOPPING" in message for message in manager.read())
    notifier.retry()
    assert manager.read() == ["STOPPING=1\nEXTEND_TIMEOUT_USEC=1000000\nSTATUS=draining"]
    notifier.retry()
    assert manager.read() == []


def test_a_manager_that_comes_later_hears_it(tmp_path_factory):
    path = f"{tmp_path_factory.mktemp('n')}/notify"
    notifier = Notifier(path)
    notifier.ready("serving: 1 service")
    later = Manager(path)
    notifier.retry()
    assert later.read() == ["READY=1\nSTATUS=serving: 1 service"]
    notifier.close()
    later.close()


@pytest.mark.parametrize(
    "address", ["", "vsock:2:1234", "relative/path", "/no/such/folder/notify", "/" + "x" * 500, "@", "/a\0b"]
)
def test_without_a_manager_nothing_happens(address):
    notifier = Notifier.here({"NOTIFY_SOCKET": address} if "\0" not in address else {})
    if "\0" in address:
        notifier = Notifier(address)
    notifier.ready("serving")
    notifier.reloading()
    notifier.status("serving")
    notifier.alive()
    notifier.retry()
    notifier.stopping("stopping", 1)
    notifier.close()
    notifier.alive()


def test_nothing_in_the_environment():
    notifier = Notifier.here({})
    assert not notifier.listening
    assert notifier.watchdog_seconds == 0


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "0"}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "9" * 40}, 0.0),
        ({"WATCHDOG_PID": str(os.getpid())}, 0.0),
    ],
)
def test_whom_the_watchdog_watches(environ, seconds):
    assert Notifier.here(environ).watchdog_seconds == seconds


def test_workers_do_not_inherit_the_socket(tmp_path: Path):
    notifier = Notifier("@proxyd-test-none")
    assert notifier._socket is not None
    assert not notifier._socket.get_inheritable()
    notifier.close()
