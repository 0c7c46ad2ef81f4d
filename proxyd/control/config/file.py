"""The configuration file: KubeProxyConfiguration v1alpha1 with proxyd's own fields under `proxyd:`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import msgspec

from proxyd.api.findings import Path, clip, field_path
from proxyd.api.problems import Problem, Severity
from proxyd.control.config import schema
from proxyd.control.config.durations import parse_duration
from proxyd.control.config.feature_gates import gate_warnings
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.schema import API_GROUP, API_VERSION, KIND, KUBE_PROXY, OWN, OWN_FIELDS
from proxyd.control.config.settings import Settings, SettingsError, Surroundings, build
from proxyd.sources.text.documents import Document, Unreadable, read_documents

MAX_BYTES = 1 << 20

# The settings that take effect when the file is read again; all others need a restart.
AT_RUN_TIME = frozenset(
    {
        "verbosity",
        "log_format",
        "nodeport_addresses",
        "bind_address",
        "drain_timeout",
        "metrics_endpoints",
        "sync_period",
        "min_sync_period",
        "config_sync_period",
        "iptables_localhost_nodeports",
        "cluster_cidr",
        "detect_local_mode",
        "vmodule",
        "log_file",
    }
)


class ConfigError(SettingsError):
    """A configuration file that cannot be used; one line with its place for everything that is wrong."""


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file: texts for `proxyd.control.config.settings.build`, and warnings."""

    values: Mapping[str, Any] = {}
    warnings: tuple[Problem, ...] = ()


class Configuration:
    """Where a daemon's settings come from, so that they can be read again.

    Args:
        flags: texts by settings field; None if a flag was not given.
        surroundings: what defaults depend on.
        winning: the flags that win over the file; None: all of them. Under kube-proxy's name only a few do.

    Attributes:
        path: of the file; "" if there is none.
        told: the lines of warnings that were already written.
    """

    def __init__(
        self,
        flags: Mapping[str, Any],
        surroundings: Surroundings,
        *,
        winning: Collection[str] | None = None,
    ) -> None:
        self.path = flags.get("config") or ""
        self.told: tuple[str, ...] = ()
        self._flags = flags
        self._surroundings = surroundings
        self._winning = winning

    def load(self) -> tuple[Settings, tuple[Problem, ...]]:
        """The settings, and the file's warnings.

        Raises:
            ConfigError: fields of the file are wrong.
            SettingsError: flags are wrong.
        """
        file = read(self.path) if self.path else ConfigFile()
        return build(merge(file.values, self._flags, self._winning), self._surroundings), file.warnings

    def admin_socket(self) -> str:
        """The daemon's admin socket, even if other settings are wrong."""
        return build({**self._flags, "config": None, "manifests": ["."]}, self._surroundings).admin_socket


def merge(
    file: Mapping[str, Any], flags: Mapping[str, Any], winning: Collection[str] | None = None
) -> dict[str, Any]:
    """The texts in force: flags win over the file. If there is one, `winning` names those that count."""
    given = {field: text for field, text in flags.items() if text is not None}
    if winning is not None and given.get("config"):
        given = {field: text for field, text in given.items() if field in winning or field == "config"}
    return {**file, **given}


def read(path: str) -> ConfigFile:
    """Read a file. Unknown and repeated fields are warnings, all other faults are errors.

    Raises:
        ConfigError: with a line for everything that is wrong, `file:line:col: error: field: what is wrong`.
    """
    try:
        with FilePath(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"--config: {path}: {error.strerror}"]) from None
    if len(data) > MAX_BYTES:
        raise ConfigError([f"--config: {path}: a configuration has at most 1 MiB"])
    return parse(path, data)


