"""A CPTJob: metadata, spec and status in one value."""

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cptjob_api.fields import show
from cptjob_api.kubeyaml import dump
from cptjob_api.rules import broken
from cptjob_api.spec import CPTJobSpec
from cptjob_api.status import CPTJobStatus
from cptjob_trainer.config import Strict

GROUP = "training.cptjob.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "CPTJob"
PLURAL = "cptjobs"
#: Where a job's curves are served.
TENSORBOARD_PORT = 6006


def tensorboard_name(job_name: str) -> str:
    """Name of the Deployment and Service that show a job's curves, where it asks for them.

    People type it, so it is the same each time that a job is made anew.
    """
    return f"{job_name}-tensorboard"


class ObjectMeta(Strict):
    """The standard metadata; what is not named here is kept as it is."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="Name of the job, such as my-job, unique in its namespace."
    )
    namespace: str | None = Field(default=None, description="Namespace of the job.")
    labels: dict[str, str] = Field(default={}, description="Labels.")
    annotations: dict[str, str] = Field(default={}, description="Annotations.")
    uid: str | None = Field(default=None, description="Identity, given by the API server.")
    generation: int | None = Field(default=None, description="Counts changes of the spec.")
    resource_version: str | None = Field(default=None, description="Changes with every write.")
    creation_timestamp: AwareDatetime | None = Field(default=None, description="When it was made.")
    deletion_timestamp: AwareDatetime | None = Field(
        default=None, description="When it was asked to go."
    )


class CPTJob(Strict):
    """Continued pre-training of a model on domain text, or a classifier's training."""

    api_version: Literal["training.cptjob.io/v1alpha1"] = Field(
        default="training.cptjob.io/v1alpha1", description="Group and version of this API."
    )
    kind: Literal["CPTJob"] = Field(default="CPTJob", description="Always CPTJob.")
    metadata: ObjectMeta = Field(description="The standard metadata, such as {name: my-job}.")
    spec: CPTJobSpec = Field(description="What the job is asked to do.")
    status: CPTJobStatus | None = Field(default=None, description="What the operator reports.")

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        found = broken(self)
        if found:
            text = "; ".join(f"{show(each.path)}: {each.message}" for each in found)
            # Messages may hold braces, so they travel in the context.
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": found})
        return self

    def manifest(self) -> dict[str, object]:
        """The job as a document, with what was left out left out."""
        return self.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    def yaml(self) -> str:
        """The job as a manifest's text."""
        return dump(self.manifest())
