"""Storage URIs on this machine."""

from pathlib import Path

import pytest

from cptjob.volumes import Volumes
from cptjob_trainer.errors import ConfigError, MissingInputError, UsageError


def test_a_claim_is_below_volumes_or_where_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    volumes = Volumes.parse(["data=big"], tmp_path)
    assert volumes.locate("pvc://data/law/a") == tmp_path / "big" / "law" / "a"
    assert volumes.locate("pvc://models/m") == tmp_path / "volumes" / "models" / "m"
    assert volumes.locate("pvc://models") == tmp_path / "volumes" / "models"


def test_a_file_uri_is_absolute_or_starts_here(tmp_path: Path) -> None:
    volumes = Volumes.parse([], tmp_path)
    assert volumes.locate("file:///data/law") == Path("/data/law")
    assert volumes.locate("file://data/law") == tmp_path / "data" / "law"


@pytest.mark.parametrize("option", ["data", "=dir", "data=", ""])
def test_a_volume_without_claim_or_directory_is_a_usage_error(option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CLAIM=DIR"):
        Volumes.parse([option], tmp_path)


def test_a_claim_given_twice_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        Volumes.parse([f"data={tmp_path}", f"data={tmp_path}"], tmp_path)


def test_a_volume_that_is_no_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is not a directory"):
        Volumes.parse(["data=nowhere"], tmp_path)


def test_a_directory_for_a_claim_that_nothing_names_is_a_usage_error(tmp_path: Path) -> None:
    uris = ["pvc://models/m", "pvc://data/law", "file:///elsewhere"]
    Volumes.parse([f"data={tmp_path}"], tmp_path).check_claims(uris)
    with pytest.raises(UsageError, match=r"--volume dat: .* no such claim; did you mean data\?"):
        Volumes.parse([f"dat={tmp_path}"], tmp_path).check_claims(uris)
    with pytest.raises(UsageError, match=r"--volume foo: .* it names data, models$"):
        Volumes.parse([f"foo={tmp_path}"], tmp_path).check_claims(uris)


def test_a_missing_input_names_field_path_and_option(tmp_path: Path) -> None:
    volumes = Volumes.parse([], tmp_path)
    with pytest.raises(MissingInputError) as caught:
        volumes.locate_input("spec.model.storageUri", "pvc://models/m")
    assert str(caught.value) == (
        f"spec.model.storageUri: pvc://models/m is {tmp_path}/volumes/models/m here, and there is "
        "no such path; put it there or give --volume models=DIR"
    )


def test_remote_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Volumes.parse([], tmp_path).locate("s3://bucket/model")
