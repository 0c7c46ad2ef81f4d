"""`proxyd check --explain NAME` shows what a Service would get, and why."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping

import msgspec

from proxyd.api.meta import ObjectName
from proxyd.api.pod import Pod, PodPhase
from proxyd.api.problems import Problem, Severity
from proxyd.api.service import Service, ServicePort, ServiceType, TrafficPolicy
from proxyd.cli.env import INVALID, OK, CommandError, Env
from proxyd.cli.output import json_text
from proxyd.cli.reading import Reading
from proxyd.cli.tables import Status, clean, table
from proxyd.sources.standalone.endpoints import SKIP_MIRROR_LABEL
from proxyd.state.explain import Considered, considered
from proxyd.state.spec import ListenerState, ListenerStatus, Role, ServicePortName, status_of


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What a Service would get. `notes` are about the Service as a whole."""

    service: ObjectName
    type: str
    file: str
    listeners: tuple[ListenerStatus, ...]
    endpoints: tuple[Considered, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


def explain(args: argparse.Namespace, env: Env, reading: Reading) -> int:
    """Print what the Services called `args.explain` would get. Exit code 3 if one of them has an error.

    Raises:
        CommandError: there is none of that name.
    """
    names = _named(args.explain, reading)
    found = [_explanation(name, reading) for name in names]
    if args.output == "json":
        answer = {"services": [_as_json(one) for one in found]}
        env.stdout.write(json_text(answer))
    else:
        env.stdout.write("\n".join(_text(one, env) for one in found))
    wrong = any(problem.severity is Severity.ERROR for one in found for problem in one.problems)
    return INVALID if wrong else OK


def _named(wanted: str, reading: Reading) -> list[ObjectName]:
    known = sorted({*reading.manifests.services, *reading.manifests.rejected})
    namespace, slash, name = wanted.rpartition("/")
    found = [one for one in known if one.name == name and (not slash or one.namespace == namespace)]
    if not found:
        near = difflib.get_close_matches(name, [one.name for one in known], n=1)
        meant = [str(one) for one in known if near and one.name == near[0]]
        advice = f"; did you mean {meant[0]}?" if meant else ""
        raise CommandError(f"there is no Service {wanted} in these manifests{advice}")
    return found


def _explanation(name: ObjectName, reading: Reading) -> Explanation:
    manifests, snapshot = reading.manifests, reading.assembled.snapshot
    problems = tuple(p for p in reading.problems if (p.kind, p.object) == (Service.__name__, str(name)))
    service = snapshot.services.get(name)
    if service is None:
        file = next((p.file for p in problems), "")
        notes: tuple[str, ...] = ("it has errors: the daemon would not serve it",)
        return Explanation(
            service=name, type="", file=file, listeners=(), endpoints=(), notes=notes, problems=problems
        )
    slices = snapshot.slices.get(name, ())
    left_out = tuple(_pods(service, manifests.pods))
    # A Pod that lacks a port is also in a slice without that port: it is listed once.
    said = {(one.target, one.port) for one in left_out}
    endpoints = tuple(
        one
        for one in considered(service, slices, reading.node, reading.options)
        if one.used or (one.target, one.port) not in said
    )
    return Explanation(
        service=name,
        type=service.spec.type,
        file=manifests.origins.get((Service.__name__, name), ""),
        listeners=tuple(sorted(_listeners(name, reading), key=_listener_order)),
        endpoints=(*endpoints, *(() if service.spec.headless else left_out)),
        notes=tuple(_notes(service, reading)),
        problems=problems,
    )


def _listeners(name: ObjectName, reading: Reading) -> Iterator[ListenerStatus]:
    def ours(port: ServicePortName) -> bool:
        return ObjectName(port.namespace, port.name) == name

    for listener in reading.desired.host.listeners.values():
        if ours(listener.service_port):
            who = reading.held.get(listener.key)
            if who is None:
                yield status_of(listener, ListenerState.SERVING)
            else:
                yield status_of(listener, ListenerState.FAILED, f"in use by {who or 'another process'}")
    yield from (status for status in reading.desired.unopened if ours(status.service_port))


def _listener_order(status: ListenerStatus) -> tuple[int, str, str, int]:
    return list(Role).index(status.role), status.service_port.port, status.key.ip, status.key.port


def _pods(service: Service, pods: Mapping[ObjectName, Pod]) -> Iterator[Considered]:
    """Pods that match the selector but give no endpoint for some port."""
    selector = service.spec.selector
    if not selector or service.spec.type is ServiceType.EXTERNAL_NAME:
        return
    for name, pod in sorted(pods.items()):
        if (
            name.namespace != service.metadata.namespace
            or not selector.items() <= pod.metadata.labels.items()
        ):
            continue
        status = pod.status
        for port in service.spec.ports:
            reason = ""
            if status.phase in {PodPhase.SUCCEEDED, PodPhase.FAILED}:
                reason = f"its phase is {status.phase}: it has ended"
            elif not status.pod_ip and not any(entry.ip for entry in status.pod_ips):
                reason = "has no status.podIP"
            elif isinstance(port.target, str) and not _has_port(pod, port):
                reason = f"has no container port '{port.target}' ({port.protocol})"
            if reason:
                for policy in _policies(service):
                    yield Considered(
                        port=port.name,
                        protocol=port.protocol,
                        policy=policy,
                        address=status.pod_ip,
                        target=f"Pod {name}",
                        node=pod.spec.node_name,
                        reason=reason,
                    )


def _has_port(pod: Pod, port: ServicePort) -> bool:
    return any(
        (candidate.name, candidate.protocol) == (port.target, port.protocol)
        for container in pod.spec.containers
        for candidate in container.ports
    )


def _policies(service: Service) -> tuple[TrafficPolicy, ...]:
    """The traffic policies that this Service's listeners have."""
    spec = service.spec
    external = spec.type in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER) or spec.external_ips
    both = (spec.internal_traffic_policy, *([spec.external_traffic_policy] if external else []))
    return tuple(dict.fromkeys(both))


