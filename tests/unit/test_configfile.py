"""The configuration file: what it may say, what is wrong and where, what wins, what changes at run time."""

from __future__ import annotations

import msgspec
import pytest

from proxyd.control.config import file as configfile
from proxyd.control.config.file import (
    ConfigError,
    Configuration,
    changes,
    effective,
    merge,
    parse,
    shown_field,
)
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.schema import API_GROUP, API_VERSION, KUBE_PROXY, OWN_FIELDS
from proxyd.control.config.settings import Settings, SettingsError, Surroundings, build
from proxyd.sources.text.documents import Document, read_documents
from tests.support.paths import REPOSITORY

HERE = Surroundings(uid=0, net_admin=True, cpus=2, hostname="Node")
DEFAULT_FILE = REPOSITORY / "config" / "proxyd.yaml"
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

# What kubeadm 1.30 mounts as config.conf.
KUBEADM = (
    HEAD
    + """\
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""
)


def read(text: str) -> configfile.ConfigFile:
    return parse("c.yaml", (HEAD + text).encode())


def settings(text: str, **flags) -> Settings:
    return build(merge(read(text).values, {"manifests": ["m"], **flags}), HERE)


def errors(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse("c.yaml", text.encode())
    return caught.value.problems


def test_kubeadms_zero_values_are_defaults():
    file = parse("c.yaml", KUBEADM.encode())
    told = {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf", "cluster_cidr": "10.244.0.0/16"}
    # Others that are zero are given as such, and mean the default.
    assert file.values.items() >= {"bind_address": "0.0.0.0", **told}.items()
    assert not file.warnings
    assert build(file.values, HERE) == build(told, HERE)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("bindAddress: 192.0.2.1", "bind_address", "192.0.2.1"),
        ("healthzBindAddress: 127.0.0.1:1256", "healthz_bind_address", "127.0.0.1:1256"),
        ("metricsBindAddress: '[::1]:1249'", "metrics_bind_address", "[::1]:1249"),
        ("bindAddressHardFail: true", "bind_address_hard_fail", True),
        ("hostnameOverride: ' NODE-1 '", "hostname_override", "node-1"),
        ("nodePortAddresses: [10.0.0.0/8, 127.0.0.0/8]", "nodeport_addresses", ("10.0.0.0/8", "127.0.0.0/8")),
        ("nodePortAddresses: [primary]", "nodeport_addresses", ("primary",)),
        ("featureGates: {SCTPSupport: true}", "feature_gates", {"SCTPSupport": True}),
        ("iptables: {syncPeriod: 1m30s}", "sync_period", 90.0),
        ("udpIdleTimeout: 5s", "udp_timeout", 5.0),
        ("logging: {format: json}", "log_format", "json"),
        ("logging: {format: text}", "log_format", "auto"),
        ("logging: {verbosity: 2}", "verbosity", 0),
        ("logging: {verbosity: 4}", "verbosity", 1),
        ("proxyd: {manifests: [a, b]}", "manifests", ("a", "b")),
        ("proxyd: {manifests: a}", "manifests", ("a",)),
        ("proxyd: {serviceClusterIPRange: [10.1.0.0/16, 'fd00::/108']}", "service_cluster_ip_range", ("10.1.0.0/16", "fd00::/108")),
        ("proxyd: {serviceNodePortRange: 100-200}", "service_node_port_range", (100, 200)),
        ("proxyd: {vipMode: none}", "vip_mode", "none"),
        ("proxyd: {externalIPMode: none}", "external_ip_mode", "none"),
        ("proxyd: {fwmark: 0x40}", "fwmark", 0x40),
        ("proxyd: {fwmark: '0x80000000'}", "fwmark", 1 << 31),
        ("proxyd: {fwmark: 16}", "fwmark", 16),
        ("proxyd: {workers: 0}", "workers", 0),
        ("proxyd: {drainTimeout: 0s}", "drain_timeout", 0.0),
        ("proxyd: {tcpIdleTimeout: 1h}", "tcp_idle_timeout", 3600.0),
        ("proxyd: {tcpSplice: false}", "tcp_splice", False),
        ("proxyd: {accessLog: '-'}", "access_log", "-"),
        ("proxyd: {adminSocket: /x/a.sock}", "admin_socket", "/x/a.sock"),
        ("proxyd: {stateFile: /x/state}", "state_file", "/x/state"),
        ("proxyd: {allowLoopbackEndpoints: true}", "allow_loopback_endpoints", True),
        ("proxyd: {logFormat: console}", "log_format", "console"),
        ("proxyd: {verbosity: 1}", "verbosity", 1),
        ("proxyd: {healthzPort: 0}", "healthz_address", None),
        ("proxyd: {metricsPort: 0}", "metrics_address", None),
        ("proxyd: {metricsEndpoints: false}", "metrics_endpoints", False),
    ],
)  # fmt: skip
def test_fields_become_settings(text, field, value):
    # A flag would win over the file.
    assert getattr(build({"manifests": ["m"], **read(text).values}, HERE), field) == value


def test_every_setting_can_be_said_in_the_file():
    said = {flag.field for flag in OWN_FIELDS.values()} | {field.setting for field in KUBE_PROXY.values()}
    assert {flag.field for flag in FLAGS} - said == {"config"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("proxyd:\n  workers: many", 'c.yaml:4:12: error: proxyd.workers: expected a number from 0 to 16, got "many"'),
        ("proxyd:\n  workers: [1]", "c.yaml:4:12: error: proxyd.workers: expected a list of strings"),
        ("proxyd: 7", "c.yaml:3:9: error: proxyd: expected a map"),
        ("oomScoreAdj: 1001", 'c.yaml:3:14: error: oomScoreAdj: expected a whole number from -1000 to 1000, got "1001"'),
        ("oomScoreAdj: low", 'c.yaml:3:14: error: oomScoreAdj: expected a number, got "low"'),
        ("iptables:\n  syncPeriod: -1s", 'c.yaml:4:15: error: iptables.syncPeriod: expected a duration such as 25s, 1m30s or 250ms, got "-1s"'),
        ("iptables:\n  syncPeriod: 30", "c.yaml:4:15: error: iptables.syncPeriod: expected a duration such as 30s, got 30"),
        ("iptables:\n  minSyncPeriod: 1m", "c.yaml:4:18: error: iptables.minSyncPeriod: must not be longer than iptables.syncPeriod"),
        ("ipvs:\n  syncPeriod: 5s\n  minSyncPeriod: 6s", "c.yaml:5:18: error: ipvs.minSyncPeriod: must not be longer than ipvs.syncPeriod"),
        ("healthzBindAddress: 0.0.0.0", 'c.yaml:3:21: error: healthzBindAddress: expected IP:port with a port from 1 to 65535, got "0.0.0.0"'),
        ("healthzBindAddress: 0.0.0.0:0", 'c.yaml:3:21: error: healthzBindAddress: expected IP:port with a port from 1 to 65535, got "0.0.0.0:0"'),
        ("metricsBindAddress: host:80", 'c.yaml:3:21: error: metricsBindAddress: expected IP:port with a port from 1 to 65535, got "host:80"'),
        ("clusterCIDR: 10.0.0.0/8,10.1.0.0/16", 'c.yaml:3:14: error: clusterCIDR: expected one CIDR, or an IPv4 and an IPv6 one, got "10.0.0.0/8,10.1.0.0/16"'),
        ("clusterCIDR: x", 'c.yaml:3:14: error: clusterCIDR: expected one CIDR, or an IPv4 and an IPv6 one, got "x"'),
        ("nodePortAddresses: [10.0.0.1]", None),
        ("nodePortAddresses: [web]", 'c.yaml:3:20: error: nodePortAddresses: expected a CIDR such as 10.96.0.0/16, got "web"'),
        ("mode: kernelspace", "c.yaml:3:7: error: mode: kernelspace is a mode of Windows; use userspace"),
        ("mode: magic", 'c.yaml:3:7: error: mode: expected userspace, iptables, ipvs or nftables, got "magic"'),
        ("featureGates: {SCTPSupport: 'on'}", "c.yaml:3:15: error: featureGates: expected a map of names to true or false"),
        ("iptables: 5", "c.yaml:3:11: error: iptables: expected a map"),
        ("clientConnection: {qps: many}", 'c.yaml:3:25: error: clientConnection.qps: expected a number, got "many"'),
        ("clientConnection: {burst: -1}", 'c.yaml:3:27: error: clientConnection.burst: expected a whole number from 0 to 1000000, got "-1"'),
        ("detectLocalMode: Guess", 'c.yaml:3:18: error: detectLocalMode: expected ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix, got "Guess"'),
        ("oomScoreAdj: 1.5", 'c.yaml:3:14: error: oomScoreAdj: expected a whole number from -1000 to 1000, got "1.5"'),
        ("configSyncPeriod: soon", 'c.yaml:3:19: error: configSyncPeriod: expected a duration such as 25s, 1m30s or 250ms, got "soon"'),
        ("enableProfiling: 'yes'", 'c.yaml:3:18: error: enableProfiling: expected true or false, got "yes"'),
        ("logging: {vmodule: [cluster]}", "c.yaml:3:20: error: logging.vmodule: expected a list of maps with filePattern and verbosity, got a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text, line):
    if line is None:
        assert not read(text).warnings
        return
    assert errors(HEAD + text) == (line,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "c.yaml: error: the file is empty: expected one KubeProxyConfiguration"),
        (
            HEAD + "---\n" + HEAD,
            "c.yaml: error: the file has 2 documents: expected one KubeProxyConfiguration",
        ),
        ("- a", "c.yaml:1:1: error: expected a KubeProxyConfiguration, a map"),
        (
            HEAD.replace("v1alpha1", "v1alpha2"),
            f"c.yaml:1:13: error: apiVersion: expected {API_VERSION}; {API_GROUP}/v1alpha2 is not supported",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: Service",
            'c.yaml:2:7: error: kind: expected KubeProxyConfiguration, got "Service"',
        ),
        ("a: b: c", "c.yaml:1:5: error: not valid YAML: mapping values are not allowed in this context"),
    ],
)
def test_what_is_no_configuration(text, line):
    assert errors(text) == (line,)


def test_every_error_is_said_in_order_of_place():
    lines = errors(HEAD + "oomScoreAdj: 5000\nproxyd: {workers: x, vipMode: y}\n")
    assert [line.split(": ")[0] for line in lines] == ["c.yaml:3:14", "c.yaml:4:19", "c.yaml:4:31"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("colour: red", "c.yaml:3:9: warning: colour: unknown field: ignored"),
        ("iptables:\n  magic: 1", "c.yaml:4:10: warning: iptables.magic: unknown field: ignored"),
        ("proxyd:\n  magic: 1", "c.yaml:4:10: warning: proxyd.magic: unknown field: ignored"),
        (
            "proxyd:\n  bindAddress: 10.0.0.1",
            "c.yaml:4:16: warning: proxyd.bindAddress: unknown field: ignored; it is a field of the file itself",
        ),
        ("mode: ipvs", "c.yaml:3:7: warning: mode: proxyd always serves in user space, not by ipvs"),
        ("portRange: 1-2", "c.yaml:3:12: warning: portRange: no effect: there are no intermediate ports"),
        (
            "featureGates: {Magic: true}",
            "c.yaml:3:23: warning: featureGates.Magic: unknown feature gate: ignored",
        ),
    ],
)
def test_what_has_no_effect_is_warned_of_and_the_rest_counts(text, line):
    file = read(text + "\nhostnameOverride: n")
    assert [str(warning) for warning in file.warnings] == [line]
    assert file.values["hostname_override"] == "n"


def test_flags_win():
    assert settings("proxyd: {workers: 3}").workers == 3
    assert settings("proxyd: {workers: 3}", workers="1").workers == 1
    assert settings("proxyd: {workers: 3, manifests: [a]}", manifests=["b"]).manifests == ("b",)


def test_for_kube_proxy_only_some_flags_win_over_a_file():
    flags = {"config": "f", "hostname_override": "n", "workers": "1"}
    merged = merge({"workers": "3"}, flags, winning={"hostname_override"})
    assert merged == {"config": "f", "hostname_override": "n", "workers": "3"}
    # Without a file every flag counts.
    assert merge({}, {"workers": "1"}, winning=()) == {"workers": "1"}


def test_a_configuration_is_read_again(tmp_path):
    path = tmp_path / "c.yaml"
    configuration = Configuration({"config": str(path), "workers": None, "manifests": ["m"]}, HERE)
    path.write_text(HEAD + "proxyd: {workers: 3}")
    assert configuration.load()[0].workers == 3
    path.write_text(HEAD + "proxyd: {workers: 1}")
    assert configuration.load()[0].workers == 1
    path.unlink()
    with pytest.raises(SettingsError, match=r"--config: .*: No such file"):
        configuration.load()
    path.write_bytes(b"#" * (configfile.MAX_BYTES + 1))
    with pytest.raises(SettingsError, match="at most 1 MiB"):
        configuration.load()


def test_what_changes_at_run_time_and_what_needs_a_restart():
    before = settings("")
    now, later = changes(
        before, settings("nodePortAddresses: [primary]\nproxyd: {workers: 1, drainTimeout: 1s}")
    )
    assert now == {"nodeport_addresses", "drain_timeout"}
    assert later == {"workers"}
    assert sorted(map(shown_field, now | later)) == [
        "nodePortAddresses",
        "proxyd.drainTimeout",
        "proxyd.workers",
    ]
    assert changes(before, settings("proxyd: {accessLog: /a}")) == (frozenset(), {"access_log"})
    one, two = settings("proxyd: {accessLog: /a}"), settings("proxyd: {accessLog: /b}")
    assert changes(one, two) == ({"access_log"}, frozenset())


def test_the_effective_configuration_read_as_a_file_gives_the_same():
    text = (
        "bindAddress: '::'\nnodePortAddresses: [primary]\niptables: {syncPeriod: 250ms}\nfeatureGates: {SCTPSupport: true}\n"
        "proxyd: {workers: 1, drainTimeout: 0s, accessLog: '-', serviceClusterIPRange: 'fd00::/108', vipMode: bind}"
    )
    for given in (settings(text), settings("", healthz_bind_address="", metrics_port="0")):
        shown = effective(given)
        again = parse("c.json", msgspec.json.encode(shown))
        assert not again.warnings
        assert effective(build(again.values, HERE)) == shown
        assert build(again.values, HERE).healthz_address == given.healthz_address


def test_the_sample_has_the_defaults_and_every_field():
    data = DEFAULT_FILE.read_bytes()
    file = parse("proxyd.yaml", data)
    assert not file.warnings
    manifests = {"manifests": ["/etc/proxyd/manifests"]}
    assert build(file.values, HERE) == build(manifests, HERE)
    user = Surroundings(uid=1000, cpus=8, hostname="n", environ={"HOME": "/h"})
    assert build(file.values, user) == build(manifests, user)
    (document,) = read_documents(data)
    assert isinstance(document, Document)
    assert isinstance(document.value, dict)
    assert set(document.value["proxyd"]) == set(OWN_FIELDS)
    used = {path[0] for path, field in KUBE_PROXY.items() if field.setting}
    assert used - set(document.value) == {"logging"}


@pytest.mark.parametrize(
    ("flags", "healthz", "metrics"),
    [
        ({}, ("0.0.0.0", 10256), ("127.0.0.1", 10249)),
        ({"healthz_port": "0", "metrics_bind_address": ""}, None, None),
        ({"healthz_port": "1", "metrics_port": "2"}, ("0.0.0.0", 1), ("127.0.0.1", 2)),
        ({"healthz_bind_address": "10.0.0.1", "healthz_port": "7"}, ("10.0.0.1", 7), ("127.0.0.1", 10249)),
        ({"healthz_bind_address": "10.0.0.1:8", "healthz_port": "7"}, ("10.0.0.1", 8), ("127.0.0.1", 10249)),
        ({"healthz_bind_address": "[::1]:8", "metrics_bind_address": "::1"}, ("::1", 8), ("::1", 10249)),
        ({"bind_address": "::"}, ("::", 10256), ("::1", 10249)),
        ({"healthz_bind_address": "10.0.0.1:0"}, None, ("127.0.0.1", 10249)),
    ],
)
def test_where_health_and_metrics_are_answered(flags, healthz, metrics):
    got = build({"manifests": ["m"], **flags}, HERE)
    assert (got.healthz_address, got.metrics_address) == (healthz, metrics)


@pytest.mark.parametrize("text", ["web", "1.2.3.4:x", "1.2.3.4:70000", "[::1", "[::1]x", "1.2.3.4:"])
def test_wrong_bind_addresses(text):
    with pytest.raises(SettingsError, match="--healthz-bind-address: expected IP:port"):
        build({"manifests": ["m"], "healthz_bind_address": text}, HERE)
