"""Asks all workers which relays are alive, and joins their answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from proxyd.relay.ipc.messages import ListConnections, LiveConnection, LiveConnections

TIMEOUT = 2.0  # seconds that the workers have for an answer
MAX_RECORDS = 10_000


class LiveAnswer(NamedTuple):
    """The joined answers of the workers."""

    records: list[tuple[int, LiveConnection]]  # each with the number of its worker
    more: int  # how many more are alive
    silent: tuple[int, ...]  # workers that did not answer in time


@dataclass(slots=True)
class _Question:
    """One question under way."""

    limit: int
    waiting: set[int]
    done: asyncio.Event = field(default_factory=asyncio.Event)
    records: list[tuple[int, LiveConnection]] = field(default_factory=list)
    more: int = 0


class LiveQuery:
    """Asks one question at a time; further callers wait.

    Args:
        tell: sends a message to every worker, and returns their numbers.
    """

    def __init__(self, tell: Callable[[ListConnections], set[int]]) -> None:
        self._tell = [tell]
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._lock = asyncio.Lock()

    def add_workers(self, tell: Callable[[ListConnections], set[int]]) -> None:
        """Ask others too. Their numbers must differ from the workers'."""
        self._tell.append(tell)

    async def ask(
        self, *, namespace: str = "", name: str = "", limit: int = MAX_RECORDS, seconds: float = TIMEOUT
    ) -> LiveAnswer:
        """The relays that are alive.

        Args:
            namespace: of their Services; "" for all.
            name: of their Services; "" for all.
            limit: of records.
            seconds: that the workers have for an answer.
        """
        async with self._lock:
            number = next(self._numbers)
            question = self._questions[number] = _Question(limit, set())
            try:
                message = ListConnections(number, limit, namespace, name)
                question.waiting = set().union(*(tell(message) for tell in self._tell))
                if question.waiting:
                    async with asyncio.timeout(seconds):
                        await question.done.wait()
            except TimeoutError:
                pass
            finally:
                del self._questions[number]
            return LiveAnswer(question.records, question.more, tuple(sorted(question.waiting)))

    def answered(self, worker: int, answer: LiveConnections) -> None:
        """Take a part of a worker's answer. One that comes too late is dropped."""
        question = self._questions.get(answer.request)
        if question is None:
            return
        room = max(0, question.limit - len(question.records))
        question.records += [(worker, record) for record in answer.records[:room]]
        question.more += max(0, len(answer.records) - room) + answer.more
        if answer.last:
            self._done(question, worker)

    def worker_gone(self, worker: int) -> None:
        """A worker has died, and its relays with it."""
        for question in self._questions.values():
            question.records = [entry for entry in question.records if entry[0] != worker]
            self._done(question, worker)

    @staticmethod
    def _done(question: _Question, worker: int) -> None:
        question.waiting.discard(worker)
        if not question.waiting:
            question.done.set()
