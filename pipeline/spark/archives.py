"""Folders of the driver that tasks read.

Where Spark is local, tasks read them in place; on a cluster, each executor unpacks an archive once.
"""

import zipfile
from pathlib import Path

from pyspark import SparkContext, SparkFiles

from pipeline.models.meta_model import index_digest, read_index

# The time of every file in an archive, so that equal content gives equal bytes.
FIXED_TIME = (1980, 1, 1, 0, 0, 0)


def is_local(master: str) -> bool:
    """Whether Spark runs in the driver's own process, so that tasks see its folders."""
    return master == "local" or master.startswith("local[")


def share_pack(context: SparkContext, folder: Path) -> str:
    """Let tasks read a pack; the name that `SparkFiles.get` finds its folder by.

    On a cluster the name holds the pack's digest, so that several versions in one session stay
    apart, and a pack that has been shared is not packed again.

    Args:
        context: of the session.
        folder: the pack, under a name of its own.

    Raises:
        PackError: if the pack has no readable index.
    """
    if is_local(str(context.master)):
        context.addFile(str(folder), recursive=True)
        return folder.name
    name = f"pack-{index_digest(read_index(folder))}.zip"
    # Kept as long as the session: executors that register later fetch it, too.
    archive = Path(SparkFiles.getRootDirectory()) / "archives" / name
    if not archive.exists():
        files = sorted(filter(Path.is_file, folder.rglob("*")))
        write_archive(archive, folder, files)
        context.addArchive(str(archive))
    return name


def write_archive(archive: Path, root: Path, files: list[Path]) -> None:
    """Write files into a zip archive, uncompressed and without their times, in one step.

    Args:
        archive: to write.
        root: folder that their names in the archive count from.
        files: below it, in the archive's order.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as written:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), FIXED_TIME)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as content, written.open(entry, "w") as target:
                while block := content.read(1 << 20):
                    target.write(block)
    unfinished.replace(archive)
