"""The chart's values as types; values.yaml, values.schema.json and the chart's table are made of them.

What the operator itself reads stands under `settings`, as cptjob_operator.settings defines it.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from cptjob_api.spec import Quantity, ResourceName
from cptjob_operator.settings import Annotations, Labels, Port, Settings
from cptjob_trainer.config import Strict, rule

Object = dict[str, JsonValue]
_DNS_LABEL = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"
# Short, as the names of objects are made of it.
NamePart = Annotated[str, Field(max_length=40, pattern=_DNS_LABEL)]
AccountName = Annotated[str, Field(max_length=63, pattern=_DNS_LABEL)]
Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h))+$")]


class Image(Strict):
    """An image and the version of it."""

    # With a tag or a digest it stays within the 512 characters of settings.jobs.image.
    repository: str = Field(min_length=1, max_length=380, description="Registry and name.")
    tag: str = Field(
        default="",
        max_length=128,
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$",
        description="Tag; empty is the chart's appVersion.",
    )
    digest: str = Field(
        default="",
        pattern=r"^(sha256:[0-9a-f]{64})?$",
        description="Digest, such as sha256:...; it wins over the tag.",
    )


class OperatorImage(Image):
    """Image of the operator."""

    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When nodes pull it."
    )


class ContainerEnv(Strict):
    """An environment variable of the operator."""

    name: str = Field(
        min_length=1, max_length=256, pattern=r"^[^=]+$", description="Name of the variable."
    )
    value: str = Field(default="", max_length=16_384, description="Its value.")
    value_from: Object | None = Field(
        default=None,
        description="Where its value comes from, as in a container.",
        json_schema_extra=rule("value"),
    )


class PodToleration(Strict):
    """A taint that pods tolerate, as Kubernetes writes it."""

    key: str = Field(default="", max_length=317, description="Key of the taint; empty is any.")
    operator: Literal["Exists", "Equal", "Lt", "Gt"] = Field(
        default="Equal", description="How the taint's value is compared; Exists takes any."
    )
    value: str = Field(default="", max_length=63, description="Value of the taint, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""] = Field(
        default="", description="Effect of the taint; empty is any."
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=31_536_000)] | None = Field(
        default=None,
        description="How long a NoExecute taint is tolerated.",
        json_schema_extra=rule("for ever"),
    )


class Reference(Strict):
    """Name of an object in the release's namespace."""

    name: str = Field(min_length=1, max_length=253, description="Its name.")


class Crds(Strict):
    """The definition of CPTJob."""

    enabled: bool = Field(default=True, description="Install and upgrade it with the chart.")
    keep: bool = Field(
        default=True,
        description="Leave it, and so every CPTJob, when the release is uninstalled.",
    )


class ServiceAccount(Strict):
    """Who the operator is."""

    create: bool = Field(default=True, description="Make the service account.")
    name: AccountName = Field(
        default="",
        description="Its name; empty is the release's full name. An account that was made before "
        "has to be named.",
    )
    annotations: Annotations = Field(default={}, description="Its annotations.")


class Rbac(Strict):
    """What the operator and people may do."""

    create: bool = Field(
        default=True,
        description="Make the roles: for every namespace, or with settings.watchedNamespaces for "
        "those alone and for reading nodes.",
    )
    aggregate: bool = Field(
        default=True,
        description="Let whom the cluster's edit role allows write CPTJobs, and whom its view role "
        "allows read them. Who may create a CPTJob may use any Secret and claim of its namespace.",
    )


class Disruption(Strict):
    """The PodDisruptionBudget."""

    enabled: bool = Field(default=True, description="Make it, where there are several replicas.")
    max_unavailable: Annotated[int, Field(ge=1, le=10)] = Field(
        default=1, description="Operators that may be drained at once."
    )


class NetworkPolicy(Strict):
    """Who may reach the operator, and whom it may reach."""

    enabled: bool = Field(default=True, description="Make the NetworkPolicy.")
    api_server_ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=16)] = Field(
        default=(443, 6443), description="Ports of the API server, before and behind its Service."
    )
    extra_ingress: tuple[Object, ...] = Field(default=(), description="More ingress rules.")
    extra_egress: tuple[Object, ...] = Field(default=(), description="More egress rules.")


class Service(Strict):
    """The Service in front of the operators' metrics."""

    enabled: bool = Field(default=True, description="Whether to make it.")
    annotations: Annotations = Field(default={}, description="Its annotations.")


class Monitor(Strict):
    """An object of the Prometheus operator, whose definitions have to be there."""

    enabled: bool = Field(default=False, description="Whether to make it.")
    interval: Duration = Field(default="30s", description="Time between two scrapes.")
    labels: Labels = Field(default={}, description="Labels that a Prometheus selects by.")


