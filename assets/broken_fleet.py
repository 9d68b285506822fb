"""A fleet whose description has a mistake: one asset that says so, in the place of its chain."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

BROKEN = "broken"
MISTAKE = "fleet/mistake"


@dataclass(frozen=True)
class BrokenFleet:
    """A fleet that cannot be built.

    Args:
        name: from its defs.yaml where it can be read, else from its folder; its asset group.
        message: what is wrong, for people.
    """

    name: str
    message: str

    def build_defs(self) -> dg.Definitions:
        """One asset with the message, which fails with it."""

        @dg.asset(
            key=[self.name, BROKEN],
            group_name=self.name,
            description=f"This fleet cannot be built:\n\n```\n{self.message}\n```",
            metadata={MISTAKE: self.message},
            tags={"fleet/broken": "true"},
        )
        def broken() -> None:
            raise dg.Failure(description=self.message, allow_retries=False)

        return dg.Definitions(assets=[broken])


def broken_fleets(definitions: dg.Definitions) -> dict[str, str]:
    """What is wrong with each broken fleet of a code location, by name."""
    messages = {}
    for asset in definitions.assets or ():
        if not isinstance(asset, dg.AssetsDefinition):
            continue
        for spec in asset.specs:
            if MISTAKE in spec.metadata:
                messages[str(spec.group_name)] = str(spec.metadata[MISTAKE])
    return messages


def fleet_name(folder: Path, attributes: Any) -> str:
    """The name of a fleet: its own if that is valid and not taken, else the folder's."""
    match attributes:
        case {"name": str(name)} if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            if name_taken_by(folder, name) is None:
                return name
    return re.sub(r"\W", "_", folder.name, flags=re.ASCII)


def name_taken_by(folder: Path, name: str) -> str | None:
    """The neighbouring folder whose fleet a name belongs to; None where it is this folder's.

    Of several fleets with one name, the folder of that name has it, else the first.
    """
    holders = []
    for path in sorted(folder.parent.glob("*/defs.yaml")):
        if declared_name(path) == name:
            holders.append(path.parent.name)
    if not holders:
        return None
    owner = holders[0]
    if name in holders:
        owner = name
    if owner == folder.name:
        return None
    return owner


def declared_name(file: Path) -> str | None:
    """The name in a defs.yaml; None where there is none to be read."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        return str(written["attributes"]["name"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def shown_path(folder: Path) -> str:
    """A folder's path for people: relative to the working directory if it is below that."""
    here = Path.cwd()
    if folder.is_relative_to(here):
        folder = folder.relative_to(here)
    return str(folder)
