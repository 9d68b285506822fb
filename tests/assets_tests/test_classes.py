"""Fleets that predict classes, from raw rows to registered model and predictions."""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import numpy as np
import pytest

from pipeline.spec import parse_spec

pytestmark = [pytest.mark.spark, pytest.mark.slow]

FEATURES = {"columns": ["size"], "calendar": ["month"], "categoricals": ["region"]}
LABELS = {
    "binary": "amount > 150",
    "multiclass": "CASE WHEN amount < 130 THEN 'low' WHEN amount < 170 THEN 'mid' ELSE 'top' END",
}
CLASSES = {"binary": ["false", "true"], "multiclass": ["low", "mid", "top"]}


@pytest.mark.parametrize("task", LABELS)
def test_a_fleet_of_classes_goes_from_rows_to_answers(
    shop_attributes: dict[str, Any],
    launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]],
    checks: Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]],
    metadata: Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]],
    task: str,
) -> None:
    spec = parse_spec(
        {
            **shop_attributes,
            "task": task,
            "target": {"column": "label"},
            "features": FEATURES,
            "baselines": {},
        },
        file="defs.yaml",
    )
    sql = (
        "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, size, "
        f"{LABELS[task]} AS label FROM sales"
    )
    fleet, result = launched(spec, sql)
    assert result.success
    assert [name for name, found in checks(result).items() if not found.passed] == []
    predictions = fleet.table("predictions")
    assert len(predictions) == 12
    probabilities = np.stack(predictions["probabilities"].to_list())
    assert probabilities.sum(axis=1) == pytest.approx(1.0)
    if task == "multiclass":
        assert predictions["prediction"].tolist() == [
            CLASSES[task][number] for number in probabilities.argmax(axis=1)
        ]
    else:
        assert predictions["prediction"].tolist() == probabilities[:, 1].tolist()
    told = metadata(result)
    assert "log_loss" in told["models"]["fleet/errors"]
    assert "log_loss" in told["models"]["fleet/worst_groups"]
    registry = fleet.resources["registry"]
    client = registry.make_client()
    import mlflow

    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert {"fleet_log_loss", "fleet_accuracy", "constant_log_loss"} <= set(run.data.metrics)
    assert run.data.metrics["fleet_log_loss"] < run.data.metrics["constant_log_loss"]
    served = mlflow.pyfunc.load_model("models:/shop@champion")
    features = fleet.table("features")
    question = features.loc[
        features["row_key"].isin(predictions["row_key"]),
        served.metadata.get_input_schema().input_names(),
    ]
    answers = served.predict(question)
    assert list(answers.columns) == served.metadata.get_output_schema().input_names()
    assert sorted(answers["prediction"]) == sorted(predictions["prediction"])
