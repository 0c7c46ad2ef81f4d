"""Problems of the API server and its objects: each is reported once, and once more when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from proxyd.api.problems import Problem, Severity

# So many different texts are reported until all works again, and so many refused objects are remembered.
_MAX_SAID = 20
MAX_REFUSED = 1000


class Troubles:
    """Collects the problems of all watches of one API server.

    When the server is away several watches fail in the same way: that is reported in one line. Each different
    failure is a line, and there is one when every watch works again.
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
        """The problems of now."""
        return (*dict.fromkeys(self._current.values()), *self._refused.values())

    def failed(self, watch: str, message: str) -> None:
        """Take note that a watch fails."""
        if not self._current:
            self._since = time.monotonic()
        problem = Problem(severity=Severity.WARNING, kind="API server", object=self._server, message=message)
        self._current[watch] = problem
        if message not in self._said and len(self._said) < _MAX_SAID:
            self._said.add(message)
            self._on_problem(problem)

    def works(self, watch: str) -> None:
        """Take note that a watch works."""
        if self._current.pop(watch, None) is not None and not self._current:
            self._said.clear()
            self._on_solved(
                f"API server {self._server}: answers again after {time.monotonic() - self._since:.1f} s"
            )

    def refused(self, kind: str, name: str, problem: Problem) -> None:
        """Take note that an object cannot be used."""
        key = (kind, name)
        if self._refused.get(key) == problem:
            return
        if key in self._refused or len(self._refused) < MAX_REFUSED:
            self._refused[key] = problem
            self._on_problem(problem)

    def accepted(self, kind: str, name: str) -> None:
        """Take note that an object can be used, or is gone."""
        if self._refused and self._refused.pop((kind, name), None) is not None:
            self._on_solved(f"{kind} {name}: solved")

    def only(self, kind: str, names: set[str]) -> None:
        """Take note that of a full list of this kind no objects but `names` cannot be used."""
        for key in [key for key in self._refused if key[0] == kind and key[1] not in names]:
            self.accepted(*key)
