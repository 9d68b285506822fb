"""A fleet in which a new recipe helps some groups and not others: what is promoted, taken back, overridden, and who answers then."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from pipeline.spec import FleetSpec, parse_spec
from resources.cleaning import clean
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SQL = "SELECT store, CAST(day AS DATE) AS day, amount, warm, wet FROM sales"
AS_OF = "2023-12-31"
# In these shops warmth and rain act together, which stumps cannot tell.
JOINT, PLAIN = ("j1", "j2"), ("p1", "p2", "p3")
Checks = Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]


def spec_of(num_leaves: int, **changes: Any) -> FleetSpec:
    attributes = {
        "name": "shop",
        "sources": [{"name": "sales", "uri": "sales.csv"}],
        "features": {"columns": ["warm", "wet"]},
        "grains": [[], ["store"]],
        "entity": ["store"],
        "time": "day",
        "period": "1 day",
        "target": {"column": "amount"},
        "splits": {"report": "3 months", "tune": "3 months"},
        "tuning": {
            "max_trials": 1,
            "patience": 1,
            "max_rounds": 60,
            "fit_rows": 20,
            "tune_rows": 5,
            "search": {
                "num_leaves": num_leaves,
                "learning_rate": 0.2,
                "min_data_in_leaf": 10,
                "feature_fraction": 1.0,
            },
        },
        "scoring": {"score": "new"},
    }
    return parse_spec({**attributes, **changes}, file="defs.yaml")


def daily_sales() -> pd.DataFrame:
    random = np.random.default_rng(3)
    days = pd.date_range("2023-01-01", "2023-12-31", freq="D")
    parts = []
    for store in (*JOINT, *PLAIN):
        warm, wet = random.normal(size=(2, len(days)))
        signal = 8.0 * ((warm > 0) & ((wet > 0) | (store in PLAIN)))
        parts.append(
            pd.DataFrame(
                {
                    "store": store,
                    "day": days,
                    "warm": warm,
                    "wet": wet,
                    "amount": 50 + signal + random.normal(size=len(days)),
                }
            )
        )
    # Too few rows for a model of its own, and for a test.
    thin = parts[0].tail(12).assign(store="thin")
    return pd.concat([*parts, thin], ignore_index=True)


@pytest.fixture(scope="module")
def fleets(launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]]) -> tuple[Any, Any]:
    """The fleet, trained with stumps; and the same described with deeper trees, trained and judged."""
    shallow, first = launched(spec_of(2), SQL, daily_sales(), AS_OF)
    assert first.success
    deep = type(shallow)(spec_of(8), shallow.files, shallow.resources)
    assert deep.launch("models", "meta_model", "champion").success
    return shallow, deep


def answers(fleet: Any, number: str) -> pd.DataFrame:
    """What a registered version answers for every row of the feature table, and for a shop that it never saw."""
    registry = fleet.resources["registry"]
    features = fleet.table("features").sort_values("row_key", ignore_index=True)
    asked = pd.concat([features, features.head(3).assign(store="unheard of")], ignore_index=True)
    return (
        registry.open_pack(registry.get("shop", number)).predict(asked).assign(store=asked["store"])
    )


def by_store(frame: pd.DataFrame, *stores: str) -> pd.DataFrame:
    return frame[frame["store"].isin(stores)]


def newest(fleet: Any) -> pd.DataFrame:
    rows = fleet.table("decisions")
    return rows[rows["decided_at"] == rows["decided_at"].max()].set_index("group_id")


def group(store: str) -> str:
    return f'["{store}"]'


def test_groups_move_to_a_new_recipe_only_where_it_is_better(fleets: tuple[Any, Any]) -> None:
    _, deep = fleets
    registry = deep.resources["registry"]
    assert (registry.get("shop", CHALLENGER).number, registry.get("shop", CHAMPION).number) == (
        "2",
        "3",
    )
    decided = newest(deep)
    assert set(decided.loc[[group(store) for store in JOINT], "reason"]) == {"better"}
    assert set(decided.loc[[group(store) for store in PLAIN], "reason"]) == {"not_better"}
    assert decided.loc[group("thin"), "reason"] == "follows_parent"
    assert decided["moved"].to_dict() == {
        key: reason == "better" or (key == group("thin") and decided.loc["[]", "moved"])
        for key, reason in decided["reason"].items()
    }
    before, after, both = (answers(deep, number) for number in "123")
    stay = [store for store in (*PLAIN, "thin") if not decided.loc[group(store), "moved"]]
    pd.testing.assert_frame_equal(by_store(both, *stay), by_store(before, *stay))
    pd.testing.assert_frame_equal(by_store(both, *JOINT), by_store(after, *JOINT))
    assert not by_store(before, *JOINT)["prediction"].equals(by_store(after, *JOINT)["prediction"])


def test_every_decision_is_recorded_with_who_when_from_to_and_why(fleets: tuple[Any, Any]) -> None:
    _, deep = fleets
    rows = deep.table("decisions")
    assert len(rows) == 2 * len(newest(deep))
    first, second = (part for _, part in rows.sort_values("decided_at").groupby("decided_at"))
    assert set(first["reason"]) == {"new_group"}
    assert first["from_version"].isna().all()
    runs = deep.table("runs").sort_values("started_at")["run_id"].tolist()
    assert set(second["from_version"]) == {runs[0]}
    moved = second.set_index("group_id")["moved"]
    assert second.set_index("group_id")["to_version"].to_dict() == {
        key: runs[1] if moved[key] else runs[0] for key in moved.index
    }
    assert (
        set(second["champion_before"]),
        set(second["champion_after"]),
        set(second["challenger"]),
    ) == ({"1"}, {"3"}, {"2"})
    assert second["decided_by"].str.len().min() > 0
    tested = second[second["reason"].isin(["better", "not_better"])]
    assert (
        tested[["n_rows", "n_blocks", "loss_champion", "loss_challenger", "p_value"]]
        .notna()
        .all(axis=None)
    )
    assert (tested["loss_champion"] > tested["loss_challenger"]).equals(tested["p_value"] < 0.5)


def test_a_twin_is_the_champions_recipe_on_the_challengers_rows(fleets: tuple[Any, Any]) -> None:
    """Nothing has changed but the recipe, so the champion's twin errs exactly as its own run says that it did."""
    _, deep = fleets
    runs = deep.table("runs").sort_values("started_at")["run_id"].tolist()
    ledger = deep.table("ledger").set_index(["run_id", "group_id"])
    decided = newest(deep)
    for store in (*JOINT, *PLAIN):
        for side, run in zip(("champion", "challenger"), runs, strict=True):
            expected = ledger.loc[(run, group(store)), "report_blend"] ** 2
            assert decided.loc[group(store), f"loss_{side}"] == pytest.approx(expected, rel=1e-9)


