"""Registering a version that combines the answer chains of several."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from assets.meta_model import pack_store
from pipeline.models.meta_model import FleetModel, GroupKey
from pipeline.models.pack import combine_versions, write_pack
from pipeline.spec import FleetSpec
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import MlflowRegistry, Version, interface
from resources.spark_session import SparkSessionResource


def register_mosaic(
    tables: DeltaTables,
    registry: MlflowRegistry,
    spark: SparkSessionResource,
    spec: FleetSpec,
    namespace: str,
    serving: Mapping[GroupKey, str],
    models: Sequence[FleetModel],
    decisions: pd.DataFrame,
) -> Version:
    """Register a version in which each group is answered by the fleet version that is named for it; it gets no alias.

    Args:
        tables: where the fleet's tables are.
        registry: where it is registered.
        spark: for the types of the columns that it needs.
        spec: the fleet.
        namespace: name of the registered model.
        serving: fleet version by group.
        models: packs that together hold these chains; the first one's own version names the new one.
        decisions: logged with it.
    """
    options = tables.storage_options

    def boosters(names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        found: set[str] = set()
        for row in chain.from_iterable(model.stored_boosters(names) for model in models):
            if row["booster_id"] not in found:
                found.add(row["booster_id"])
                yield row

    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack"
        runs = combine_versions(serving, models)
        digest = write_pack(pack, runs, boosters, store=pack_store(tables, namespace, spec), before=models)
        answering = FleetModel(pack, digest=digest, options=options)
        features = tables.read_spark(spark.session, tables.location(spec.name, "features"))
        dtypes = {field.name: field.dataType.simpleString() for field in features.schema}
        counts = pd.Series(serving).value_counts()
        return registry.register(
            namespace,
            answering.fleet_version,
            pack=pack,
            **interface(answering, dtypes),
            parameters={"combines": ", ".join(f"{version} ({count} groups)" for version, count in counts.items())[:MOST_CHARACTERS]},
            metrics={"generations": float(len(runs)), "groups": float(len(serving))},
            tables={"decisions.json": decisions.head(DECISIONS_LOGGED)},
            plots={},
            alias=None,
        )


DECISIONS_LOGGED = 10_000
# Of a parameter, as MLflow takes it.
MOST_CHARACTERS = 500
