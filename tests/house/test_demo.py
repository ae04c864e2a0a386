"""The text and the tiny model that need no hub."""

import json
from pathlib import Path

import pytest

from cptjob_trainer import demo


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    assert demo.main(["tiny", "--volumes", str(folder)]) == 0
    return folder


def documents(volumes: Path, role: str) -> list[str]:
    files = sorted((volumes / "data" / role).glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]


def test_a_scene_is_plain_text_under_a_line_that_names_it() -> None:
    play = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter to him BERNARDO_\n\n"
        "**BERNARDO**  \nWho's there,'\\--\n\n__\\[Sings]_  \nsnake_case stays\n\n"
        "### SCENE II. A room.\n\n**KING**  \nCome.\n"
    )
    assert demo.play_scenes(play) == [
        "Hamlet. ACT I. SCENE I. Elsinore.\n\nEnter to him BERNARDO\n\n"
        "BERNARDO\nWho's there,'--\n\n[Sings]\nsnake_case stays\n",
        "Hamlet. ACT I. SCENE II. A room.\n\nKING\nCome.\n",
    ]


def test_no_markup_is_left_in_the_plays(volumes: Path) -> None:
    scenes = documents(volumes, "general")
    assert len(scenes) > 500
    assert not any(mark in scene for scene in scenes for mark in ("**", "##", "\\"))


def test_little_of_the_reference_stands_in_it_twice(volumes: Path) -> None:
    sections = documents(volumes, "domain")
    seen: set[str] = set()
    repeated = 0
    for section in sections:
        paragraphs = {" ".join(part.split()) for part in section.split("\n\n") if len(part) > 80}
        repeated += sum(len(part) for part in paragraphs & seen)
        seen |= paragraphs
    assert repeated < 0.02 * sum(map(len, sections))


def test_the_tiny_tokenizer_gives_every_text_back(volumes: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(volumes / "models" / "tiny")
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.eos_token == "</s>"
    for text in [*documents(volumes, "domain")[:20], "naïve — ☃ \t\n  two"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_tiny_model_loads_and_fits_its_tokenizer(volumes: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = volumes / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 1_000_000
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))


def test_what_is_complete_is_left_alone(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = volumes / "models" / "tiny" / "model.safetensors"
    before = model.stat()
    assert demo.main(["tiny", "--volumes", str(volumes)]) == 0
    assert model.stat() == before
    assert capsys.readouterr().out == ""


def test_what_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    half = tmp_path / "data" / ".domain.tmp"
    half.mkdir(parents=True)
    (half / "rest.jsonl").write_text("{")
    demo.write_text(tmp_path)
    assert [path.name for path in (tmp_path / "data" / "domain").iterdir()] == [
        "python-reference.jsonl"
    ]
    assert not half.exists()
