"""The flags of `proxyd run` that are settings: their names and meaning. `values` reads their texts."""

from __future__ import annotations

from proxyd.control.config import values
from proxyd.control.config.cluster_flags import SHARED_FLAGS
from proxyd.control.config.durations import parse_duration, parse_port_range
from proxyd.control.config.flag import Flag
from proxyd.control.config.values import FEATURE_GATES, MAX_WORKERS
from proxyd.state.marks import DEFAULT_MARK

__all__ = ["FEATURE_GATES", "FLAGS", "MAX_WORKERS", "Flag"]

FLAGS: tuple[Flag, ...] = (
    Flag(
        name="manifests",
        metavar="PATH",
        kind="repeat",
        parse=values.paths,
        default="none",
        help="file or folder of Services, Endpoints, EndpointSlices and Pods to serve; repeatable; "
        "required where no cluster is followed",
    ),
    Flag(
        name="service-cluster-ip-range",
        metavar="CIDR[,CIDR]",
        parse=values.cluster_ip_range,
        default="10.96.0.0/16 with CAP_NET_ADMIN, else 127.96.0.0/16",
        help="range that clusterIPs are taken from where a Service gives none; one, or one IPv4 and one IPv6",
    ),
    Flag(
        name="service-node-port-range",
        metavar="PORTS",
        parse=parse_port_range,
        default="30000-32767",
        help="range of NodePorts, as FIRST-LAST or FIRST+MORE",
    ),
    Flag(
        name="vip-mode",
        metavar="MODE",
        parse=values.one_of("auto", "route", "bind", "loopback", "none"),
        default="auto",
        help="how VIPs become reachable: auto (route if allowed, else bind what is local), route, bind, "
        "loopback (a.b.c.d is served at 127.b.c.d) or none (NodePorts and externalIPs only)",
    ),
    Flag(
        name="vip-listen",
        metavar="HOW",
        parse=values.one_of("auto", "parked", "bound"),
        default="auto",
        help="how VIPs are listened at: parked (a kernel program finds the listener, so daemons at 0.0.0.0 "
        "keep their ports), bound (VIP:port is bound) or auto (parked if the kernel and the rights allow it)",
    ),
    Flag(
        name="vip-overlap",
        metavar="MODE",
        parse=values.one_of("refuse", "serve"),
        default="refuse",
        help="VIPs within a network that this node is connected to: refuse, or serve (a host that has the "
        "address cannot be reached from here)",
    ),
    Flag(
        name="external-ip-mode",
        metavar="MODE",
        parse=values.one_of("steer", "none"),
        default="steer",
        help="externalIPs that are not the node's own: steer (their service ports are taken) or none",
    ),
    Flag(
        name="fwmark",
        metavar="BIT",
        parse=values.mark,
        default=f"{DEFAULT_MARK:#x}",
        help="the bit of packet marks by which those are taken, where another program uses the default",
    ),
    Flag(
        name="nodeport-addresses",
        kube=True,
        metavar="CIDR[,CIDR...]",
        kind="repeat",
        parse=values.nodeport_addresses,
        default="all",
        help='node addresses that NodePorts are opened on: CIDRs, or "primary"; repeatable',
    ),
    Flag(
        name="bind-address",
        kube=True,
        blank=True,
        metavar="IP",
        parse=values.address,
        default="0.0.0.0",
        help="the one node address that NodePorts are opened on; 0.0.0.0 or :: for all",
    ),
    Flag(
        name="workers",
        metavar="N",
        parse=values.workers,
        default="one per CPU, at most 4",
        help=f"data-plane processes, 0 to {MAX_WORKERS}; 0 relays inside the control process",
    ),
    Flag(
        name="drain-timeout",
        metavar="DURATION",
        parse=parse_duration,
        default="25s",
        help="how long connections may go on after SIGTERM or after their Service was removed; "
        "0 ends them at once",
    ),
    Flag(
        name="tcp-idle-timeout",
        metavar="DURATION",
        parse=parse_duration,
        default="0s",
        help="end TCP connections that carried nothing for so long; 0 never",
    ),
    Flag(
        name="tcp-splice",
        metavar="true|false",
        kind="switch",
        parse=values.boolean,
        default="true",
        help="move bulk between TCP sockets without a copy; "
        "false where the kernel's splice(2) is not to be trusted",
    ),
    Flag(
        name="udp-timeout",
        kube=True,
        metavar="DURATION",
        parse=values.period,
        default="60s, and 10s after a single exchange",
        help="end UDP flows that carried nothing for so long; "
        "annotation proxyd.io/udp-idle-timeout says otherwise for one Service",
    ),
    Flag(
        name="sctp-max-message",
        metavar="BYTES",
        parse=values.message_size,
        default="256Ki",
        help="largest SCTP message that is relayed; a larger one ends its association",
    ),
    Flag(
        name="sctp-max-streams",
        metavar="N",
        parse=values.integer(1, 65535),
        default="1024",
        help="streams that an SCTP association may have in each direction; "
        "65535 of them take 1.5 MB of the kernel",
    ),
    Flag(
        name="access-log",
        metavar="PATH",
        parse=values.access_log,
        default="none",
        help='file that gets a line for every finished connection; "-" for standard output',
    ),
    Flag(
        name="admin-socket",
        metavar="PATH",
        parse=values.socket_path,
        default="/run/proxyd/admin.sock as root, else $XDG_RUNTIME_DIR/proxyd/admin.sock",
        help="Unix socket that `proxyd get` and `proxyd status` ask",
    ),
    Flag(
        name="state-file",
        metavar="PATH",
        parse=values.path,
        default="/var/lib/proxyd/state.json as root, else ~/.local/state/proxyd/state.json",
        help="file that remembers allocated clusterIPs and NodePorts across restarts",
    ),
    Flag(
        name="allow-loopback-endpoints",
        metavar="true|false",
        kind="switch",
        parse=values.boolean,
        default="false",
        help="accept endpoints in 127.0.0.0/8 and ::1, for local testing",
    ),
    Flag(
        name="log-format",
        metavar="FORMAT",
        parse=values.one_of("auto", "console", "json"),
        default="auto",
        help="console, json, or auto: console on a terminal and json elsewhere",
    ),
    Flag(
        name="verbosity",
        short="v",
        metavar="N",
        kind="count",
        parse=values.integer(0, 100),
        default="0",
        help="more in the log: -v for debug",
    ),
    Flag(
        name="hostname-override",
        kube=True,
        blank=True,
        metavar="NAME",
        parse=values.node_name,
        default="the host name, in lower case",
        help="name of this node, as endpoints carry it",
    ),
    Flag(
        name="feature-gates",
        kube=True,
        metavar="NAME=BOOL[,...]",
        kind="repeat",
        parse=values.feature_gates,
        default=",".join(f"{name}={str(on).lower()}" for name, on in FEATURE_GATES.items()),
        help="features that are off until asked for; repeatable",
    ),
    Flag(
        name="config",
        kube=True,
        metavar="FILE",
        parse=values.path,
        default="none",
        help="KubeProxyConfiguration file, with proxyd's own settings under proxyd:; flags win over it",
    ),
    Flag(
        name="healthz-bind-address",
        kube=True,
        metavar="IP[:PORT]",
        parse=values.bind_address,
        default="0.0.0.0:10256",
        help='where /healthz and /livez are answered, 0.0.0.0 for IPv6 too; "" for nowhere',
    ),
    Flag(
        name="metrics-bind-address",
        kube=True,
        metavar="IP[:PORT]",
        parse=values.bind_address,
        default="127.0.0.1:10249",
        help='where /metrics, /proxyMode and /configz are answered; "" for nowhere',
    ),
    Flag(
        name="healthz-port",
        kube=True,
        metavar="PORT",
        parse=values.port,
        default="10256",
        help="port of --healthz-bind-address where it names none; 0 answers nowhere",
    ),
    Flag(
        name="metrics-port",
        kube=True,
        metavar="PORT",
        parse=values.port,
        default="10249",
        help="port of --metrics-bind-address where it names none; 0 answers nowhere",
    ),
    Flag(
        name="bind-address-hard-fail",
        kube=True,
        metavar="true|false",
        kind="switch",
        parse=values.boolean,
        default="false",
        help="end when the health or metrics address is taken; else it is tried again every 5 s",
    ),
    Flag(
        name="metrics-endpoints",
        metavar="true|false",
        kind="switch",
        parse=values.boolean,
        default="true",
        help="metrics for every endpoint, of the first 10,000; false leaves those of service ports",
    ),
    Flag(
        name="sync-period",
        metavar="DURATION",
        parse=values.period,
        default="30s",
        help="how often routes and rules are compared with the kernel's; "
        "a change older than two of them is unhealthy",
    ),
    *SHARED_FLAGS,
)
