"""Every fault of a data file is named with its file, its line and what to do."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cptjob_trainer.config import Data, TrainerConfig
from cptjob_trainer.data import documents
from cptjob_trainer.data.prepare import check, prepare
from cptjob_trainer.errors import DataError, Fault, MissingInputError

GOOD = '{"text": "a good line"}'

BAD_LINES = {
    "broken JSON": ('{"text": "no end', "broken JSON at column"),
    "a list": ('["text"]', "is a list, not an object"),
    "a bare string": ('"text"', "is a string, not an object"),
    "nothing": ("", "blank line; remove it"),
    "white space only": ("  \t", "blank line; remove it"),
    "a further field": ('{"text": "a", "id": 7}', 'has a further field "id"; keep "text" only'),
    "another field": ('{"content": "a"}', 'field "text" is missing (there is "content")'),
    "no field": ("{}", 'field "text" is missing (there is no field at all)'),
    "a number for text": ('{"text": 5}', '"text" is a number, not a string'),
    "null for text": ('{"text": null}', '"text" is null, not a string'),
    "a boolean for text": ('{"text": true}', '"text" is a boolean, not a string'),
    "empty text": ('{"text": ""}', '"text" is empty or only white space'),
    "white space for text": ('{"text": " \\n "}', '"text" is empty or only white space'),
    "text twice": ('{"text": "a", "text": "b"}', "more than once"),
    "a lone surrogate": ('{"text": "\\ud800"}', "broken JSON at column"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at position 14"),
    "a BOM inside": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark (BOM)"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_in_line_7_of_file_3_is_named(
    kind: str, tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    line, message = BAD_LINES[kind]
    data = tmp_path / "data"
    for number in range(1, 5):
        lines = [GOOD] * 6 + ([line] if number == 3 else [GOOD]) + [GOOD]
        make.lines(data / f"{number}.jsonl", lines)
    with pytest.raises(DataError) as raised:
        check(job(data))
    (fault,) = raised.value.faults
    assert (fault.file, fault.line) == (str(data / "3.jsonl"), 7)
    assert message in fault.message
    assert f"3.jsonl:7: {fault.message}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text", "not a .jsonl file; unpack or convert it, or move it away"),
        ("a.json", b"{}", "not a .jsonl file"),
        ("a.jsonl.gz", b"\x1f\x8b", "not a .jsonl file"),
        ("README.md", b"hello", "not a .jsonl file"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed (gzip); unpack it first"),
        ("a.jsonl", b"PK\x03\x04", "a zip archive; unpack it first"),
        ("a.jsonl", b"Salted__x", "encrypted (openssl); decrypt it first"),
        ("a.jsonl", b"age-encryption.org/v1", "encrypted (age); decrypt it first"),
        ("a.jsonl", b"PAR1", "a Parquet file"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', "byte order mark (BOM); save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16, not UTF-8; convert it"),
    ],
)
def test_a_wrong_file_is_named(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    make: SimpleNamespace,
    job: Callable[..., TrainerConfig],
) -> None:
    data = tmp_path / "data"
    make.lines(data / "0.jsonl", [GOOD])
    (data / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        check(job(data))
    (fault,) = raised.value.faults
    assert (fault.file, fault.line) == (str(data / name), 0)
    assert message in fault.message


def test_hidden_files_of_a_volume_are_passed_over(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    data = tmp_path / "data"
    make.lines(data / "0.jsonl", [GOOD])
    (data / "..data").symlink_to(data / "0.jsonl")
    (data / ".DS_Store").write_bytes(b"x")
    (data / "lost+found").mkdir()
    assert check(job(data)).documents == {"data": 1}


def test_a_directory_inside_is_a_fault(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    make.lines(tmp_path / "data" / "inner" / "0.jsonl", [GOOD])
    with pytest.raises(DataError, match="a directory inside the data set"):
        check(job(tmp_path / "data"))


def test_missing_and_empty_data_sets_say_so(
    tmp_path: Path, job: Callable[..., TrainerConfig]
) -> None:
    with pytest.raises(MissingInputError, match=r"data set cannot be read .*check storageUri"):
        check(job(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file; put .jsonl files there"):
        check(job(tmp_path / "empty"))


def test_a_file_that_may_not_be_read_is_missing_input_as_a_model_is(
    tmp_path: Path,
    make: SimpleNamespace,
    job: Callable[..., TrainerConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make.texts(tmp_path / "data.jsonl", ["a text"])
    config, opened = job(data), Path.open

    # Root may read everything, so the refusal is made here.
    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == data:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MissingInputError, match="cannot be read: Permission denied; check"):
        check(config)


def test_all_faults_are_shown_up_to_a_limit_and_the_rest_is_counted(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    data = tmp_path / "data"
    make.lines(data / "0.jsonl", ["[]"] * 15)
    make.lines(data / "1.jsonl", ["{}"] * 300)
    with pytest.raises(DataError) as raised:
        check(job(data))
    lines = str(raised.value).splitlines()
    assert lines[0] == "the data has 315 faults:"
    assert len(lines) == 22
    assert lines[15].startswith(f"{data}/0.jsonl:15: ")
    assert lines[16].startswith(f"{data}/1.jsonl:1: ")
    assert lines[-1] == "... and 295 more"


def test_a_line_over_the_limit_is_refused_with_its_size(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    long = json.dumps({"text": "x" * (50 << 20)})
    path = make.lines(tmp_path / "0.jsonl", [GOOD, GOOD, long, GOOD, "[]"])
    with pytest.raises(DataError) as raised:
        check(job(path))
    assert [fault.line for fault in raised.value.faults] == [3, 5]
    assert "the line has 50 MiB, the limit is 32 MiB" in raised.value.faults[0].message


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.JSONL", "the name must end in .jsonl, in lower case; rename it"),
        ("a.json", 'if each line is one object {"text": "..."}, rename it, else convert it'),
        ("a.txt", "not a .jsonl file; unpack or convert it, or move it away"),
    ],
)
def test_another_ending_is_told_with_what_to_do(
    tmp_path: Path,
    make: SimpleNamespace,
    job: Callable[..., TrainerConfig],
    name: str,
    advice: str,
) -> None:
    with pytest.raises(DataError) as raised:
        check(job(make.lines(tmp_path / name, [GOOD])))
    assert advice in raised.value.faults[0].message


def test_bad_lines_are_tolerated_up_to_max_bad_lines(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    lines = [GOOD, "[]", '{"text": "another"}', "{}"]
    path = make.lines(tmp_path / "0.jsonl", lines)
    prepared = prepare(job(path, data=Data(max_bad_lines=2), split=0.0), packs=lambda _: True)
    assert prepared.sources[0].documents == 2
    assert prepared.bad_line_count == 2
    assert [fault.line for fault in prepared.bad_lines] == [2, 4]
    assert "data: 2 bad lines were skipped" in prepared.warnings
    with pytest.raises(DataError, match=r"2 faults \(1 bad line is allowed\)"):
        prepare(job(path, data=Data(max_bad_lines=1)), packs=lambda _: True)


def test_a_wrong_file_is_never_tolerated(
    tmp_path: Path, make: SimpleNamespace, job: Callable[..., TrainerConfig]
) -> None:
    make.lines(tmp_path / "data" / "0.jsonl", [GOOD])
    make.lines(tmp_path / "data" / "1.txt", [GOOD])
    with pytest.raises(DataError, match=r"not a .jsonl file"):
        check(job(tmp_path / "data", data=Data(max_bad_lines=10)))


def test_the_last_line_needs_no_line_break_and_cr_is_white_space(
    tmp_path: Path, job: Callable[..., TrainerConfig]
) -> None:
    path = tmp_path / "0.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}')
    assert check(job(path)).documents == {"0": 2}


def test_chunks_hold_whole_lines_and_all_of_them(
    tmp_path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 1000)
    monkeypatch.setattr(documents, "_BLOCK", 64)
    random.seed(0)
    lines = ["x" * random.choice([0, 1, 50, 63, 64, 65, 999, 1000, 1001, 3000]) for _ in range(200)]
    path = make.lines(tmp_path / "0.jsonl", lines)
    chunks = list(documents.chunks(path))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks[:-1])]
    assert chunks[-1].end == path.stat().st_size
    read = [line for chunk in chunks for batch in documents.batches(chunk) for line in batch]
    assert read == [line.encode() for line in lines]


def test_line_numbers_count_over_chunks_and_processes(
    tmp_path: Path,
    make: SimpleNamespace,
    job: Callable[..., TrainerConfig],
) -> None:
    long = json.dumps({"text": "word " * 200_000})
    lines = [long if number % 5 == 0 else GOOD for number in range(60)]
    lines[3] = lines[41] = lines[59] = "[]"
    path = make.lines(tmp_path / "0.jsonl", lines)
    assert len(list(documents.chunks(path))) > 1
    with pytest.raises(DataError) as raised:
        check(job(path), processes=2)
    assert raised.value.faults == [
        Fault(str(path), line, "is a list, not an object; each line must be one object "
        '{"text": "..."}')
        for line in (4, 42, 60)
    ]  # fmt: skip


@pytest.mark.parametrize("rest", [{}, {"text": "a"}])
def test_a_strange_name_of_a_field_is_shown_short_and_harmless(rest: dict[str, str]) -> None:
    name = "\x1b[31mred\n\u202e\u009b" + "x" * 5000
    message = documents.problem(json.dumps({name: 1, **rest}).encode())
    assert '"\\x1b[31mred\\n\\u202e\\x9b' in message
    assert "xxx..." in message
    assert message.isprintable()
    assert len(message) < 250