class Rules(Strict):
    """Alerts of the Prometheus operator, whose definitions have to be there."""

    enabled: bool = Field(default=False, description="Whether to make it.")
    labels: Labels = Field(default={}, description="Labels that a Prometheus selects by.")


class Metrics(Strict):
    """How Prometheus finds the figures of the operator and of jobs."""

    service: Service = Field(
        default=Service(), description="The Service in front of the operators' metrics."
    )
    service_monitor: Monitor = Field(
        default=Monitor(), description="ServiceMonitor for the operators; needs the Service."
    )
    pod_monitor: Monitor = Field(
        default=Monitor(), description="PodMonitor for the operators, in place of the other."
    )
    job_pod_monitor: Monitor = Field(
        default=Monitor(),
        description="PodMonitor for the coordinators of jobs: steps, loss, tokens per second.",
    )
    rules: Rules = Field(
        default=Rules(),
        description="PrometheusRule: alerts about the operators and about jobs; they need the "
        "figures of the operators, by serviceMonitor or podMonitor.",
    )


class Dashboard(Strict):
    """A Grafana dashboard in a ConfigMap that Grafana's sidecar picks up."""

    enabled: bool = Field(default=False, description="Whether to make it.")
    labels: Labels = Field(
        default={"grafana_dashboard": "1"}, description="Labels that the sidecar selects by."
    )
    annotations: Annotations = Field(
        default={}, description="Annotations, such as the folder in Grafana."
    )


class Resources(Strict):
    """Resources of an operator."""

    requests: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] = Field(
        default={"cpu": "200m", "memory": "192Mi"}, description="What a node must have free."
    )
    limits: Annotated[dict[ResourceName, Quantity], Field(max_length=16)] = Field(
        default={"memory": "512Mi"},
        description="Most that it may use. Held back in its CPU, a leader could lose its lease.",
    )


class Values(Strict):
    """Values of the chart cptjob-operator."""

    name_override: NamePart = Field(default="", description="Name in place of the chart's.")
    fullname_override: NamePart = Field(
        default="", description="Name of the objects in place of the release's and the chart's."
    )
    image: OperatorImage = Field(
        default=OperatorImage(repository="cptjob/operator"), description="Image of the operator."
    )
    trainer_image: Image = Field(
        default=Image(repository="cptjob/trainer"),
        description="Image of jobs that name none; settings.jobs.image wins over it.",
    )
    image_pull_secrets: tuple[Reference, ...] = Field(
        default=(), description="Secrets to pull the operator's image with, as {name: ...}."
    )
    replicas: Annotated[int, Field(ge=1, le=10)] = Field(
        default=2, description="Operators; one leads and the others stand by."
    )
    settings: Settings = Field(
        default=Settings(),
        description="What the platform decides: pools, defaults, limits. The operator reads it at "
        "its start, so a change starts it anew; jobs that were accepted stay as they are.",
    )
    crds: Crds = Field(default=Crds(), description="The definition of CPTJob.")
    service_account: ServiceAccount = Field(
        default=ServiceAccount(), description="Who the operator is."
    )
    rbac: Rbac = Field(default=Rbac(), description="What the operator and people may do.")
    resources: Resources = Field(default=Resources(), description="Resources of an operator.")
    pod_disruption_budget: Disruption = Field(
        default=Disruption(), description="The PodDisruptionBudget."
    )
    network_policy: NetworkPolicy = Field(
        default=NetworkPolicy(), description="Who may reach the operator, and whom it may reach."
    )
    metrics: Metrics = Field(
        default=Metrics(),
        description="How Prometheus finds the figures of the operator and of jobs.",
    )
    dashboard: Dashboard = Field(
        default=Dashboard(), description="A Grafana dashboard in a ConfigMap."
    )
    common_labels: Labels = Field(default={}, description="Labels of every object.")
    pod_labels: Labels = Field(default={}, description="Labels of the operator's pods.")
    pod_annotations: Annotations = Field(
        default={}, description="Annotations of the operator's pods."
    )
    env: tuple[ContainerEnv, ...] = Field(
        default=(), description="More environment of the operator, as in a container."
    )
    priority_class_name: str = Field(
        default="", max_length=253, description="Priority class of the operator's pods."
    )
    node_selector: Labels = Field(default={}, description="Labels of nodes for the operator.")
    tolerations: tuple[PodToleration, ...] = Field(
        default=(), description="Taints that the operator's pods tolerate."
    )
    affinity: Object = Field(
        default={},
        description="Affinity of the operator's pods; empty keeps them in different zones where "
        "that is possible.",
    )
    topology_spread_constraints: tuple[Object, ...] = Field(
        default=(),
        description="How the operators spread; empty spreads them over nodes where that is "
        "possible.",
    )
