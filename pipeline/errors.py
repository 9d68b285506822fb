"""What can go wrong with a fleet, by who must act.

    FleetError
    ├── SpecError       the author of defs.yaml or features.sql; also a ValueError
    ├── DataError       whoever owns the data
    │   └── UnreadableFile  the same; a stream sets such a file aside and continues
    ├── StoreError      whoever owns storage: Delta tables, disks, object stores, the registry
    └── ModelNotFound   whoever asked for a model that does not exist; also a KeyError

A message says what is wrong, the offending value, what was expected or is available, and the next
step. A mistake in one group never ends a run: it becomes that group's ledger row.
"""


class FleetError(Exception):
    """Base of everything this project raises on purpose."""


class SpecError(FleetError, ValueError):
    """The fleet is described wrongly: a field of defs.yaml or the SQL of features.sql."""


class DataError(FleetError):
    """The data breaks a contract: a column is missing, a key is doubled, a type cannot be read."""


class UnreadableFile(DataError):
    """A file is damaged, incomplete, or not of the format that its name promises."""


class StoreError(FleetError):
    """Storage or the registry refused, is damaged, or is missing something it promised."""


class ModelNotFound(FleetError, KeyError):
    """A registered version, booster or alias that was asked for does not exist."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which hides line breaks and adds quotes.
        return Exception.__str__(self)
