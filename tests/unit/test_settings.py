"""Flags become settings, or one line each that names the flag."""

from __future__ import annotations

import pytest

from proxyd.control.config.durations import format_duration, parse_duration, parse_port_range
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.settings import Settings, SettingsError, Surroundings, build

USER = Surroundings(
    uid=1000, cpus=2, hostname="Node-A", environ={"XDG_RUNTIME_DIR": "/run/user/1000", "HOME": "/home/u"}
)
ROOT = Surroundings(uid=0, net_admin=True, cpus=64, hostname="n")


def settings(surroundings: Surroundings = USER, **given) -> Settings:
    return build({"manifests": ["m"], **given}, surroundings)


def problems(**given) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        settings(**given)
    return caught.value.problems


def test_defaults_of_a_user():
    got = settings()
    assert got.manifests == ("m",)
    assert got.service_cluster_ip_range == ("127.96.0.0/16",)
    assert got.service_node_port_range == (30000, 32767)
    assert got.admin_socket == "/run/user/1000/proxyd/admin.sock"
    assert got.state_file == "/home/u/.local/state/proxyd/state.json"
    assert got.node_name == "node-a"
    assert (got.workers, got.drain_timeout, got.tcp_idle_timeout) == (2, 25, 0)
    assert got.vip_mode == "auto"
    assert not got.sctp


def test_defaults_of_root():
    got = settings(ROOT)
    assert got.service_cluster_ip_range == ("10.96.0.0/16",)
    assert got.admin_socket == "/run/proxyd/admin.sock"
    assert got.state_file == "/var/lib/proxyd/state.json"
    assert got.workers == 4


def test_a_user_without_a_runtime_folder_gets_one_in_tmp():
    got = settings(Surroundings(uid=1234))
    assert got.admin_socket == "/tmp/proxyd-1234/admin.sock"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("1m30s", 90),
        ("25", 25),
        ("0.5", 0.5),
        ("2h", 7200),
        ("1.5h", 5400),
        ("0", 0),
        ("100us", 1e-4),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5x", "-1s", "-3", "1m 30s", "nan", "inf", "1e99", "m30s"])
def test_wrong_durations(text):
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (59, "59s"),
        (90, "1m30s"),
        (3600, "1h"),
        (3605, "1h"),
        (273600, "3d4h"),
        (86400, "1d"),
    ],
)
def test_durations_for_people(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "ports"), [("30000-32767", (30000, 32767)), ("30000+10", (30000, 30010)), ("80", (80, 80))]
)
def test_port_ranges(text, ports):
    assert parse_port_range(text) == ports


@pytest.mark.parametrize("text", ["", "0-5", "5-1", "1-65536", "a-b", "65535+1", "1-2-3", "-5"])
def test_wrong_port_ranges(text):
    with pytest.raises(ValueError, match=r"port|range"):
        parse_port_range(text)


