"""`proxyd check`: reads manifests as the daemon would, binds nothing, and says what it found."""

from __future__ import annotations

import argparse
import time

from proxyd.api.problems import Severity
from proxyd.api.rules import Rules
from proxyd.cli.env import INVALID, OK, Env
from proxyd.cli.run import given, settings_of
from proxyd.cli.tables import clean, count
from proxyd.sources.manifests import ManifestSource
from proxyd.sources.standalone.allocation import Allocations
from proxyd.sources.standalone.allocation import Settings as AllocationSettings
from proxyd.sources.standalone.assemble import assemble


def check(args: argparse.Namespace, env: Env) -> int:
    """`proxyd check PATH...`: problems and a summary on standard output; exit code 3 if there is an error.

    Nothing is remembered from one check to the next: what is allocated here may be another number in the daemon.
    """
    settings = settings_of({**given(args), "manifests": args.paths}, env)
    rules = Rules(
        node_port_range=settings.service_node_port_range,
        service_cidrs=settings.service_cluster_ip_range,
        allow_loopback_endpoints=settings.allow_loopback_endpoints,
    )
    found = ManifestSource(args.paths, rules).scan()
    ranges = AllocationSettings(
        cluster_cidrs=settings.service_cluster_ip_range, node_port_range=settings.service_node_port_range
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    assembled = assemble(found, Allocations(), ranges, now)
    problems = sorted(
        {*found.problems, *assembled.problems}, key=lambda p: (p.file, p.line, p.column, p.subject, p.path)
    )
    for problem in problems:
        env.stdout.write(clean(str(problem)) + "\n")
    errors = sum(problem.severity is Severity.ERROR for problem in problems)
    if not args.quiet:
        objects = [
            (len(found.services), "service"),
            (len(found.endpoints), "endpoints object"),
            (len(found.slices), "endpointslice"),
            (len(found.pods), "pod"),
        ]
        seen = [count(found.files, "file"), *(count(*item) for item in objects if item[0])]
        outcome = f"{count(errors, 'error')}, {count(len(problems) - errors, 'warning')}"
        env.stdout.write(f"checked {', '.join(seen)}: {outcome}\n")
    return INVALID if errors else OK
