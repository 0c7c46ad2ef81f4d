"""What others observe of the running program: health, metrics, its configuration, and the access log."""

from __future__ import annotations

import errno
import gzip
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import without_call
from tests.support.clients import ask, connect, lines_of, many, refused
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import NODE_IP, NODE_IP6, POD_PORT, Lab, Namespace, pod_ip
from tests.support.waiting import DEADLINE, wait_for

Run = Callable[..., Proxyd]
VIP = "10.96.0.10"
HEALTH, METRICS = 10256, 10249
CONFIG_HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
SHORT = ("--sync-period", "300ms")


class Answer:
    """Of one GET."""

    def __init__(
        self, namespace: Namespace, port: int, path: str, ip: str = "127.0.0.1", **headers: str
    ) -> None:
        client = http.client.HTTPConnection(ip, port, timeout=DEADLINE)
        client.sock = connect(namespace, ip, port)
        try:
            client.request("GET", path, headers=headers)
            response = client.getresponse()
            self.code = response.status
            self.headers = dict(response.getheaders())
            self.body = response.read()
        finally:
            client.close()

    def json(self) -> dict:
        return json.loads(self.body)


def metrics(namespace: Namespace) -> dict[str, float]:
    """Every sample, as `name{label="value"}` with the labels in order of name."""
    found = {}
    text = Answer(namespace, METRICS, "/metrics").body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def events(daemon: Proxyd, level: str = "") -> list[dict]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("level", level) == level or not level]


def has(daemon: Proxyd, text: str) -> Callable[[], bool]:
    return lambda: any(text in json.dumps(line) for line in events(daemon))


@pytest.fixture
def web(manifests: Path) -> None:
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1, 2))


@pytest.mark.usefixtures("web")
def test_what_kube_proxys_observers_ask(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(workers=2)
    daemon.wait_listener(VIP, 80)
    healthz = Answer(lab.node, HEALTH, "/healthz")
    assert (healthz.code, healthz.headers["Content-Type"]) == (200, "application/json")
    assert list(healthz.json()) == ["lastUpdated", "currentTime", "nodeEligible", "healthy", "status"]
    assert Answer(lab.outside, HEALTH, "/healthz", ip=NODE_IP).code == 200
    assert "nodeEligible" not in Answer(lab.node, HEALTH, "/livez").json()
    mode = Answer(lab.node, METRICS, "/proxyMode")
    assert (mode.code, mode.body, mode.headers["Content-Type"]) == (
        200,
        b"userspace",
        "text/plain; charset=utf-8",
    )
    assert Answer(lab.node, METRICS, "/healthz").body == b"ok"
    shown = Answer(lab.node, METRICS, "/configz").json()["kubeproxy.config.k8s.io"]
    assert shown["proxyd"]["workers"] == 2
    assert Answer(lab.node, METRICS, "/nothing").code == 404
    # Metrics are for the node itself.
    assert refused(lab.outside, NODE_IP, METRICS)


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]"])
@pytest.mark.parametrize("only_ipv6", ["0", "1"])
def test_health_is_answered_over_ipv4_and_ipv6(
    lab6: Lab, folder: Path, manifests: Path, address: str, only_ipv6: str
) -> None:
    """As by kube-proxy, for which both addresses mean every address, whatever the node's default for sockets is."""
    lab6.node.sysctl(net__ipv6__bindv6only=only_ipv6)
    with Proxyd(
        *(lab6.node, folder, manifests),
        flags=(f"--healthz-bind-address={address}", f"--metrics-bind-address={address}:10249"),
    ):
        for ip in (NODE_IP, NODE_IP6):
            wait_for(lambda ip=ip: not refused(lab6.outside, ip, HEALTH), "the health server")
            assert Answer(lab6.outside, HEALTH, "/healthz", ip=ip).code == 200
            assert Answer(lab6.outside, METRICS, "/proxyMode", ip=ip).body == b"userspace"


