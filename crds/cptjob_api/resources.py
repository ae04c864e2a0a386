"""What a worker asks its node for, and what no node could give.

The API server refuses a pod whose resources it does not understand, so what is wrong is told before,
by the field's name.
"""

import re
from collections.abc import Iterator, Mapping

from cptjob_api import quantities
from cptjob_api.job import CPTJob
from cptjob_api.resolve import gpus
from cptjob_trainer.words import counted

FIELD = "spec.trainer.resourcesPerNode"

_STANDARD = ("cpu", "memory", "ephemeral-storage")
_DOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_EXTENDED = re.compile(rf"(?=.{{1,253}}/){_DOMAIN}/[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_PAGES = "hugepages-"
_HUGE_PAGES = re.compile(rf"{_PAGES}[1-9][0-9]*[KMG]i")


def of_worker(
    job: CPTJob, gpu: str, instance_gpus: Mapping[str, int], extra: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Requests and limits. What is counted in whole pieces is asked for in both, alike."""
    asked = job.spec.trainer.resources_per_node
    requests, limits = dict(asked.requests), dict(asked.limits)
    pieces = {name: requests[name] for name in requests if _is_counted(name)}
    pieces |= {name: limits[name] for name in limits if _is_counted(name)}
    number = gpus(job, gpu, instance_gpus)
    for name, quantity in {**({gpu: str(number)} if number else {}), **extra}.items():
        pieces.setdefault(name, quantity)
    requests |= pieces
    limits |= pieces
    return dict(sorted(requests.items())), dict(sorted(limits.items()))


def faults(job: CPTJob) -> Iterator[str]:
    """What the API server would refuse, a line each."""
    asked = job.spec.trainer.resources_per_node
    for part, amounts in (("limits", asked.limits), ("requests", asked.requests)):
        for name, quantity in amounts.items():
            place = f"{FIELD}.{part}.{name}"
            if not _is_known(name):
                yield (
                    f"{place}: no resource has this name; write cpu, memory, ephemeral-storage or "
                    "the full name of a device, such as nvidia.com/gpu"
                )
            else:
                yield from (f"{place}: {words}" for words in _wrong(name, quantity))
    names = {*asked.limits, *asked.requests}
    if not names & {"cpu", "memory"} and any(map(_HUGE_PAGES.fullmatch, names)):
        yield f"{FIELD}: huge pages need a request or limit of cpu or memory beside them"
    for name, quantity in asked.requests.items():
        yield from (
            f"{FIELD}.requests.{name}: {words}" for words in _unequal(name, quantity, asked.limits)
        )


def too_many_processes(job: CPTJob, number: int) -> str | None:
    """A process uses one GPU of a worker's `number`."""
    given = job.spec.trainer.num_proc_per_node
    if not given or not number or given <= number:
        return None
    return (
        f"spec.trainer.numProcPerNode: {given} processes are more than the "
        f"{counted(number, 'GPU')} of a worker, and each uses one; lower it or leave it out"
    )


def idle_gpus(job: CPTJob, number: int) -> str | None:
    """Worth a warning: fewer processes than a worker's `number` of GPUs."""
    given = job.spec.trainer.num_proc_per_node
    if not given or given >= number:
        return None
    return (
        f"spec.trainer.numProcPerNode: {counted(given, 'process', 'processes')} of a worker with "
        f"{number} GPUs use {given} of them; leave it out to use all"
    )


def _is_counted(name: str) -> bool:
    """Devices and huge pages cannot be shared: what is requested is the limit."""
    return "/" in name or name.startswith(_PAGES)


def _is_known(name: str) -> bool:
    if name in _STANDARD or _HUGE_PAGES.fullmatch(name):
        return True
    # The API server keeps names under kubernetes.io and a prefix of quotas for itself.
    domain = name.partition("/")[0]
    own = domain == "kubernetes.io" or domain.endswith(".kubernetes.io")
    return bool(_EXTENDED.fullmatch(name)) and not own and not name.startswith("requests.")


def _wrong(name: str, quantity: str) -> Iterator[str]:
    number = quantities.parse(quantity)
    if number is None:
        yield f"{quantity} is more than can be counted"
    elif number < 0:
        yield f"{quantity} is below 0"
    elif _is_counted(name) and quantities.whole(quantity) is None:
        yield f"{quantity} is no whole number"
    elif name.startswith(_PAGES) and number % (quantities.parse(name.removeprefix(_PAGES)) or 1):
        yield f"{quantity} is no multiple of the page's size"


def _unequal(name: str, quantity: str, limits: Mapping[str, str]) -> Iterator[str]:
    if name not in limits:
        return
    asked, most = quantities.parse(quantity), quantities.parse(limits[name])
    if asked is None or most is None:
        return
    if _is_counted(name) and asked != most:
        yield f"the request ({quantity}) must equal the limit ({limits[name]}); leave one out"
    elif asked > most:
        yield f"the request ({quantity}) is more than the limit ({limits[name]})"
