"""proxyd behind an API server: beside manifests, while the server is away, and what others observe of it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support import manifests as written
from tests.support.clients import Load, ask, refused
from tests.support.clusterlab import NODE_1, Body, Cluster, pod, service, slice_of, wait_who
from tests.support.daemon import Proxyd
from tests.support.manifests import write
from tests.support.netlab import NODE_FAR_IP, NODE_IP, Lab, Namespace
from tests.support.service_manager import Manager
from tests.support.waiting import DEADLINE, wait_for

VIP, OTHER_VIP = "10.96.0.10", "10.96.0.20"
P1, P2, P3 = "pod-1", "pod-2", "pod-3"
NOBODY = {""}


@pytest.fixture
def cluster(lab: Lab, folder: Path) -> Iterator[Cluster]:
    """A running API server with the Nodes."""
    with Cluster(lab, folder) as running:
        running.add_nodes()
        yield running


def operate(cluster: Cluster, operation: str) -> None:
    """An order to the API server as such."""
    cluster.request("POST", f"/_test/{operation}", {})


def events(cluster: Cluster, reason: str) -> list[Body]:
    items = cluster.request("GET", cluster._path("events"))["items"]
    return [item for item in items if item["reason"] == reason]


def problems(daemon: Proxyd) -> list[str]:
    status = daemon._ask("status")
    assert status is not None
    return [f"{one['subject']}: {one['message']}" for one in status["problems"]]


def fetch(place: Namespace, port: int, path: str, ip: str = "127.0.0.1") -> tuple[int, str]:
    """Status and body of a GET."""

    def get() -> tuple[int, str]:
        connection = http.client.HTTPConnection(ip, port, timeout=DEADLINE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return place.call(get)


def metric(place: Namespace, name: str) -> float:
    """The sum of a metric's series."""
    text = fetch(place, 10249, "/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def said(daemon: Proxyd, text: str) -> int:
    """How often the log has a line with this."""
    return sum(text in line for line in daemon.log().splitlines())


# Manifests beside a cluster


def test_nothing_is_opened_before_every_source_has_been_read(lab: Lab, folder: Path, manifests: Path) -> None:
    write(manifests / "mine.yaml", written.service("mine", OTHER_VIP), written.endpoints("mine", 2))
    cluster = Cluster(lab, folder)
    daemon = cluster.proxyd(NODE_1, manifests=[manifests])
    daemon.start(wait=False)
    try:
        wait_for(lambda: said(daemon, "API server") >= 1, "it to miss the API server")
        status = wait_for(lambda: daemon._ask("status"), "an answer")
        assert status["phase"] == "starting"
        assert [source["synced"] for source in status["sources"]] == [True, False]
        assert [source["name"] for source in status["sources"]] == [
            f"manifests {manifests}",
            f"kube http://{NODE_IP}:6443",
        ]
        assert "not synced yet" in daemon.cli("status").stdout
        assert daemon.get("listeners") == []
        assert lab.node.run("ip", "route", "show", "table", "local", "proto", "112") == ""
        # A change of the manifests is not opened either.
        write(manifests / "mine.yaml", written.service("mine", VIP), written.endpoints("mine", 2))
        with cluster:
            cluster.add_nodes()
            cluster.serve("web", OTHER_VIP, pod(1))
            wait_who(lab.client, OTHER_VIP, {P1})
            wait_who(lab.client, VIP, {P2})
            assert all(source["synced"] for source in daemon.status()["sources"])
            assert daemon.status()["phase"] == "serving"
            assert daemon.stop() == 0
    finally:
        daemon.__exit__()


def test_what_a_killed_daemon_left_stays_until_the_lists_are_there(cluster: Cluster, lab: Lab) -> None:
    def routes() -> str:
        return lab.node.run("ip", "route", "show", "table", "local", "proto", "112")

    cluster.serve("web", VIP, pod(1))
    cluster.serve("gone", OTHER_VIP, pod(1))
    with cluster.proxyd(NODE_1) as daemon:
        wait_who(lab.client, VIP, {P1})
        wait_who(lab.client, OTHER_VIP, {P1})
        daemon.process.kill()
        daemon.wait()
        cluster.delete("services", "gone")
        cluster.kill()
        before = routes()
        assert VIP in before
        assert OTHER_VIP in before
        daemon.start(wait=False)
        wait_for(lambda: daemon._ask("status"), "an answer")
        assert routes() == before
        cluster.start()
        wait_who(lab.client, VIP, {P1})
        wait_for(lambda: OTHER_VIP not in routes(), "what is not wanted any more to go")


def test_a_service_manager_waits_with_it(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(lab, folder)
    with Manager(folder) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        daemon = cluster.proxyd(NODE_1).start(wait=False)
        try:
            first = manager.wait("EXTEND_TIMEOUT_USEC", "60000000")
            assert first["STATUS"] == f"waiting for the first list of kube http://{NODE_IP}:6443"
            manager.wait("EXTEND_TIMEOUT_USEC", "60000000", count=2)
            assert not any("READY" in message for message in manager.read())
            with cluster:
                cluster.serve("web", VIP, pod(1))
                ready = manager.wait("READY", "1")
                assert "EXTEND_TIMEOUT_USEC" not in ready
                assert ask(lab.client, VIP, 80) == P1
        finally:
            daemon.__exit__()


def test_of_one_name_the_clusters_service_is_served(cluster: Cluster, lab: Lab, manifests: Path) -> None:
    write(manifests / "web.yaml", written.service("web", OTHER_VIP), written.endpoints("web", 2))
    write(manifests / "more.yaml", written.service("more", "10.96.0.30"), written.endpoints("more", 3))
    cluster.serve("web", VIP, pod(1))
    with cluster.proxyd(NODE_1, manifests=[manifests]) as daemon:
        wait_who(lab.client, VIP, {P1})
        wait_who(lab.client, "10.96.0.30", {P3})
        assert [one["name"] for one in daemon.get("services")] == ["more", "web"]
        (problem,) = problems(daemon)
        assert problem.startswith("Service default/web: the cluster has a Service of this name")
        assert said(daemon, "the cluster has a Service of this name") == 1
        # Its endpoints in the manifests mean nothing either, and come into force with it.
        cluster.endpoints("web")
        wait_who(lab.client, VIP, NOBODY)
        cluster.delete("services", "web")
        wait_who(lab.client, OTHER_VIP, {P2})
        assert problems(daemon) == []
        cluster.create("services", service("web", VIP))
        cluster.endpoints("web", pod(3))
        wait_who(lab.client, VIP, {P3})
        assert daemon.find(OTHER_VIP, 80) is None


def test_what_the_cluster_has_is_not_handed_out(cluster: Cluster, lab: Lab, manifests: Path) -> None:
    ranges = ("--service-cluster-ip-range", "10.96.0.0/29", "--service-node-port-range", "30000-30002")
    for number in (1, 2, 3, 4):
        ports = [{"name": "http", "port": 80, **({"nodePort": 30000} if number == 1 else {})}]
        kind = "NodePort" if number == 1 else "ClusterIP"
        cluster.serve(f"theirs-{number}", f"10.96.0.{number}", pod(1), ports=ports, type=kind)
    write(manifests / "mine.yaml", written.service("mine", type="NodePort"), written.endpoints("mine", 2))

    def mine(daemon: Proxyd) -> tuple[str, int]:
        entry = next(one for one in daemon.get("services") if one["name"] == "mine")
        return entry["clusterIps"][0], entry["ports"][0]["nodePort"]

    with cluster.proxyd(NODE_1, *ranges, manifests=[manifests]) as daemon:
        ip, port = mine(daemon)
        assert ip in {"10.96.0.5", "10.96.0.6"}
        assert port in {30001, 30002}
        wait_who(lab.client, ip, {P2})
        # The cluster comes to use both: what was handed out moves, and is remembered.
        ports = [{"name": "http", "port": 80, "nodePort": port}]
        cluster.serve("late", ip, pod(3), ports=ports, type="NodePort")
        wait_who(lab.client, ip, {P3})
        wait_who(lab.client, NODE_IP, {P3}, port)
        wait_for(lambda: mine(daemon)[0] != ip and mine(daemon)[1] != port, "other allocations")
        moved = mine(daemon)
        wait_who(lab.client, moved[0], {P2})
        wait_who(lab.client, NODE_IP, {P2}, moved[1])
        assert problems(daemon) == []
        assert daemon.stop() == 0
        daemon.start()
        assert mine(daemon) == moved


def test_manifests_and_cluster_change_by_themselves(cluster: Cluster, lab: Lab, manifests: Path) -> None:
    write(manifests / "mine.yaml", written.service("mine", OTHER_VIP), written.endpoints("mine", 2))
    cluster.serve("web", VIP, pod(1))
    with cluster.proxyd(NODE_1, manifests=[manifests]) as daemon:
        wait_who(lab.client, VIP, {P1})
        with Load(lab.client, VIP, 80) as load:
            write(manifests / "mine.yaml", written.service("mine", OTHER_VIP), written.endpoints("mine", 3))
            wait_who(lab.client, OTHER_VIP, {P3})
            (manifests / "mine.yaml").unlink()
            wait_for(lambda: daemon.find(OTHER_VIP, 80) is None, "mine to be gone")
            load.wait_more(5)
        assert (load.outcome.refused, load.outcome.broken) == ([], [])
        assert daemon.cli("reload").returncode == 0
        write(manifests / "mine.yaml", written.service("mine", OTHER_VIP), written.endpoints("mine", 1))
        cluster.endpoints("web", pod(2))
        wait_who(lab.client, OTHER_VIP, {P1})
        wait_who(lab.client, VIP, {P2})


# The API server


def test_while_the_api_server_is_away_everything_is_served(cluster: Cluster, lab: Lab) -> None:
    cluster.serve("web", VIP, pod(1), pod(2))
    with cluster.proxyd(NODE_1) as daemon:
        wait_who(lab.client, VIP, {P1, P2})
        with Load(lab.client, VIP, 80) as load:
            cluster.kill()
            wait_for(lambda: problems(daemon), "it to miss the API server")
            assert all(one.startswith("API server") for one in problems(daemon))
            told = said(daemon, "warning: API server")
            load.wait_more(20)
            assert daemon.status()["sources"][0]["synced"]
            cluster.start()
            cluster.endpoints("web", pod(3))
            wait_who(lab.client, VIP, {P3})
            wait_for(lambda: not problems(daemon), "no problem")
        assert (load.outcome.refused, load.outcome.broken) == ([], [])
        # Once for each thing that was wrong, however often it was tried.
        assert told <= said(daemon, "warning: API server") <= 6
        assert said(daemon, "answers again after") == 1


def test_a_relist_of_the_same_state_changes_nothing(cluster: Cluster, lab: Lab) -> None:
    for number in range(20):
        cluster.serve(f"web-{number}", f"10.96.1.{number + 1}", pod(1))
    with cluster.proxyd(NODE_1) as daemon:
        wait_who(lab.client, "10.96.1.20", {P1})
        wait_for(lambda: daemon.status()["listeners"].get("Serving") == 20, "all listeners")
        lists = metric(lab.node, "proxyd_cluster_lists_total")
        before = daemon.status()["generation"]
        operate(cluster, "compact")
        cluster.kill()
        cluster.start()
        operate(cluster, "compact")
        operate(cluster, "cut")
        wait_for(lambda: metric(lab.node, "proxyd_cluster_lists_total") >= lists + 2, "two lists")
        assert daemon.status()["generation"] == before
        # It follows from where the lists left off.
        cluster.endpoints("web-19", pod(2))
        wait_who(lab.client, "10.96.1.20", {P2})
        assert daemon.status()["generation"] == before + 1


def test_a_proxy_name_takes_its_own_services_only(cluster: Cluster, lab: Lab) -> None:
    label = "service.kubernetes.io/service-proxy-name"
    cluster.serve("mine", VIP, pod(1), labels={label: "edge"})
    cluster.serve("theirs", OTHER_VIP, pod(2))
    with cluster.proxyd(NODE_1, "--service-proxy-name", "edge") as daemon:
        wait_who(lab.client, VIP, {P1})
        assert [one["name"] for one in daemon.get("services")] == ["mine"]
        cluster.patch("services", "theirs", {"metadata": {"labels": {label: "edge"}}})
        wait_who(lab.client, OTHER_VIP, {P2})
        cluster.patch("services", "mine", {"metadata": {"labels": {label: "another"}}})
        wait_for(lambda: [one["name"] for one in daemon.get("services")] == ["theirs"], "theirs alone")


def test_a_kubeconfig_that_cannot_be_used_is_one_line(cluster: Cluster) -> None:
    daemon = cluster.proxyd(NODE_1)
    path = cluster.kubeconfig()
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "current-context": "elsewhere"}))
    daemon.start(wait=False)
    try:
        assert daemon.wait() == 3
    finally:
        daemon.__exit__()
    assert 'there is no "elsewhere" among `contexts`' in daemon.log()
    assert "Traceback" not in daemon.log()


