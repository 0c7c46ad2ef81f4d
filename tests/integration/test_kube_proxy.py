"""In kube-proxy's place: its command lines and ConfigMap start proxyd, its flags take effect, and what it left goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.host.other_proxies import neighbour
from tests.support.clients import ask, refused
from tests.support.clusterlab import API_PORT, NODE_1, NODE_2, Cluster, pod, wait_who, who
from tests.support.daemon import Proxyd
from tests.support.kube_proxy import KubeProxy, OtherKubeProxy, get, run_once, userspace_rules
from tests.support.manifests import endpoints, mount, service, write
from tests.support.netlab import NODE_FAR_IP, NODE_IP, POD_PORT, Lab, Namespace
from tests.support.waiting import DEADLINE, wait_for

Run = Callable[..., Proxyd]
VIP = "10.96.0.10"
HEALTH, METRICS = 10256, 10249
CAP_SYS_RESOURCE = 24  # linux/capability.h
USERSPACE_CHAINS = (
    "KUBE-PORTALS-CONTAINER",
    "KUBE-PORTALS-HOST",
    "KUBE-NODEPORT-CONTAINER",
    "KUBE-NODEPORT-HOST",
    "KUBE-NODEPORT-NON-LOCAL",
)
HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

# What kubeadm 1.25 mounts at /var/lib/kube-proxy, many zero values and all.
KUBEADM_CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
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
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
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
kind: KubeProxyConfiguration
metricsBindAddress: ""
mode: ""
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
udpIdleTimeout: 0s
winkernel:
  enableDSR: false
  networkName: ""
  sourceVip: ""
"""
KUBEADM_KUBECONFIG = f"""\
apiVersion: v1
kind: Config
clusters:
- cluster:
    server: http://{NODE_IP}:{API_PORT}
  name: default
contexts:
- context:
    cluster: default
    namespace: default
    user: default
  name: default
current-context: default
users:
- name: default
  user:
    tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token
"""


def container(mounted: Path, account: Path) -> tuple[str, ...]:
    """Executes a program as in a container of config/kubernetes.

    It has a /run and /var/lib of its own, with a ConfigMap and a service account's token and CA, and root has the
    capabilities that are always needed, and no others.
    """
    script = f"""
        mount -t tmpfs none /var/lib
        mkdir /var/lib/kube-proxy
        mount --bind {mounted} /var/lib/kube-proxy
        mount -t tmpfs none /run
        mkdir -p /run/secrets/kubernetes.io/serviceaccount
        mount --bind {account} /run/secrets/kubernetes.io/serviceaccount
        exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+net_admin,+net_bind_service,+net_raw "$0" "$@"
    """
    return ("unshare", "--mount", "--propagation", "private", "sh", "-ec", script)


@pytest.fixture
def cluster(lab: Lab, folder: Path) -> Iterator[Cluster]:
    """An API server that knows the Service web, of pod 1, with the NodePort 30080."""
    with Cluster(lab, folder) as made:
        made.add_nodes()
        port = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": POD_PORT, "nodePort": 30080}
        made.serve("web", VIP, pod(1), type="NodePort", ports=[port])
        yield made


def served(lab: Lab) -> None:
    """Wait until the Service answers, from the node, from a pod and at its NodePort."""
    wait_for(lambda: VIP in lab.node.run("ip", "route", "show", "table", "local"), "a route")
    wait_for(lambda: who(lab.node, VIP, count=1) == {"pod-1"}, "the Service")
    assert who(lab.client, VIP, count=1) == {"pod-1"}
    assert who(lab.outside, NODE_IP, 30080, count=1) == {"pod-1"}


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def allowed(score: int) -> int:
    """What a negative score becomes: lowering it needs CAP_SYS_RESOURCE, which root in a container often lacks."""
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return score if int(effective, 16) >> CAP_SYS_RESOURCE & 1 else oom_score(os.getpid())


def log_lines(daemon: Proxyd) -> list[dict]:
    return [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]


# Command lines


