"""`proxyd check` reads manifests as the daemon would, binds nothing, and prints what is wrong with them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

from proxyd.api.problems import Severity
from proxyd.cli.env import INVALID, OK, Env
from proxyd.cli.explain import explain
from proxyd.cli.output import json_text
from proxyd.cli.reading import Reading, read, settings_of_check
from proxyd.cli.tables import clean, count


def check(args: argparse.Namespace, env: Env) -> int:
    """Print problems and a summary. Exit code 3 if there is an error.

    A check remembers nothing: the daemon may allocate other addresses and NodePorts than it does.

    Raises:
        CommandError: a flag or the configuration file is wrong.
    """
    reading = read(args.paths, settings_of_check(args, env))
    if args.explain:
        return explain(args, env, reading)
    counts = Counter(problem.severity for problem in reading.problems)
    shown = [p for p in reading.problems if p.severity is Severity.ERROR or not args.quiet]
    if args.output == "json":
        answer = {"problems": shown, "summary": _totals(reading, counts)}
        env.stdout.write(json_text(answer))
    else:
        for problem in shown:
            env.stdout.write(clean(str(problem)) + "\n")
        if not args.quiet:
            env.stdout.write(_summary(_totals(reading, counts)) + "\n")
    return INVALID if counts[Severity.ERROR] else OK


def _totals(reading: Reading, counts: Counter[Severity]) -> dict[str, int]:
    found = reading.manifests
    return {
        "files": found.files,
        "services": len(found.services),
        "endpoints": len(found.endpoints),
        "endpointslices": len(found.slices),
        "pods": len(found.pods),
        "errors": counts[Severity.ERROR],
        "warnings": counts[Severity.WARNING],
    }


def _summary(totals: Mapping[str, int]) -> str:
    nouns = {
        "services": "service",
        "endpoints": "endpoints object",
        "endpointslices": "endpointslice",
        "pods": "pod",
    }
    seen = [count(totals["files"], "file")]
    seen += [count(totals[key], noun) for key, noun in nouns.items() if totals[key]]
    outcome = f"{count(totals['errors'], 'error')}, {count(totals['warnings'], 'warning')}"
    return f"checked {', '.join(seen)}: {outcome}"