def parse(path: str, data: bytes) -> ConfigFile:
    """Like `read`, of the content of a file."""
    documents = list(read_documents(data, is_json=path.endswith(".json")))
    repeated: list[Unreadable] = []
    if any(isinstance(document, Unreadable) for document in documents):
        # As kube-proxy does: first strictly, then leniently, where the last of repeated fields counts. JSON
        # is read as YAML, which it is.
        lenient = list(read_documents(data, repeated=repeated))
        if repeated and not any(isinstance(document, Unreadable) for document in lenient):
            documents = lenient
    for document in documents:
        if isinstance(document, Unreadable):
            problem = Problem(file=path, line=document.line, column=document.column, message=document.message)
            raise ConfigError([str(problem)])
    if len(documents) != 1:
        found = "is empty" if not documents else f"has {len(documents)} documents"
        raise ConfigError([f"{path}: error: the file {found}: expected one {KIND}"])
    document = documents[0]
    assert isinstance(document, Document)
    reading = _Reading(document.value)
    reading.read()
    positions = document.positions([place for place, _, _ in reading.found])
    problems = [
        Problem(
            file=path, line=line, column=column, severity=severity, path=field_path(place), message=message
        )
        for (place, severity, message), (line, column) in zip(reading.found, positions, strict=True)
    ]
    errors = [str(problem) for problem in sorted(problems) if problem.severity is Severity.ERROR]
    if errors:
        raise ConfigError(errors)
    problems += [
        Problem(
            file=path,
            line=again.line,
            column=again.column,
            severity=Severity.WARNING,
            message=f"{again.message}: the last one counts",
        )
        for again in repeated
    ]
    return ConfigFile(values=reading.values, warnings=tuple(sorted(problems)))


