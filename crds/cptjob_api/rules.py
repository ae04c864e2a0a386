"""Rules over several fields, each once as CEL for the API server and once in Python.

The lists are the specification: `RULES` hold for any job, `TRANSITIONS` for a change to one that
was accepted. Both forms say the same message.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from pydantic import BaseModel

from cptjob_api.fields import Path, fields, instances, parts
from cptjob_api.spec import CPTJobSpec, Dataset, ElasticPolicy, EnvVar, Scheduling, Trainer
from cptjob_api.storage import FORMS, PATTERNS, is_storage_uri
from cptjob_trainer.config import Role, Sifting, Training

# Pod names are `<job>-<uid>-<attempt>-<role><index>-<incarnation>`, with a few characters of the uid,
# and a host name has 63 characters.
MAX_NAME = 40
# The Service's name begins with the job's, so it must be a DNS label that starts with a letter.
NAME_PATTERN = "[a-z]([-a-z0-9]*[a-z0-9])?"


# Where parts of a value break a rule, each with a few words.
Places: TypeAlias = list[tuple[Path, str]]


@dataclass(frozen=True)
class Broken:
    """A rule that does not hold, and where. `places` are those of the parts that break it, each with
    a few words: whoever has the manifest's lines names these instead.
    """

    path: Path
    message: str
    places: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Rule:
    """One static rule.

    at: where in a job it holds; `[]` stands for every item of a list.
    field: the field below `at` that is at fault, or "".
    cel: the rule for the API server, on the value at `at` (for metadata: on the job, as the API
        server gives no other way to it). None where the schema itself says it.
    check: the rule in Python; it takes the value at `at`. None where only a cluster has the rule.
    where: the places below the value that break it, each with a few words about it.
    """

    at: str
    field: str
    message: str
    cel: str | None
    check: Callable[[Any], bool] | None
    where: Callable[[Any], Places] | None = None

    def judge(self, path: Path, value: Any) -> Iterator[Broken]:
        """The rule, if the value at `path` breaks it."""
        if self.check is not None and not self.check(value):
            places = self.where(value) if self.where else []
            below = tuple(((*path, *place), words) for place, words in places)
            yield Broken((*path, *parts(self.field)), self.message, below)


class Named(Protocol):
    """Metadata, as far as rules look at it."""

    @property
    def name(self) -> str: ...


class Job(Protocol):
    """A job, as far as rules look at it (the type itself is built on these rules)."""

    @property
    def spec(self) -> CPTJobSpec: ...


def _short_name(metadata: Named) -> bool:
    return len(metadata.name) <= MAX_NAME


def _label_name(metadata: Named) -> bool:
    return re.fullmatch(NAME_PATTERN, metadata.name) is not None


def _has_data(spec: CPTJobSpec) -> bool:
    if spec.task not in ("CausalLM", "MaskedLM"):
        return True
    return any(each.role == "Domain" for each in spec.datasets)


def _weights(spec: CPTJobSpec, role: Role) -> list[float | None]:
    return [each.weight for each in spec.datasets if each.role == role]


def _all_or_none(weights: list[float | None]) -> bool:
    return all(weight is None for weight in weights) or None not in weights


def _general_below_one(spec: CPTJobSpec) -> bool:
    return sum(weight for weight in _weights(spec, "General") if weight is not None) < 1.0


def _nodes_in_bounds(spec: CPTJobSpec) -> bool:
    policy = spec.elastic_policy or ElasticPolicy()
    wanted = spec.trainer.num_nodes
    low, high = policy.min_nodes or wanted, policy.max_nodes or wanted
    return low <= wanted <= high


def _enough_node_names(spec: CPTJobSpec) -> bool:
    policy = spec.elastic_policy or ElasticPolicy()
    wanted = max(spec.trainer.num_nodes, policy.max_nodes or 1)
    return spec.scheduling.mode == "Auto" or len(spec.scheduling.node_names) >= wanted


def _manual_for_names(scheduling: Scheduling) -> bool:
    return scheduling.mode == "Manual" or not scheduling.node_names


def _floor_below_peak(training: Training) -> bool:
    peak, floor = training.learning_rate, training.schedule.min_learning_rate
    return peak is None or floor is None or floor < peak


def _unbiased_below_one(sifting: Sifting) -> bool:
    return sifting.mode != "Unbiased" or sifting.beta_value < 1.0


def _unique(values: Sequence[str]) -> bool:
    return len(values) == len(set(values))


def _unique_names(datasets: Sequence[Dataset]) -> bool:
    return _unique([each.name for each in datasets])


def _repeated(values: Sequence[str], *below: str) -> Places:
    counts = Counter(values)
    return [
        ((index, *below), f"{value} is named {counts[value]} times")
        for index, value in enumerate(values)
        if counts[value] > 1
    ]


def _repeated_names(items: Sequence[Dataset | EnvVar]) -> Places:
    return _repeated([each.name for each in items], "name")


def _names_apart(spec: CPTJobSpec) -> bool:
    trained = {each.name for each in spec.datasets}
    return not any(each.name in trained for each in spec.validation.datasets)


def _trained_names(spec: CPTJobSpec) -> Places:
    trained = {each.name for each in spec.datasets}
    return [
        (("validation", "datasets", index, "name"), f"{each.name} is trained on")
        for index, each in enumerate(spec.validation.datasets)
        if each.name in trained
    ]


def _general_weights(spec: CPTJobSpec) -> Places:
    return [
        (("datasets", index, "weight"), f"{each.name} has {each.weight:g}")
        for index, each in enumerate(spec.datasets)
        if each.role == "General" and each.weight is not None
    ]


# What the launcher tells each of its processes, and what a pod's read-only root makes necessary.
RESERVED_ENVIRONMENT = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CPTJOB_PARENT_PID",
    "CPTJOB_TERMINATION_LOG",
    "HOME",
)


def _reserved(env: Sequence[EnvVar]) -> Places:
    return [
        ((index, "name"), each.name)
        for index, each in enumerate(env)
        if each.name in RESERVED_ENVIRONMENT
    ]


def _weight_rule(role: Role) -> Rule:
    def without(spec: CPTJobSpec) -> Places:
        return [
            (("datasets", index), f"{each.name} has none")
            for index, each in enumerate(spec.datasets)
            if each.role == role and each.weight is None
        ]

    of_role = f"d.role == '{role}'"
    return Rule(
        at="spec",
        field="datasets",
        message=f"give all {role} data sets a weight, or none of them",
        cel=f"!has(self.datasets) || !self.datasets.exists(d, {of_role} && has(d.weight)) || "
        f"self.datasets.all(d, d.role != '{role}' || has(d.weight))",
        check=lambda spec: _all_or_none(_weights(spec, role)),
        where=without,
    )


def _uri_cel() -> str:
    known = " || ".join(f"self.matches(r'{pattern}')" for pattern in PATTERNS.values())
    return f"({known}) && !self.matches(r'(^|/)[.][.](/|$)')"


def _uri_rules(at: str, *, written: bool) -> Iterator[Rule]:
    yield Rule(at, "", f"write {FORMS}, without '..' in it", _uri_cel(), is_storage_uri)
    yield Rule(
        at,
        "",
        "file:// is for local runs only; put it on a volume and write pvc://CLAIM/path",
        "!self.startsWith('file://')",
        None,
    )
    if written:
        yield Rule(
            at,
            "",
            "hf:// cannot be written; write pvc://CLAIM/path",
            "!self.startsWith('hf://')",
            lambda uri: not uri.startswith("hf://"),
        )


RULES: tuple[Rule, ...] = (
    Rule(
        at="metadata",
        field="name",
        message=f"must be at most {MAX_NAME} characters long, so that names of pods fit",
        cel=f"size(self.metadata.name) <= {MAX_NAME}",
        check=_short_name,
    ),
    Rule(
        at="metadata",
        field="name",
        message="must be lower-case letters, digits and '-', from a letter to a letter or digit",
        cel=f"self.metadata.name.matches('^{NAME_PATTERN}$')",
        check=_label_name,
    ),
    *_uri_rules("spec.model.storageUri", written=False),
    *_uri_rules("spec.datasets[].storageUri", written=False),
    *_uri_rules("spec.validation.datasets[].storageUri", written=False),
    *_uri_rules("spec.checkpoint.storageUri", written=True),
    *_uri_rules("spec.output.storageUri", written=True),
    Rule(
        at="spec",
        field="datasets",
        message="a CausalLM or MaskedLM job needs at least one data set with role Domain",
        cel="!(self.task in ['CausalLM', 'MaskedLM']) || "
        "(has(self.datasets) && self.datasets.exists(d, d.role == 'Domain'))",
        check=_has_data,
    ),
    # A list map with the key `name` says this in the schema.
    Rule("spec.datasets", "", "names must be unique", None, _unique_names, _repeated_names),
    Rule(
        "spec.validation.datasets",
        "",
        "names must be unique",
        None,
        _unique_names,
        _repeated_names,
    ),
    Rule(
        "spec.trainer.env",
        "",
        "names must be unique",
        None,
        lambda env: _unique([each.name for each in env]),
        _repeated_names,
    ),
    Rule(
        at="spec.trainer.env",
        field="",
        message=f"{', '.join(RESERVED_ENVIRONMENT)} are set for each process; leave them out",
        cel=f"self.all(e, !(e.name in {list(RESERVED_ENVIRONMENT)}))",
        check=lambda env: not _reserved(env),
        where=_reserved,
    ),
    Rule(
        at="spec",
        field="validation.datasets",
        message="a held-out data set needs a name that no training data set has",
        cel="!has(self.datasets) || !has(self.validation.datasets) || "
        "self.validation.datasets.all(v, !self.datasets.exists(d, d.name == v.name))",
        check=_names_apart,
        where=_trained_names,
    ),
    _weight_rule("Domain"),
    _weight_rule("General"),
    Rule(
        at="spec",
        field="datasets",
        message="weights of General data sets are shares of all tokens and must sum to less than 1",
        cel="!has(self.datasets) || self.datasets.filter(d, d.role == 'General' && has(d.weight))"
        ".map(d, d.weight).sum() < 1.0",
        check=_general_below_one,
        where=_general_weights,
    ),
    Rule(
        at="spec",
        field="elasticPolicy",
        message="minNodes <= trainer.numNodes <= maxNodes must hold",
        cel="!has(self.elasticPolicy) || ("
        "(!has(self.elasticPolicy.minNodes) || "
        "self.elasticPolicy.minNodes <= self.trainer.numNodes) && "
        "(!has(self.elasticPolicy.maxNodes) || "
        "self.trainer.numNodes <= self.elasticPolicy.maxNodes))",
        check=_nodes_in_bounds,
    ),
    Rule(
        at="spec.scheduling",
        field="nodeNames",
        message="nodeNames are for mode Manual; set mode: Manual or leave them out",
        cel="self.mode == 'Manual' || !has(self.nodeNames) || size(self.nodeNames) == 0",
        check=_manual_for_names,
    ),
    # A list of type set says this in the schema.
    Rule("spec.scheduling.nodeNames", "", "each node may be named once", None, _unique, _repeated),
    Rule(
        "spec.scheduling.gpuTypes", "", "each product may be named once", None, _unique, _repeated
    ),
    Rule(
        at="spec",
        field="scheduling.nodeNames",
        message="mode Manual needs a name for each of numNodes (and of maxNodes) nodes",
        cel="self.scheduling.mode != 'Manual' || (has(self.scheduling.nodeNames) && "
        "size(self.scheduling.nodeNames) >= self.trainer.numNodes && "
        "(!has(self.elasticPolicy) || !has(self.elasticPolicy.maxNodes) || "
        "size(self.scheduling.nodeNames) >= self.elasticPolicy.maxNodes))",
        check=_enough_node_names,
    ),
    Rule(
        at="spec.training",
        field="lora",
        message="lora is for method LoRA; set method: LoRA or leave it out",
        cel="self.method == 'LoRA' || !has(self.lora)",
        check=lambda training: training.method == "LoRA" or training.lora is None,
    ),
    Rule(
        at="spec.training",
        field="schedule.minLearningRate",
        message="must be less than learningRate",
        cel="!has(self.learningRate) || !has(self.schedule.minLearningRate) || "
        "self.schedule.minLearningRate < self.learningRate",
        check=_floor_below_peak,
    ),
    Rule(
        at="spec.training.sifting",
        field="betaValue",
        message="mode Unbiased needs a betaValue below 1",
        # The API server tries rules on the empty default too, before it fills that in.
        cel="!has(self.mode) || self.mode != 'Unbiased' || self.betaValue < 1.0",
        check=_unbiased_below_one,
    ),
)


def broken(job: BaseModel) -> list[Broken]:
    """Every static rule that a job breaks."""
    return [
        found
        for rule in RULES
        for path, value in instances(job, parts(rule.at))
        for found in rule.judge(path, value)
    ]


# --- changes --------------------------------------------------------------------------------------

# What may change after acceptance. `trainer` has a rule for each of its fields, for numNodes' sake.
MUTABLE = (
    "suspend",
    "activeDeadlineSeconds",
    "startupDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "failurePolicy",
    "hangDetection",
)
ACCEPTED = "has(oldSelf.status) && has(oldSelf.status.resolved)"


@dataclass(frozen=True)
class Transition:
    """A rule for a change to an accepted job; `cel` and `check` take the old job and the new one."""

    field: str
    message: str
    cel: str
    check: Callable[[Any, Any], bool]


def _frozen(place: str) -> Transition:
    """The field at `place` does not change."""
    new, old = f"self.{place}", f"oldSelf.{place}"

    def unchanged(before: Any, after: Any) -> bool:
        return list(instances(before, parts(place))) == list(instances(after, parts(place)))

    return Transition(
        place,
        "cannot change once the job is accepted; make a new job instead",
        f"has({new}) == has({old}) && (!has({new}) || {new} == {old})",
        unchanged,
    )


def _may_resize(before: Job, after: Job) -> bool:
    old, new = before.spec, after.spec
    free = new.elastic_policy is not None or new.suspend or old.suspend
    return free or new.trainer.num_nodes == old.trainer.num_nodes


TRANSITIONS: tuple[Transition, ...] = (
    *(_frozen(f"spec.{name}") for name in fields(CPTJobSpec) if name not in (*MUTABLE, "trainer")),
    *(_frozen(f"spec.trainer.{name}") for name in fields(Trainer) if name != "numNodes"),
    Transition(
        "spec.trainer.numNodes",
        "can change only with an elasticPolicy or while the job is suspended",
        "has(self.spec.elasticPolicy) || self.spec.suspend || "
        "oldSelf.spec.suspend || self.spec.trainer.numNodes == oldSelf.spec.trainer.numNodes",
        _may_resize,
    ),
)


def transition_cel() -> tuple[str, str]:
    """All transition rules in one: the rule, and what makes its message of those that are broken.

    One, because the API server asks on every write of a status too: that the whole spec is as it
    was takes a third of the time of asking for each field.
    """
    fine = " && ".join(f"({each.cel})" for each in TRANSITIONS)
    told = " + ".join(
        f"(({each.cel}) ? '' : '; {each.field}: {each.message}')" for each in TRANSITIONS
    )
    return (
        f"!({ACCEPTED}) || self.spec == oldSelf.spec || ({fine})",
        f"({told}).substring(2)",
    )


def forbidden_changes(before: BaseModel, after: BaseModel) -> list[Broken]:
    """Every transition rule that the change of an accepted job breaks."""
    return [
        Broken(parts(each.field), each.message)
        for each in TRANSITIONS
        if not each.check(before, after)
    ]