# What others observe


def test_the_times_that_changes_take_are_measured(cluster: Cluster, lab: Lab) -> None:
    name = "kubeproxy_network_programming_duration_seconds"

    def changed(*pods: int) -> None:
        made = slice_of("web", *map(pod, pods))
        now = datetime.now(UTC).isoformat()
        made["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": now}
        cluster.replace("endpointslices", "web-1", made)

    cluster.serve("web", VIP, pod(1))
    with cluster.proxyd(NODE_1):
        wait_who(lab.client, VIP, {P1})
        assert metric(lab.node, f"{name}_count") == 0
        changed(2)
        wait_who(lab.client, VIP, {P2})
        wait_for(lambda: metric(lab.node, f"{name}_count") == 1, "one change")
        changed(2, 3)
        wait_who(lab.client, VIP, {P2, P3})
        wait_for(lambda: metric(lab.node, f"{name}_count") == 2, "two changes")
        assert 0 < metric(lab.node, f"{name}_sum") < 60
        assert metric(lab.node, "rest_client_requests_total") >= 5
        assert metric(lab.node, "rest_client_request_duration_seconds_count") >= 5
        assert metric(lab.node, "kubernetes_build_info") == 1


def test_a_deleted_node_is_not_eligible(cluster: Cluster, lab: Lab) -> None:
    def health(path: str) -> tuple[int, Any]:
        status, body = fetch(lab.node, 10256, path)
        return status, json.loads(body).get("nodeEligible")

    with cluster.proxyd(NODE_1):
        wait_for(lambda: health("/healthz") == (200, True), "a healthy node")
        cluster.delete("nodes", NODE_1)
        wait_for(lambda: health("/healthz") == (503, False), "an unhealthy node")
        assert health("/livez") == (200, None)
        cluster.create("nodes", {"metadata": {"name": NODE_1}})
        wait_for(lambda: health("/healthz") == (200, True), "a healthy node again")


