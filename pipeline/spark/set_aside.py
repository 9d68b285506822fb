"""Unreadable files of a stream: set aside, and tried again when they change.

Spark never lists a file twice. A file that a task cannot read is therefore noted in the checkpoint:
below `attempt/` until its micro batch is committed, and then beside it for good.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UnreadableFile
from pipeline.reading.files import RowFile
from pipeline.spark.files import Batches

FOLDER = "set-aside"


@dataclass(frozen=True)
class FileSetAside:
    """A file that could not be read.

    Args:
        path: of the file.
        size: in bytes, when it was tried.
        modified_ns: its modification time then.
        reason: why it could not be read.
    """

    path: str
    size: int
    modified_ns: int
    reason: str

    @property
    def digest(self) -> str:
        """A hash of the path, for the name of its entry and of the transaction that answers it."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:16]

    @property
    def has_changed(self) -> bool:
        """Whether the file has changed since it was tried; one that is gone has not."""
        try:
            stat = Path(self.path).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified_ns)


@dataclass(frozen=True)
class SetAside:
    """The files that a stream has set aside.

    Args:
        folder: the stream's checkpoint; tasks must be able to write there.
    """

    folder: Path

    @property
    def _entries(self) -> Path:
        return self.folder / FOLDER

    @property
    def _attempt(self) -> Path:
        return self._entries / "attempt"

    def begin(self) -> None:
        """Forget what an earlier attempt at a micro batch noted, as it was not committed."""
        shutil.rmtree(self._attempt, ignore_errors=True)
        self._attempt.mkdir(parents=True, exist_ok=True)

    def reads(self, file: RowFile, rows: Callable[[RowFile], Batches]) -> bool:
        """Whether a file can be read to its end; called by tasks. One that cannot is noted.

        Raises:
            UnreadableFile: if it cannot, and this task cannot reach the checkpoint.
            DataError: if it lacks columns, which waiting does not mend; this ends the stream.
        """
        stat = Path(file.path).stat()
        try:
            for _ in rows(file):
                pass
        except UnreadableFile as error:
            if not self._attempt.is_dir():
                raise
            entry = FileSetAside(file.path, stat.st_size, stat.st_mtime_ns, str(error))
            self._write(self._attempt, entry)
            return False
        # An earlier try of this task may have found it incomplete.
        (self._attempt / f"{FileSetAside(file.path, 0, 0, '').digest}.json").unlink(missing_ok=True)
        return True

    def keep(self) -> list[FileSetAside]:
        """Keep what the attempt noted, once its micro batch is committed.

        Returns:
            The files that it set aside.
        """
        noted = self._read(self._attempt)
        for entry in noted:
            self.update(entry)
        shutil.rmtree(self._attempt, ignore_errors=True)
        return noted

    def files(self) -> list[FileSetAside]:
        """All files that are set aside, in the order of their paths."""
        return sorted(self._read(self._entries), key=lambda entry: entry.path)

    def update(self, entry: FileSetAside) -> None:
        """Remember a file, or the outcome of another try."""
        self._write(self._entries, entry)

    def remove(self, entry: FileSetAside) -> None:
        """Forget a file that has been answered."""
        (self._entries / f"{entry.digest}.json").unlink(missing_ok=True)

    @staticmethod
    def _write(folder: Path, entry: FileSetAside) -> None:
        written = folder / f"{entry.digest}.part"
        written.write_text(json.dumps(vars(entry)), encoding="utf-8")
        written.replace(folder / f"{entry.digest}.json")

    @staticmethod
    def _read(folder: Path) -> list[FileSetAside]:
        entries = []
        for path in folder.glob("*.json"):
            entries.append(FileSetAside(**json.loads(path.read_text(encoding="utf-8"))))
        return entries
