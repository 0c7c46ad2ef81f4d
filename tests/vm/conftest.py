"""The machine is tested where it is used: where this kernel has no SCTP."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.vm.errors import has_sctp

collect_ignore = ["test_machine.py"] if has_sctp() else []
