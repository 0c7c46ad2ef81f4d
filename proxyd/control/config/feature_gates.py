"""The feature gates of Kubernetes, which are accepted. proxyd's own are in `values`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from proxyd.control.config.values import FEATURE_GATES

# Of Kubernetes 1.19 to 1.34: those that kube-proxy reads, and others that all components of a node often get.
KUBERNETES_GATES = frozenset(
    {
        "AllAlpha",
        "AllBeta",
        "CloudDualStackNodeIPs",
        "ContextualLogging",
        "DynamicKubeletConfig",
        "EndpointSlice",
        "EndpointSliceNodeName",
        "EndpointSliceProxying",
        "EndpointSliceTerminatingCondition",
        "ExperimentalCriticalPodAnnotation",
        "ExperimentalHostUserNamespaceDefaulting",
        "ExternalPolicyForExternalIP",
        "HPAScaleToZero",
        "InPlacePodVerticalScaling",
        "IPv6DualStack",
        "KubeletPodResources",
        "KubeProxyDrainingTerminatingNodes",
        "LoadBalancerIPMode",
        "LocalStorageCapacityIsolation",
        "LoggingAlphaOptions",
        "LoggingBetaOptions",
        "MinimizeIPTablesRestore",
        "MixedProtocolLBService",
        "NFTablesProxyMode",
        "NodeDisruptionExclusion",
        "PodDisruptionConditions",
        "PodPriority",
        "PodShareProcessNamespace",
        "PreferSameTrafficDistribution",
        "ProxyTerminatingEndpoints",
        "RotateKubeletServerCertificate",
        "SCTPSupport",
        "ServiceInternalTrafficPolicy",
        "ServiceLoadBalancerClass",
        "ServiceNodeExclusion",
        "ServiceTopology",
        "ServiceTrafficDistribution",
        "StructuredLogging",
        "SupportIPVSProxyMode",
        "TopologyAwareHints",
        "TopologyManager",
        "TTLAfterFinished",
        "WarnServiceExternalName",
        "WatchListClient",
        "WindowsOverlay",
        "WinDSR",
        "WinOverlay",
    }
)


def gate_warnings(gates: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The gates that neither proxyd nor Kubernetes has, as far as is known, each with a warning."""
    for gate in dict.fromkeys(gates):
        if gate not in KUBERNETES_GATES and gate not in FEATURE_GATES:
            near = difflib.get_close_matches(gate, FEATURE_GATES, n=1)
            yield gate, "unknown feature gate: ignored" + (f"; did you mean {near[0]}?" if near else "")
