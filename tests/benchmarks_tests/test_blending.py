"""The arena of blending rules: what it trains, what it replays, and whom it judges on what."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.blending import (
    HINDSIGHT,
    OWN,
    POOLED,
    RULES,
    SERVED,
    Replayed,
    choose_leaving_out,
    fixed,
    later_error,
    learnt,
    replay,
)
from benchmarks.figures import FIGURES
from benchmarks.held_out import LATER, HeldOut, collect
from benchmarks.panels import GENERATED, Panel, Truth, generated_panels, public_panels, suite
from benchmarks.runs import NotMeasured
from pipeline.training.splits import EARLIER, REPORT, TUNE


@pytest.fixture(scope="module")
def panel() -> Panel:
    (found,) = generated_panels(["blind_levels"])
    return found


@pytest.fixture(scope="module")
def held_out(panel: Panel) -> HeldOut:
    return collect(panel)


def test_later_rows_come_after_everything_that_was_chosen(panel: Panel, held_out: HeldOut) -> None:
    rows = held_out.rows
    is_later = rows["split"] == LATER
    assert rows.loc[is_later, "time"].min() >= panel.later_from
    assert rows.loc[~is_later, "time"].max() < panel.later_from
    assert set(rows["split"]) == {EARLIER, TUNE, REPORT, LATER}
    assert not rows.duplicated(["row_key", "split"]).any()
    assert rows.loc[rows["split"] == TUNE, "stretch"].isin([0, 1]).all()
    assert rows.loc[rows["split"] == EARLIER, "stretch"].isin([2, 3]).all()
    assert rows.loc[rows["split"].isin([REPORT, LATER]), "stretch"].isna().all()


def test_later_rows_change_no_weight_of_a_rule_that_may_not_see_them(held_out: HeldOut) -> None:
    rows = held_out.rows.copy()
    is_unseen = rows["split"].isin([REPORT, LATER])
    rows.loc[is_unseen, "actual"] = 1e6
    changed = replace(held_out, rows=rows)
    for name, rule in RULES.items():
        if name != HINDSIGHT:
            assert rule(changed) == rule(held_out), name


def test_the_error_is_that_of_the_answers(held_out: HeldOut) -> None:
    later = held_out.rows[held_out.rows["split"] == LATER]
    error = later["actual"] - later["p0"]
    assert later_error(held_out, fixed(1.0, 0.0)(held_out)) == pytest.approx(
        np.sqrt((error**2).mean())
    )


def test_own_models_win_where_only_they_know_the_level(held_out: HeldOut) -> None:
    replayed = replay([held_out])
    ratios = replayed.relative_to(POOLED).loc["blind_levels"]
    assert ratios[HINDSIGHT] <= ratios[SERVED] + 1e-12
    assert ratios[SERVED] < 1.0
    finest = learnt(held_out)[-1]
    assert set(finest) == held_out.has_model[-1]
    assert len(set(finest.values())) == 1


def test_a_rule_is_chosen_without_the_fleet_that_it_is_for() -> None:
    # Only fleet a likes `select`: without a nobody chooses it, and with a alone nobody else would.
    errors = pd.DataFrame(1.0, index=["a", "b", "c"], columns=list(RULES))
    errors.loc["a", "select"] = 0.1
    errors.loc[["b", "c"], "select"] = 1.005
    errors.loc[["b", "c"], SERVED] = 0.99
    kinds = pd.Series("generated", index=errors.index)
    chosen = choose_leaving_out(Replayed(errors, kinds))
    assert chosen["a"] == SERVED
    assert chosen["b"] == chosen["c"] == "select"


def test_the_figures_say_how_many_fleets_there_are() -> None:
    for name in ("blend-safety", "blend-truth"):
        assert f"{len(GENERATED)} generated" in FIGURES[name].what
    assert {found.kind for found in suite()} == {"generated", "public"}
    assert OWN in RULES


@pytest.mark.parametrize("number", range(2))
def test_public_panels_are_read_from_their_packages(number: int) -> None:
    panel = public_panels()[number]
    rows = panel.read()
    spec = panel.spec
    assert not rows["row_key"].duplicated().any()
    assert {*spec.finest, *spec.feature_columns, spec.target.column} <= set(rows)
    assert (rows["time"] >= panel.later_from).any()


def test_a_folder_without_panels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=r"holds none of hospital\.parquet"):
        suite(tmp_path)


def test_generated_rows_follow_their_seed() -> None:
    (one,) = generated_panels(["mixed"])
    (other,) = generated_panels(["mixed"], seed=1)
    pd.testing.assert_frame_equal(one.read(), one.read())
    assert not one.read()["y"].equals(other.read()["y"])
    assert Truth().n_groups == one.read()["shop"].nunique()
