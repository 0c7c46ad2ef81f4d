"""The machine is tested where it is used: where this kernel has no SCTP."""

from __future__ import annotations

from tests.vm.errors import has_sctp

collect_ignore = ["test_machine.py"] if has_sctp() else []