def test_health_is_answered_where_there_is_no_ipv6(lab: Lab, proxyd: Run) -> None:
    """In the kernel, or in a sandbox."""
    proxyd(before=(sys.executable, without_call.__file__, "ipv6", str(errno.EAFNOSUPPORT)))
    wait_for(lambda: not refused(lab.outside, NODE_IP, HEALTH), "the health server")
    assert Answer(lab.outside, HEALTH, "/healthz", ip=NODE_IP).code == 200


@pytest.mark.usefixtures("web")
def test_metrics_count_what_was_relayed(lab: Lab, folder: Path, manifests: Path, proxyd: Run) -> None:
    write(manifests / "empty.yaml", service("empty", "10.96.0.11"))
    daemon = proxyd(workers=2, flags=("--access-log", str(folder / "access.log")))
    daemon.wait_listener(VIP, 80)
    assert many(lab.node, VIP, 80, 10).total == 10
    name = 'namespace="default",port="",protocol="TCP",service="web"'
    held = connect(lab.node, VIP, 80)
    try:
        wait_for(lambda: metrics(lab.node)[f"proxyd_connections_active{{{name}}}"] == 1, "an open connection")
    finally:
        held.close()
    wait_for(lambda: metrics(lab.node)["proxyd_access_log_records_total"] == 11, "11 records")
    got = metrics(lab.node)
    assert got[f"proxyd_connections_total{{{name}}}"] == 11
    assert got[f"proxyd_connections_active{{{name}}}"] == 0
    ends = [f'endpoint="{pod_ip(number)}:{POD_PORT}",{name}' for number in (1, 2)]
    assert sum(got[f"proxyd_endpoint_connections_total{{{end}}}"] for end in ends) == 11
    assert all(got[f"proxyd_endpoint_connect_seconds_count{{{end}}}"] >= 4 for end in ends)
    assert all(got[f"proxyd_endpoint_connect_seconds_sum{{{end}}}"] > 0 for end in ends)
    records = [json.loads(line) for line in (folder / "access.log").read_text().splitlines()]
    for direction, counter in (("bytesIn", "received"), ("bytesOut", "sent")):
        total = sum(record[direction] for record in records)
        assert got[f"proxyd_{counter}_bytes_total{{{name}}}"] == total > 0
        assert sum(got[f"proxyd_endpoint_{counter}_bytes_total{{{end}}}"] for end in ends) == total
    assert {record["service"] for record in records} == {"default/web"}
    assert got['proxyd_listeners{state="Serving"}'] == 1
    assert got['proxyd_listeners{state="NoEndpoints"}'] == 1
    assert got['proxyd_worker_up{worker="1"}'] == 1
    assert got["proxyd_generation"] >= 1
    assert got["kubeproxy_sync_proxy_rules_duration_seconds_count"] >= 1
    packed = Answer(lab.node, METRICS, "/metrics", **{"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert b"\nproxyd_connections_total{" in gzip.decompress(packed.body)


@pytest.mark.usefixtures("web")
def test_a_killed_worker_is_counted(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(workers=1)
    daemon.wait_listener(VIP, 80)
    os.kill(daemon.worker_pids()[0], signal.SIGKILL)
    wait_for(lambda: metrics(lab.node)['proxyd_worker_restarts_total{worker="0"}'] == 1, "a restart")
    wait_for(lambda: metrics(lab.node)['proxyd_worker_up{worker="0"}'] == 1, "the worker back")
    wait_for(
        lambda: metrics(lab.node)['proxyd_worker_generation_lag{worker="0"}'] == 0, "it knows everything"
    )


@pytest.mark.usefixtures("web")
def test_a_worker_that_hangs_makes_it_unhealthy(lab: Lab, manifests: Path, proxyd: Run) -> None:
    daemon = proxyd(workers=1, flags=SHORT)
    daemon.wait_listener(VIP, 80)
    pid = daemon.worker_pids()[0]
    wait_for(lambda: unhealthy(lab.node) is None, "health")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert unhealthy(lab.node) is None
        write(manifests / "web.yaml", service("web", VIP), endpoints("web", 3))
        answer = wait_for(lambda: unhealthy(lab.node), "503")
        assert answer["healthy"] is False
        assert answer["lastUpdated"] < answer["currentTime"]
        assert answer["reasons"][0].startswith("a worker has not acknowledged a change for")
        assert metrics(lab.node)["proxyd_healthy"] == 0
        assert metrics(lab.node)['proxyd_worker_generation_lag{worker="0"}'] >= 1
    finally:
        with suppress(ProcessLookupError):  # it may have been replaced
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: unhealthy(lab.node) is None, "health")
    assert metrics(lab.node)['kubeproxy_proxy_healthz_total{code="503"}'] >= 1


def unhealthy(namespace: Namespace) -> dict | None:
    answer = Answer(namespace, HEALTH, "/healthz")
    assert answer.code in {200, 503}
    return answer.json() if answer.code == 503 else None


@pytest.mark.usefixtures("web")
def test_a_taken_address_is_tried_again(lab: Lab, proxyd: Run) -> None:
    taken = lab.node.listen("0.0.0.0", HEALTH)
    with taken:
        daemon = proxyd()
        daemon.wait_listener(VIP, 80)

        def told() -> list[dict]:
            return [
                line for line in events(daemon, "warning") if "an address of proxyd's own" in line["event"]
            ]

        # Who has it is asked first, over HTTP too.
        (line,) = wait_for(told, "a warning")
        assert (line["what"], line["address"]) == ("health", "0.0.0.0:10256")
        assert line["error"].endswith(f"(pid {os.getpid()}) has it")
        assert Answer(lab.node, METRICS, "/healthz").body == b"ok"
    wait_for(lambda: not refused(lab.node, "127.0.0.1", HEALTH), "the health server")
    assert Answer(lab.node, HEALTH, "/healthz").code == 200


@pytest.mark.usefixtures("web")
def test_a_taken_address_can_be_an_error(lab: Lab, folder: Path, manifests: Path) -> None:
    with lab.node.listen("127.0.0.1", METRICS):
        daemon = Proxyd(lab.node, folder, manifests, flags=("--bind-address-hard-fail",))
        try:
            assert daemon.start(wait=False).wait() == 1
        finally:
            daemon.__exit__()
    assert "the metrics address 127.0.0.1:10249 can't be opened: " in daemon.log()
    assert f"(pid {os.getpid()}) has it" in daemon.log()
    assert "Traceback" not in daemon.log()


@pytest.mark.usefixtures("web")
def test_both_servers_can_be_off(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd(flags=("--healthz-port", "0", "--metrics-bind-address", ""))
    daemon.wait_listener(VIP, 80)
    assert refused(lab.node, "127.0.0.1", HEALTH)
    assert refused(lab.node, "127.0.0.1", METRICS)


@pytest.mark.usefixtures("web")
def test_clients_that_say_nothing_do_not_keep_others_out(lab: Lab, proxyd: Run) -> None:
    daemon = proxyd()
    daemon.wait_listener(VIP, 80)

    def descriptors() -> int:
        return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))

    assert Answer(lab.node, HEALTH, "/livez").code == 200
    before = descriptors()
    idle: list[socket.socket] = []
    try:
        idle += [connect(lab.node, "127.0.0.1", HEALTH) for _ in range(250)]
        assert Answer(lab.node, HEALTH, "/livez").code == 200
        # 200 clients of one server, those that are being ended, and what answers take.
        assert descriptors() - before < 240
    finally:
        for sock in idle:
            sock.close()


@pytest.mark.usefixtures("web")
def test_the_configuration_is_read_again(lab: Lab, folder: Path, manifests: Path, proxyd: Run) -> None:
    write(manifests / "web.yaml", service("web", VIP, node_port=30080), endpoints("web", 1))
    path = write(
        folder / "config.yaml", CONFIG_HEAD + "nodePortAddresses: [127.0.0.0/8]\nproxyd: {drainTimeout: 3s}\n"
    )
    daemon = proxyd(flags=("--config", str(path)))
    daemon.wait_listener("127.0.0.1", 30080)
    assert daemon.find(NODE_IP, 30080) is None

    # The file changed.
    write(
        path,
        CONFIG_HEAD + "nodePortAddresses: []\nproxyd: {drainTimeout: 1s, workers: 4, tcpIdleTimeout: 9s}\n",
    )
    daemon.wait_listener(NODE_IP, 30080)
    wait_for(has(daemon, "restart needed for proxyd.tcpIdleTimeout"), "what needs a restart")
    shown = Answer(lab.node, METRICS, "/configz").json()["kubeproxy.config.k8s.io"]["proxyd"]
    # --workers was given as a flag, which wins.
    assert (shown["drainTimeout"], shown["tcpIdleTimeout"], shown["workers"]) == ("1s", "0s", 1)
    assert not has(daemon, "proxyd.workers")()

    # A wrong one changes nothing, and says where.
    write(path, CONFIG_HEAD + "nodePortAddresses: [web]\n")
    wait_for(has(daemon, f"{path}:3:20: error: nodePortAddresses: expected a CIDR"), "the error")
    wait_for(lambda: metrics(lab.node)["proxyd_config_last_reload_successful"] == 0, "the metric")
    assert ask(lab.outside, NODE_IP, 30080).startswith("pod-1")

    # SIGHUP reads it too; with -v the log tells more.
    write(path, CONFIG_HEAD + "proxyd: {drainTimeout: 1s, verbosity: 1}\n")
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: metrics(lab.node)["proxyd_config_last_reload_successful"] == 1, "a good configuration")
    wait_for(has(daemon, "proxyd.verbosity"), "the change")


@pytest.mark.usefixtures("web")
def test_a_wrong_configuration_at_the_start(lab: Lab, folder: Path, manifests: Path) -> None:
    path = write(folder / "config.yaml", CONFIG_HEAD + "proxyd:\n  workers: many\n  colour: red\n")
    daemon = Proxyd(lab.node, folder, manifests, flags=("--config", str(path)))
    try:
        assert daemon.start(wait=False).wait() == 3
    finally:
        daemon.__exit__()
    (line,) = daemon.log().splitlines()
    assert (
        line
        == f'proxyd: error: {path}:4:12: error: proxyd.workers: expected a number from 0 to 16, got "many"'
    )


@pytest.mark.usefixtures("web")
def test_the_access_log_is_reopened_on_sighup(lab: Lab, folder: Path, proxyd: Run) -> None:
    path = folder / "access.log"
    daemon = proxyd(flags=("--access-log", str(path)))
    daemon.wait_listener(VIP, 80)
    assert many(lab.node, VIP, 80, 3).total == 3
    wait_for(lambda: len(lines_of(path)) == 3, "3 lines")
    path.rename(folder / "access.log.1")
    daemon.signal(signal.SIGHUP)
    wait_for(path.exists, "a new file")
    assert many(lab.node, VIP, 80, 2).total == 2
    wait_for(lambda: len(lines_of(path)) == 2, "2 lines")
    assert (folder / "access.log.1").read_text().count("\n") == 3


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("where", ["/dev/full", "fifo"])
def test_a_log_that_takes_nothing_holds_nobody_up(lab: Lab, folder: Path, proxyd: Run, where: str) -> None:
    path = Path(where)
    reader = -1
    if where == "fifo":
        path = folder / "fifo"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        daemon = proxyd(flags=("--access-log", str(path)))
        daemon.wait_listener(VIP, 80)
        assert many(lab.node, VIP, 80, 300).total == 300
        if where == "/dev/full":
            wait_for(lambda: metrics(lab.node)["proxyd_access_log_dropped_total"] == 300, "300 lost records")
            errors = events(daemon, "error")
            assert [line["error"] for line in errors] == ["No space left on device"]
        assert Answer(lab.node, HEALTH, "/healthz").code == 200
        assert daemon.stop() == 0
    finally:
        if reader >= 0:
            os.close(reader)
