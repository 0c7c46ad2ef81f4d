"""The settings of a daemon: the checked values of its flags, and defaults that depend on where it runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from proxyd.control.config.flags import FEATURE_GATES, FLAGS
from proxyd.control.config.values import DEFAULT_BURST, DEFAULT_QPS
from proxyd.host.rights import has
from proxyd.state.marks import DEFAULT_MARK

SYSTEM_SOCKET = "/run/proxyd/admin.sock"


class SettingsError(ValueError):
    """Flags that cannot be used; one line each, naming the flag."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """The process and its environment, on which the defaults depend."""

    uid: int = 65534
    net_admin: bool = False  # CAP_NET_ADMIN is effective, so routes can be made
    cpus: int = 1
    hostname: str = "localhost"
    environ: Mapping[str, str] = {}

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> Surroundings:
        """Those of this process."""
        return cls(
            uid=os.getuid(),
            net_admin=has("CAP_NET_ADMIN"),
            cpus=len(os.sched_getaffinity(0)),
            hostname=socket.gethostname(),
            environ=dict(os.environ if environ is None else environ),
        )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Checked settings of a daemon. Durations are seconds."""

    manifests: tuple[str, ...] = ()
    service_cluster_ip_range: tuple[str, ...] = ("127.96.0.0/16",)  # one CIDR, or one of each family
    service_node_port_range: tuple[int, int] = (30000, 32767)  # first and last
    vip_mode: Literal["auto", "route", "bind", "loopback", "none"] = "auto"
    vip_listen: Literal["auto", "parked", "bound"] = "auto"
    vip_overlap: Literal["refuse", "serve"] = "refuse"
    external_ip_mode: Literal["steer", "none"] = "steer"
    fwmark: int = DEFAULT_MARK  # one bit of packet marks
    nodeport_addresses: tuple[str, ...] = ()  # CIDRs, or "primary"; () = all
    bind_address: str = "0.0.0.0"  # NodePorts are opened on this one only; unspecified = all
    workers: int = 1  # 0 = inside the control process
    drain_timeout: float = 25.0
    tcp_idle_timeout: float = 0.0  # 0 = off
    tcp_splice: bool = True
    udp_timeout: float | None = None  # None = 60 s, and 10 s after a single exchange
    sctp_max_message: int = 256 * 1024  # bytes
    sctp_max_streams: int = 1024  # of an association, in each direction
    access_log: str = ""  # "" = none, "-" = standard output, else a file
    admin_socket: str = "/run/proxyd/admin.sock"
    state_file: str = "/var/lib/proxyd/state.json"
    allow_loopback_endpoints: bool = False
    log_format: Literal["auto", "console", "json"] = "auto"
    verbosity: int = 0  # 0 = info, 1 and more = debug
    hostname_override: str = ""  # the node's name
    feature_gates: Mapping[str, bool] = msgspec.field(default_factory=lambda: dict(FEATURE_GATES))
    config: str = ""  # KubeProxyConfiguration file, "" = none
    healthz_bind_address: str = "0.0.0.0:10256"  # IP or IP:port, "" = off
    metrics_bind_address: str = "127.0.0.1:10249"
    healthz_port: int = 10256  # where the address names none; 0 = off
    metrics_port: int = 10249
    bind_address_hard_fail: bool = False  # end when one of the two is taken
    metrics_endpoints: bool = True  # metrics for every endpoint
    sync_period: float = 30.0  # between two comparisons with the kernel; twice that old is unhealthy
    kubeconfig: str = ""  # path; "" = none
    master: str = ""  # URL of the API server; "" = the kubeconfig's, or the Pod's
    in_cluster: bool = False  # the cluster whose Pod this is
    kube_api_qps: float = DEFAULT_QPS  # below 0 = no limit
    kube_api_burst: int = DEFAULT_BURST
    service_proxy_name: str = ""  # "" = Services without one
    config_sync_period: float = 900.0  # between two times that everything is planned anew
    min_sync_period: float = 0.0  # between two times that changes are carried out
    proxy_mode: str = "userspace"  # as it was given; all are served in user space
    cluster_cidr: tuple[str, ...] = ()  # of Pods: one CIDR, or one of each family
    detect_local_mode: str = ""  # "" = ClusterCIDR
    iptables_localhost_nodeports: bool = True
    oom_score_adj: int | None = None  # None = see `oom_score`
    profiling: bool = False
    cleanup_kube_proxy: Literal["auto", "always", "never"] = "auto"
    vmodule: tuple[tuple[str, int], ...] = ()  # pattern of a room, klog's level
    log_file: str = ""  # "" = standard error

    @property
    def oom_score(self) -> int | None:
        """The oom_score_adj to set, by default kube-proxy's with a cluster; None: it is left alone."""
        return -999 if self.oom_score_adj is None and self.cluster else self.oom_score_adj

    @property
    def cluster(self) -> bool:
        """Whether an API server is followed."""
        return bool(self.kubeconfig or self.master or self.in_cluster)

    @property
    def node_name(self) -> str:
        """The name of this node, as `spec.nodeName` and endpoints carry it."""
        return self.hostname_override

    @property
    def sctp(self) -> bool:
        """Whether SCTP may be served."""
        return self.feature_gates.get("SCTPSupport", False)

    @property
    def protocols(self) -> frozenset[str]:
        """The protocols that are relayed."""
        return frozenset({"TCP", "UDP", "SCTP"} if self.sctp else {"TCP", "UDP"})

    @property
    def healthz_address(self) -> tuple[str, int] | None:
        """IP and port of the health server; None: there is none."""
        return _ip_and_port(self.healthz_bind_address, self.healthz_port)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """IP and port of the metrics server; None: there is none."""
        return _ip_and_port(self.metrics_bind_address, self.metrics_port)


