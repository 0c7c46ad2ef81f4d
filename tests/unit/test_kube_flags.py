"""kube-proxy's command line: what becomes of each flag, in every form that its library takes, and of each field of its file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from proxyd.cli.env import Env
from proxyd.cli.main import main
from proxyd.control.config.feature_gates import KUBERNETES_GATES
from proxyd.control.config.file import parse
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.kube_flags import ALIASES, FOREIGN, shared
from proxyd.control.config.schema import KUBE_PROXY
from tests.support.commandline import Result
from tests.support.commandline import run as proxyd

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
NO_CONNTRACK = "proxyd leaves the kernel's connection tracking as it is"
NO_IPVS = "proxyd is no IPVS"
NO_INTERFACE = "Pods are told by --cluster-cidr or --detect-local-mode=NodeCIDR alone"

# Those of kube-proxy 1.19, and what came later. Of its orders (--config, --cleanup ...) there are tests of their own.
KUBE_PROXY_FLAGS = """
add-dir-header alsologtostderr azure-container-registry-config bind-address bind-address-hard-fail boot-id-file cleanup-ipvs
cloud-provider-gce-l7lb-src-cidrs cloud-provider-gce-lb-src-cidrs cluster-cidr config config-sync-period conntrack-max-per-core
conntrack-min conntrack-tcp-be-liberal conntrack-tcp-timeout-close-wait conntrack-tcp-timeout-established conntrack-udp-timeout
conntrack-udp-timeout-stream detect-local-mode feature-gates healthz-bind-address healthz-port hostname-override
iptables-localhost-nodeports iptables-masquerade-bit iptables-min-sync-period iptables-sync-period ipvs-exclude-cidrs
ipvs-min-sync-period ipvs-scheduler ipvs-strict-arp ipvs-sync-period ipvs-tcp-timeout ipvs-tcpfin-timeout ipvs-udp-timeout
kube-api-burst kube-api-content-type kube-api-qps kubeconfig log-backtrace-at log-dir log-file log-file-max-size
log-flush-frequency log-json-info-buffer-size log-json-split-stream log-text-info-buffer-size log-text-split-stream
logging-format logtostderr machine-id-file masquerade-all master metrics-bind-address metrics-port nodeport-addresses
one-output oom-score-adj pod-bridge-interface pod-interface-name-prefix profiling proxy-mode proxy-port-range
show-hidden-metrics-for-version skip-headers skip-log-headers stderrthreshold udp-timeout v vmodule
enable-dsr forward-healthcheck-vip network-name root-hnsendpoint-name source-vip windows-priorityclass windows-service
""".split()  # noqa: SIM905 - a list would take ninety lines  # fmt: skip


def kube_proxy(*argv: str, environ: dict[str, str] | None = None) -> Result:
    """Call the program by the name kube-proxy."""
    out, err = io.StringIO(), io.StringIO()
    code = main(argv, Env(stdout=out, stderr=err, environ=environ or {}), program="kube-proxy")
    return Result(code, out.getvalue(), err.getvalue())


def effective(tmp_path: Path, *argv: str) -> tuple[dict, list[str]]:
    """The configuration that a command line amounts to, and what is said of it."""
    written = tmp_path / "effective.yaml"
    got = kube_proxy(*argv, "--write-config-to", str(written))
    assert got.code == 0, got.err
    *said, last = got.err.splitlines()
    assert last == f"wrote the configuration to {written}"
    return yaml.safe_load(written.read_text()), said


def field(config: dict, path: str) -> object:
    value: object = config
    for name in path.split("."):
        assert isinstance(value, dict)
        value = value[name]
    return value


CLUSTER = ("--kubeconfig", "/k")


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--kubeconfig=/etc/k", "clientConnection.kubeconfig", "/etc/k"),
        ("--master=https://10.0.0.1:6443", "proxyd.master", "https://10.0.0.1:6443"),
        ("--kube-api-qps=7.5", "clientConnection.qps", 7.5),
        ("--kube-api-burst=20", "clientConnection.burst", 20),
        ("--hostname-override= Node-1 ", "hostnameOverride", "node-1"),
        ("--bind-address=192.0.2.1", "bindAddress", "192.0.2.1"),
        ("--healthz-bind-address=127.0.0.1:1256", "healthzBindAddress", "127.0.0.1:1256"),
        ("--metrics-bind-address=[::1]:1249", "metricsBindAddress", "[::1]:1249"),
        ("--bind-address-hard-fail", "bindAddressHardFail", True),
        ("--profiling", "enableProfiling", True),
        ("--proxy-mode=userspace", "mode", "userspace"),
        ("--proxy-mode=", "mode", "userspace"),
        ("--udp-timeout=250ms", "udpIdleTimeout", "0.25s"),
        ("--feature-gates=SCTPSupport=true", "featureGates.SCTPSupport", True),
        ("--oom-score-adj=-998", "oomScoreAdj", -998),
        ("--iptables-sync-period=1m", "iptables.syncPeriod", "60s"),
        ("--iptables-min-sync-period=10s", "iptables.minSyncPeriod", "10s"),
        ("--iptables-localhost-nodeports=false", "iptables.localhostNodePorts", False),
        ("--config-sync-period=20m", "configSyncPeriod", "1200s"),
        ("--cluster-cidr=10.0.0.5/8,fd00::/48", "clusterCIDR", "10.0.0.0/8,fd00::/48"),
        ("--detect-local-mode=NodeCIDR", "detectLocalMode", "NodeCIDR"),
        ("--detect-local-mode=ClusterCIDR", "detectLocalMode", "ClusterCIDR"),
        ("--nodeport-addresses=127.0.0.0/8,10.1.2.3/24", "nodePortAddresses", ["127.0.0.0/8", "10.1.2.0/24"]),
        ("--nodeport-addresses=primary", "nodePortAddresses", ["primary"]),
        ("--logging-format=json", "proxyd.logFormat", "json"),
        ("--logging-format=text", "proxyd.logFormat", "auto"),
        ("--v=4", "proxyd.verbosity", 1),
        ("--v=2", "proxyd.verbosity", 0),
        ("--vmodule=cluster=4,feed*=6", "proxyd.vmodule", "cluster=4,feed*=6"),
        ("--log-file=/var/log/kube-proxy.log", "proxyd.logFile", "/var/log/kube-proxy.log"),
    ],
)  # fmt: skip
def test_flags_that_are_honoured(tmp_path, flag, path, value):
    config, said = effective(tmp_path, *CLUSTER, flag)
    assert field(config, path) == value
    assert said == []


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--healthz-port=0", "--healthz-port is deprecated: --healthz-bind-address takes IP:port"),
        ("--metrics-port=1", "--metrics-port is deprecated: --metrics-bind-address takes IP:port"),
        ("--cleanup-ipvs", "--cleanup-ipvs has no effect: proxyd makes no IPVS rules; --cleanup names what is left of kube-proxy's"),
        ("--proxy-mode=iptables", "--proxy-mode: proxyd always serves in user space, not by iptables"),
        ("--proxy-mode=ipvs", "--proxy-mode: proxyd always serves in user space, not by ipvs"),
        ("--proxy-mode=nftables", "--proxy-mode: proxyd always serves in user space, not by nftables"),
        ("--proxy-port-range=40000+100", "--proxy-port-range has no effect: there are no intermediate ports"),
        ("--proxy-port-range=40000", "--proxy-port-range has no effect: there are no intermediate ports"),
        ("--feature-gates=Magic=true", "--feature-gates: Magic: unknown feature gate: ignored"),
        ("--feature-gates=SCTPSuport=true", "--feature-gates: SCTPSuport: unknown feature gate: ignored; did you mean SCTPSupport?"),
        ("--ipvs-scheduler=wlc", f"--ipvs-scheduler has no effect: {NO_IPVS}; endpoints take turns"),
        ("--ipvs-exclude-cidrs=10.0.0.0/8", f"--ipvs-exclude-cidrs has no effect: {NO_IPVS}"),
        ("--ipvs-strict-arp", f"--ipvs-strict-arp has no effect: {NO_IPVS}; it answers no ARP for VIPs"),
        ("--ipvs-tcp-timeout=1s", f"--ipvs-tcp-timeout has no effect: {NO_IPVS}"),
        ("--ipvs-tcpfin-timeout=1s", f"--ipvs-tcpfin-timeout has no effect: {NO_IPVS}"),
        ("--ipvs-udp-timeout=1s", f"--ipvs-udp-timeout has no effect: {NO_IPVS}"),
        ("--conntrack-max-per-core=1", f"--conntrack-max-per-core has no effect: {NO_CONNTRACK}"),
        ("--conntrack-min=1", f"--conntrack-min has no effect: {NO_CONNTRACK}"),
        ("--conntrack-tcp-timeout-established=1h", f"--conntrack-tcp-timeout-established has no effect: {NO_CONNTRACK}"),
        ("--conntrack-tcp-timeout-close-wait=1m", f"--conntrack-tcp-timeout-close-wait has no effect: {NO_CONNTRACK}"),
        ("--detect-local-mode=BridgeInterface", "--detect-local-mode: Pods are not told by their interfaces; ClusterCIDR is used"),
        ("--detect-local-mode=InterfaceNamePrefix", "--detect-local-mode: Pods are not told by their interfaces; ClusterCIDR is used"),
        ("--pod-bridge-interface=cbr0", f"--pod-bridge-interface has no effect: {NO_INTERFACE}"),
        ("--pod-interface-name-prefix=veth", f"--pod-interface-name-prefix has no effect: {NO_INTERFACE}"),
    ],
)  # fmt: skip
def test_flags_that_are_warned_of_once(tmp_path, flag, line):
    _, said = effective(tmp_path, *CLUSTER, flag, flag)
    assert said == [f"warning: {line}"]


@pytest.mark.parametrize(
    "flag",
    [
        "--kube-api-content-type=application/vnd.kubernetes.protobuf",
        "--show-hidden-metrics-for-version=1.18",
        "--boot-id-file=/x",
        "--machine-id-file=/x",
        "--azure-container-registry-config=/x",
        "--cloud-provider-gce-lb-src-cidrs=10.0.0.0/8",
        "--cloud-provider-gce-l7lb-src-cidrs=10.0.0.0/8",
        "--proxy-port-range=",
        "--masquerade-all",
        "--iptables-masquerade-bit=15",
        "--ipvs-sync-period=1m",
        "--ipvs-min-sync-period=10s",
        "--ipvs-scheduler=rr",
        "--ipvs-scheduler=",
        "--ipvs-strict-arp=false",
        "--ipvs-tcp-timeout=0s",
        "--ipvs-exclude-cidrs=",
        "--conntrack-max-per-core=32768",
        "--conntrack-max-per-core=0",
        "--conntrack-min=131072",
        "--conntrack-tcp-timeout-established=24h0m0s",
        "--conntrack-tcp-timeout-close-wait=1h",
        "--conntrack-tcp-be-liberal",
        "--conntrack-udp-timeout=30s",
        "--conntrack-udp-timeout-stream=3m",
        "--logtostderr=false",
        "--alsologtostderr",
        "--skip-headers",
        "--skip-log-headers",
        "--add-dir-header",
        "--one-output",
        "--log-json-split-stream",
        "--log-text-split-stream",
        "--log-dir=/x",
        "--log-file-max-size=1800",
        "--stderrthreshold=2",
        "--log-backtrace-at=:0",
        "--log-flush-frequency=5s",
        "--log-json-info-buffer-size=0",
        "--log-text-info-buffer-size=0",
        "--feature-gates=AllAlpha=true,ExperimentalCriticalPodAnnotation=true",
    ],
)
def test_flags_that_are_accepted_silently(tmp_path, flag):
    plain, _ = effective(tmp_path, *CLUSTER)
    config, said = effective(tmp_path, *CLUSTER, flag)
    assert said == []
    assert config == plain


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--proxy-mode=kernelspace", "--proxy-mode: kernelspace is a mode of Windows; use userspace"),
        *(
            (f"--{name}", f"--{name}: it is for Windows; leave it out")
            for name in ("windows-service", "enable-dsr", "forward-healthcheck-vip")
        ),
        *(
            (f"--{name}=x", f"--{name}: it is for Windows; leave it out")
            for name in ("network-name", "source-vip", "root-hnsendpoint-name", "windows-priorityclass")
        ),
        ("--conntrack-min=many", '--conntrack-min: expected a whole number from 0 to 2147483648, got "many"'),
        ("--iptables-masquerade-bit=32", '--iptables-masquerade-bit: expected a whole number from 0 to 31, got "32"'),
        ("--ipvs-strict-arp=maybe", '--ipvs-strict-arp: expected true or false, got "maybe"'),
        ("--proxy-port-range=9-1", '--proxy-port-range: the range ends before it begins: "9-1"'),
        ("--logging-format=xml", '--logging-format: expected text or json, got "xml"'),
        ("--v=high", '--v: expected a whole number from -1 to 100, got "high"'),
        ("--iptables-sync-period=0s", '--sync-period: expected a duration over 0, got "0s"'),
        ("--iptables-min-sync-period=1m", "--min-sync-period: must not be longer than --sync-period"),
        ("--cleanup=maybe", '--cleanup: expected true or false, got "maybe"'),
        ("--cluster-cird=10.0.0.0/8", "unknown flag --cluster-cird; did you mean --cluster-cidr?"),
        ("--zzzzzz", "unknown flag --zzzzzz; see `kube-proxy --help`"),
        ("-x", "unknown flag -x; see `kube-proxy --help`"),
        ("extra", 'unexpected argument "extra"; see `kube-proxy --help`'),
        ("--master", "--master: expected one argument; see `kube-proxy --help`"),
    ],
)  # fmt: skip
def test_flags_that_are_refused(flag, line):
    got = kube_proxy(*CLUSTER, flag)
    assert (got.code, got.out, got.err) == (2, "", f"proxyd: error: {line}\n")


def test_every_flag_of_kube_proxy_is_known():
    known = {flag.name for flag in (*FLAGS, *ALIASES, *FOREIGN)}
    assert set(KUBE_PROXY_FLAGS) <= known
    # And is told apart from proxyd's own, which win over a file under the name kube-proxy too.
    assert {flag.name for flag in FLAGS if flag.kube} <= set(KUBE_PROXY_FLAGS)
    assert {flag.name for flag in FOREIGN} <= set(KUBE_PROXY_FLAGS)


# Forms


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--v=4"], "proxyd.verbosity", 1),
        (["--v", "4"], "proxyd.verbosity", 1),
        (["-v=4"], "proxyd.verbosity", 1),
        (["-v4"], "proxyd.verbosity", 1),
        (["-v", "4"], "proxyd.verbosity", 1),
        (["-v", "2"], "proxyd.verbosity", 0),
        (["-v2"], "proxyd.verbosity", 0),
        (["-v"], "proxyd.verbosity", 1),
        (["-v", "--profiling"], "proxyd.verbosity", 1),
        (["--profiling"], "enableProfiling", True),
        (["--profiling=true"], "enableProfiling", True),
        (["--profiling=T"], "enableProfiling", True),
        (["--profiling", "--profiling=false"], "enableProfiling", False),
        (["--profiling=0"], "enableProfiling", False),
        (["--oom-score-adj", "-500"], "oomScoreAdj", -500),
        (["--oom_score_adj=-500"], "oomScoreAdj", -500),
        (["--oom-score-adj=1", "--oom-score-adj=2"], "oomScoreAdj", 2),
        (["--nodeport-addresses=10.0.0.0/8", "--nodeport_addresses", "127.0.0.0/8,::1/128"], "nodePortAddresses",
         ["10.0.0.0/8", "127.0.0.0/8", "::1/128"]),
        (["--feature-gates=SCTPSupport=false", "--feature-gates=SCTPSupport=true"], "featureGates.SCTPSupport", True),
        (["--iptables-sync-period=1m30s"], "iptables.syncPeriod", "90s"),
        (["--iptables-sync-period", "250ms"], "iptables.syncPeriod", "0.25s"),
        (["--hostname-override="], "hostnameOverride", None),
        (["--hostname-override", ""], "hostnameOverride", None),
        (["--service-node-port-range=30000+10"], "proxyd.serviceNodePortRange", "30000-30010"),
        (["--service-node-port-range=30000"], "proxyd.serviceNodePortRange", "30000-30000"),
        (["--healthz-port=0"], "proxyd.healthzPort", 0),
        (["--"], "enableProfiling", False),
    ],
)  # fmt: skip
def test_forms_of_flags(tmp_path, argv, path, value):
    written = tmp_path / "effective.yaml"
    got = kube_proxy("--write-config-to", str(written), *CLUSTER, *argv)
    assert got.code == 0, got.err
    found = field(yaml.safe_load(written.read_text()), path)
    if value is None:
        assert found  # this machine's name
    else:
        assert found == value


# Who wins


def test_beside_a_file_kube_proxy_heeds_few_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        HEAD + "clientConnection: {kubeconfig: /from-file}\nhostnameOverride: f\nbindAddress: 192.0.2.1\n"
    )
    flags = [
        "--bind-address=192.0.2.2",
        "--hostname-override=n",
        "--master=https://m",
        "--v=4",
        "--kubeconfig=/flag",
    ]
    config, said = effective(tmp_path, f"--config={file}", *flags, "--workers=3")
    assert said == [
        "warning: --config is given: kube-proxy ignores --bind-address, --kubeconfig beside it, and so does this"
    ]
    assert config["bindAddress"] == "192.0.2.1"
    assert config["clientConnection"]["kubeconfig"] == "/from-file"
    assert config["hostnameOverride"] == "n"
    assert (config["proxyd"]["master"], config["proxyd"]["verbosity"]) == ("https://m", 1)
    # kube-proxy does not have it, and so can't ignore it.
    assert config["proxyd"]["workers"] == 3


def test_a_void_flag_is_not_warned_of_twice(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(HEAD + "clientConnection: {kubeconfig: /k}\n")
    _, said = effective(tmp_path, f"--config={file}", "--proxy-mode=ipvs")
    assert said == ["warning: --config is given: kube-proxy ignores --proxy-mode beside it, and so does this"]


@pytest.mark.parametrize("command", [["run"], []])
def test_flags_of_proxyd_run_win_over_the_file_and_run_may_be_left_out(tmp_path, command):
    file, written = tmp_path / "c.yaml", tmp_path / "w.yaml"
    file.write_text(HEAD + "clientConnection: {kubeconfig: /k}\nbindAddress: 192.0.2.1\n")
    got = proxyd(*command, f"--config={file}", "--bind_address=192.0.2.2", "--write-config-to", str(written))
    assert (got.code, got.err) == (0, f"wrote the configuration to {written}\n")
    assert yaml.safe_load(written.read_text())["bindAddress"] == "192.0.2.2"


def test_what_is_written_is_read_again(tmp_path):
    flags = [
        "--nodeport-addresses=primary",
        "--oom-score-adj=-998",
        "--cluster-cidr=10.0.0.0/8",
        "--vmodule=a=4",
    ]
    first, _ = effective(tmp_path, *CLUSTER, *flags)
    kept = tmp_path / "kept.yaml"
    (tmp_path / "effective.yaml").rename(kept)
    assert effective(tmp_path, f"--config={kept}") == (first, [])


def test_a_folder_that_is_not_there_is_said_when_writing(tmp_path):
    got = kube_proxy(*CLUSTER, "--write-config-to", str(tmp_path / "no/c.yaml"))
    assert got.code == 1
    assert got.err == f"proxyd: error: --write-config-to: {tmp_path}/no/c.yaml: No such file or directory\n"


def test_version_and_help():
    assert kube_proxy("--version").out == proxyd("--version").out
    assert kube_proxy("--version=raw").out == proxyd("--version").out
    for argv in (["--help"], ["-h"], ["--v=2", "--help"]):
        got = kube_proxy(*argv)
        assert (got.code, got.err) == (0, "")
        assert got.out.startswith("usage: kube-proxy")
        assert "--cluster-cidr" in got.out


def test_gce_command_line(tmp_path):
    config, said = effective(
        tmp_path,
        "--master=https://10.0.0.2",
        "--kubeconfig=/var/lib/kube-proxy/kubeconfig",
        "--cluster-cidr=10.64.0.0/14",
        "--oom-score-adj=-998",
        "--v=2",
        "--feature-gates=ExperimentalCriticalPodAnnotation=true,SCTPSupport=true",
        "--iptables-sync-period=1m",
        "--iptables-min-sync-period=10s",
        "--ipvs-sync-period=1m",
        "--ipvs-min-sync-period=10s",
    )
    assert said == []
    assert config["clientConnection"]["kubeconfig"] == "/var/lib/kube-proxy/kubeconfig"
    assert config["proxyd"]["master"] == "https://10.0.0.2"
    assert (config["iptables"]["syncPeriod"], config["iptables"]["minSyncPeriod"]) == ("60s", "10s")
    assert (config["oomScoreAdj"], config["clusterCIDR"]) == (-998, "10.64.0.0/14")
    assert config["featureGates"] == {"SCTPSupport": True}


def test_in_a_pod_its_own_cluster_is_followed(tmp_path):
    written = tmp_path / "w.yaml"
    pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    got = kube_proxy("--write-config-to", str(written), environ=pod)
    assert got.code == 0, got.err
    assert yaml.safe_load(written.read_text())["proxyd"]["inCluster"] is True
    got = kube_proxy()
    assert got.code == 2
    assert "--manifests or --kubeconfig is required" in got.err


# The file


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("enableProfiling: true", "profiling", True),
        ("clusterCIDR: 10.0.0.0/8", "cluster_cidr", "10.0.0.0/8"),
        ("mode: userspace", "proxy_mode", "userspace"),
        ("detectLocalMode: NodeCIDR", "detect_local_mode", "NodeCIDR"),
        ("clientConnection: {kubeconfig: /k}", "kubeconfig", "/k"),
        ("clientConnection: {qps: 7.5}", "kube_api_qps", "7.5"),
        ("clientConnection: {burst: 3}", "kube_api_burst", "3"),
        ("iptables: {localhostNodePorts: false}", "iptables_localhost_nodeports", False),
        ("iptables: {minSyncPeriod: 2s}", "min_sync_period", "2s"),
        ("oomScoreAdj: 0", "oom_score_adj", "0"),
        ("configSyncPeriod: 5m0s", "config_sync_period", "5m0s"),
        ("logging: {vmodule: [{filePattern: cluster, verbosity: 5}]}", "vmodule", "cluster=5"),
    ],
)
def test_fields_that_are_honoured(text, setting, value):
    file = parse("c.yaml", (HEAD + text).encode())
    assert file.values == {setting: value}
    assert not file.warnings


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("portRange: 1-2", "portRange", "no effect: there are no intermediate ports"),
        ("detectLocal: {bridgeInterface: cbr0}", "detectLocal.bridgeInterface",
         "no effect: Pods are told by clusterCIDR, or detectLocalMode NodeCIDR, alone"),
        ("detectLocal: {interfaceNamePrefix: veth}", "detectLocal.interfaceNamePrefix",
         "no effect: Pods are told by clusterCIDR, or detectLocalMode NodeCIDR, alone"),
        ("ipvs: {scheduler: wlc}", "ipvs.scheduler", f"no effect: {NO_IPVS}; endpoints take turns"),
        ("ipvs: {excludeCIDRs: [10.0.0.0/8]}", "ipvs.excludeCIDRs", f"no effect: {NO_IPVS}"),
        ("ipvs: {strictARP: true}", "ipvs.strictARP", f"no effect: {NO_IPVS}"),
        ("ipvs: {tcpTimeout: 1s}", "ipvs.tcpTimeout", f"no effect: {NO_IPVS}"),
        ("ipvs: {tcpFinTimeout: 1s}", "ipvs.tcpFinTimeout", f"no effect: {NO_IPVS}"),
        ("ipvs: {udpTimeout: 1s}", "ipvs.udpTimeout", f"no effect: {NO_IPVS}"),
        ("conntrack: {maxPerCore: 1}", "conntrack.maxPerCore", f"no effect: {NO_CONNTRACK}"),
        ("conntrack: {min: 1}", "conntrack.min", f"no effect: {NO_CONNTRACK}"),
        ("conntrack: {tcpEstablishedTimeout: 1h}", "conntrack.tcpEstablishedTimeout", f"no effect: {NO_CONNTRACK}"),
        ("conntrack: {tcpCloseWaitTimeout: 1m}", "conntrack.tcpCloseWaitTimeout", f"no effect: {NO_CONNTRACK}"),
        ("mode: iptables", "mode", "proxyd always serves in user space, not by iptables"),
        ("mode: nftables", "mode", "proxyd always serves in user space, not by nftables"),
        ("detectLocalMode: BridgeInterface", "detectLocalMode", "Pods are not told by their interfaces; ClusterCIDR is used"),
        ("featureGates: {Magic: true}", "featureGates.Magic", "unknown feature gate: ignored"),
        ("winkernel: {sourceVip: 10.0.0.1}", "winkernel", "no effect: it is for Windows"),
    ],
)  # fmt: skip
def test_fields_that_are_warned_of(text, path, line):
    (warning,) = parse("c.yaml", (HEAD + text).encode()).warnings
    assert (warning.path, warning.message) == (path, line)


@pytest.mark.parametrize(
    "text",
    [
        "showHiddenMetricsForVersion: '1.18'",
        "clientConnection: {acceptContentTypes: a/b, contentType: a/b}",
        "iptables: {masqueradeBit: 14, masqueradeAll: true}",
        "nftables: {masqueradeBit: 14, masqueradeAll: true, syncPeriod: 1m, minSyncPeriod: 1s}",
        "ipvs: {syncPeriod: 1m, minSyncPeriod: 1s, scheduler: rr}",
        "conntrack: {maxPerCore: 32768, min: 131072, tcpEstablishedTimeout: 24h0m0s, tcpCloseWaitTimeout: 1h0m0s}",
        "conntrack: {tcpBeLiberal: true, udpTimeout: 1s, udpStreamTimeout: 1s, maxPerCore: 0}",
        "logging: {flushFrequency: 5000000000, options: {json: {infoBufferSize: '1'}}}",
        "featureGates: {AllAlpha: true, NFTablesProxyMode: true}",
    ],
)
def test_fields_that_are_accepted_silently(text):
    file = parse("c.yaml", (HEAD + text).encode())
    assert not file.warnings
    assert file.values.get("feature_gates", []) == []


def test_every_field_of_kube_proxy_is_known():
    # kubernetes staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go, 1.19 to 1.34
    fields = """
    bindAddress healthzBindAddress metricsBindAddress bindAddressHardFail enableProfiling clusterCIDR hostnameOverride mode
    detectLocalMode portRange showHiddenMetricsForVersion clientConnection.kubeconfig clientConnection.acceptContentTypes
    clientConnection.contentType clientConnection.qps clientConnection.burst iptables.masqueradeBit iptables.masqueradeAll
    iptables.syncPeriod iptables.minSyncPeriod iptables.localhostNodePorts ipvs.syncPeriod ipvs.minSyncPeriod ipvs.scheduler
    ipvs.excludeCIDRs ipvs.strictARP ipvs.tcpTimeout ipvs.tcpFinTimeout ipvs.udpTimeout nftables.masqueradeBit
    nftables.masqueradeAll nftables.syncPeriod nftables.minSyncPeriod conntrack.maxPerCore conntrack.min
    conntrack.tcpEstablishedTimeout conntrack.tcpCloseWaitTimeout conntrack.tcpBeLiberal conntrack.udpTimeout
    conntrack.udpStreamTimeout oomScoreAdj configSyncPeriod udpIdleTimeout nodePortAddresses featureGates winkernel
    detectLocal.bridgeInterface detectLocal.interfaceNamePrefix logging.format logging.flushFrequency logging.verbosity
    logging.options
    """.split()  # noqa: SIM905 - a list would take fifty lines  # fmt: skip
    assert set(fields) <= {".".join(path) for path in KUBE_PROXY}


def test_a_field_that_is_given_twice_is_read_leniently():
    file = parse("c.yaml", (HEAD + "bindAddress: 192.0.2.1\ncolour: red\nbindAddress: 192.0.2.2\n").encode())
    assert file.values == {"bind_address": "192.0.2.2"}
    assert [str(warning) for warning in file.warnings] == [
        "c.yaml:4:9: warning: colour: unknown field: ignored",
        'c.yaml:5:1: warning: the key "bindAddress" is given twice in this map: the last one counts',
    ]


def test_gates_that_proxyd_has_are_known_to_kubernetes():
    assert "SCTPSupport" in KUBERNETES_GATES
    assert {flag.name for flag in FLAGS if shared(flag)} >= {
        "config",
        "sync-period",
        "verbosity",
        "log-format",
    }