def _notes(service: Service, reading: Reading) -> Iterator[str]:
    spec, name = service.spec, service.metadata.key
    written = reading.manifests.services[name].spec
    if spec.type is ServiceType.EXTERNAL_NAME:
        yield f"it is an alias for {spec.external_name}: there is nothing to proxy"
        return
    if spec.headless:
        yield "it is headless (clusterIP: None): clients go to the endpoints by themselves"
        return
    if spec.all_cluster_ips and not written.all_cluster_ips:
        yield "its clusterIP was allocated for this check: the daemon may give it another"
    if any(port.node_port and not old.node_port for port, old in zip(spec.ports, written.ports, strict=True)):
        yield "its nodePort was allocated for this check: the daemon may give it another"
    endpoints = reading.manifests.endpoints.get(name)
    if endpoints and endpoints.metadata.labels.get(SKIP_MIRROR_LABEL) == "true":
        yield f"its Endpoints object is not used: it has the label {SKIP_MIRROR_LABEL}"
    if spec.selector:
        matching = [
            pod.namespace
            for pod, item in reading.manifests.pods.items()
            if spec.selector.items() <= item.metadata.labels.items()
        ]
        if name.namespace not in matching:
            wanted = ",".join(f"{key}={value}" for key, value in sorted(spec.selector.items()))
            elsewhere = f"; one in namespace {min(matching)} does, which does not count" if matching else ""
            yield f"no Pod in namespace {name.namespace} has the labels {wanted}{elsewhere}"


def _as_json(one: Explanation) -> dict[str, object]:
    return {
        "namespace": one.service.namespace,
        "name": one.service.name,
        "type": one.type,
        "file": one.file,
        "listeners": [
            {
                "address": status.key.ip,
                "port": status.key.port,
                "protocol": status.key.protocol,
                "mappedFrom": status.mapped_from,
                "role": status.role,
                "servicePort": status.service_port.port,
                "state": status.state,
                "detail": status.detail,
            }
            for status in one.listeners
        ],
        "endpoints": [msgspec.to_builtins(item) for item in one.endpoints],
        "notes": list(one.notes),
        "problems": list(one.problems),
    }


def _text(one: Explanation, env: Env) -> str:
    lines = [f"Service {one.service}" + (f"  {one.type}" if one.type else "") + f"  {one.file}"]
    lines += [f"  {note}" for note in one.notes]
    lines += [f"  {problem}" for problem in one.problems]
    text = "".join(clean(line) + "\n" for line in lines)
    if one.listeners:
        rows = [
            (
                f"{status.key}" + (f" (for {status.mapped_from})" if status.mapped_from else ""),
                status.role,
                status.service_port.port,
                Status(status.state, str(status)),
            )
            for status in one.listeners
        ]
        text += "\n" + table(("LISTENER", "ROLE", "PORT", "STATUS"), rows, colour=env.colour)
    groups: dict[tuple[str, str, str], list[Considered]] = {}
    for item in one.endpoints:
        groups.setdefault((item.port, item.protocol, item.policy), []).append(item)
    for (port, protocol, policy), items in groups.items():
        title = f"port {port}/{protocol}" if port else f"the {protocol} port"
        text += f"\nEndpoints of {clean(title)}, traffic policy {policy}:\n"
        rows_of = [
            (item.address, item.target, item.node, "yes" if item.used else "no", item.reason)
            for item in items
        ]
        text += table(("ENDPOINT", "OBJECT", "NODE", "USED", "WHY"), rows_of)
    return text
