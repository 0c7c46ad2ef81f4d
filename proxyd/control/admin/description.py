"""Everything about one Service, for `proxyd describe service`."""

from __future__ import annotations

from proxyd.api.meta import ObjectName
from proxyd.api.service import ServiceType, SessionAffinity
from proxyd.control.admin import views
from proxyd.control.admin.history import History
from proxyd.control.admin.picture import Picture
from proxyd.control.admin.schema import ServiceDescription

_DEFAULT_AFFINITY_SECONDS = 10800  # kubernetes api/core/v1, DefaultClientIPServiceAffinitySeconds


def describe(picture: Picture, history: History, namespace: str, name: str) -> ServiceDescription | None:
    """A Service with its listeners, endpoints, failures and events; None if there is no such Service."""
    service = picture.snapshot.services.get(ObjectName(namespace, name))
    if service is None:
        return None
    (view,) = views.services(picture, namespace=namespace, name=name)
    spec = service.spec
    affinity = 0
    if spec.session_affinity is SessionAffinity.CLIENT_IP:
        config = spec.session_affinity_config
        given = config.client_ip.timeout_seconds if config and config.client_ip else None
        affinity = given or _DEFAULT_AFFINITY_SECONDS
    alias = spec.type is ServiceType.EXTERNAL_NAME
    outside = bool(view.external_ips) or spec.type in {ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER}
    return ServiceDescription(
        service=view,
        created=service.metadata.creation_timestamp,
        selector=spec.selector,
        affinity_seconds=affinity,
        internal_traffic_policy="" if alias else str(spec.internal_traffic_policy),
        external_traffic_policy=str(spec.external_traffic_policy) if outside and not alias else "",
        source_ranges=spec.load_balancer_source_ranges,
        listeners=tuple(views.listeners(picture, namespace=namespace, name=name)),
        endpoints=tuple(views.endpoints(picture, namespace=namespace, name=name)),
        failures=history.failures(namespace, name),
        events=history.events(namespace, name),
    )