def test_judging_again_changes_nothing(fleets: tuple[Any, Any]) -> None:
    _, deep = fleets
    before = deep.resources["registry"].get("shop", CHAMPION).number
    reasons = newest(deep)["reason"]
    assert deep.launch("champion").success
    assert deep.resources["registry"].get("shop", CHAMPION).number == before
    again = newest(deep)
    assert not again["moved"].any()
    assert again.loc[reasons == "not_better", "reason"].eq("not_better").all()


@pytest.fixture(scope="module")
def month_later(launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]]) -> Any:
    """The fleet, trained with stumps as of November, and with deeper trees as of December."""
    shallow, first = launched(spec_of(2), SQL, daily_sales(), "2023-11-30")
    assert first.success
    deep = type(shallow)(spec_of(8), shallow.files, shallow.resources)
    assert deep.launch(
        "models", "meta_model", "champion", launch=LaunchSettings(as_of=AS_OF)
    ).success
    return deep


def test_a_recipe_that_was_not_beaten_is_fitted_on_the_newer_rows(month_later: Any) -> None:
    decided, runs = (
        newest(month_later),
        month_later.table("runs").sort_values("started_at", ignore_index=True),
    )
    november, december, refit = runs["run_id"]
    stay = [group(store) for store in PLAIN]
    assert set(decided.loc[stay, "reason"]) == {"earlier_recipe_refitted"}
    assert set(decided.loc[stay, "from_version"]) == {november}
    assert set(decided.loc[stay, "to_version"]) == {refit}
    assert set(decided.loc[[group(store) for store in JOINT], "to_version"]) == {december}
    ledger = month_later.table("ledger").set_index(["run_id", "group_id"])
    for key in stay:
        old, new, fitted = (ledger.loc[(run, key)] for run in (november, december, refit))
        assert fitted["status"] == "refreshed"
        assert (fitted["parameters"], fitted["n_rounds"]) == (old["parameters"], old["n_rounds"])
        assert fitted["parameters"] != new["parameters"]
        assert fitted["n_target"] == new["n_target"] > old["n_target"]
        assert fitted["booster_id"] not in (old["booster_id"], new["booster_id"])
    champion = month_later.resources["registry"].get("shop", CHAMPION).number
    served = answers(month_later, champion)
    own = (
        by_store(served[served["answered_by"] == "[store]"], *PLAIN)
        .groupby("store")["booster_id"]
        .unique()
    )
    assert not own.empty
    assert own.to_dict() == {
        store: [ledger.loc[(refit, group(store)), "booster_id"]] for store in own.index
    }


