"""What a result takes over from its base: links are followed where it is clear what they lead to."""

import shutil
from pathlib import Path

import pytest

from cptjob_trainer.errors import DataError, MissingInputError
from cptjob_trainer.model.model_files import copied
from cptjob_trainer.model.modeldir import check_model

NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def names(base: Path) -> list[str]:
    return [str(name) for name in copied(base)]


def as_cache(model: Path, home: Path, relative: bool = True) -> Path:
    """A snapshot of a Hugging Face cache, with the files of `model`."""
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        target = Path("../../blobs") if relative else blobs
        (snapshot / file.name).symlink_to(target / f"{number:040x}")
    return snapshot


STRANGERS = (
    "pytorch_model.bin", "rust_model.ot", "weights.npz", "notes.pkl", "old.tar", "train.jsonl",
    "model.safetensors.index.json", "modeling.py", ".gitattributes", "README.md", "notes.txt",
)  # fmt: skip


def test_only_configuration_tokenizer_templates_and_licence_are_copied(model: Path) -> None:
    for name in STRANGERS:
        (model / name).write_text("x")
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    assert names(model) == NAMES
    further = (
        "LICENSE.txt", "license.md", "NOTICE.md", "generation_config.json", "preprocessor_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt",
        "vocab.json", "tokenizer.model", "video_preprocessor_config.json",
    )  # fmt: skip
    for name in further:
        (model / name).write_text("x")
    assert set(names(model)) == {*NAMES, *further}


def test_a_snapshot_of_a_cache_is_a_model(tmp_path: Path, model: Path) -> None:
    snapshot = as_cache(model, tmp_path / "models--a--b")
    assert names(snapshot) == NAMES
    assert check_model(snapshot).fingerprint == check_model(model).fingerprint


def test_a_directory_may_link_into_a_cache_and_be_a_link_itself(
    tmp_path: Path, model: Path
) -> None:
    snapshot = as_cache(model, tmp_path / "models--a--b", relative=False)
    (tmp_path / "link").symlink_to(snapshot)
    assert names(tmp_path / "link") == NAMES


def test_links_within_the_directory_are_followed_also_those_of_folders(model: Path) -> None:
    (model / "..data").mkdir()
    (model / "..data" / "tools.jinja").write_text("{{ tools }}")
    (model / "LICENSE").symlink_to("config.json")
    (model / "additional_chat_templates").symlink_to("..data")
    templates = ["additional_chat_templates/tools.jinja"]
    assert names(model) == sorted([*NAMES, "LICENSE", *templates])


def test_a_link_out_of_the_directory_is_refused_before_anything_is_trained(
    tmp_path: Path, model: Path
) -> None:
    (tmp_path / "secret").write_text("password")
    (model / "LICENSE.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"LICENSE\.txt: leads to .*secret, outside of the model's"):
        check_model(model)


def test_a_folder_that_leads_out_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tools.jinja").write_text("{{ tools }}")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="outside of the model's directory"):
        check_model(model)


def test_a_link_that_leads_nowhere_is_refused(model: Path) -> None:
    (model / "generation_config.json").symlink_to("../../blobs/gone")
    with pytest.raises(MissingInputError, match=r"a link to \.\./\.\./blobs/gone, which is not"):
        check_model(model)


def test_links_among_what_is_not_copied_do_not_matter(tmp_path: Path, model: Path) -> None:
    weights = (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(weights)
    (model / "pytorch_model.bin").symlink_to("gone")
    assert names(model) == NAMES
    assert check_model(model).files == (model / "model.safetensors",)
