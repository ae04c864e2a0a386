"""How a rank leaves its process group: together with the others, or at once after an error."""

import pytest
import torch

from cptjob_trainer.errors import DataError
from cptjob_trainer.run import worker

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.distributed."""
    names: list[str] = []
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(worker.dist, name, lambda *_, name=name, **__: names.append(name))
    return names


def test_ranks_that_come_to_the_end_destroy_their_group(asked: list[str]) -> None:
    with worker.process_group(2, CPU):
        assert asked == ["init_process_group"]
    assert asked == ["init_process_group", "destroy_process_group"]


def test_a_rank_with_an_error_does_not_wait_for_the_others(asked: list[str]) -> None:
    with pytest.raises(DataError, match="broken"), worker.process_group(2, CPU):
        raise DataError("broken")
    assert asked == ["init_process_group"]


def test_a_rank_alone_needs_no_group(asked: list[str]) -> None:
    with worker.process_group(1, CPU):
        pass
    assert asked == []
