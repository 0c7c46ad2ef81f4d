"""The programs `proxyd` and `kube-proxy`: Ctrl-C ends it without a traceback, also while it is being imported."""

from __future__ import annotations

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main() -> int:
    """Run the command of this process. Returns the exit code."""
    try:
        from proxyd.cli.main import main as command  # noqa: PLC0415 - importing takes the time in which Ctrl-C comes

        return command()
    except KeyboardInterrupt:
        return INTERRUPTED
