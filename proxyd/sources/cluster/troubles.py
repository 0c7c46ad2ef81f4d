"""What is wrong with the API server or its objects, each said once, and once when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from proxyd.api.problems import Problem, Severity

# Different texts that are said until it works again, and objects that are remembered as refused.
_MAX_SAID = 20
MAX_REFUSED = 1000


class Troubles:
    """Collects the troubles of all watches of one API server.

    Several watches fail in the same way when the server is away: that is one line. Another failure is another line; when
    every watch works again, that is one line.
    """

    def __init__(
        self, server: str, on_problem: Callable[[Problem], None], on_solved: Callable[[str], None]
    ) -> None:
        self._server = server
        self._on_problem, self._on_solved = on_problem, on_solved
        self._current: dict[str, Problem] = {}  # by watch
        self._said: set[str] = set()
        self._since = 0.0
        self._refused: dict[tuple[str, str], Problem] = {}  # by kind and name

    @property
    def current(self) -> tuple[Problem, ...]:
        """Everything that is wrong now."""
        return (*dict.fromkeys(self._current.values()), *self._refused.values())

    def failed(self, watch: str, message: str) -> None:
        """A watch cannot go on for now."""
        if not self._current:
            self._since = time.monotonic()
        problem = Problem(severity=Severity.WARNING, kind="API server", object=self._server, message=message)
        self._current[watch] = problem
        if message not in self._said and len(self._said) < _MAX_SAID:
            self._said.add(message)
            self._on_problem(problem)

    def works(self, watch: str) -> None:
        """A watch goes on."""
        if self._current.pop(watch, None) is not None and not self._current:
            self._said.clear()
            self._on_solved(
                f"API server {self._server}: answers again after {time.monotonic() - self._since:.1f} s"
            )

    def refused(self, kind: str, name: str, problem: Problem) -> None:
        """An object is left out."""
        key = (kind, name)
        if self._refused.get(key) == problem:
            return
        if key in self._refused or len(self._refused) < MAX_REFUSED:
            self._refused[key] = problem
            self._on_problem(problem)

    def accepted(self, kind: str, name: str) -> None:
        """An object that was left out is right now, or gone."""
        if self._refused and self._refused.pop((kind, name), None) is not None:
            self._on_solved(f"{kind} {name}: solved")

    def only(self, kind: str, names: set[str]) -> None:
        """A full list came in: of this kind, nothing but `names` is left out."""
        for key in [key for key in self._refused if key[0] == kind and key[1] not in names]:
            self.accepted(*key)