def test_the_primary_address_is_the_nodes(cluster: Cluster, lab: Lab) -> None:
    """By its route to everywhere it is the far one; the Node says otherwise."""
    addresses = [{"type": "Hostname", "address": NODE_1}, {"type": "InternalIP", "address": NODE_IP}]
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    cluster.serve("web", VIP, pod(1), ports=ports, type="NodePort")
    with cluster.proxyd(NODE_1, "--nodeport-addresses", "primary") as daemon:
        daemon.wait_listener(NODE_FAR_IP, 30080)
        assert daemon.find(NODE_IP, 30080) is None
        cluster.patch("nodes", NODE_1, {"status": {"addresses": addresses}})
        daemon.wait_listener(NODE_IP, 30080)
        wait_for(lambda: daemon.find(NODE_FAR_IP, 30080) is None, "the other address to be left")
        assert ask(lab.outside, NODE_IP, 30080) == P1


def balanced(name: str, port: int) -> Body:
    """A Service whose health is asked for at a port."""
    return {
        "metadata": {"name": name},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": VIP,
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": port,
            "ports": [{"name": "http", "port": 80}],
        },
    }


def test_a_health_check_port_that_is_taken(cluster: Cluster, lab: Lab) -> None:
    cluster.create("services", balanced("web", 30199))
    cluster.create("endpointslices", slice_of("web", pod(1)))
    holder = lab.node.listen(NODE_IP, 30199)
    with cluster.proxyd(NODE_1) as daemon:
        wait_for(lambda: problems(daemon), "a problem")
        (problem,) = problems(daemon)
        assert problem.startswith("Service default/web: healthCheckNodePort 30199: in use by")
        wait_for(lambda: events(cluster, "FailedToStartServiceHealthcheck"), "an event")
        (event,) = events(cluster, "FailedToStartServiceHealthcheck")
        assert event["involvedObject"]["name"] == "web"
        assert event["type"] == "Warning"
        assert (
            "node node-1 failed to start healthcheck default/web on port 30199: in use by" in event["message"]
        )
        # The other addresses, and the Service, are not concerned.
        wait_for(lambda: not refused(lab.node, NODE_FAR_IP, 30199), "the port at another address")
        assert fetch(lab.node, 30199, "/", NODE_FAR_IP)[0] == 200
        wait_who(lab.client, VIP, {P1})
        holder.close()
        wait_for(lambda: not problems(daemon), "it to be opened")
        assert fetch(lab.node, 30199, "/", NODE_IP)[0] == 200
        # Another port, and then none.
        cluster.patch("services", "web", {"spec": {"healthCheckNodePort": 30198}})
        wait_for(lambda: refused(lab.client, NODE_IP, 30199), "the old port to close")
        wait_for(lambda: not refused(lab.client, NODE_IP, 30198), "the new port to open")
        cluster.delete("services", "web")
        wait_for(lambda: refused(lab.client, NODE_IP, 30198), "the port to close")