def _ip_and_port(address: str, default_port: int) -> tuple[str, int] | None:
    """IP and port of a checked bind address; None if it is off.

    As kubernetes cmd/kube-proxy/app/options.go, addressFromDeprecatedFlags.
    """
    if not address or not default_port:
        return None
    host, port = address, default_port
    if address.startswith("["):
        host, _, text = address[1:].partition("]:")
        port = int(text)
    elif address.count(":") == 1:
        host, _, text = address.partition(":")
        port = int(text)
    return (host, port) if port else None


def build(given: Mapping[str, Any], surroundings: Surroundings) -> Settings:
    """Settings from texts by field name; a field that is missing or None gets its default.

    Args:
        given: for each flag its text; for a repeatable one a list of texts; for a counted one an int.
        surroundings: what the defaults depend on.

    Raises:
        SettingsError: with every flag that is wrong.
    """
    values: dict[str, Any] = _defaults(surroundings)
    problems = []
    for flag in FLAGS:
        text = given.get(flag.field)
        if text is None or (flag.blank and isinstance(text, str) and not text.strip()):
            continue
        try:
            values[flag.field] = flag.parse(text)
        except ValueError as error:
            problems.append(f"--{flag.name}: {error}")
    if not problems and values.get("min_sync_period", 0.0) > values.get("sync_period", 30.0):
        problems.append("--min-sync-period: must not be longer than --sync-period")
    unknown = set(given) - {flag.field for flag in FLAGS}
    problems += [f"unknown setting {name}" for name in sorted(unknown)]
    elsewhere = any(values.get(source) for source in ("manifests", "kubeconfig", "master"))
    if "in_cluster" not in values and not elsewhere:
        # kubernetes vendor/k8s.io/client-go/rest/config.go, InClusterConfig
        values["in_cluster"] = bool(surroundings.environ.get("KUBERNETES_SERVICE_HOST"))
    if not (elsewhere or values.get("in_cluster") or problems):
        problems.append(
            "--manifests or --kubeconfig is required: a file or folder of Service manifests, for example "
            "--manifests config/demo, or the kubeconfig of a cluster"
        )
    if problems:
        raise SettingsError(problems)
    for name, here in (("healthz", ("0.0.0.0", "::")), ("metrics", ("127.0.0.1", "::1"))):
        if values.get(f"{name}_port") and given.get(f"{name}_bind_address") is None:
            # A port alone is one of the default address.
            values[f"{name}_bind_address"] = here[":" in values.get("bind_address", "")]
    if ":" in values.get("bind_address", ""):
        # As in kubernetes pkg/proxy/apis/config/v1alpha1/defaults.go.
        values.setdefault("healthz_bind_address", "[::]:10256")
        values.setdefault("metrics_bind_address", "[::1]:10249")
    return Settings(**values)


def default_admin_socket(surroundings: Surroundings) -> str:
    """The admin socket of a daemon that is not told another.

    It is in the RuntimeDirectory of a systemd unit; in /run/proxyd as root; else in $XDG_RUNTIME_DIR/proxyd;
    else in /tmp/proxyd-UID, which is used only if it is the user's own (see `check_folder`).
    """
    if folder := _unit_folder(surroundings, "RUNTIME_DIRECTORY"):
        return f"{folder}/admin.sock"
    if surroundings.uid == 0:
        return SYSTEM_SOCKET
    runtime = surroundings.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return f"{runtime}/proxyd/admin.sock"
    return f"/tmp/proxyd-{surroundings.uid}/admin.sock"  # noqa: S108 - owner and mode are checked before use


def client_admin_socket(surroundings: Surroundings) -> str:
    """The admin socket that a client asks by default: the user's own if it exists, else the system's."""
    own = default_admin_socket(surroundings)
    if os.path.lexists(own) or not Path(SYSTEM_SOCKET).parent.is_dir():
        return own
    return SYSTEM_SOCKET


def default_state_file(surroundings: Surroundings) -> str:
    """The state file of a daemon that is not told another.

    It is in the StateDirectory of a systemd unit; in /var/lib/proxyd as root; else in $XDG_STATE_HOME or
    ~/.local/state; else in /tmp.
    """
    if folder := _unit_folder(surroundings, "STATE_DIRECTORY"):
        return f"{folder}/state.json"
    if surroundings.uid == 0:
        return "/var/lib/proxyd/state.json"
    state = surroundings.environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):
        home = surroundings.environ.get("HOME", "")
        state = f"{home}/.local/state"
        if not home.startswith("/"):
            state = f"/tmp/proxyd-{surroundings.uid}"  # noqa: S108 - the last resort
    return f"{state}/proxyd/state.json"


def _unit_folder(surroundings: Surroundings, variable: str) -> str:
    """The first folder that systemd made for the unit, as of RuntimeDirectory= in systemd.exec(5); or ""."""
    folder = surroundings.environ.get(variable, "").partition(":")[0]
    return folder if folder.startswith("/") else ""


def _defaults(surroundings: Surroundings) -> dict[str, Any]:
    return {
        "service_cluster_ip_range": ("10.96.0.0/16" if surroundings.net_admin else "127.96.0.0/16",),
        "workers": min(surroundings.cpus, 4),
        "admin_socket": default_admin_socket(surroundings),
        "state_file": default_state_file(surroundings),
        "hostname_override": surroundings.hostname.lower(),
    }
