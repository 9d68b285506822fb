"""The table of decisions: which version served from when on, and why each group moved or stayed."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.models.meta_model import GroupKey
from pipeline.models.promotion import groups_rolled_back
from pipeline.runs.fleet_tables import FleetTables
from pipeline.tables import DECISIONS

_WHOLE_NUMBERS = ("n_rows", "n_blocks")
_NUMBERS = ("loss_champion", "loss_challenger", "p_value")


@dataclass(frozen=True)
class Decisions:
    """The rows of `tables.DECISIONS`, which launches of `champion` left.

    Args:
        tables: of the fleet.
    """

    tables: FleetTables

    @property
    def location(self) -> str:
        """Root of the table."""
        return self.tables.location(DECISIONS)

    def alias_moves(self) -> pd.DataFrame:
        """One row per launch that decided, oldest first.

        Returns:
            decision_id, decided_at, champion_before and champion_after (registered versions), and
            whether it was carried out (moved).
        """
        columns = ["decision_id", "decided_at", "champion_before", "champion_after", "moved"]
        if not self.tables.tables.exists(self.location):
            return pd.DataFrame(columns=columns)
        rows = self.tables.tables.read_pandas(self.location, columns=columns)
        return rows.drop_duplicates("decision_id").sort_values("decided_at", ignore_index=True)

    def rows_of(self, decision_id: str) -> pd.DataFrame:
        """The rows of one launch."""
        return self.tables.tables.read_pandas(self.location, where={"decision_id": decision_id})

    def rolled_back_from(self, fleet_version: str) -> frozenset[GroupKey]:
        """Groups that were rolled back from that fleet version."""
        if not self.tables.tables.exists(self.location):
            return frozenset()
        columns = ["decision", "moved", "from_version", "grain", "group_id"]
        rows = self.tables.tables.read_pandas(
            self.location, where={"decision": "rollback"}, columns=columns
        )
        return groups_rolled_back(rows, fleet_version)

    def write(self, rows: pd.DataFrame) -> None:
        """Replace the rows of one decision, in one commit."""
        files = self.tables.write(DECISIONS, _decision_table(rows))
        self.tables.tables.commit(
            self.location,
            files,
            DECISIONS.schema,
            mode="overwrite",
            partition={"decision_id": str(rows["decision_id"].iloc[0])},
        )


def _decision_table(rows: pd.DataFrame) -> pa.Table:
    """The rows in the types of the contract; columns that they lack are null."""
    whole = rows.reindex(columns=DECISIONS.schema.names)
    for name in _WHOLE_NUMBERS:
        whole[name] = pd.to_numeric(whole[name]).astype("Int64")
    for name in _NUMBERS:
        whole[name] = pd.to_numeric(whole[name]).astype(float)
    for field in DECISIONS.schema:
        if pa.types.is_string(field.type):
            texts = list(map(_as_text, whole[field.name]))
            whole[field.name] = pd.Series(texts, index=whole.index, dtype=object)
    return pa.Table.from_pandas(whole, schema=DECISIONS.schema, preserve_index=False)


def _as_text(value: Any) -> str | None:
    if pd.isna(value):
        return None
    return str(value)
