"""Pod (core/v1): the fields that decide whether it is an endpoint."""

from __future__ import annotations

import enum

import msgspec

from proxyd.api.meta import ObjectMeta
from proxyd.api.service import Protocol


class PodPhase(enum.StrEnum):
    """The phase of a Pod."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


class ContainerPort(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One declared port of a container."""

    container_port: int
    name: str = ""
    protocol: Protocol = Protocol.TCP


class Container(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One container."""

    name: str = ""
    ports: tuple[ContainerPort, ...] = ()


class PodSpec(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`spec` of a Pod."""

    containers: tuple[Container, ...] = ()
    node_name: str = ""
    hostname: str = ""


class PodCondition(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One condition; `Ready` is the one that counts here."""

    type: str
    status: str = "Unknown"


class PodIP(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One address of a Pod."""

    ip: str = ""


class PodStatus(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """`status` of a Pod."""

    phase: PodPhase | None = None
    conditions: tuple[PodCondition, ...] = ()
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: tuple[PodIP, ...] = msgspec.field(default=(), name="podIPs")


class Pod(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A Pod."""

    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()