def test_a_launch_after_a_refit_builds_on_the_whole_fleet_and_changes_nothing(
    month_later: Any,
) -> None:
    registry, trained = month_later.resources["registry"], len(month_later.table("runs"))
    before = registry.get("shop", CHAMPION).number
    assert month_later.launch(
        "models", "meta_model", "champion", launch=LaunchSettings(as_of=AS_OF)
    ).success
    runs = month_later.table("runs").sort_values("started_at", ignore_index=True)
    assert len(runs) == trained + 1
    ledger = month_later.table("ledger")
    newest_rows = ledger[ledger["run_id"] == runs["run_id"].iloc[-1]]
    assert set(newest_rows["status"]) <= {"reused", "inherited"}
    assert runs["previous_run_id"].iloc[-1] == runs["run_id"].iloc[1]
    assert registry.get("shop", CHAMPION).number == before


def test_after_a_clean_versions_are_judged_and_rolled_back_as_before(month_later: Any) -> None:
    tables, registry = month_later.resources["tables"], month_later.resources["registry"]
    served = answers(month_later, registry.get("shop", CHAMPION).number)
    november = answers(month_later, "1")
    found = clean(tables, registry, "shop", keep=timedelta(0), keep_runs=1)
    assert found.tables["boosters"].partitions
    assert launch(month_later, decision="rollback", rollback_to="1").success
    pd.testing.assert_frame_equal(answers(month_later, "1"), november)
    assert month_later.launch(
        "models", "meta_model", "champion", "predictions", launch=LaunchSettings(as_of=AS_OF)
    ).success
    again = answers(month_later, registry.get("shop", CHAMPION).number)
    stay = [group(store) for store in PLAIN]
    assert set(newest(month_later).loc[stay, "reason"]) == {"earlier_recipe_refitted"}
    of_plain = [by_store(frame, *PLAIN).drop(columns="fleet_version") for frame in (again, served)]
    pd.testing.assert_frame_equal(*of_plain)
    # They were taken back from the challenger, and wait for another.
    pd.testing.assert_frame_equal(by_store(again, *JOINT), by_store(november, *JOINT))


def launch(fleet: Any, **settings: Any) -> dg.ExecuteInProcessResult:
    return fleet.launch("champion", launch=LaunchSettings(as_of=AS_OF, **settings))


def test_one_group_and_then_the_whole_fleet_are_rolled_back_and_forth(
    fleets: tuple[Any, Any], checks: Checks
) -> None:
    _, deep = fleets
    registry, trained = deep.resources["registry"], len(deep.table("runs"))
    mixed = registry.get("shop", CHAMPION).number
    before, both = answers(deep, "1"), answers(deep, mixed)
    result = launch(
        deep, decision="rollback", decision_groups=[group("j1")], why="orders doubled", who="ann"
    )
    assert result.success
    number = registry.get("shop", CHAMPION).number
    found = answers(deep, number)
    pd.testing.assert_frame_equal(by_store(found, "j1"), by_store(before, "j1"))
    others = found["store"] != "j1"
    pd.testing.assert_frame_equal(found[others], both[others])
    row = newest(deep).loc[group("j1")]
    assert (row["decided_by"], row["why"], row["decision"], bool(row["moved"])) == (
        "ann",
        "orders doubled",
        "rollback",
        True,
    )
    assert (row["champion_before"], row["champion_after"]) == (mixed, number)
    # The same challenger does not take it back by itself.
    assert launch(deep).success
    assert registry.get("shop", CHAMPION).number == number
    assert newest(deep).loc[group("j1"), "reason"] == "rolled_back"
    assert launch(deep, decision="promote", decision_groups=[group("j1")]).success
    pd.testing.assert_frame_equal(answers(deep, registry.get("shop", CHAMPION).number), both)
    assert launch(deep, decision="rollback", rollback_to="1").success
    assert registry.get("shop", CHAMPION).number == "1"
    assert launch(deep, decision="keep").success
    assert registry.get("shop", CHAMPION).number == "1"
    assert launch(deep, decision="promote").success
    assert registry.get("shop", CHAMPION).number == "2"
    assert launch(deep, decision="rollback").success
    assert registry.get("shop", CHAMPION).number == "1"
    assert len(deep.table("runs")) == trained


