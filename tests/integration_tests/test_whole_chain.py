"""A small real fleet through real Spark, Delta and MLflow; then its model alone, in a process that knows nothing of us."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTree

from assets.fleet import Fleet
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]

HOUSING = Path("pipeline/defs/housing")
CITIES = ("Abilene", "Amarillo", "Austin", "Dallas", "Houston", "Midland")
SQL = f"""
SELECT city, make_date(year, month, 1) AS month_start, median, inventory FROM txhousing WHERE city IN {CITIES}
"""

ANSWER_IN_A_FRESH_PROCESS = """
import importlib.util, json, sys
for name in ("pipeline", "assets", "resources"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported here"
import mlflow, pandas as pd
tracking_uri, rows_file = sys.argv[1:]
mlflow.set_tracking_uri(tracking_uri)
model = mlflow.pyfunc.load_model("models:/housing@champion")
print(json.dumps(model.predict(pd.read_parquet(rows_file)).to_dict("list")))
"""


@dataclass(frozen=True)
class Chain:
    """A fleet that was materialised once, and where it left things."""

    definitions: dg.Definitions
    resources: Mapping[str, Any]
    root: Path
    result: dg.ExecuteInProcessResult

    def table(self, *parts: str) -> pd.DataFrame:
        return self.resources["tables"].read_pandas(self.resources["tables"].location(*parts))

    def run_again(self, **launch: Any) -> dg.ExecuteInProcessResult:
        return run_chain(self.definitions, {**self.resources, "launch": LaunchSettings(**launch)})


def run_chain(definitions: dg.Definitions, resources: Mapping[str, Any]) -> dg.ExecuteInProcessResult:
    assets = [*definitions.assets, *definitions.asset_checks]
    return dg.materialize(assets, resources=resources, raise_on_error=True)


@pytest.fixture(scope="module")
def chain(spark_resource: SparkSessionResource, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("a fleet [x]")
    folder = root / "housing"
    folder.mkdir()
    attributes = yaml.safe_load((HOUSING / "defs.yaml").read_text())["attributes"]
    attributes["tuning"] |= {"max_trials": 2, "patience": 1}
    (folder / "features.sql").write_text(SQL)
    context = ComponentTree.for_test().load_context
    component = Fleet.load(Fleet.get_model_cls().model_validate(attributes), _at(context, folder))
    resources: dict[str, Any] = {
        "spark": spark_resource,
        "tables": DeltaTables(root=str(root / "tables")),
        "registry": MlflowRegistry(
            tracking_uri=f"sqlite:///{root}/mlflow/mlflow.db", artifact_root=f"{root}/mlflow/artifacts", scratch=str(root / "scratch")
        ),
        "launch": LaunchSettings(),
    }
    definitions = component.build_defs(context)
    return Chain(definitions, resources, root, run_chain(definitions, resources))


def _at(context: Any, folder: Path) -> Any:
    """The load context of a component in that folder."""
    from unittest.mock import Mock

    return Mock(path=folder, resolution_context=context.resolution_context)


def test_every_link_is_materialised_and_every_check_passes(chain: Chain) -> None:
    links = {event.asset_key.path[-1] for event in chain.result.get_asset_materialization_events() if event.asset_key}
    assert links == {"txhousing", "features", "models", "importance", "meta_model", "champion", "predictions"}
    checks = chain.result.get_asset_check_evaluations()
    assert len(checks) == 10
    assert [check.check_name for check in checks if not check.passed] == []


def test_every_group_has_one_ledger_row_and_every_future_row_one_answer(chain: Chain) -> None:
    ledger = chain.table("housing", "ledger")
    assert sorted(ledger.loc[ledger["grain"] == 1, "group_id"]) == sorted(f'["{city}"]' for city in CITIES)
    assert len(ledger) == 1 + len(CITIES)
    predictions = chain.table("housing", "predictions")
    assert sorted(predictions["city"]) == sorted(CITIES)
    assert predictions["prediction"].notna().all()
    assert (predictions["lower"] <= predictions["upper"]).all()
    assert set(predictions["time"].dt.strftime("%Y-%m")) == {"2015-08"}


def test_materialisations_tell_rows_states_and_show_plots(chain: Chain) -> None:
    metadata = {
        event.asset_key.path[-1]: event.materialization.metadata for event in chain.result.get_asset_materialization_events() if event.asset_key
    }
    assert metadata["txhousing"]["dagster/row_count"].value == 8602
    assert metadata["predictions"]["dagster/row_count"].value == len(CITIES)
    assert "trained" in str(metadata["models"]["fleet/status"].value)
    assert "Abilene" in str(metadata["models"]["fleet/worst_groups"].value)
    for link in ("models", "meta_model", "predictions"):
        assert str(metadata[link]["fleet/plot"].value).startswith("![plot](data:image/png;base64,iVBOR")


def test_registered_model_answers_without_this_repository(chain: Chain, tmp_path: Path) -> None:
    features = chain.table("housing", "features")
    rows = features[features["is_future"]].copy()
    unseen = rows.iloc[[0]].assign(city="Atlantis")
    nameless = rows.iloc[[0]].assign(city=None)
    batch = pd.concat([rows, unseen, nameless], ignore_index=True)
    file = tmp_path / "rows.parquet"
    batch.drop(columns=["median"]).to_parquet(file)
    # A bare interpreter over the installed packages: neither the checkout nor its editable installation is on the path.
    site_packages = [path for path in sys.path if path.endswith("site-packages")]
    script = f"import sys; sys.path[:0] = {site_packages!r}\n" + ANSWER_IN_A_FRESH_PROCESS
    command = [sys.executable, "-I", "-S", "-c", script, chain.resources["registry"].tracking_uri, str(file)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    answers = pd.DataFrame(json.loads(run.stdout.splitlines()[-1]))
    expected = chain.table("housing", "predictions").set_index("row_key")
    ours = answers.iloc[: len(rows)].set_axis(rows["row_key"], axis=0)
    for column in ("prediction", "lower", "upper", "answered_by", "booster_id", "fleet_version"):
        assert list(ours[column]) == list(expected.loc[ours.index, column])
    for stranger in answers.iloc[len(rows) :].to_dict("records"):
        assert stranger["answered_by"] == "[]"
        assert stranger["prediction"] > 0


def test_nothing_that_is_stored_or_registered_is_pickled(chain: Chain) -> None:
    files = [path for part in ("tables", "mlflow") for path in (chain.root / part).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path.name for path in files if path.suffix in (".pkl", ".pickle", ".joblib")] == []
    # Protocol 2 and later begin with this opcode, and end with a full stop.
    pickles = [
        path
        for path in files
        if (data := path.read_bytes())[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and data[-1:] == b"."
    ]
    assert pickles == []
    models = [yaml.safe_load(path.read_text()) for path in files if path.name == "MLmodel"]
    assert models
    for model in models:
        flavour = model["flavors"]["python_function"]
        assert flavour["loader_module"] == "mlflow.pyfunc.loaders.code_model"
        assert flavour["code"] is None
        assert "python_model" not in flavour


def test_a_second_run_gives_the_same_boosters_and_answers(chain: Chain) -> None:
    before = chain.table("housing", "predictions").set_index("row_key").sort_index()
    chain.run_again()
    after = chain.table("housing", "predictions").set_index("row_key").sort_index()
    assert len(after) == len(before)
    pd.testing.assert_frame_equal(after[["prediction", "booster_id"]], before[["prediction", "booster_id"]])
    assert (after["fleet_version"] != before["fleet_version"]).all()
    ledger = chain.table("housing", "ledger")
    first, second = (rows.set_index("group_id")["booster_id"].sort_index() for _, rows in ledger.groupby("run_id", sort=False))
    assert first.equals(second)


def test_a_trial_on_a_few_groups_touches_nothing_real(chain: Chain) -> None:
    runs, predictions = chain.table("housing", "runs"), chain.table("housing", "predictions")
    chain.run_again(limit_groups=2)
    assert len(chain.table("housing-trial", "ledger")) == 3
    assert chain.resources["registry"].find("housing-trial", "champion") is not None
    pd.testing.assert_frame_equal(chain.table("housing", "runs"), runs)
    pd.testing.assert_frame_equal(chain.table("housing", "predictions"), predictions)


def test_a_dry_run_trains_nothing(chain: Chain) -> None:
    runs = chain.table("housing", "runs")
    result = chain.run_again(dry_run=True)
    assert result.success
    links = {event.asset_key.path[-1] for event in result.get_asset_materialization_events() if event.asset_key}
    assert links == {"txhousing", "features"}
    pd.testing.assert_frame_equal(chain.table("housing", "runs"), runs)


def test_resource_settings_reach_spark(spark_resource: SparkSessionResource) -> None:
    assert spark_resource.session.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark_resource.session.conf.get("spark.sql.runSQLOnFiles") == "false"