def test_a_health_check_port_stays_with_whom_has_it(cluster: Cluster, lab: Lab) -> None:
    """Also where another Service that wants the same comes first by name."""
    cluster.create("services", balanced("web", 30199))
    cluster.create("endpointslices", slice_of("web", pod(1)))
    with cluster.proxyd(NODE_1) as daemon:
        wait_for(lambda: not refused(lab.client, NODE_IP, 30199), "the port to open")
        other = balanced("api", 30199)
        other["spec"]["clusterIP"] = OTHER_VIP
        cluster.create("services", other)
        wait_for(lambda: problems(daemon), "a problem")
        assert problems(daemon) == ["Service default/api: healthCheckNodePort 30199: default/web has it"]
        assert json.loads(fetch(lab.node, 30199, "/", NODE_IP)[1])["service"]["name"] == "web"
        cluster.delete("services", "web")
        wait_for(lambda: not problems(daemon), "the other to have it")


def test_events_about_services(cluster: Cluster, lab: Lab) -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    with lab.node.listen(NODE_IP, 30080):
        cluster.serve("web", VIP, pod(1), ports=ports, type="NodePort")
        sctp = [{"name": "sig", "port": 3868, "protocol": "SCTP"}]
        cluster.serve("sig", OTHER_VIP, pod(1), ports=sctp)
        with cluster.proxyd(NODE_1):
            wait_for(lambda: events(cluster, "PortConflict"), "an event about the port")
            (event,) = events(cluster, "PortConflict")
            assert event["involvedObject"]["name"] == "web"
            assert event["involvedObject"]["uid"]
            assert f"node node-1: {NODE_IP}:30080/TCP can't be opened: in use by" in event["message"]
            assert event["reportingComponent"] == "proxyd"
            wait_for(lambda: events(cluster, "SCTPDisabled"), "an event about SCTP")
            (event,) = events(cluster, "SCTPDisabled")
            assert event["involvedObject"]["name"] == "sig"
            assert f"{OTHER_VIP}:3868/SCTP is not served" in event["message"]
            # What stays as it is is not told again.
            cluster.endpoints("web", pod(2))
            wait_who(lab.client, VIP, {P2})
            (event,) = events(cluster, "PortConflict")
            assert event["count"] == 1
            (event,) = wait_for(lambda: events(cluster, "Starting"), "the node's event")
            assert event["involvedObject"] == {
                "kind": "Node",
                "apiVersion": "v1",
                "name": NODE_1,
                "uid": NODE_1,
            }


def test_a_service_of_a_manifest_has_no_events(cluster: Cluster, lab: Lab, manifests: Path) -> None:
    write(
        manifests / "mine.yaml", written.service("mine", VIP, node_port=30080), written.endpoints("mine", 1)
    )
    with lab.node.listen(NODE_IP, 30080), cluster.proxyd(NODE_1, manifests=[manifests]) as daemon:
        daemon.wait_listener(NODE_IP, 30080, "Failed")
        wait_for(lambda: events(cluster, "Starting"), "the node's event")
        assert events(cluster, "PortConflict") == []
