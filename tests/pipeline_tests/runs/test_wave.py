"""Waves that overlap: what is handed out when, what becomes of one that dies, and how all end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pandas as pd
import pytest

from pipeline.errors import StoreError
from pipeline.models.meta_model import GroupKey
from pipeline.runs.schedule import Schedule
from pipeline.runs.wave import TrainedFiles, Wave, train_overlapping
from pipeline.tables import records

# So long is waited for another thread, before a test fails.
PATIENCE = 20.0


class CountingSchedule(Schedule):
    """A schedule that counts the waves it handed out."""

    n_handed_out = 0

    def next_wave(self) -> pd.DataFrame | None:
        groups = super().next_wave()
        self.n_handed_out += groups is not None
        return groups


def make_schedule(n_groups: int, seconds: float = 10.0) -> CountingSchedule:
    """Waves of three groups each, where groups take ten seconds each."""
    names = [f"g{number}" for number in range(n_groups)]
    groups = pd.DataFrame({"grain": 1, "group_id": names, "cost_seconds": seconds})
    return CountingSchedule(groups, slots=1, checkpoint_seconds=60.0, has_history=True)


def names_of(wave: Wave) -> list[str]:
    return [str(name) for name in wave.groups["group_id"]]


def finish(wave: Wave) -> TrainedFiles:
    """What a wave leaves whose groups were all trained."""
    keys = [GroupKey.of(row) for row in records(wave.groups)]
    return TrainedFiles(
        [{**key._asdict(), "status": "trained", "seconds": 10.0} for key in keys], [], []
    )


@dataclass
class Trainer:
    """Trains waves at once, and writes down what it began.

    Args:
        killers: groups that kill a wave.
        broken: groups that make a wave fail.
    """

    killers: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    began: list[Wave] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    n_cancelled: int = 0

    def train(self, wave: Wave) -> TrainedFiles | None:
        self.began.append(wave)
        if self.broken & set(names_of(wave)):
            raise StoreError("no space left on device")
        if self.killers & set(names_of(wave)) and len(wave.groups) > 1:
            return None
        return finish(wave)

    def cancel(self) -> None:
        self.n_cancelled += 1
        self.cancelled.set()


def train_all(
    schedule: Schedule, train: Callable[[Wave], TrainedFiles | None], cancel: Callable[[], None]
) -> Iterator[Wave]:
    """Every wave in the order in which they end, each committed before the next is asked for."""
    with closing(train_overlapping(schedule, "run-1", train, cancel)) as waves:
        for wave, trained in waves:
            yield wave
            schedule.ended(wave.groups, trained.outcomes, trained.not_started)


def test_every_group_is_trained_once_and_nothing_is_cancelled() -> None:
    trainer = Trainer()
    waves = list(train_all(make_schedule(20), trainer.train, trainer.cancel))
    trained = sorted(name for wave in waves for name in names_of(wave))
    assert trained == sorted(f"g{number}" for number in range(20))
    assert len(waves) > 2
    assert trainer.n_cancelled == 0


def test_without_groups_there_is_no_wave() -> None:
    trainer = Trainer()
    assert list(train_all(make_schedule(0), trainer.train, trainer.cancel)) == []


def test_waves_have_names_that_no_other_run_and_no_other_launch_gives() -> None:
    names = []
    for _ in range(2):
        trainer = Trainer()
        names += [wave.name for wave in train_all(make_schedule(20), trainer.train, trainer.cancel)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("run-1-") for name in names)


def test_a_wave_starts_no_group_after_the_schedules_time() -> None:
    schedule = make_schedule(3)
    trainer = Trainer()
    [wave] = train_all(schedule, trainer.train, trainer.cancel)
    assert wave.start_seconds == schedule.start_seconds


def test_the_next_wave_is_trained_while_one_drains() -> None:
    # Each wave ends only when both have begun.
    both = threading.Barrier(2)

    def train(wave: Wave) -> TrainedFiles:
        both.wait(PATIENCE)
        return finish(wave)

    assert len(list(train_all(make_schedule(6), train, lambda: None))) == 2


def test_a_further_wave_waits_until_one_is_committed() -> None:
    trainer = Trainer()
    schedule = make_schedule(12)
    with closing(train_overlapping(schedule, "run-1", trainer.train, trainer.cancel)) as waves:
        wave, trained = next(waves)
        assert schedule.n_handed_out == 2
        schedule.ended(wave.groups, trained.outcomes)
        next(waves)
        assert schedule.n_handed_out == 3


def test_the_wave_that_ends_first_comes_first() -> None:
    second_ended = threading.Event()

    def train(wave: Wave) -> TrainedFiles:
        if "g0" in names_of(wave):
            second_ended.wait(PATIENCE)
        return finish(wave)

    schedule = make_schedule(6)
    with closing(train_overlapping(schedule, "run-1", train, second_ended.set)) as waves:
        wave, _ = next(waves)
        assert "g0" not in names_of(wave)
        second_ended.set()
        wave, _ = next(waves)
        assert "g0" in names_of(wave)


def test_groups_that_a_wave_did_not_start_are_in_a_later_one() -> None:
    schedule = make_schedule(2)
    late = GroupKey(1, "g1")
    trained_groups = []

    def train(wave: Wave) -> TrainedFiles:
        done = finish(wave)
        if len(wave.groups) == 1:
            return done
        first = [outcome for outcome in done.outcomes if GroupKey.of(outcome) != late]
        return TrainedFiles(first, [], [], not_started=[late])

    with closing(train_overlapping(schedule, "run-1", train, lambda: None)) as waves:
        for wave, trained in waves:
            trained_groups += list(trained.outcome_of)
            schedule.ended(wave.groups, trained.outcomes, trained.not_started)
    assert trained_groups == [GroupKey(1, "g0"), late]


def test_a_wave_that_dies_is_halved_down_to_the_group_that_kills_it() -> None:
    trainer = Trainer(killers=frozenset({"g2"}))
    waves = list(train_all(make_schedule(5, seconds=1.0), trainer.train, trainer.cancel))
    trained = sorted(name for wave in waves for name in names_of(wave))
    assert trained == [f"g{number}" for number in range(5)]
    assert ["g2"] in [names_of(wave) for wave in waves]
    # What died was begun, and never came out.
    died = [wave for wave in trainer.began if "g2" in names_of(wave) and len(wave.groups) > 1]
    assert [len(wave.groups) for wave in died] == [5, 3]
    assert len({wave.name for wave in trainer.began}) == len(trainer.began)
    assert trainer.n_cancelled == 0


def test_an_error_ends_what_is_under_way_and_is_raised() -> None:
    trainer = Trainer(broken=frozenset({"g5"}))
    ended_by_cancel = []

    def train(wave: Wave) -> TrainedFiles | None:
        if "g0" in names_of(wave):
            ended_by_cancel.append(trainer.cancelled.wait(PATIENCE))
        return trainer.train(wave)

    with pytest.raises(StoreError, match="no space left"):
        list(train_all(make_schedule(6), train, trainer.cancel))
    assert trainer.n_cancelled == 1
    assert ended_by_cancel == [True]


def test_an_error_of_the_caller_ends_what_is_under_way() -> None:
    trainer = Trainer()
    ended_by_cancel = []

    def train(wave: Wave) -> TrainedFiles | None:
        if "g0" in names_of(wave):
            ended_by_cancel.append(trainer.cancelled.wait(PATIENCE))
        return finish(wave)

    def commit() -> None:
        with closing(train_overlapping(make_schedule(6), "run-1", train, trainer.cancel)) as waves:
            for _ in waves:
                raise StoreError("the fleet was taken over")

    with pytest.raises(StoreError, match="taken over"):
        commit()
    assert trainer.n_cancelled == 1
    assert ended_by_cancel == [True]


def test_closing_early_leaves_no_thread_behind() -> None:
    trainer = Trainer()
    schedule = make_schedule(30)
    waves = train_overlapping(schedule, "run-1", trainer.train, trainer.cancel)
    next(waves)
    waves.close()
    assert trainer.n_cancelled == 1
    assert schedule.n_handed_out == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wave")]
    assert list(waves) == []


def test_outcomes_are_found_by_group() -> None:
    outcomes = [{"grain": 2, "group_id": "a", "status": "trained"}]
    assert TrainedFiles(outcomes, [], []).outcome_of == {GroupKey(2, "a"): outcomes[0]}
