"""The entry point of the programs `proxyd` and `kube-proxy`. Ctrl-C never shows a traceback."""

from __future__ import annotations

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main() -> int:
    """Run the command of this process. Returns the exit code."""
    try:
        from proxyd.cli.main import main as command  # noqa: PLC0415 - Ctrl-C may come while it is imported

        return command()
    except KeyboardInterrupt:
        return INTERRUPTED
