"""The queue of shards: each once, neighbours together, and every kind of loss comes to an end."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.errors import Status
from gc2ray.core.shards import Shards, SourceFile, cut_shards
from gc2ray.runner.messages import GROUPED_FROM, PoisonRow, ShardAssignment
from gc2ray.runner.shard_queue import SEARCHES_A_TRY, Limits, Loss, ShardQueue

LIMITS = Limits(tries=3, poison_rows=2)


def make_shards(groups: list[int], shard_rows: int) -> Shards:
    return Shards.from_shards(
        cut_shards([SourceFile("a.parquet", "f", tuple(groups))], shard_rows, "r")
    )


def make_queue(
    groups: list[int], shard_rows: int = 10, done: tuple[int, ...] = (), limits: Limits = LIMITS
) -> ShardQueue:
    shards = make_shards(groups, shard_rows)
    return ShardQueue(shards, np.isin(np.arange(len(shards)), done), limits)


def take(queue: ShardQueue, worker: int, *, alone: bool = True) -> ShardAssignment:
    assignment = queue.take(worker, alone=alone)
    assert assignment is not None
    return assignment


def drained(queue: ShardQueue, workers: list[int]) -> dict[int, list[int]]:
    """Indices by worker, which take turns."""
    taken: dict[int, list[int]] = {worker: [] for worker in workers}
    while len(queue):
        for worker in workers:
            assignment = queue.take(worker, alone=False)
            if assignment is not None:
                taken[worker].append(assignment.shard.index)
    return taken


def test_row_groups_are_taken_in_order() -> None:
    queue = make_queue([10] * 6)
    assert drained(queue, [1, 2]) == {1: [0, 2, 4], 2: [1, 3, 5]}
    assert queue.take(1, alone=True) is None


def test_committed_shards_are_not_taken() -> None:
    queue = make_queue([10] * 6, done=(0, 3))
    assert len(queue) == 4
    assert drained(queue, [1]) == {1: [1, 2, 4, 5]}


def test_shards_of_a_row_group_stay_on_one_worker() -> None:
    queue = make_queue([40, 40, 10])
    assert drained(queue, [1, 2]) == {1: [0, 1, 2, 3, 8], 2: [4, 5, 6, 7]}


def test_a_shard_that_is_missing_ends_the_run_before_it() -> None:
    queue = make_queue([40], done=(1,))
    assert drained(queue, [1, 2]) == {1: [0, 3], 2: [2]}


def test_one_huge_row_group_feeds_every_worker() -> None:
    """Who has nothing takes half of what another has before it."""
    taken = drained(make_queue([640]), [1, 2, 3, 4])
    assert sorted(index for indices in taken.values() for index in indices) == list(range(64))
    assert all(len(indices) >= 8 for indices in taken.values())
    jumps = sum(b != a + 1 for indices in taken.values() for a, b in pairwise(indices))
    assert jumps <= 12


def test_shards_that_a_worker_leaves_are_taken_by_others() -> None:
    queue = make_queue([40, 10])
    assert take(queue, 1).shard.index == 0
    queue.leave(1)
    assert drained(queue, [2]) == {2: [1, 2, 3, 4]}
    queue.leave(3)  # had nothing


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.sets(st.integers(0, 30)),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_every_wanted_shard_is_taken_once(
    groups: list[int], done: set[int], workers: int, draw: random.Random
) -> None:
    queue = make_queue(groups, 10, tuple(done))
    wanted = [index for index in range(len(make_shards(groups, 10))) if index not in done]
    taken: list[int] = []
    while len(queue):
        worker = draw.randrange(workers)
        if draw.random() < 0.2:
            queue.leave(worker)
        taken.append(take(queue, worker, alone=False).shard.index)
    assert sorted(taken) == wanted


def test_a_lost_shard_goes_to_a_worker_that_is_alone() -> None:
    queue = make_queue([10] * 3)
    first = take(queue, 1)
    assert first == ShardAssignment(first.shard)
    assert queue.lost(first.shard, Loss("died")) is None
    assert len(queue) == 3
    assert take(queue, 1, alone=False).shard.index == 1
    again = take(queue, 1)
    assert (again.shard.index, again.attempt) == (0, 2)


def test_losses_without_a_suspect_are_counted() -> None:
    queue = make_queue([10])
    for number in (1, 2):
        assert queue.lost(take(queue, 1).shard, Loss(f"reason {number}")) is None
    shard = take(queue, 1).shard
    assert queue.lost(shard, Loss("reason 3")) == "reason 3"
    assert (len(queue), queue.tries(shard)) == (0, 3)


def test_a_finished_shard_has_no_losses() -> None:
    queue = make_queue([10])
    shard = take(queue, 1).shard
    queue.lost(shard, Loss("died"))
    queue.done(shard)
    assert queue.tries(shard) == 0


def die(
    queue: ShardQueue, in_hand: tuple[int, ...], *, is_stall: bool = False
) -> ShardAssignment | str:
    """Lose the next shard, and what it is handed out as next, or why not."""
    shard = take(queue, 1).shard
    return queue.lost(shard, Loss("died", in_hand, is_stall)) or peek(queue)


def peek(queue: ShardQueue) -> ShardAssignment:
    assignment = take(queue, 1)
    queue._lost.appendleft(assignment.shard.index)
    queue._waiting += 1
    return assignment


@pytest.mark.parametrize("status", [Status.KILLED_WORKER, Status.TIMEOUT])
def test_the_second_death_alone_names_the_row(status: Status) -> None:
    queue = make_queue([10])
    first = die(queue, (3, 4, 5))
    assert (first.suspects, dict(first.poison)) == ((3, 4, 5), {})
    is_stall = status == Status.TIMEOUT
    second = die(queue, (4,), is_stall=is_stall)
    assert (second.suspects, dict(second.poison)) == ((4,), {})
    third = die(queue, (4,), is_stall=is_stall)
    assert (third.suspects, dict(third.poison)) == ((), {4: (status, "died")})
    assert third.attempt == 4
    assert third.skip_reason(4).message.endswith("while they answered this row alone: died")
    assert third.skip_reason(3) is None


def test_many_suspects_are_narrowed_by_groups_first() -> None:
    queue = make_queue([1000], 1000)
    first = die(queue, tuple(range(100, 200)))
    groups = list(first.suspect_groups())
    assert [len(group) for group in groups] == [10] * 10
    second = die(queue, groups[3])
    assert second.suspects == groups[3]
    assert list(second.suspect_groups()) == [(row,) for row in groups[3]]
    guilty = groups[3][7]
    assert die(queue, (guilty,)).suspects == (guilty,)
    assert dict(die(queue, (guilty,)).poison) == {guilty: (Status.KILLED_WORKER, "died")}


def test_few_suspects_are_answered_alone() -> None:
    shard = make_shards([100], 100)[0]
    assignment = ShardAssignment(
        shard, 2, tuple(range(GROUPED_FROM)), {5: PoisonRow(Status.TIMEOUT, "x")}
    )
    assert [*assignment.suspect_groups()] == [(row,) for row in range(GROUPED_FROM) if row != 5]


def test_searches_that_find_nothing_cost_a_try_together() -> None:
    """All suspects pass alone, and it dies again with others in hand: from outside, it seems."""
    queue = make_queue([300], 300)
    for death in range(3 * SEARCHES_A_TRY):
        rows = (2 * death, 2 * death + 1)
        assert die(queue, rows).suspects == rows
    assert die(queue, (200, 201)) == "died"


def test_stalls_that_find_nothing_cost_a_try_each() -> None:
    """Each takes minutes."""
    queue = make_queue([30], 30)
    for rows in ((0, 1), (5, 6), (8, 9)):
        assert die(queue, rows, is_stall=True).suspects == rows
    assert die(queue, (11, 12), is_stall=True) == "died"


def test_more_poison_than_allowed_is_a_dead_letter() -> None:
    queue = make_queue([30], 30)
    for row in (1, 11):
        die(queue, (row, row + 1))
        die(queue, (row,))
        assert row in die(queue, (row,)).poison
    die(queue, (21, 22))
    die(queue, (21,))
    assert die(queue, (21,)) == "more than 2 of its rows kill or hang their worker: died"


def test_a_row_beside_those_of_another_shard_was_not_alone() -> None:
    queue = make_queue([10])
    for _ in range(2):
        shard = take(queue, 1).shard
        assert queue.lost(shard, Loss("died", (3,), is_shared=True)) is None
    assert dict(peek(queue).poison) == {}
    die(queue, (3,))
    assert dict(die(queue, (3,)).poison) == {3: (Status.KILLED_WORKER, "died")}


def test_one_row_alone_at_the_first_death_is_a_suspect_only() -> None:
    queue = make_queue([10])
    assert dict(die(queue, (3,)).poison) == {}
    assert dict(die(queue, (3,)).poison) == {3: (Status.KILLED_WORKER, "died")}


def test_a_shard_that_was_not_begun_loses_no_try_the_first_time() -> None:
    """Alone in its worker it is begun, or something is wrong with it."""
    queue = make_queue([10])
    for expected in (None, None, None, "died"):
        shard = take(queue, 1).shard
        assert queue.lost(shard, Loss("died", is_begun=False)) == expected


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 4), st.integers(0, 3))
def test_every_sequence_of_events_ends(data: st.DataObject, tries: int, poison_rows: int) -> None:
    """Whatever rows are in hand at each death: a bounded number of searches, and deaths."""
    rows = 60
    queue = make_queue([rows], rows, limits=Limits(tries, poison_rows))
    reason, searches, suspects = None, 0, frozenset(range(rows))
    while reason is None:
        assignment = take(queue, 1)
        groups = list(assignment.suspect_groups())
        anywhere = st.sets(st.integers(0, rows - 1), max_size=rows)
        in_hand = data.draw(st.one_of(anywhere, st.sampled_from(groups or [()])))
        searches += not {*in_hand} < suspects
        suspects = frozenset(assignment.suspects)
        assert searches <= 1 + tries * SEARCHES_A_TRY + 3 * (poison_rows + 1)
        stall, shared = data.draw(st.booleans()), data.draw(st.booleans())
        loss = Loss("died", tuple(sorted(in_hand)), is_stall=stall, is_shared=shared)
        reason = queue.lost(assignment.shard, loss)
    assert len(queue) == 0


def steps_of(assignment: ShardAssignment, rows: int, window: int) -> list[tuple[int, ...]]:
    """What a worker has in hand while it answers: the suspects, group by group, then the others."""
    groups = list(assignment.suspect_groups())
    alone = {row for group in groups for row in group} | {*assignment.poison}
    others = [row for row in range(rows) if row not in alone]
    return [*groups, *(tuple(others[at : at + window]) for at in range(len(others)))]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_an_innocent_row_is_named_only_if_two_workers_are_killed_with_it_alone(
    rows: int, window: int, data: st.DataObject
) -> None:
    """Kills from outside, at any moment: no row does any harm."""
    queue = make_queue([rows], rows, limits=Limits(9, 9))
    alone: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        assignment = take(queue, 1)
        in_hand = data.draw(st.sampled_from(steps_of(assignment, rows, window) or [()]))
        if len(in_hand) == 1:
            alone[in_hand[0]] = alone.get(in_hand[0], 0) + 1
        if queue.lost(assignment.shard, Loss("killed", tuple(sorted(in_hand)))) is not None:
            return
        assert {*peek(queue).poison} == {row for row, deaths in alone.items() if deaths > 1}


def test_an_unlucky_shard_outlives_many_kills() -> None:
    """Of 400 shards, each of whose tries is killed from outside in 4 of 10 cases, in any moment."""
    draw = random.Random(0)
    rows, shards = 250, 400
    queue = make_queue([rows] * shards, rows, limits=Limits(3, 8))
    kills, most = 0, 0
    while len(queue):
        assignment = take(queue, 1)
        if draw.random() < 0.4:
            in_hand = draw.choice(steps_of(assignment, rows, window=64))
            kills, most = kills + 1, max(most, assignment.attempt)
            assert queue.lost(assignment.shard, Loss("killed", in_hand)) is None
            assert dict(queue._history[assignment.shard.index].poison) == {}
        else:
            queue.done(assignment.shard)
    assert kills > 200
    assert most >= 6, "some shard was unlucky"


def test_a_killing_row_is_found_wherever_it_is() -> None:
    """Simulated: the worker has up to 100 rows in hand; the row kills when it is reached."""
    for killer in (0, 57, 233, 299):
        queue = make_queue([300], 300)
        deaths = 0
        while True:
            assignment = take(queue, 1)
            if killer in assignment.poison:
                break
            deaths += 1
            groups = list(assignment.suspect_groups())
            group = next((group for group in groups if killer in group), None)
            window = tuple(range(max(0, killer - 50), min(300, killer + 50)))
            assert queue.lost(assignment.shard, Loss("died", group or window)) is None
        assert deaths == 4
        assert list(assignment.poison) == [killer]
