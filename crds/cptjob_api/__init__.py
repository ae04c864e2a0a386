"""The CPTJob API as types: the spec, its status, the rules, the loader and what is generated."""

from cptjob_api.facts import ModelFacts
from cptjob_api.job import CPTJob
from cptjob_api.manifest import Manifest, load_manifest, parse_manifest
from cptjob_api.resolve import JobDefaults, Resolved, resolve, trainer_config
from cptjob_api.storage import Storage
from cptjob_api.unsupported import unsupported

__all__ = [
    "CPTJob",
    "JobDefaults",
    "Manifest",
    "ModelFacts",
    "Resolved",
    "Storage",
    "load_manifest",
    "parse_manifest",
    "resolve",
    "trainer_config",
    "unsupported",
]
