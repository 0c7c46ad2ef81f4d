"""The command line: what to measure, and what is missing for it.

    python -m bench                      everything, into bench/results/ and docs/performance.md
    python -m bench --only connections,requests --rounds 3
    python -m bench --check              proxyd beside HAProxy in less than two minutes

`make bench` and `make bench-check` install what is missing and run this.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from bench import about, page, sections, sections_scale, sections_udp
from bench.harness import QUICK, TINY, Bench, Effort
from bench.metrics import SECTIONS
from bench.ours import Proxyd
from bench.peers import Envoy, HAProxy, Nginx, Proxy
from bench.processes import BenchError, adopt_orphans, busy_seconds, end_descendants, used_by_children
from bench.report import OURS, Results, text
from tests.support.waiting import NotInTime

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PARTIAL = ROOT / "build" / "bench.json"
PROXIES: dict[str, type[Proxy]] = {kind.name: kind for kind in (Proxyd, HAProxy, Nginx, Envoy)}
RUN: dict[str, Callable[[Bench, type[Proxy]], dict[str, float]]] = {
    "connections": sections.connections,
    "workers": sections.workers,
    "requests": sections.requests,
    "latency": sections.latency,
    "bulk": sections.bulk,
    "memory": sections.idle,
    "scale": sections_scale.scale,
    "churn": sections.churn,
    "udp": sections_udp.udp,
}
SLOW = 60.0  # seconds: a proxy that needs more for one turn has one turn, so that a run ends in half an hour
CHECKED = "connections,requests,bulk"
_TOOLS = {
    "nginx": "nginx",
    "wrk": "wrk",
    "iperf3": "iperf3",
    "ip": "iproute2",
    "setpriv": "util-linux",
    "taskset": "util-linux",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description="Measure proxyd beside other proxies.")
    made.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(RUN)} (default: all)")
    made.add_argument("--peers", metavar="NAMES", help="some of haproxy,nginx,envoy (default: all)")
    made.add_argument("--rounds", type=int, help="turns of each proxy (default: 5; 3 with --check)")
    made.add_argument(
        "--seconds", type=float, help="length of one measured stretch (default: 1.5; 1 with --check)"
    )
    made.add_argument(
        "--check", action="store_true", help=f"proxyd and haproxy, {CHECKED}, 3 rounds, within 2 minutes"
    )
    made.add_argument(
        "--tiny", action="store_true", help="only see that everything runs: the figures mean nothing"
    )
    made.add_argument("--no-pin", action="store_true", help="do not keep a CPU for the proxy")
    made.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    made.add_argument(
        "--into",
        type=Path,
        metavar="PATH",
        help="put the figures into those of a whole run, and make the page anew",
    )
    made.add_argument(
        "--publish", type=Path, metavar="PATH", help="measure nothing: make docs/performance.md from results"
    )
    return made


def main() -> None:
    """Run it; the exit code is 1 where something failed and 2 for a mistake in the command line."""
    args = parser().parse_args()
    if args.publish:
        _publish(args.publish)
        return
    names = _choice(args.only or (CHECKED if args.check else ""), list(RUN), "--only")
    peers = _choice(
        args.peers or ("haproxy" if args.check else ""), [name for name in PROXIES if name != OURS], "--peers"
    )
    kinds = [PROXIES[name] for name in (OURS, *peers)]
    rounds = args.rounds or (3 if args.check else 5)
    effort = TINY if args.tiny else QUICK if args.check else Effort()
    if args.seconds:
        effort = dataclasses.replace(effort, seconds=args.seconds)
    _check_prerequisites(kinds)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _ended)
    adopt_orphans()
    results = Results([kind.name for kind in kinds])
    began, busy = time.monotonic(), busy_seconds()
    try:
        with Bench(effort, pin=not args.no_pin) as bench:
            measure(bench, results, names, kinds, rounds)
        seconds = time.monotonic() - began
        # A run on a machine that does something else as well is not to be trusted: say how much that was.
        others = max(0.0, busy_seconds() - busy - used_by_children())
        results.about |= {"minutes": round(seconds / 60, 1), "others_cpus": round(others / seconds, 2)}
    except (BenchError, NotInTime) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    finally:
        end_descendants()
    print(text(results), flush=True)
    _say(
        f"{results.about['minutes']} minutes; other programs kept {results.about['others_cpus']} CPUs busy meanwhile"
    )
    if args.into:
        _renew(args.into, results)
        return
    whole = list(names) == list(RUN) and len(kinds) == len(PROXIES) and not args.tiny
    path = args.json or (RESULTS / f"{results.about['date']}.json" if whole else PARTIAL)
    results.save(path)
    _say(f"results: {path}")
    if whole and not args.json:
        page.publish(results)
        _say(f"page: {page.PAGE}")
    if results.failures:
        _fail(f"{len(results.failures)} turns failed: see above")


def measure(bench: Bench, results: Results, names: list[str], kinds: list[type[Proxy]], rounds: int) -> None:
    """Every section: rounds of all proxies in turns, each round begun by another one."""
    results.about = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": about.machine(),
        "versions": about.versions(kinds),
        "settings": {"rounds": rounds, "seconds": bench.effort.seconds, "pinned": bench.pin},
    }
    titles = {section.name: section for section in SECTIONS}
    for name in names:
        able = [kind for kind in kinds if titles[name].protocol in kind.protocols]
        slow: set[type[Proxy]] = set()
        for turn in range(rounds):
            for kind in (*able[turn % len(able) :], *able[: turn % len(able)]):
                if kind in slow:
                    continue
                _say(f"{name}, round {turn + 1} of {rounds}: {kind.name}")
                begin = time.monotonic()
                try:
                    results.add(kind.name, RUN[name](bench, kind))
                except (BenchError, NotInTime, OSError) as error:
                    results.failures.append(f"{name}, round {turn + 1}: {error}")
                    _say(results.failures[-1])
                if time.monotonic() - begin > SLOW:
                    slow.add(kind)
                    _say(f"{name}: {kind.name} took more than {SLOW:.0f} s and takes no part in more rounds")


def _publish(path: Path) -> None:
    try:
        page.publish(Results.load(path))
    except (OSError, ValueError, KeyError) as error:
        _fail(f"{path} can't be published: {error!r}")


def _renew(path: Path, results: Results) -> None:
    try:
        whole = Results.load(path)
    except (OSError, ValueError, KeyError) as error:
        _fail(f"{path} is no file of results: {error!r}")
    whole.renew(results)
    whole.save(path)
    page.publish(whole)
    _say(f"results: {path}; page: {page.PAGE}")


def _choice(given: str, known: list[str], flag: str) -> list[str]:
    """Names from a list separated by commas, in the order in which they are known; all for none."""
    wanted = [word.strip() for word in given.split(",") if word.strip()]
    for word in wanted:
        if word not in known:
            _fail(f"{flag}: unknown {word!r}; there are {', '.join(known)}", 2)
    return [name for name in known if not wanted or name in wanted]


def _check_prerequisites(kinds: list[type[Proxy]]) -> None:
    os.environ["PATH"] += os.pathsep + "/usr/sbin:/sbin"
    missing = [
        f"{tool}: apt-get install {package}" for tool, package in _TOOLS.items() if not shutil.which(tool)
    ]
    missing += [lack for kind in kinds if (lack := kind.missing()) and lack not in missing]
    if missing:
        _fail(f"missing: {'; '.join(missing)} (`make bench` installs them)")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _fail(text: str, code: int = 1) -> NoReturn:
    _say(text)
    sys.exit(code)


def _ended(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
