"""The command that prepares: what it says, what it imports, and what memory it takes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import main, prepare

Job = Callable[..., TrainerConfig]


MEASURED = """
import resource, sys
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepare import prepare
if __name__ == "__main__":
    prepared = prepare(TrainerConfig.load(sys.argv[1]), packs=lambda _: True, processes=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(prepared.sources[0].tokens, peak)
"""


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    """60 MB of text take at most 12 MB more than 5 MB of text do."""
    (tmp_path / "measured.py").write_text(MEASURED)
    texts = [text * 8 for text in make.sentences(5000)]
    content = make.texts(tmp_path / "part.jsonl", texts).read_bytes()
    figures = []
    for size in (5 << 20, 60 << 20):
        data = tmp_path / str(size)
        data.mkdir()
        for number in range(size // len(content) + 1):
            first = b'{"text": "%d"}\n' % number
            (data / f"{number:03}.jsonl").write_bytes(first + content)
        job(data, output=tmp_path / f"output-{size}").dump(tmp_path / "config.json")
        command = [sys.executable, tmp_path / "measured.py", tmp_path / "config.json"]
        ended = subprocess.run(command, capture_output=True, check=True, text=True)
        figures.append([int(word) for word in ended.stdout.split()])
    (few, small), (many, large) = figures
    assert many > 7 * few
    assert large - small < 12 << 20


def test_the_command_prepares_checks_and_exits_with_the_fault_code(
    tmp_path: Path, make: SimpleNamespace, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    # No layers, so that the few weights are all that the model has.
    no_layers = {"num_hidden_layers": 0, "num_attention_heads": 1, "tie_word_embeddings": True}
    model = make.model(tmp_path / "tied", **no_layers)
    config = job(path, model=model)
    config.dump(tmp_path / "config.json")
    arguments = ["--config", str(tmp_path / "config.json")]
    assert main([*arguments, "--check-only"]) == 0, capsys.readouterr().err
    assert "data: 50 documents" in capsys.readouterr().out
    assert not config.paths.output.exists()
    make.remember_packs(config)
    assert main(arguments) == 0
    assert "steps, in " in capsys.readouterr().out
    make.lines(path, ["[]"])
    assert main(arguments) == 65
    assert "data.jsonl:1: is a list" in capsys.readouterr().err


def test_a_check_of_a_model_whose_weights_lack_something_says_what(
    tmp_path: Path, make: SimpleNamespace, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make.model(tmp_path / "untied", num_hidden_layers=0, num_attention_heads=1)
    path = make.texts(tmp_path / "data.jsonl", make.sentences(50))
    job(path, model=model).dump(tmp_path / "config.json")
    assert main(["--config", str(tmp_path / "config.json"), "--check-only"]) == 65
    assert "the weights lack the tensor lm_head.weight" in capsys.readouterr().err


def test_a_warm_up_is_compared_with_the_steps_also_of_data_that_was_prepared_before(
    tmp_path: Path, make: SimpleNamespace, job: Job
) -> None:
    config = job(make.texts(tmp_path / "data.jsonl", make.sentences(50)))
    steps = prepare(config, packs=make.packs).total_steps
    for warmup in (steps, steps + 1):
        schedule = config.training.schedule.model_copy(update={"warmup_steps": warmup})
        training = config.training.model_copy(update={"schedule": schedule})
        again = prepare(config.model_copy(update={"training": training}), packs=make.packs)
        told = [warning for warning in again.warnings if "warmupSteps" in warning]
        assert len(told) == (warmup > steps)


def test_the_data_part_starts_without_torch() -> None:
    program = (
        "import sys, cptjob_trainer.data.prepare; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"
