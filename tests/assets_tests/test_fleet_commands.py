"""`many-models check` and `run`, and what a terminal shows of a failure."""

import logging
from pathlib import Path
from unittest.mock import Mock

import dagster as dg
import pytest

from assets import command_line, fleet_commands
from assets.broken_fleet import BrokenFleet
from assets.console import console_logger
from assets.failure_log import keep_trace
from pipeline.errors import ModelNotFound


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two fleets, `good` in a folder of another name and `bad`, as they load."""
    for folder, name in (("my-good", "good"), ("bad", "bad")):
        (tmp_path / "pipeline" / "defs" / folder).mkdir(parents=True)
        (tmp_path / "pipeline" / "defs" / folder / "defs.yaml").write_text(
            f"attributes: {{name: {name}}}"
        )
    broken = BrokenFleet("bad", "bad/defs.yaml, line 7: target: expected a mapping").build_defs()
    monkeypatch.setattr(fleet_commands, "load_fleets", lambda _: broken)
    monkeypatch.setattr(command_line, "PROJECT", tmp_path)
    monkeypatch.setenv("MANY_MODELS_DATA", str(tmp_path / "data"))
    return tmp_path


def test_check_lists_every_broken_fleet_and_fails(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "many-models: bad/defs.yaml, line 7: target: expected a mapping",
        "Correct the file, then: many-models check",
    ]


def test_check_of_one_sound_fleet_passes_beside_a_broken_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["check", "good"]) == 0
    assert capsys.readouterr().out == "well described: good\n"
    assert command_line.main(["check", "bad"]) == 1


def test_run_becomes_a_launch_of_the_fleets_group_found_by_name_or_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr(fleet_commands, "_run_apart", lambda command: launched.append(command) or 0)
    for fleet in ("good", "my-good"):
        assert command_line.main(["run", fleet]) == 0
    assert {tuple(arguments[1:4]) for arguments in launched} == {
        ("launch", "--assets", 'group:"good"')
    }
    assert len(launched) == 2


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -TERM $$", 143)])
def test_run_ends_as_the_launch_does(script: str, status: int) -> None:
    assert fleet_commands._run_apart(["sh", "-c", script]) == status


def test_a_dry_run_launches_nothing_beyond_the_models(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr(fleet_commands, "_run_apart", lambda command: launched.append(command) or 0)
    monkeypatch.setenv("MANY_MODELS_DRY_RUN", "1")
    assert command_line.main(["run", "my-good"]) == 0
    assert launched[0][1:4] == ["launch", "--assets", '+key:"good/models"']


def test_run_of_a_broken_or_unknown_fleet_launches_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet_commands, "_run_apart", Mock(side_effect=AssertionError))
    assert command_line.main(["run", "bad"]) == 1
    assert "line 7: target" in capsys.readouterr().err
    assert command_line.main(["run", "goood"]) == 2
    assert "unknown fleet 'goood'" in (told := capsys.readouterr().err)
    assert "did you mean 'good'? Available: bad, good" in told


def test_what_nobody_expected_is_one_line_and_a_trace_in_a_log(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        fleet_commands, "load_fleets", Mock(side_effect=RuntimeError("first\nsecond"))
    )
    assert command_line.main(["check"]) == 1
    message, trace = capsys.readouterr().err.splitlines()
    assert message == "many-models: RuntimeError: first"
    log = Path(trace.removeprefix("trace: "))
    assert log.parent == project / "data" / "logs"
    assert "Traceback" in log.read_text()


def test_a_trace_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder would be")
    assert keep_trace(tmp_path / "logs", "trace") == ""


def test_a_failed_step_says_its_cause_once_and_where_the_trace_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dg.asset
    def first() -> None:
        raise ValueError("no such thing\nand a second line")

    @dg.asset(deps=[first])
    def second() -> None: ...

    job = dg.define_asset_job("job", [first, second], executor_def=dg.in_process_executor)
    definitions = dg.Definitions(
        [first, second], jobs=[job], loggers={"console": console_logger(tmp_path)}
    )
    definitions.resolve_job_def("job").execute_in_process(
        run_config={"loggers": {"console": {"config": {}}}}, raise_on_error=False
    )
    logging.shutdown([])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 3
    assert 'ERROR: Execution of step "first" failed.' in lines[0]
    assert lines[1] == "ValueError: no such thing"
    assert "and a second line" in Path(lines[2].removeprefix("trace: ")).read_text()


def test_a_fleet_is_known_by_name_before_folder() -> None:
    names = {"a": "b", "b": "c"}
    assert [fleet_commands.known_fleet(names, fleet) for fleet in ("a", "b", "c")] == [
        "b",
        "b",
        "c",
    ]
    with pytest.raises(ModelNotFound, match="Available: b, c"):
        fleet_commands.known_fleet(names, "zzz")
