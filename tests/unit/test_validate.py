"""Every rule of validation, by its one-line message; and what must not be refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from proxyd.api.decode import Decoded, Rules, decode

RULES = Rules(service_cidrs=("10.96.0.0/12", "fd00:96::/112"))


def service(spec: str, meta: str = "name: web", status: str = "{}") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": yaml.safe_load(f"{{{meta}}}"),
        "spec": yaml.safe_load(f"{{{spec}}}"),
        "status": yaml.safe_load(status),
    }


def endpoints(*subsets: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": "db"},
        "subsets": [yaml.safe_load(f"{{{subset}}}") for subset in subsets],
    }


def addresses(*ips: str) -> dict[str, Any]:
    return endpoints("addresses: [" + ", ".join(f'{{ip: "{ip}"}}' for ip in ips) + "], ports: [{port: 1}]")


def endpoint_slice(body: str, version: str = "v1") -> dict[str, Any]:
    meta = {
        "apiVersion": f"discovery.k8s.io/{version}",
        "kind": "EndpointSlice",
        "metadata": {"name": "db-1"},
    }
    return meta | yaml.safe_load(f"{{{body}}}")


def pod(status: str = "{}", spec: str = "{}") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p.1"},
        "status": yaml.safe_load(status),
        "spec": yaml.safe_load(spec),
    }


def lines(decoded: Decoded) -> list[str]:
    return [str(problem) for problem in decoded.problems]


P80 = "ports: [{port: 80}]"
LABEL_1035 = 'use 1-63 of a-z, 0-9 and "-", with a letter first and no "-" at the end'
LABEL_1123 = 'use 1-63 of a-z, 0-9 and "-", with no "-" first or last'
SUBDOMAIN = 'use at most 253 of a-z, 0-9, "-" and ".", with a letter or digit at both ends of each part'
PORT_NAME = 'use 1-15 of a-z, 0-9 and single "-", with a letter among them and no "-" first or last'

# Of a Service default/web: the spec, and path and message of each error.
BAD_SERVICES: list[tuple[str, list[str]]] = [
    ("", ["spec.ports: required: give at least one port (or clusterIP: None)"]),
    ("ports: []", ["spec.ports: required: give at least one port (or clusterIP: None)"]),
    ("ports: [{port: 0}]", ["spec.ports[0].port: 0 is not a port number (1-65535)"]),
    ("ports: [{port: 65536}]", ["spec.ports[0].port: 65536 is not a port number (1-65535)"]),
    ("ports: [{port: -1}]", ["spec.ports[0].port: -1 is not a port number (1-65535)"]),
    (
        "ports: [{port: 80, targetPort: 70000}]",
        ["spec.ports[0].targetPort: 70000 is not a port number (1-65535)"],
    ),
    (
        'ports: [{port: 80, targetPort: "8080"}]',
        ['spec.ports[0].targetPort: "8080" is not a port name: write a port number without quotes'],
    ),
    (
        "ports: [{port: 80, targetPort: web--1}]",
        [f'spec.ports[0].targetPort: "web--1" is not a port name: {PORT_NAME}'],
    ),
    (
        "ports: [{port: 80, targetPort: a-very-long-name}]",
        [f'spec.ports[0].targetPort: "a-very-long-name" is not a port name: {PORT_NAME}'],
    ),
    ("ports: [{port: 80, name: Web}]", [f'spec.ports[0].name: "Web" is not a port name: {LABEL_1123}']),
    (
        "ports: [{port: 80, name: a}, {port: 81}]",
        ["spec.ports[1].name: required: each of several ports has a name"],
    ),
    (
        "ports: [{port: 80, name: a}, {port: 81, name: a}]",
        ['spec.ports[1].name: "a" is already the name of ports[0]'],
    ),
    (
        "ports: [{port: 80, name: a}, {port: 80, name: b}]",
        ["spec.ports[1].port: 80/TCP is already the port of ports[0]"],
    ),
    (
        "type: NodePort, ports: [{port: 80, name: a, nodePort: 30080}, {port: 81, name: b, nodePort: 30080}]",
        ["spec.ports[1].nodePort: 30080/TCP is already the nodePort of ports[0]"],
    ),
    (
        "type: NodePort, ports: [{port: 80, nodePort: 22}]",
        ["spec.ports[0].nodePort: 22 is not in the range 30000-32767 (--service-node-port-range)"],
    ),
    (
        "ports: [{port: 80, nodePort: 30080}]",
        ["spec.ports[0].nodePort: may not be used when `type` is 'ClusterIP': use NodePort or LoadBalancer"],
    ),
    (
        f"type: NodePort, clusterIP: None, {P80}",
        ["spec.clusterIP: may not be set to 'None' for NodePort services"],
    ),
    (
        f"type: LoadBalancer, clusterIPs: [None], {P80}",
        ["spec.clusterIPs[0]: may not be set to 'None' for LoadBalancer services"],
    ),
    (f"clusterIP: 10.0.0, {P80}", ['spec.clusterIP: "10.0.0" is not an IP address']),
    (
        f"clusterIP: 10.0.0.010, {P80}",
        ['spec.clusterIP: "10.0.0.010" is not an IP address: leading zeros are not allowed'],
    ),
    (f"clusterIP: 0.0.0.0, {P80}", ['spec.clusterIP: "0.0.0.0" may not be unspecified (0.0.0.0)']),
    (f"clusterIP: 239.0.0.1, {P80}", ['spec.clusterIP: "239.0.0.1" may not be a multicast address']),
    (
        f"clusterIP: 10.96.0.1, clusterIPs: [10.96.0.2], {P80}",
        ['spec.clusterIPs[0]: "10.96.0.2" is not the clusterIP "10.96.0.1"'],
    ),
    (
        f"clusterIPs: [10.96.0.1, 10.96.0.2], {P80}",
        ["spec.clusterIPs[1]: is of the same IP family as the first: at most one of each"],
    ),
    (
        f'clusterIPs: [10.96.0.1, "fd00:96::1", 10.96.0.2], {P80}',
        ["spec.clusterIPs: at most two, one of each IP family"],
    ),
    (f"clusterIPs: [10.96.0.1, None], {P80}", ["spec.clusterIPs: 'None' stands alone"]),
    (
        f'ipFamilyPolicy: SingleStack, clusterIPs: [10.96.0.1, "fd00:96::1"], {P80}',
        ["spec.clusterIPs: may only hold one value when `ipFamilyPolicy` is 'SingleStack'"],
    ),
    (
        f"ipFamilyPolicy: Dual, {P80}",
        ['spec.ipFamilyPolicy: expected SingleStack, PreferDualStack or RequireDualStack, got "Dual"'],
    ),
    (f"ipFamilies: [IPv5], {P80}", ['spec.ipFamilies[0]: expected IPv4 or IPv6, got "IPv5"']),
    (f"ipFamilies: [IPv4, IPv4], {P80}", ["spec.ipFamilies[1]: IPv4 is given twice"]),
    (
        f"ipFamilies: [IPv6], clusterIP: 10.96.0.1, {P80}",
        ["spec.ipFamilies[0]: IPv6 does not fit the clusterIP 10.96.0.1"],
    ),
    (
        f"externalIPs: [80.11.12.10, 127.0.0.1], {P80}",
        ['spec.externalIPs[1]: "127.0.0.1" may not be in the loopback range (127.0.0.0/8)'],
    ),
    (f"externalIPs: [0.0.0.0], {P80}", ['spec.externalIPs[0]: "0.0.0.0" may not be unspecified (0.0.0.0)']),
    (
        f"externalIPs: [169.254.169.254], {P80}",
        ['spec.externalIPs[0]: "169.254.169.254" may not be in the link-local range (169.254.0.0/16)'],
    ),
    (
        f"externalIPs: [224.0.0.251], {P80}",
        ['spec.externalIPs[0]: "224.0.0.251" may not be in the link-local multicast range (224.0.0.0/24)'],
    ),
    (f"externalIPs: [example.com], {P80}", ['spec.externalIPs[0]: "example.com" is not an IP address']),
    (f'externalIPs: ["fe80::1%eth0"], {P80}', ['spec.externalIPs[0]: "fe80::1%eth0" is not an IP address']),
    (
        "type: ExternalName",
        ["spec.externalName: required: an ExternalName service is an alias for a host name"],
    ),
    (
        "type: ExternalName, externalName: my_db.example.com",
        [f'spec.externalName: "my_db.example.com" is not a host name: {SUBDOMAIN}'],
    ),
    (
        "type: ExternalName, externalName: a.example, clusterIP: 10.96.0.1",
        ["spec.clusterIP: may not be set for ExternalName services"],
    ),
    (
        f"sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 0}}}}, {P80}",
        ["spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is not in the range 1-86400 (seconds)"],
    ),
    (
        f"sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 86401}}}}, {P80}",
        ["spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not in the range 1-86400 (seconds)"],
    ),
    (
        f"loadBalancerSourceRanges: [10.0.0.0/8], {P80}",
        ["spec.loadBalancerSourceRanges: may only be used when `type` is 'LoadBalancer'"],
    ),
    (
        f"type: LoadBalancer, loadBalancerSourceRanges: [10.0.0.0/8, 10.0.0.0/33], {P80}",
        ['spec.loadBalancerSourceRanges[1]: "10.0.0.0/33" is not a CIDR such as 10.0.0.0/8'],
    ),
    (
        f"type: LoadBalancer, loadBalancerSourceRanges: [10.0.0.1], {P80}",
        ['spec.loadBalancerSourceRanges[0]: "10.0.0.1" is not a CIDR such as 10.0.0.0/8'],
    ),
    (
        f"healthCheckNodePort: 70000, {P80}",
        ["spec.healthCheckNodePort: 70000 is not a port number (1-65535)"],
    ),
    # Types.
    ('ports: [{port: "eighty"}]', ['spec.ports[0].port: expected an integer, got "eighty"']),
    ("ports: [{port: 80.5}]", ["spec.ports[0].port: expected an integer, got 80.5"]),
    ("ports: [{port: true}]", ["spec.ports[0].port: expected an integer, got true"]),
    ("ports: [{name: a}]", ["spec.ports[0].port: required"]),
    ("ports: [80]", ["spec.ports[0]: expected a map, got 80"]),
    ("ports: [null]", ["spec.ports[0]: expected a map, got null"]),
    ("ports: {port: 80}", ["spec.ports: expected a list, got a map"]),
    (
        "ports: [{port: 80, targetPort: [1]}]",
        ["spec.ports[0].targetPort: expected an integer or a name, got a list"],
    ),
    ("ports: [{port: 80, protocol: tcp}]", ['spec.ports[0].protocol: expected TCP, UDP or SCTP, got "tcp"']),
    (
        f"type: Nodeport, {P80}",
        ['spec.type: expected ClusterIP, NodePort, LoadBalancer or ExternalName, got "Nodeport"'],
    ),
    (f"sessionAffinity: ip, {P80}", ['spec.sessionAffinity: expected None or ClientIP, got "ip"']),
    (
        f"externalTrafficPolicy: local, {P80}",
        ['spec.externalTrafficPolicy: expected Cluster or Local, got "local"'],
    ),
    (
        f'publishNotReadyAddresses: "yes", {P80}',
        ['spec.publishNotReadyAddresses: expected true or false, got "yes"'],
    ),
    (
        f"selector: {{app/version: 1.1}}, {P80}",
        ["spec.selector[app/version]: expected a string, got 1.1: put it in quotes"],
    ),
    (f"selector: [app], {P80}", ["spec.selector: expected a map, got a list"]),
    # Several at once.
    (
        "type: NodePort, externalIPs: [1.2.3], ports: [{port: 0, nodePort: 1}, {port: 81, name: B}]",
        [
            "spec.ports[0].port: 0 is not a port number (1-65535)",
            "spec.ports[0].name: required: each of several ports has a name",
            "spec.ports[0].nodePort: 1 is not in the range 30000-32767 (--service-node-port-range)",
            f'spec.ports[1].name: "B" is not a port name: {LABEL_1123}',
            'spec.externalIPs[0]: "1.2.3" is not an IP address',
        ],
    ),
    (
        'sessionAffinity: 1, ports: [{port: "a"}, {port: "b", protocol: x}]',
        [
            'spec.ports[0].port: expected an integer, got "a"',
            'spec.ports[1].port: expected an integer, got "b"',
            'spec.ports[1].protocol: expected TCP, UDP or SCTP, got "x"',
            "spec.sessionAffinity: expected None or ClientIP, got 1",
        ],
    ),
]


@pytest.mark.parametrize(("spec", "messages"), BAD_SERVICES)
def test_bad_service(spec: str, messages: list[str]) -> None:
    decoded = decode(service(spec), RULES)
    assert lines(decoded) == [f"error: Service default/web: {message}" for message in messages]
    assert decoded.objects == ()
    assert [(kind, str(name)) for kind, name in decoded.rejected] == [("Service", "default/web")]
    assert decoded.complete


BAD_OBJECTS: list[tuple[dict[str, Any], str]] = [
    (service(P80, meta="name: Web_1"), f'Service default/Web_1: metadata.name: "Web_1" is not a service name: {LABEL_1035}'),
    (service(P80, meta="name: 1web"), f'Service default/1web: metadata.name: "1web" is not a service name: {LABEL_1035}'),
    (service(P80, meta="name: web.a"), f'Service default/web.a: metadata.name: "web.a" is not a service name: {LABEL_1035}'),
    (service(P80, meta="name: web, namespace: a.b"), f'Service a.b/web: metadata.namespace: "a.b" is not a namespace: {LABEL_1123}'),
    (service(P80, meta="generateName: web-"), "Service: metadata.name: required"),
    (service(P80, meta="name: 80"), "Service: metadata.name: expected a string, got 80: put it in quotes"),
    (
        service(P80, status='{loadBalancer: {ingress: [{ip: "1.2.3"}]}}'),
        'Service default/web: status.loadBalancer.ingress[0].ip: "1.2.3" is not an IP address',
    ),
    (
        service(P80, status="{loadBalancer: {ingress: [{ip: 1.2.3.4, ipMode: vip}]}}"),
        'Service default/web: status.loadBalancer.ingress[0].ipMode: expected VIP or Proxy, got "vip"',
    ),
    (
        addresses("1.2.3.4", "127.0.0.1"),
        'Endpoints default/db: subsets[0].addresses[1].ip: "127.0.0.1" may not be in the loopback range (127.0.0.0/8)',
    ),
    (addresses("::1"), 'Endpoints default/db: subsets[0].addresses[0].ip: "::1" may not be in the loopback range (::1)'),
    (addresses("::"), 'Endpoints default/db: subsets[0].addresses[0].ip: "::" may not be unspecified (::)'),
    (
        addresses("fe80::1"),
        'Endpoints default/db: subsets[0].addresses[0].ip: "fe80::1" may not be in the link-local range (fe80::/10)',
    ),
    (
        addresses("ff02::fb"),
        'Endpoints default/db: subsets[0].addresses[0].ip: "ff02::fb" may not be in the link-local multicast range (ff02::/16)',
    ),
    (
        addresses("::ffff:127.0.0.1"),
        'Endpoints default/db: subsets[0].addresses[0].ip: "::ffff:127.0.0.1" may not be in the loopback range (127.0.0.0/8)',
    ),
    (
        addresses("10.96.0.10"),
        'Endpoints default/db: subsets[0].addresses[0].ip: "10.96.0.10" may not be in the service VIP range (10.96.0.0/12)',
    ),
    (
        addresses("fd00:96::a"),
        'Endpoints default/db: subsets[0].addresses[0].ip: "fd00:96::a" may not be in the service VIP range (fd00:96::/112)',
    ),
    (addresses("010.0.0.1"), 'Endpoints default/db: subsets[0].addresses[0].ip: "010.0.0.1" is not an IP address: leading zeros are not allowed'),
    (addresses(""), 'Endpoints default/db: subsets[0].addresses[0].ip: "" is not an IP address'),
    (
        endpoints("notReadyAddresses: [{ip: 169.254.0.1}]"),
        'Endpoints default/db: subsets[0].notReadyAddresses[0].ip: "169.254.0.1" may not be in the link-local range (169.254.0.0/16)',
    ),
    (endpoints("ports: [{port: 1}]"), "Endpoints default/db: subsets[0]: must specify `addresses` or `notReadyAddresses`"),
    (endpoints("addresses: [{ip: 1.2.3.4}], ports: [{name: a}]"), "Endpoints default/db: subsets[0].ports[0].port: required"),
    (
        endpoints("addresses: [{ip: 1.2.3.4}], ports: [{port: 99999}]"),
        "Endpoints default/db: subsets[0].ports[0].port: 99999 is not a port number (1-65535)",
    ),
    (
        endpoints("addresses: [{ip: 1.2.3.4}], ports: [{port: 1, name: a}, {port: 2}]"),
        "Endpoints default/db: subsets[0].ports[1].name: required: each of several ports has a name",
    ),
    (endpoints("addresses: [{nodeName: a}]"), "Endpoints default/db: subsets[0].addresses[0].ip: required"),
    (endpoint_slice("addressType: IP"), 'EndpointSlice default/db-1: addressType: expected IPv4, IPv6 or FQDN, got "IP"'),
    (
        endpoint_slice('addressType: IPv4, endpoints: [{addresses: ["fd00::1"]}]'),
        'EndpointSlice default/db-1: endpoints[0].addresses[0]: "fd00::1" must be an IPv4 address, as addressType says',
    ),
    (
        endpoint_slice("addressType: IPv6, endpoints: [{addresses: [10.0.0.1]}]"),
        'EndpointSlice default/db-1: endpoints[0].addresses[0]: "10.0.0.1" must be an IPv6 address, as addressType says',
    ),
    (
        endpoint_slice("addressType: IPv4, endpoints: [{addresses: [db.example.com]}]"),
        'EndpointSlice default/db-1: endpoints[0].addresses[0]: "db.example.com" is not an IP address',
    ),
    (
        endpoint_slice("addressType: IPv4, endpoints: [{addresses: [10.0.0.1, 127.0.0.1]}]"),
        'EndpointSlice default/db-1: endpoints[0].addresses[1]: "127.0.0.1" may not be in the loopback range (127.0.0.0/8)',
    ),
    (
        endpoint_slice("addressType: FQDN, endpoints: [{addresses: [a_b]}]"),
        f'EndpointSlice default/db-1: endpoints[0].addresses[0]: "a_b" is not a host name: {SUBDOMAIN}',
    ),
    (
        endpoint_slice("addressType: IPv4, endpoints: [{addresses: []}]"),
        "EndpointSlice default/db-1: endpoints[0].addresses: required: an endpoint has at least one address",
    ),
    (
        endpoint_slice("addressType: IPv4") | {"endpoints": [{"addresses": ["10.0.0.1"]}] * 1001},
        "EndpointSlice default/db-1: endpoints: must have at most 1000 items, got 1001",
    ),
    (
        endpoint_slice("addressType: IPv4, ports: [{port: 1}, {port: 2}]"),
        'EndpointSlice default/db-1: ports[1].name: "" is already the name of ports[0]',
    ),
    (
        endpoint_slice("addressType: IPv4, ports: [{port: 0}]"),
        "EndpointSlice default/db-1: ports[0].port: 0 is not a port number (1-65535)",
    ),
    (
        pod("{podIP: 127.0.0.1}"),
        'Pod default/p.1: status.podIP: "127.0.0.1" may not be in the loopback range (127.0.0.0/8)',
    ),
    (
        pod("{podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.2}]}"),
        'Pod default/p.1: status.podIPs[0].ip: "10.0.0.2" is not the podIP "10.0.0.1"',
    ),
    (
        pod('{podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fe80::1"}]}'),
        'Pod default/p.1: status.podIPs[1].ip: "fe80::1" may not be in the link-local range (fe80::/10)',
    ),
    (pod("{phase: running}"), 'Pod default/p.1: status.phase: expected Pending, Running, Succeeded, Failed or Unknown, got "running"'),
    (
        pod(spec="{containers: [{ports: [{containerPort: 0}]}]}"),
        "Pod default/p.1: spec.containers[0].ports[0].containerPort: 0 is not a port number (1-65535)",
    ),
    (
        pod(spec="{containers: [{ports: [{containerPort: 1, name: Web}]}]}"),
        f'Pod default/p.1: spec.containers[0].ports[0].name: "Web" is not a port name: {PORT_NAME}',
    ),
    (
        pod(spec="{containers: [{ports: [{containerPort: 1, name: web}, {containerPort: 2, name: web}]}]}"),
        'Pod default/p.1: spec.containers[0].ports[1].name: "web" is already the name of ports[0]',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), BAD_OBJECTS)
def test_bad_object(raw: dict[str, Any], message: str) -> None:
    decoded = decode(raw, RULES)
    assert lines(decoded) == [f"error: {message}"]
    assert decoded.objects == ()


GOOD: list[dict[str, Any]] = [
    service(P80),
    service("clusterIP: None"),
    service("clusterIP: None, clusterIPs: [None]"),
    service("type: ExternalName, externalName: my.database.example.com."),
    service('type: ExternalName, externalName: a, clusterIP: ""'),
    service("ports: [{port: 53, name: a}, {port: 53, name: b, protocol: UDP}]"),
    service('type: "", sessionAffinity: "", ports: [{port: 1, protocol: "", targetPort: ""}]'),
    service("ports: [{port: 1, targetPort: 0, nodePort: 0}]"),
    service("ports: [{port: 1, targetPort: 8080-tcp}]"),
    service(f"clusterIP: 127.96.0.1, {P80}"),
    service(f'clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, "fd00:96::1"], ipFamilies: [IPv4, IPv6], {P80}'),
    service(f'clusterIP: "fd00:0096::1", clusterIPs: ["fd00:96::1"], {P80}'),
    service(
        "type: NodePort, ports: [{port: 1, name: a, nodePort: 30000}, {port: 1, name: b, nodePort: 30000, protocol: UDP}]"
    ),
    service(
        f"sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 86400}}}}, {P80}"
    ),
    service(P80, status="{loadBalancer: {ingress: [{hostname: lb.example.com}, {ip: 127.0.0.1}]}}"),
    service(P80, meta=f"name: {'a' * 63}, labels: null, creationTimestamp: null"),
    service(P80 + ", selector: null, clusterIP: null, externalIPs: null, sessionAffinityConfig: null"),
    addresses("1.2.3.4", "2001:db8::1", "224.0.1.1"),
    endpoints(),
    endpoint_slice("addressType: FQDN, endpoints: [{addresses: [db.example.com]}]"),
    endpoint_slice("addressType: IPv4, endpoints: null, ports: [{port: null}, {name: a}]"),
    pod(),
    pod("{podIP: '', podIPs: null, phase: Running}"),
]


@pytest.mark.parametrize("raw", GOOD)
def test_good_object(raw: dict[str, Any]) -> None:
    decoded = decode(raw, RULES)
    assert lines(decoded) == []
    assert len(decoded.objects) == 1
    assert decoded.rejected == ()


def test_affinity_config_without_affinity_is_a_warning() -> None:
    decoded = decode(service(f"sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 5}}}}, {P80}"), RULES)
    assert lines(decoded) == [
        "warning: Service default/web: spec.sessionAffinityConfig: has no effect: `sessionAffinity` is 'None'"
    ]
    assert len(decoded.objects) == 1


@pytest.mark.parametrize(
    "raw",
    [
        addresses("127.0.0.1", "127.1.2.3", "::1"),
        endpoint_slice("addressType: IPv4, endpoints: [{addresses: [127.0.0.1]}]"),
        pod("{podIP: 127.0.0.2, podIPs: [{ip: 127.0.0.2}]}"),
    ],
)
def test_loopback_endpoints_may_be_allowed(raw: dict[str, Any]) -> None:
    assert decode(raw, Rules(allow_loopback_endpoints=True)).problems == ()
    assert decode(raw, Rules()).objects == ()


@pytest.mark.parametrize(
    ("ip", "reason"),
    [
        ("127.96.0.1", "may not be in the service VIP range (127.96.0.0/16)"),
        ("169.254.1.1", "may not be in the link-local range (169.254.0.0/16)"),
        ("0.0.0.0", "may not be unspecified (0.0.0.0)"),
        ("224.0.0.1", "may not be in the link-local multicast range (224.0.0.0/24)"),
        ("fe80::1", "may not be in the link-local range (fe80::/10)"),
    ],
)
def test_allowing_loopback_allows_nothing_else(ip: str, reason: str) -> None:
    decoded = decode(addresses(ip), Rules(allow_loopback_endpoints=True))
    assert lines(decoded) == [f'error: Endpoints default/db: subsets[0].addresses[0].ip: "{ip}" {reason}']


def test_allowing_loopback_endpoints_does_not_allow_loopback_external_ips() -> None:
    decoded = decode(service(f"externalIPs: [127.0.0.1], {P80}"), Rules(allow_loopback_endpoints=True))
    assert lines(decoded) == [
        'error: Service default/web: spec.externalIPs[0]: "127.0.0.1" may not be in the loopback range (127.0.0.0/8)'
    ]


def test_node_port_range_is_the_one_given() -> None:
    raw = service("type: NodePort, ports: [{port: 80, nodePort: 30080}]")
    decoded = decode(raw, Rules(node_port_range=(31000, 31999)))
    assert lines(decoded) == [
        "error: Service default/web: spec.ports[0].nodePort: 30080 is not in the range 31000-31999 (--service-node-port-range)"
    ]
    assert decode(raw, Rules(node_port_range=(30080, 30080))).problems == ()


def test_rules_refuse_a_service_range_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"'10\.96\.0\.0' is not a CIDR"):
        Rules(service_cidrs=("10.96.0.0",))
