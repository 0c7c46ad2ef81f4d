"""Events about Services that are posted to the API server, and the warning that SCTP is off."""

from __future__ import annotations

from typing import NamedTuple

from proxyd.api.meta import ObjectName
from proxyd.api.service import Protocol
from proxyd.control.core import Core
from proxyd.control.runtime.logs import get_logger
from proxyd.state.desired import DesiredState
from proxyd.state.spec import ListenerKey, ListenerState, ServicePortName

log = get_logger("proxyd")

PORT_CONFLICT, SCTP_DISABLED = "PortConflict", "SCTPDisabled"
HEALTH_PORT_FAILED = "FailedToStartServiceHealthcheck"


class _Trouble(NamedTuple):
    """Why an address of a service port is not served."""

    service_port: ServicePortName
    reason: str


class ServiceEvents:
    """Posts an Event when a service port loses an address, once for as long as it lasts.

    Args:
        core: the daemon's parts.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sctp_said = False
        self._told: dict[_Trouble, str] = {}
        self._seen: tuple[object, object] = ((), ())

    def reconciled(self, desired: DesiredState) -> None:
        """A state was carried out, apart from the listeners that failed."""
        self._say_sctp_is_off(desired)
        if self._core.feed.cluster is not None:
            self._tell(desired)

    def health_port_failed(self, name: ObjectName, port: int, why: str) -> None:
        """A Service's healthCheckNodePort can't be opened."""
        node = self._core.settings.node_name
        message = f"node {node} failed to start healthcheck {name} on port {port}: {why}"
        self._core.feed.post_event(name, "Warning", HEALTH_PORT_FAILED, message)

    def _say_sctp_is_off(self, desired: DesiredState) -> None:
        """Warn once; the status of each Service says it too."""
        if self._sctp_said or self._core.settings.sctp:
            return
        services = {
            f"{status.service_port.namespace}/{status.service_port.name}"
            for status in desired.unopened
            if status.key.protocol is Protocol.SCTP and status.state is ListenerState.DISABLED
        }
        if services:
            self._sctp_said = True
            log.warning(
                "SCTP is off: --feature-gates=SCTPSupport=true serves these Services",
                count=len(services),
                first=min(services),
            )

    def _tell(self, desired: DesiredState) -> None:
        failures = self._core.reconciler.failures
        taken = {key: failure for key, failure in failures.items() if failure.taken}
        seen = (desired.unopened, {key: failure.message for key, failure in taken.items()})
        if self._seen[0] is seen[0] and self._seen[1] == seen[1]:
            return
        self._seen = seen
        found: dict[_Trouble, list[tuple[ListenerKey, str]]] = {}
        for status in desired.unopened:
            if status.state is ListenerState.CONFLICT:
                reason = PORT_CONFLICT
            elif (
                status.state is ListenerState.DISABLED
                and status.key.protocol is Protocol.SCTP
                and not self._core.settings.sctp
            ):
                reason = SCTP_DISABLED
            else:
                continue
            found.setdefault(_Trouble(status.service_port, reason), []).append((status.key, status.detail))
        for key, failure in taken.items():
            trouble = _Trouble(failure.spec.service_port, PORT_CONFLICT)
            found.setdefault(trouble, []).append((key, failure.message))
        told, self._told = self._told, {}
        for trouble, places in found.items():
            text = self._told[trouble] = self._message(trouble, places)
            if told.get(trouble) != text:
                owner = ObjectName(trouble.service_port.namespace, trouble.service_port.name)
                self._core.feed.post_event(owner, "Warning", trouble.reason, text)

    def _message(self, trouble: _Trouble, places: list[tuple[ListenerKey, str]]) -> str:
        key, detail = min(places)
        more = f" (and {len(places) - 1} more addresses)" if len(places) > 1 else ""
        what = "is not served" if trouble.reason == SCTP_DISABLED else "can't be opened"
        return f"node {self._core.settings.node_name}: {key} {what}{more}: {detail}"
