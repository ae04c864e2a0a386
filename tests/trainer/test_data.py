"""Rows become arrays with the right targets, and every rank gets its own part of every step."""

import numpy as np
import pytest

from cptjob_trainer.data.batch import BatchShape, arrange, empty_row
from cptjob_trainer.data.batcher import Batcher
from cptjob_trainer.data.mix import Mix
from cptjob_trainer.data.rows import Row
from cptjob_trainer.model.loss import IGNORE


def row(*pieces: list[int], masked: list[int] = ()) -> Row:  # type: ignore[assignment]
    tokens = np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])
    starts = np.cumsum([0, *[len(piece) for piece in pieces[:-1]]]).astype(np.int64)
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[list(masked)] = True
    return Row(tokens, starts, mask)


def batcher(rank: int, world: int, rows: int = 10, batch: int = 5, micro: int = 2) -> Batcher:
    class Source:
        def rows(self) -> int:
            return rows

        def row(self, index: int) -> Row:
            return row([index + 1, index + 101])

    return Batcher(
        [Source()],
        Mix([rows], [rows], 0),
        BatchShape(micro_batch=micro, max_length=4, pad_id=0, packed=True),
        global_batch=batch,
        rank=rank,
        world=world,
    )


def test_targets_are_the_next_tokens_of_the_same_piece() -> None:
    arranged = arrange([row([5, 6, 7], [8, 9])], [0], 7, pad_id=0)
    assert arranged.ids.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert arranged.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert arranged.targets.tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]


def test_a_masked_token_is_no_target_and_is_still_seen() -> None:
    arranged = arrange([row([5, 6, 7, 8], masked=[0, 1])], [0], 4, pad_id=0)
    assert arranged.ids.tolist() == [[5, 6, 7, 8]]
    assert arranged.targets.tolist() == [[IGNORE, 7, 8, IGNORE]]


def test_an_empty_row_has_no_targets() -> None:
    assert arrange([empty_row()], [3], 4, pad_id=0).targets_count() == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_of_any_world_share_the_rows_of_a_step_without_loss_or_repeat(world: int) -> None:
    expected = [batcher(0, 1).mix.locate(number)[1] + 1 for number in range(5)]
    seen: list[int] = []
    counts = set()
    for rank in range(world):
        step = batcher(rank, world).step(0)
        counts.add(len(step.micro_batches))
        for micro in step.micro_batches:
            seen += [
                ids[0]
                for ids, t in zip(micro.ids.tolist(), micro.targets, strict=True)
                if (t >= 0).any()
            ]
    assert sorted(seen) == sorted(expected)
    assert len(counts) == 1


def test_the_last_batch_is_filled_with_rows_of_weight_zero() -> None:
    step = batcher(0, 1, rows=7).step(1)
    assert step.targets == 2
    assert sum(len(micro.numbers) for micro in step.micro_batches) == 5


def test_a_system_prompt_fills_places_and_is_no_token_of_its_source() -> None:
    class Source:
        def row(self, index: int) -> Row:
            return row([1, 2, 3, index + 4], masked=[0, 1, 2])

    shape = BatchShape(micro_batch=2, max_length=6, pad_id=0, packed=True)
    mix = Mix([5], [5], 0)
    step = Batcher([Source()], mix, shape, global_batch=5, rank=0, world=1).step(0)
    assert step.tokens_by_source == {0: 5}
    assert (step.filled, step.slots) == (20, 30)


def test_reading_ahead_gives_what_reading_step_by_step_gives() -> None:
    one = batcher(0, 1)
    ahead = [step.micro_batches[0].ids.tolist() for step in one.steps(0, 2)]
    assert ahead == [one.step(number).micro_batches[0].ids.tolist() for number in (0, 1)]
