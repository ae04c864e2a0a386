"""Storage URIs."""

from pathlib import Path

import pytest

from cptjob_api.storage import Storage, is_storage_uri
from cptjob_trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("uri", "scheme", "place", "path"),
    [
        ("pvc://models/llama/8b", "pvc", "models", "llama/8b"),
        ("pvc://models", "pvc", "models", ""),
        ("pvc://models/", "pvc", "models", ""),
        ("s3://bucket-1/a/b", "s3", "bucket-1", "a/b"),
        ("hf://org/name-1.5", "hf", "org", "name-1.5"),
        ("file:///data/x", "file", "", "/data/x"),
        ("file://data/x", "file", "", "data/x"),
    ],
)
def test_a_uri_is_taken_apart(uri: str, scheme: str, place: str, path: str) -> None:
    assert Storage.parse(uri) == Storage(scheme, place, path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "models/llama",
        "/models",
        "pvc:/models",
        "pvc://",
        "pvc:///x",
        "pvc://Models/x",
        "pvc://models/../secrets",
        "pvc://models/a/..",
        "file://../x",
        "s3://b/x",
        "hf://org",
        "hf://org/name/more",
        "http://host/x",
        "PVC://models/x",
        "pvc://models/a\nb",
        "pvc://models/a\n",
    ],
)
def test_what_is_none_is_refused_with_the_forms(uri: str) -> None:
    assert not is_storage_uri(uri)
    with pytest.raises(ConfigError, match="write pvc://CLAIM/path, or file:///path in a local run"):
        Storage.parse(uri)


def test_dots_inside_a_name_are_harmless() -> None:
    assert is_storage_uri("pvc://models/a..b/...")


def test_a_claim_is_found_in_the_volumes_or_beside_the_job(tmp_path: Path) -> None:
    claim = Storage.parse("pvc://models/llama")
    assert claim.local({"models": Path("/mnt/m")}, tmp_path) == Path("/mnt/m/llama")
    assert claim.local({}, tmp_path) == tmp_path / "volumes" / "models" / "llama"


def test_a_file_starts_at_the_base_unless_it_is_absolute(tmp_path: Path) -> None:
    assert Storage.parse("file://a/b").local({}, tmp_path) == tmp_path / "a" / "b"
    assert Storage.parse("file:///a/b").local({}, tmp_path) == Path("/a/b")


def test_what_is_elsewhere_has_no_local_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="copy it to a volume first"):
        Storage.parse("s3://bucket/x").local({}, tmp_path)


@pytest.mark.parametrize("uri", ["pvc://out", "pvc://out/a", "s3://bucket/a", "file:///out"])
def test_a_folder_below_is_a_uri_again(uri: str) -> None:
    below = str(Storage.parse(uri) / "job")
    assert below == f"{uri}/job"
    assert is_storage_uri(below)
