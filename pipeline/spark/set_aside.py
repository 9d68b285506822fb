"""Unreadable files of a stream: set aside, and tried again when they change.

Spark never lists a file twice. What is set aside is therefore remembered here, in the checkpoint:
by the task that could not read it, below `attempt/` while its micro batch is not committed, and for
good once it is.
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
        """Of the path; names its entry, and the transaction that answers it later."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:16]

    @property
    def has_changed(self) -> bool:
        """Whether the file is another one than the one that was tried."""
        try:
            found = Path(self.path).stat()
        except OSError:  # gone: there is nothing to try
            return False
        return (found.st_size, found.st_mtime_ns) != (self.size, self.modified_ns)


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
        """Forget what an attempt at a micro batch noted that was not committed."""
        shutil.rmtree(self._attempt, ignore_errors=True)
        self._attempt.mkdir(parents=True, exist_ok=True)

    def reads(self, file: RowFile, rows: Callable[[RowFile], Batches]) -> bool:
        """Whether a file can be read to its end; called by tasks. One that cannot is noted.

        Raises:
            UnreadableFile: if it cannot, and the checkpoint is not in reach of this task.
            DataError: if it lacks columns, which waiting does not mend; this ends the stream.
        """
        found = Path(file.path).stat()
        try:
            for _ in rows(file):
                pass
        except UnreadableFile as error:
            if not self._attempt.is_dir():
                raise
            entry = FileSetAside(file.path, found.st_size, found.st_mtime_ns, str(error))
            self._write(self._attempt, entry)
            return False
        # An earlier try of this task may have found it incomplete.
        (self._attempt / f"{FileSetAside(file.path, 0, 0, '').digest}.json").unlink(missing_ok=True)
        return True

    def keep(self) -> list[FileSetAside]:
        """Keep what the attempt noted, now that its micro batch is committed.

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
        """Remember a file, or what was found at another try."""
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
        texts = (path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
        return [FileSetAside(**json.loads(text)) for text in texts]