def test_kubeadms_configmap_and_command_line_start_it_unchanged(
    lab: Lab, folder: Path, cluster: Cluster
) -> None:
    lab.node.run("sh", "-c", userspace_rules("iptables-legacy", VIP, NODE_IP))
    mounted, account = folder / "mounted", folder / "account"
    mounted.mkdir()
    account.mkdir()
    (account / "token").write_text("token\n")
    (mounted / "config.conf").write_text(KUBEADM_CONFIG)
    (mounted / "kubeconfig.conf").write_text(KUBEADM_KUBECONFIG)
    flags = ("--config=/var/lib/kube-proxy/config.conf", f"--hostname-override={NODE_1}")
    with KubeProxy(lab.node, folder, *flags, prefix=container(mounted, account)) as daemon:
        served(lab)
        daemon.wait_healthy()
        assert daemon.ask(METRICS, "/proxyMode") == (200, "userspace")
        assert "KUBE-" not in lab.node.run("iptables-legacy-save")
        answer = daemon.ask(METRICS, "/configz")
        assert answer is not None
        config = json.loads(answer[1])["kubeproxy.config.k8s.io"]
        assert (config["clusterCIDR"], config["hostnameOverride"]) == ("10.244.0.0/16", NODE_1)
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert "CapEff:\t0000000000003400\n" in status
        # The ConfigMap changes: kube-proxy would exit, this goes on.
        (mounted / "config.conf").write_text(
            KUBEADM_CONFIG.replace("nodePortAddresses: null", "nodePortAddresses: [primary]")
        )
        wait_for(
            lambda: not who(lab.outside, NODE_IP, 30080, count=1) - {""},
            "another NodePort address",
        )
        assert who(lab.outside, NODE_FAR_IP, 30080, count=1) == {"pod-1"}
    assert "warning" not in daemon.log().split("{")[0]


