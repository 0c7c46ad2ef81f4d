"""Where and with what a run was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.peers import Proxy

ROOT = Path(__file__).parent.parent


def _first(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def _tool(name: str) -> str:
    if not shutil.which(name):
        return "none"
    done = subprocess.run([name, "-v"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
    return found.group() if found else "unknown"


def _commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """The machine, its kernel and its system."""
    return {
        "cpu": _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(_first("/proc/meminfo", r"^MemTotal:\s*(\d+)")) * 1024 / 1e9, 1),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
    }


def versions(proxies: Iterable[type[Proxy]]) -> dict[str, str]:
    """Of the proxies, of what proxyd runs on, and of the loads."""
    return {
        **{kind.name: kind.version() for kind in proxies},
        "proxyd commit": _commit(),
        "Python": f"{platform.python_version()} ({os.path.realpath(sys.executable)})",
        "uvloop": importlib.metadata.version("uvloop"),
        "wrk": _tool("wrk"),
        "iperf3": _tool("iperf3"),
    }
