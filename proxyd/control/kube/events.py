"""What a node's proxy does beside relaying: Events about Services, health check node ports, whether the node is eligible."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from proxyd.api.meta import ObjectName
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Protocol
from proxyd.control.kube.health_check_ports import HealthPorts
from proxyd.control.runtime.logs import get_logger
from proxyd.state.desired import DesiredState
from proxyd.state.spec import ListenerKey, ListenerState, ServicePortName

if TYPE_CHECKING:
    from proxyd.control.daemon import Daemon

log = get_logger("proxyd")

PORT_CONFLICT, SCTP_DISABLED = "PortConflict", "SCTPDisabled"


class _Trouble(NamedTuple):
    """Why an address of a service port is not served."""

    service_port: ServicePortName
    reason: str


class Duties:
    """Does them for one daemon.

    Args:
        daemon: whose state is looked at after each reconcile.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._sctp_said = False
        self._told: dict[_Trouble, str] = {}
        self._seen: tuple[object, object] = ((), ())
        self.health_ports = HealthPorts(self._healthy, self._port_failed)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with health check node ports at the moment."""
        return tuple(
            Problem(severity=Severity.WARNING, subject=f"Service {name}", message=why)
            for name, why in sorted(self.health_ports.failures.items())
        )

    def reconciled(self, desired: DesiredState) -> None:
        """A state was carried out as far as it can be."""
        daemon = self._daemon
        self._say_sctp_is_off(desired)
        self.health_ports.update(daemon.snapshot, daemon.node, daemon.options)
        if daemon.feed.cluster is not None:
            self._tell(desired)

    def _say_sctp_is_off(self, desired: DesiredState) -> None:
        """Once: what their status says of each Service."""
        if self._sctp_said or self._daemon.settings.sctp:
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

    def node_changed(self) -> None:
        """What is known of this node's Node has changed."""
        daemon = self._daemon
        daemon.observation.health.eligible = daemon.feed.eligible

    async def stop(self) -> None:
        """Close what is open."""
        await self.health_ports.stop()

    def _tell(self, desired: DesiredState) -> None:
        """Post an Event for each service port that has lost an address, once for as long as it lasts."""
        failures = self._daemon.reconciler.failures
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
                and not self._daemon.settings.sctp
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
                self._post(trouble.service_port, trouble.reason, text)

    def _message(self, trouble: _Trouble, places: list[tuple[ListenerKey, str]]) -> str:
        key, detail = min(places)
        more = f" (and {len(places) - 1} more addresses)" if len(places) > 1 else ""
        what = "is not served" if trouble.reason == SCTP_DISABLED else "can't be opened"
        return f"node {self._daemon.settings.node_name}: {key} {what}{more}: {detail}"

    def _post(self, service_port: ServicePortName, reason: str, message: str) -> None:
        cluster = self._daemon.feed.cluster
        if cluster is not None:
            name = ObjectName(service_port.namespace, service_port.name)
            cluster.about_service(name, "Warning", reason, message)

    def _port_failed(self, name: ObjectName, port: int, why: str) -> None:
        cluster = self._daemon.feed.cluster
        if cluster is not None:
            node = self._daemon.settings.node_name
            cluster.about_service(
                name,
                "Warning",
                "FailedToStartServiceHealthcheck",
                f"node {node} failed to start healthcheck {name} on port {port}: {why}",
            )

    def _healthy(self) -> bool:
        return self._daemon.observation.health.look().healthy
