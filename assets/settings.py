"""What every asset of the chain shares: its key, its settings, and readable errors."""

import datetime as dt
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from pipeline.errors import FleetError
from pipeline.recognition import DIGEST
from pipeline.spark.data_errors import readable_model_errors
from pipeline.spec import FleetSpec
from pipeline.storage import Snapshot, Tables
from resources.launch_settings import LaunchSettings


@dataclass(frozen=True)
class FleetFiles:
    """The files a fleet is written in.

    Args:
        folder: of its defs.yaml.
        sql: text of its SQL file.
    """

    folder: Path
    sql: str


def asset_key(spec: FleetSpec, name: str) -> dg.AssetKey:
    """The key of one asset of the fleet."""
    return dg.AssetKey([spec.name, name])


def asset_settings(
    spec: FleetSpec, name: str, *, description: str, kinds: set[str], deps: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments of `dg.asset` that every asset of the chain has."""
    return {
        "key": asset_key(spec, name),
        "group_name": spec.name,
        "description": description,
        "kinds": kinds,
        "owners": list(spec.owners) or None,
        "deps": [asset_key(spec, dep) for dep in deps],
    }


def check_specs(
    spec: FleetSpec, name: str, descriptions: Mapping[str, str], *, blocking: Collection[str] = ()
) -> list[dg.AssetCheckSpec]:
    """The checks of one asset of the fleet.

    Args:
        spec: of the fleet.
        name: of the asset.
        descriptions: what must hold, by name of the check.
        blocking: names of the checks that end the run where they fail.
    """
    return [
        dg.AssetCheckSpec(
            check,
            asset=asset_key(spec, name),
            blocking=check in blocking,
            description=description,
        )
        for check, description in descriptions.items()
    ]


@contextmanager
def readable_failures() -> Iterator[None]:
    """Show an error of ours as the step's failure, in its own words.

    Nothing that was written is lost.
    """
    try:
        with readable_model_errors():
            yield
    except FleetError as error:
        raise dg.Failure(
            description=str(error),
            metadata={"fleet/error": type(error).__name__},
            allow_retries=False,
        ) from error


def unchanged(
    launch: LaunchSettings, tables: Tables, location: str, digest: str | None
) -> Snapshot | None:
    """A table whose newest commit was made of just what it would be made of now.

    None where it is to be made again, also because the launch makes everything again.

    Args:
        launch: makes everything again with `retrain: all`.
        tables: where the table is.
        location: root of the table.
        digest: of what it would be made of; None where that cannot be told.
    """
    if digest is None or launch.retrain == "all":
        return None
    table = tables.snapshot(location)
    if table is None or table.metadata.get(DIGEST) != digest:
        return None
    return table


def commit_metadata(digest: str | None) -> dict[str, str]:
    """What a table's commit keeps, so that a later launch finds it `unchanged`."""
    if digest is None:
        return {}
    return {DIGEST: digest}


def since(table: Snapshot) -> str:
    """When a version was committed, in local time, with the date where that is not today's."""
    committed = table.committed_at.astimezone()
    if committed.date() == dt.datetime.now().astimezone().date():
        return committed.strftime("%H:%M")
    return committed.strftime("%Y-%m-%d %H:%M")


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """The columns of a table as the Dagster UI shows them."""
    columns = [dg.TableColumn(field.name, str(field.type)) for field in schema]
    return dg.TableSchema(columns=columns)


def png(picture: bytes) -> dg.MarkdownMetadataValue:
    """A picture that the UI shows in place."""
    import base64

    return dg.MetadataValue.md(
        f"![plot](data:image/png;base64,{base64.b64encode(picture).decode()})"
    )


def prefixed(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata under our own prefix."""
    return {f"fleet/{name}": value for name, value in counts.items()}
