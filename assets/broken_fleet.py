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
    specs = (
        spec
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition)
        for spec in asset.specs
    )
    return {
        str(spec.group_name): str(spec.metadata[MISTAKE])
        for spec in specs
        if MISTAKE in spec.metadata
    }


def fleet_name(folder: Path, attributes: Any) -> str:
    """The name of a fleet: its own where that can serve and is not taken, else the folder's."""
    name = attributes.get("name") if isinstance(attributes, dict) else None
    text = name if isinstance(name, str) else ""
    if re.fullmatch(r"[A-Za-z]\w*", text, re.ASCII) and name_taken_by(folder, text) is None:
        return text
    return re.sub(r"\W", "_", folder.name, flags=re.ASCII)


def name_taken_by(folder: Path, name: str) -> str | None:
    """The neighbouring folder whose fleet a name belongs to; None where it is this folder's.

    Of several fleets with one name, the folder of that name has it, else the first.
    """
    holders = [
        path.parent.name
        for path in sorted(folder.parent.glob("*/defs.yaml"))
        if declared_name(path) == name
    ]
    owner = name if name in holders else holders[0] if holders else folder.name
    return None if owner == folder.name else owner


def declared_name(file: Path) -> str | None:
    """The name in a defs.yaml; None where there is none to be read."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        return str(written["attributes"]["name"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def shown_path(folder: Path) -> str:
    """A folder as a person finds it: from the working directory where it is below that."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)