def test_in_a_pod_without_a_kubeconfig(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is that of the Pod, by TLS; its token is replaced as the kubelet does, and the old one is void."""
    pki, account = folder / "pki", folder / "account"
    pki.mkdir()
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", pki / "server.key")
    names = ("-subj", "/CN=kubernetes", "-addext", f"subjectAltName=IP:{NODE_IP}")
    openssl = ("openssl", "req", "-x509", *key, *names, "-days", "2", "-out", pki / "server.crt")
    subprocess.run(openssl, check=True, capture_output=True, timeout=DEADLINE)
    shutil.copyfile(pki / "server.crt", pki / "ca.crt")

    def give(token: str) -> None:
        mount(account, {"token": token, "ca.crt": (pki / "ca.crt").read_text()})
        beside = pki / "token.new"  # the server reads it with each request: it must never be half
        beside.write_text(token)
        beside.rename(pki / "token")

    give("first")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", NODE_IP)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(API_PORT))
    with Cluster(lab, folder, pki=pki) as cluster:
        cluster.add_nodes()
        cluster.serve("web", VIP, pod(1))
        prefix = container(account, account)
        with KubeProxy(lab.node, folder, f"--hostname-override={NODE_1}", prefix=prefix) as daemon:
            wait_who(lab.client, VIP, {"pod-1"})
            daemon.wait_healthy()
            for number, token in ((2, "second"), (3, "third")):
                give(token)
                cluster.request("POST", "/_test/cut", {})
                cluster.endpoints("web", pod(number))
                wait_who(lab.client, VIP, {f"pod-{number}"})
            assert f"https://{NODE_IP}:{API_PORT}" in daemon.log()
        said = [line for line in daemon.log().splitlines() if line.startswith("{")]
        assert said
        assert not any(
            "401" in json.loads(line)["event"] for line in said
        )  # a token that is void is read again, without a word


def test_gces_command_line_starts_it_unchanged(lab: Lab, folder: Path, cluster: Cluster) -> None:
    flags = (
        f"--master=http://{NODE_IP}:{API_PORT}",
        f"--kubeconfig={cluster.kubeconfig('192.0.2.1')}",  # --master wins
        "--cluster-cidr=10.244.0.0/14",
        "--oom-score-adj=-998",
        "--v=2",
        "--feature-gates=ExperimentalCriticalPodAnnotation=true",
        "--iptables-sync-period=1m",
        "--iptables-min-sync-period=10s",
        "--ipvs-sync-period=1m",
        "--ipvs-min-sync-period=10s",
    )
    with KubeProxy(lab.node, folder, *flags) as daemon:
        served(lab)
        daemon.wait_healthy()
        for pid in (daemon.pid, *daemon.workers()):
            assert oom_score(pid) == allowed(-998)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(DEADLINE) == 0
    assert "warning" not in daemon.log().split("{")[0]


# Effects of flags


def web(manifests: Path) -> None:
    """A Service of pod 1, with the NodePort 30080."""
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))


def test_qps_and_burst_limit_what_the_api_server_is_asked(lab: Lab, folder: Path, cluster: Cluster) -> None:
    limits = ("--kube-api-qps=0.001", "--kube-api-burst=1")
    with KubeProxy(lab.node, folder, f"--kubeconfig={cluster.kubeconfig()}", *limits) as limited:

        def requests() -> float:
            answer = limited.ask(METRICS, "/metrics")
            lines = answer[1].splitlines() if answer else []
            return sum(
                float(line.split()[-1]) for line in lines if line.startswith("rest_client_requests_total{")
            )

        # The second may go after a quarter of an hour.
        wait_for(lambda: requests() == 1, "the first request")
        assert requests() == 1
        assert VIP not in lab.node.run("ip", "route", "show", "table", "local")


def test_changes_are_spaced_and_the_last_one_counts(proxyd: Run, lab: Lab, manifests: Path) -> None:
    spacing = 0.5
    web(manifests)
    daemon = proxyd(flags=("--iptables-min-sync-period", "500ms"))

    def turns() -> float:
        answer = get(lab.node, METRICS, "/metrics")
        assert answer is not None
        lines = answer[1].splitlines()
        return next(
            float(line.split()[-1])
            for line in lines
            if line.startswith("kubeproxy_sync_proxy_rules_duration_seconds_count")
        )

    began = time.monotonic()
    before = turns()
    for number in range(30):
        name = f"s{number}"
        write(manifests / "more.yaml", service(name, f"10.96.1.{number + 1}"), endpoints(name, 1))
        time.sleep(0.05)  # apart enough to be seen one by one
    daemon.wait_listener("10.96.1.30", 80)
    made = turns() - before
    assert 1 <= made <= (time.monotonic() - began) / spacing + 2


def test_everything_is_planned_anew_now_and_then(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    daemon = proxyd(flags=("--config-sync-period", "200ms", "--profiling", "-v4"))
    wait_for(lambda: daemon.log().count("planning everything anew") >= 3, "three renewals")
    assert ask(lab.node, VIP, 80) == "pod-1"


def test_nodeports_stay_off_loopback_where_that_is_wanted(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    daemon = proxyd(flags=("--iptables-localhost-nodeports=false",))
    daemon.wait_listener(NODE_IP, 30080)
    assert ask(lab.outside, NODE_IP, 30080) == "pod-1"
    assert refused(lab.node, "127.0.0.1", 30080)


def test_profiles_are_there_only_where_asked_for(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    daemon = proxyd(flags=("--profiling",))
    stacks = get(lab.node, METRICS, "/debug/stacks")
    assert stacks is not None
    assert stacks[0] == 200
    assert "task sources:" in stacks[1] or "task source" in stacks[1]
    profile = get(lab.node, METRICS, "/debug/profile?seconds=0.2")
    assert profile is not None
    code, text = profile
    assert code == 200
    assert any(line.rpartition(" ")[2].isdigit() and ";" in line for line in text.splitlines())
    assert (get(lab.node, METRICS, "/debug/profile?seconds=never") or (0,))[0] == 400
    assert (get(lab.node, METRICS, "/debug/pprof/") or (0,))[0] == 200
    assert daemon.stop() == 0
    proxyd()
    assert (get(lab.node, METRICS, "/debug/stacks") or (0,))[0] == 404


def test_the_log_goes_to_a_file_that_can_be_rotated(
    proxyd: Run, lab: Lab, manifests: Path, folder: Path
) -> None:
    web(manifests)
    log = folder / "kube-proxy.log"
    daemon = proxyd(flags=("--log-file", str(log), "--logging-format=json"))
    log.rename(folder / "old.log")
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: log.exists() and "reloading" not in log.read_text(), "a new file")
    assert daemon.stop() == 0
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["stopping"]
    assert "reloading" in (folder / "old.log").read_text()
    assert daemon.log() == ""


def test_one_part_alone_logs_more(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    daemon = proxyd(flags=("--vmodule=none=9,proxy*=4", "--config-sync-period=200ms"))
    wait_for(lambda: "planning everything anew" in daemon.log(), "debug lines of that part")
    assert {line["room"] for line in log_lines(daemon) if line["level"] == "debug"} == {"proxyd"}
    daemon.log_file.unlink()
    assert daemon.stop() == 0
    everything = proxyd(flags=("-v4",))
    wait_for(lambda: '"room":"supervisor"' in everything.log(), "debug lines of other parts")


def test_a_score_is_given_to_all_processes(proxyd: Run, manifests: Path) -> None:
    web(manifests)
    mine = oom_score(os.getpid())
    daemon = proxyd(flags=(f"--oom-score-adj={mine + 1}",))
    assert {oom_score(pid) for pid in (daemon.pid, *daemon.worker_pids())} == {mine + 1}
    assert daemon.stop() == 0
    # It is left alone where nobody asks, and there is no cluster.
    assert oom_score(proxyd().pid) == mine


def test_a_score_that_cannot_be_set_is_no_reason_not_to_serve(
    lab: Lab, folder: Path, manifests: Path
) -> None:
    web(manifests)
    flags = ("--oom-score-adj=-1000", "--vip-mode=none")
    with Proxyd(lab.node, folder, manifests, flags=flags, unprivileged=True) as daemon:
        (line,) = [line for line in log_lines(daemon) if "oom_score_adj" in line["event"]]
        assert (line["wanted"], line["reason"]) == (-1000, "permission denied")
        assert ask(lab.outside, NODE_IP, 30080) == "pod-1"


# Taking over


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_the_userspace_modes_chains_give_way(lab: Lab, folder: Path, cluster: Cluster, iptables: str) -> None:
    lab.node.run("sh", "-c", userspace_rules(iptables, VIP, NODE_IP))
    lab.node.run("sh", "-c", userspace_rules(iptables.replace("ip", "ip6", 1), "fd00::10", "fd00:10:244::1"))
    lab.node.run(iptables, "-w", "-t", "nat", "-N", "MINE")
    flags = (
        f"--kubeconfig={cluster.kubeconfig()}",
        f"--hostname-override={NODE_1}",
        "--proxy-mode=userspace",
    )
    with KubeProxy(lab.node, folder, *flags) as daemon:
        served(lab)
        daemon.wait_healthy()
        assert "removed chains of kube-proxy's userspace mode" in daemon.log()
        for program in (iptables, iptables.replace("ip", "ip6", 1)):
            for table in ("nat", "filter"):
                assert "KUBE-" not in lab.node.run(f"{program}-save", "-t", table)
        assert "MINE" in lab.node.run(f"{iptables}-save", "-t", "nat")


@pytest.mark.parametrize(
    "flags",
    [("--cleanup-kube-proxy=never", "--proxy-mode=userspace"), ("--proxy-mode=iptables",)],
    ids=["never", "iptables mode"],
)
def test_chains_that_are_not_to_be_removed_are_named(
    lab: Lab, folder: Path, cluster: Cluster, flags: tuple[str, ...]
) -> None:
    lab.node.run("sh", "-c", userspace_rules("iptables-nft", "192.0.2.1", NODE_IP))
    with cluster.proxyd(NODE_1, *flags) as daemon:
        found = [line for line in log_lines(daemon) if line["event"].startswith("kube-proxy left rules")]
        assert {line["remove_with"] for line in found} == {"proxyd cleanup --kube-proxy"}
        assert {line["mode"] for line in found} == {"userspace"}
        named = " ".join(line["what"] for line in found)
        assert all(chain in named for chain in USERSPACE_CHAINS)
    assert lab.node.run("iptables-nft-save", "-t", "nat").count("KUBE-PORTALS-HOST") >= 2


def test_leftovers_of_the_other_modes_are_named_and_stay(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    lab.node.run(
        "sh",
        "-ec",
        "for p in iptables-nft ip6tables-legacy; do $p -t nat -N KUBE-SERVICES; $p -t nat -N KUBE-SVC-A; done",
    )
    lab.node.run("nft", "add table ip kube-proxy; add chain ip kube-proxy services")
    lab.node.ip("link add name kube-ipvs0 type bridge")
    daemon = proxyd(flags=("--cleanup-kube-proxy=always",))
    found = {
        (line["mode"], line["what"], line["remove_with"])
        for line in log_lines(daemon)
        if line["event"].startswith("kube-proxy left rules")
    }
    assert found == {
        ("iptables", "nft table ip nat: KUBE-SERVICES, KUBE-SVC-A", "kube-proxy --cleanup"),
        ("iptables", "ip6tables (legacy) table nat: KUBE-SERVICES, KUBE-SVC-A", "kube-proxy --cleanup"),
        ("nftables", "nft table ip kube-proxy: services", "nft delete table ip kube-proxy"),
        (
            "IPVS",
            "interface kube-ipvs0: virtual servers of IPVS",
            "ipvsadm --clear; ip link delete kube-ipvs0",
        ),
    }
    assert "KUBE-SERVICES" in lab.node.run("iptables-nft-save", "-t", "nat")


def test_without_a_cluster_chains_are_only_named(proxyd: Run, lab: Lab, manifests: Path) -> None:
    web(manifests)
    lab.node.run("iptables-nft", "-t", "nat", "-N", "KUBE-PORTALS-HOST")
    daemon = proxyd()
    assert any(line.get("mode") == "userspace" for line in log_lines(daemon))
    assert "KUBE-PORTALS-HOST" in lab.node.run("iptables-nft-save", "-t", "nat")


def test_a_kube_proxy_that_still_runs_is_told_of_and_keeps_its_chains_until_it_ends(
    lab: Lab, folder: Path, cluster: Cluster
) -> None:
    lab.node.run("iptables-nft", "-t", "nat", "-N", "KUBE-PORTALS-HOST")
    with OtherKubeProxy(lab.node, folder, METRICS, HEALTH) as other, cluster.proxyd(NODE_1) as daemon:
        wait_for(lambda: daemon.log().count("tried again every 5 s") >= 2, "both addresses")
        lines = log_lines(daemon)
        (running,) = [line for line in lines if line["event"].startswith("a kube-proxy still runs")]
        assert running["running"] == f"kube-proxy (kube-proxy (pid {other.pid}))"
        held = {line["what"]: line["error"] for line in lines if "can't be opened" in line["event"]}
        advice = "stop it: two proxies on a node want the same addresses"
        assert (
            held["metrics"] == f"kube-proxy in userspace mode (kube-proxy (pid {other.pid})) has it; {advice}"
        )
        assert held["health"] == f"kube-proxy (kube-proxy (pid {other.pid})) has it; {advice}"
        assert "KUBE-PORTALS-HOST" in lab.node.run("iptables-nft-save", "-t", "nat")
        # Only then: until it has ended its chains serve.
        other.end()
        wait_for(lambda: "removed chains of kube-proxy's" in daemon.log(), "the chains to go")
        assert "KUBE-PORTALS-HOST" not in lab.node.run("iptables-nft-save", "-t", "nat")
        daemon.wait_listener(VIP, 80)


def test_who_holds_an_address_is_told(proxyd: Run, lab: Lab, manifests: Path) -> None:
    def who_has(port: int, node: Namespace = lab.node) -> str:
        return str(node.call(neighbour, ("0.0.0.0", port)))

    web(manifests)
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)
    for port in (HEALTH, METRICS):
        wait_for(lambda port=port: who_has(port).startswith("another proxyd (python"), "an answer")
    assert lab.node.call(neighbour, ("127.0.0.1", 9)) is None
    with lab.node.listen("127.0.0.1", 8001):  # of this process, which does not answer
        assert f"(pid {os.getpid()})" in str(lab.node.call(neighbour, ("127.0.0.1", 8001)))


# Orders


def test_cleanup_removes_proxyds_state_and_the_userspace_modes_chains(
    lab: Lab, folder: Path, manifests: Path
) -> None:
    web(manifests)
    with Proxyd(lab.node, folder, manifests) as daemon:
        daemon.wait_listener(VIP, 80)
        daemon.process.kill()
        daemon.wait()
    lab.node.run("sh", "-c", userspace_rules("iptables-nft", VIP, NODE_IP))
    lab.node.run("iptables-nft", "-t", "nat", "-N", "KUBE-SERVICES")
    assert VIP in lab.node.run("ip", "route", "show", "table", "local")
    done = run_once(
        lab.node, folder, "--cleanup", "--cleanup-ipvs=false", "--admin-socket", str(folder / "none.sock")
    )
    assert done.returncode == 0, done.stdout
    assert "removed 1 VIP route" in done.stdout
    assert VIP not in lab.node.run("ip", "route", "show", "table", "local")
    left = lab.node.run("iptables-nft-save")
    assert not any(chain in left for chain in USERSPACE_CHAINS)
    assert "KUBE-SERVICES" in left
    assert "kube-proxy left nft table ip nat: KUBE-SERVICES; `kube-proxy --cleanup` removes it" in done.stdout


def test_init_only_does_what_needs_rights_and_ends(lab: Lab, folder: Path, cluster: Cluster) -> None:
    lab.node.run("sh", "-c", userspace_rules("iptables-nft", VIP, NODE_IP))
    config = folder / "c.yaml"
    config.write_text(f"{HEAD}clientConnection: {{kubeconfig: {cluster.kubeconfig()}}}\n")
    done = run_once(lab.node, folder, f"--config={config}", "--init-only")
    assert done.returncode == 0, done.stdout
    assert "removed chains of kube-proxy's userspace mode" in done.stdout
    assert "KUBE-" not in lab.node.run("iptables-nft-save")


# Whose traffic is the cluster's own

BALANCER_IP = "203.0.113.77"  # nobody's


def answer(place: Namespace) -> str:
    """Who answers at the load balancer's address; "" where the connection is refused or reset."""
    try:
        return ask(place, BALANCER_IP, 80, timeout=5)
    except ConnectionError:
        return ""


@pytest.mark.parametrize("flag", ["--cluster-cidr=10.244.0.0/16", "--detect-local-mode=NodeCIDR"])
def test_pods_reach_a_local_only_service_whose_endpoints_are_elsewhere(
    lab: Lab, folder: Path, cluster: Cluster, flag: str
) -> None:
    node = cluster.request("GET", "/api/v1/nodes/" + NODE_1)
    cluster.request("PUT", "/api/v1/nodes/" + NODE_1, {**node, "spec": {"podCIDRs": ["10.244.0.0/24"]}})
    shut = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    cluster.serve("far", "10.96.0.20", pod(2, node=NODE_2), ingress=[{"ip": BALANCER_IP}], **shut)
    with cluster.proxyd(NODE_1, flag) as daemon:
        daemon.wait_listener(BALANCER_IP, 80)
        assert who(lab.client, BALANCER_IP, count=3) == {"pod-2"}
        assert who(lab.node, BALANCER_IP, count=3) == {"pod-2"}
        # From elsewhere it comes only while the load balancer has not noticed: it goes to another node.
        lab.outside.ip(f"route add {BALANCER_IP}/32 via {NODE_IP}")
        assert answer(lab.outside) == ""
        # An endpoint on this node: the policy as ever.
        cluster.endpoints("far", pod(1), pod(2, node=NODE_2))
        wait_for(lambda: answer(lab.outside) == "pod-1", "pod-1")
        assert who(lab.client, BALANCER_IP, count=4) == {"pod-1"}


def test_without_the_pods_range_nobody_reaches_it(lab: Lab, folder: Path, cluster: Cluster) -> None:
    shut = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    cluster.serve("far", "10.96.0.20", pod(2, node=NODE_2), ingress=[{"ip": BALANCER_IP}], **shut)
    with cluster.proxyd(NODE_1) as daemon:
        daemon.wait_listener(BALANCER_IP, 80, "NoEndpoints")
        assert who(lab.client, BALANCER_IP, count=2) == {""}