class _Reading:
    """Reads one document: texts into `values`, and what is wrong into `found`."""

    def __init__(self, value: object) -> None:
        self._root = value
        self.values: dict[str, Any] = {}
        self.found: list[tuple[Path, Severity, str]] = []

    def read(self) -> None:
        root = self._root
        if not isinstance(root, dict):
            self._error((), f"expected a {KIND}, a map")
            return
        if not self._version(root):
            return
        given = dict(self._leaves(root))
        for path, value in given.items():
            self._kube_field(path, value)
        for shorter, longer in schema.ORDERED:
            self._ordered(given, shorter, longer)
        own = root.get(OWN)
        if isinstance(own, dict):
            for name, value in own.items():
                self._own_field(name, value)
        elif own is not None:
            self._error((OWN,), "expected a map")

    def _version(self, root: dict[str, Any]) -> bool:
        version, kind = root.get("apiVersion"), root.get("kind")
        if version != API_VERSION:
            other = isinstance(version, str) and version.startswith(f"{API_GROUP}/")
            told = f"; {version} is not supported" if other else f', got "{clip(str(version or ""))}"'
            self._error(("apiVersion",), f"expected {API_VERSION}{told}")
        if kind != KIND:
            self._error(("kind",), f'expected {KIND}, got "{clip(str(kind or ""))}"')
        return not self.found

    def _leaves(self, root: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
        groups = {path[0] for path in KUBE_PROXY if len(path) == 2}
        for name, value in root.items():
            if name in {"apiVersion", "kind", OWN}:
                continue
            if name in groups:
                if isinstance(value, dict):
                    yield from (((name, inner), below) for inner, below in value.items())
                elif value is not None:
                    self._error((name,), "expected a map")
            else:
                yield (name,), value

    def _kube_field(self, path: tuple[str, ...], value: Any) -> None:
        field = KUBE_PROXY.get(path)
        if field is None:
            self._warn(path, "unknown field: ignored")
            return
        try:
            given = schema.checked(field, value)
            if given is None:
                return
            if field.setting:
                text = schema.kube_text(field, given)
                if text is not None:
                    schema.flag_of(field.setting).parse(text)
                    self.values[field.setting] = text
            elif field.told:
                self._warn(path, f"no effect: {field.told}")
            if field.tells is not None and (told := field.tells(given)):
                self._warn(path, told)
        except ValueError as error:
            self._error(path, str(error))
            return
        if path == ("featureGates",):
            for gate, told in gate_warnings(value):
                self._warn((*path, gate), told)

    def _ordered(
        self, given: Mapping[tuple[str, ...], Any], shorter: tuple[str, ...], longer: tuple[str, ...]
    ) -> None:
        values = [given.get(path) for path in (shorter, longer)]
        try:
            low, high = (
                parse_duration(value) if isinstance(value, str) and value else 0.0 for value in values
            )
        except ValueError:
            return  # reported already
        if low > (high or 30.0):
            self._error(shorter, f"must not be longer than {field_path(longer)}")

    def _own_field(self, name: str, value: Any) -> None:
        path = (OWN, name)
        flag = OWN_FIELDS.get(name)
        if flag is None:
            known = "; it is a field of the file itself" if (name,) in KUBE_PROXY else ""
            self._warn(path, f"unknown field: ignored{known}")
            return
        if value is None or value == "":
            return
        try:
            text = schema.own_text(flag, value)
            flag.parse(text)
        except ValueError as error:
            self._error(path, str(error))
            return
        self.values[flag.field] = text

    def _error(self, path: Path, message: str) -> None:
        self.found.append((path, Severity.ERROR, message))

    def _warn(self, path: Path, message: str) -> None:
        self.found.append((path, Severity.WARNING, message))


def changes(old: Settings, new: Settings) -> tuple[frozenset[str], frozenset[str]]:
    """The settings fields that differ: those that take effect at run time, and those that need a restart."""
    differ = {flag.field for flag in FLAGS if getattr(old, flag.field) != getattr(new, flag.field)}
    if old.access_log and new.access_log:
        # From one file to another: workers already send records.
        return frozenset(differ & {*AT_RUN_TIME, "access_log"}), frozenset(
            differ - {*AT_RUN_TIME, "access_log"}
        )
    return frozenset(differ & AT_RUN_TIME), frozenset(differ - AT_RUN_TIME)


def shown_field(field: str) -> str:
    """The file's name of a settings field, such as nodePortAddresses or proxyd.workers."""
    for name, flag in OWN_FIELDS.items():
        if flag.field == field:
            return f"{OWN}.{name}"
    for path, known in KUBE_PROXY.items():
        if known.setting == field:
            return field_path(path)
    return f"--{field.replace('_', '-')}"


def effective(settings: Settings) -> dict[str, Any]:
    """The settings as a configuration file that gives the same settings."""
    root: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND}
    own: dict[str, Any] = {}
    for path, field in KUBE_PROXY.items():
        if not field.setting or field.setting in {"log_format", "verbosity", "vmodule"}:
            continue
        above = root
        for name in path[:-1]:
            above = above.setdefault(name, {})
        above[path[-1]] = _value(field.setting, settings)
    root["clusterCIDR"] = ",".join(settings.cluster_cidr)
    for name, flag in OWN_FIELDS.items():
        own[name] = _value(flag.field, settings)
    for name, port, address in (
        ("healthzBindAddress", "healthzPort", settings.healthz_address),
        ("metricsBindAddress", "metricsPort", settings.metrics_address),
    ):
        # "" would mean the default address, so a server that is off has the port 0.
        own[port] = address[1] if address else 0
        root[name] = (
            (f"[{address[0]}]:" if ":" in address[0] else f"{address[0]}:") + str(address[1])
            if address
            else ""
        )
    return {**root, OWN: own}


def write(settings: Settings, path: str) -> None:
    """Write the settings as a file, for --write-config-to.

    Raises:
        OSError: it cannot be written.
    """
    import yaml  # noqa: PLC0415 - only for this

    text = yaml.dump(effective(settings), Dumper=yaml.CSafeDumper, sort_keys=False)
    FilePath(path).write_text(text, encoding="utf-8")


def _value(field: str, settings: Settings) -> object:
    value = getattr(settings, field)
    if field == "vmodule":
        return ",".join(f"{pattern}={level}" for pattern, level in value)
    if field in {"kube_api_qps", "kube_api_burst"}:
        return value
    if field == "service_node_port_range":
        return f"{value[0]}-{value[1]}"
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".") + "s"
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value