@pytest.mark.parametrize("point", ["decision_recorded", "alias_moved"])
def test_a_decision_that_was_killed_is_carried_out_by_the_next_launch(
    fleets: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def die(name: str) -> None:
        if name == point:
            raise RuntimeError("killed")

    _, deep = fleets
    registry = deep.resources["registry"]
    served = registry.get("shop", CHAMPION).number
    other = "2" if served == "1" else "1"
    with monkeypatch.context() as patch:
        patch.setattr("assets.deciding.crash_point", die)
        assert not launch(
            deep, decision="rollback", rollback_to=other, why=point, who="ann"
        ).success
    assert launch(deep, decision="keep").success
    assert registry.get("shop", CHAMPION).number == other
    rows = deep.table("decisions")
    killed = rows[rows["why"] == point]
    assert set(killed["decided_by"]) == {"ann"}
    assert (set(killed["champion_before"]), set(killed["champion_after"])) == ({served}, {other})
    assert killed["moved"].any()
    assert rows["moved"].notna().all()
    assert not rows["decision"].eq("unknown").any()
    # What served before is known, so that it can serve again.
    assert launch(deep, decision="rollback").success
    assert registry.get("shop", CHAMPION).number == served


def test_an_alias_that_was_moved_by_hand_gets_its_decision(fleets: tuple[Any, Any]) -> None:
    _, deep = fleets
    registry = deep.resources["registry"]
    served = registry.get("shop", CHAMPION).number
    other = "2" if served == "1" else "1"
    registry.promote(registry.get("shop", other))
    assert launch(deep, decision="keep").success
    assert registry.get("shop", CHAMPION).number == other
    rows = deep.table("decisions")
    found = rows[rows["decision"] == "unknown"]
    assert (set(found["champion_before"]), set(found["champion_after"])) == ({served}, {other})
    assert found["moved"].all()
    assert set(found["group_id"]) == set(newest(deep).index)
    assert launch(deep, decision="rollback").success
    assert registry.get("shop", CHAMPION).number == served


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"decision": "promote", "decision_groups": ['["j9"]']},
            "there is no group '[\"j9\"]'; did you mean",
        ),
        (
            {"decision": "rollback", "decision_groups": ['["j9"]']},
            "there is no group '[\"j9\"]'; did you mean",
        ),
        (
            {"decision": "rollback", "rollback_to": "99"},
            "registered model 'shop' has no version 99",
        ),
    ],
)
def test_what_cannot_be_decided_is_told(
    fleets: tuple[Any, Any],
    failure: Callable[[dg.ExecuteInProcessResult], str],
    settings: Mapping[str, Any],
    message: str,
) -> None:
    _, deep = fleets
    result = launch(deep, **settings)
    assert not result.success
    assert message in failure(result)


def test_a_fleet_that_is_described_otherwise_is_not_judged(
    fleets: tuple[Any, Any], failure: Callable[[dg.ExecuteInProcessResult], str]
) -> None:
    _, deep = fleets
    other = type(deep)(spec_of(4), deep.files, deep.resources)
    assert "materialise models and meta_model first" in failure(other.launch("champion"))


def test_packs_in_a_store_are_put_together_without_storing_anything_again(
    launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]],
) -> None:
    shallow, first = launched(spec_of(2, pack="shared"), SQL, daily_sales(), AS_OF)
    assert first.success
    deep = type(shallow)(spec_of(8, pack="shared"), shallow.files, shallow.resources)
    assert deep.launch("models", "meta_model").success
    store = Path(deep.resources["tables"].location("shop", "packs"))
    stored = {path.name for path in store.iterdir()}
    assert deep.launch("champion").success
    assert {path.name for path in store.iterdir()} == stored
    registry = deep.resources["registry"]
    champion = registry.open_pack(registry.get("shop", CHAMPION))
    champion.check_files()
    assert len(champion.generations) == 2
    assert len(champion.files) == 2
