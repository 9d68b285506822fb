"""Registering a version that combines the answer chains of several."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from assets.meta_model import pack_store, register_model
from pipeline.models.meta_model import FleetModel, GroupKey
from pipeline.models.pack import combine_versions, write_pack
from pipeline.models.registry import RunRecord
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spec import FleetSpec
from resources.mlflow_registry import MlflowRegistry, Version
from resources.spark_session import SparkSessionResource

MAX_DECISIONS_LOGGED = 10_000
# Of a parameter, as MLflow takes it.
MAX_CHARACTERS = 500


def register_combined(
    tables: FleetTables,
    registry: MlflowRegistry,
    spark: SparkSessionResource,
    spec: FleetSpec,
    serving: Mapping[GroupKey, str],
    models: Sequence[FleetModel],
    decisions: pd.DataFrame,
) -> Version:
    """Register a version in which each group is answered by the named fleet version.

    It gets no alias.

    Args:
        tables: of the fleet; the feature table gives the types of the columns that it reads.
        registry: where it is registered.
        spark: reads the feature table.
        spec: says where packs keep their boosters.
        serving: fleet version by group.
        models: packs that together hold these chains; the first one's own version names the new
            one.
        decisions: logged with it.
    """

    def read_boosters(names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        return _stored_boosters(models, names)

    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack"
        runs = combine_versions(serving, models)
        digest = write_pack(
            pack, runs, read_boosters, store=pack_store(tables, spec), before=models
        )
        model = FleetModel(pack, digest=digest, options=tables.tables.storage_options)
        features = tables.features(spark.session)
        record = RunRecord(
            parameters={"combines": _describe_counts(serving)},
            metrics={"generations": float(len(runs)), "groups": float(len(serving))},
            tables={"decisions.json": decisions.head(MAX_DECISIONS_LOGGED)},
        )
        return register_model(registry, tables.namespace, model, features, record, alias=None)


def _stored_boosters(
    models: Sequence[FleetModel], names: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    """Each of the named boosters once, from the first pack that has it."""
    seen: set[str] = set()
    for model in models:
        for row in model.stored_boosters(names):
            if row["booster_id"] not in seen:
                seen.add(row["booster_id"])
                yield row


def _describe_counts(serving: Mapping[GroupKey, str]) -> str:
    """How many groups each fleet version answers, cut to what MLflow takes."""
    counts = pd.Series(list(serving.values()), dtype=object).value_counts()
    parts = [f"{version} ({count} groups)" for version, count in counts.items()]
    return ", ".join(parts)[:MAX_CHARACTERS]
