import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyspark import SparkFiles

from pipeline.models.meta_model import FleetModel, index_digest, read_index
from pipeline.spark.archives import is_local, share_pack, write_archive
from pipeline.testing.packs import asked_pack


class Context(SimpleNamespace):
    """A session's, that only remembers what it was given."""

    def __init__(self, master: str) -> None:
        super().__init__(master=master, files=[], archives=[])

    def addFile(self, path: str, recursive: bool) -> None:  # noqa: N802 - PySpark's name
        self.files.append((path, recursive))

    def addArchive(self, path: str) -> None:  # noqa: N802 - PySpark's name
        self.archives.append(Path(path))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(SparkFiles, "getRootDirectory", lambda: str(tmp_path / "files"))
    return Context("spark://host:7077")


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("local", True),
        ("local[2]", True),
        ("local[*,4]", True),
        ("local-cluster[2,1,1024]", False),
        ("spark://local:7077", False),
        ("yarn", False),
    ],
)
def test_only_a_local_session_sees_the_drivers_folders(master: str, expected: bool) -> None:
    assert is_local(master) is expected


def test_a_local_session_reads_packs_where_they_are(tmp_path: Path) -> None:
    context, pack = Context("local[2,4]"), asked_pack(tmp_path / "pack-1", "run-1")
    assert share_pack(context, pack) == "pack-1"
    assert context.files == [(str(pack), True)]
    assert context.archives == []


def test_a_cluster_gets_a_pack_as_an_archive_once(cluster: Context, tmp_path: Path) -> None:
    pack = asked_pack(tmp_path / "pack", "run-1")
    name = share_pack(cluster, pack)
    assert name == share_pack(cluster, pack) == f"pack-{index_digest(read_index(pack))}.zip"
    (archive,) = cluster.archives
    assert archive.name == name
    # Spark unpacks it on the driver, too, into a folder of that name.
    assert archive != tmp_path / "files" / name
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(archive).extractall(unpacked)
    model, copied = FleetModel(pack), FleetModel(unpacked)
    assert copied.groups() == model.groups()


def test_two_versions_in_one_session_stay_apart(cluster: Context, tmp_path: Path) -> None:
    first = asked_pack(tmp_path / "one" / "pack", "run-1")
    second = asked_pack(tmp_path / "two" / "pack", "run-2", seed=1)
    assert share_pack(cluster, first) != share_pack(cluster, second)
    assert len(cluster.archives) == 2


def test_equal_files_give_equal_archives(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "a.py").write_text("a = 1\n")
        (folder / "b.py").write_text("b = 2\n")
    os.utime(tmp_path / "one" / "b.py", (1, 1))
    archives = [tmp_path / f"{name}.zip" for name in ("one", "two")]
    for archive in archives:
        folder = tmp_path / archive.stem
        write_archive(archive, folder, sorted(folder.rglob("*.py")))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert zipfile.ZipFile(archives[0]).namelist() == ["b.py", "part/a.py"]