def test_two_families():
    got = settings(service_cluster_ip_range="10.96.0.0/16,fd00:1::/108")
    assert got.service_cluster_ip_range == ("10.96.0.0/16", "fd00:1::/108")


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("service_cluster_ip_range", "10.96.0.1/16", "did you mean 10.96.0.0/16?"),
        ("service_cluster_ip_range", "10.0.0.0/16,10.1.0.0/16", "one IPv4 and one IPv6"),
        ("service_cluster_ip_range", "10.0.0.0/31", "too small"),
        ("service_cluster_ip_range", "web", "expected a CIDR"),
        ("service_node_port_range", "9-1", "ends before it begins"),
        ("vip_mode", "magic", 'expected auto, route, bind, loopback or none, got "magic"'),
        ("fwmark", "0x1001", "expected one bit such as 0x1000"),
        ("fwmark", "0", "expected one bit such as 0x1000"),
        ("fwmark", "0x100000000", "from 0x1 to 0x80000000"),
        ("fwmark", "-1", "expected one bit such as 0x1000"),
        ("fwmark", "bit 3", "expected one bit such as 0x1000"),
        ("nodeport_addresses", ["primary,10.0.0.0/8"], "stands alone"),
        ("nodeport_addresses", ["10.0.0.300"], "expected a CIDR"),
        ("bind_address", "host", "expected an IP address"),
        ("workers", "17", "from 0 to 16"),
        ("workers", "-1", "from 0 to 16"),
        ("drain_timeout", "soon", "expected a duration"),
        ("admin_socket", "/" + "x" * 200, "at most 107 bytes"),
        ("allow_loopback_endpoints", "maybe", "expected true or false"),
        ("feature_gates", ["SCTPSupport=maybe"], "expected true or false"),
        ("master", "https://", "expected a URL"),
        ("master", "ftp://x", "expected a URL"),
        ("kube_api_burst", "-1", "expected a whole number from 0"),
        ("kube_api_qps", "many", "expected a number of requests"),
        ("service_proxy_name", "a b", "expected the value of a label"),
        ("config_sync_period", "0s", "expected a duration over 0"),
        ("min_sync_period", "31s", "must not be longer than --sync-period"),
        ("proxy_mode", "kernelspace", "kernelspace is a mode of Windows; use userspace"),
        ("proxy_mode", "magic", "expected userspace, iptables, ipvs or nftables"),
        ("cluster_cidr", "10.0.0.0/8,11.0.0.0/8", "expected one CIDR, or an IPv4 and an IPv6 one"),
        (
            "detect_local_mode",
            "Guess",
            "expected ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
        ),
        ("oom_score_adj", "-1001", "expected a whole number from -1000 to 1000"),
        ("vmodule", "cluster", "expected PATTERN=N"),
        ("cleanup_kube_proxy", "maybe", "expected auto, always or never"),
        ("hostname_override", "a b", "expected a node name"),
    ],
)
def test_a_wrong_flag_is_named(field, text, says):
    (line,) = problems(**{field: text})
    assert line.startswith(f"--{field.replace('_', '-')}: ")
    assert says in line
    assert "\n" not in line


def test_every_wrong_flag_is_named_at_once():
    assert len(problems(workers="x", vip_mode="y", drain_timeout="z")) == 3


def test_manifests_are_required():
    with pytest.raises(SettingsError, match="--manifests or --kubeconfig is required"):
        build({}, USER)


@pytest.mark.parametrize(
    ("given", "pod", "in_cluster"),
    [
        ({}, True, True),
        ({"manifests": ["m"]}, True, False),
        ({"manifests": ["m"], "in_cluster": "true"}, True, True),
        ({"kubeconfig": "/k"}, True, False),
        ({"master": "https://10.0.0.1"}, True, False),
        ({"kubeconfig": "", "master": ""}, True, True),
    ],
)
def test_a_pods_own_cluster_is_followed_where_there_is_no_other_source(given, pod, in_cluster):
    here = Surroundings(environ={"KUBERNETES_SERVICE_HOST": "10.96.0.1"} if pod else {})
    got = build(given, here)
    assert got.in_cluster is in_cluster
    assert got.cluster is (in_cluster or bool(given.get("kubeconfig") or given.get("master")))


def test_with_a_cluster_the_kernel_is_to_spare_proxyd():
    assert settings().oom_score is None
    assert settings(kubeconfig="/k").oom_score == -999
    assert settings(kubeconfig="/k", oom_score_adj="5").oom_score == 5


@pytest.mark.parametrize(
    "field",
    [
        "kubeconfig",
        "master",
        "bind_address",
        "hostname_override",
        "cluster_cidr",
        "detect_local_mode",
        "proxy_mode",
    ],
)
def test_of_kube_proxys_texts_an_empty_one_is_the_default(field):
    assert settings(**{field: ""}) == settings()


def test_a_qps_and_burst_of_0_are_the_default():
    assert settings(kube_api_qps="0", kube_api_burst="0") == settings()
    assert settings(kube_api_qps="-1").kube_api_qps == -1


def test_repeated_and_joined_values():
    got = settings(
        nodeport_addresses=["10.0.0.0/8, 127.0.0.0/8", "::1/128"], feature_gates=["SCTPSupport=true"]
    )
    assert got.nodeport_addresses == ("10.0.0.0/8", "127.0.0.0/8", "::1/128")
    assert got.sctp


def test_every_flag_has_a_field_and_a_line_of_help():
    assert [flag.field for flag in FLAGS] == list(Settings.__struct_fields__)
    for flag in FLAGS:
        assert flag.help, flag.name
        assert "\n" not in flag.help
        assert flag.default
