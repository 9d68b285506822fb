"""The blend on Spark: each grain's prediction and weight beside a row, and its answers."""

from collections.abc import Collection, Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.training.blend import Constants, GroupSkill


def grain_columns(prefix: str, n_grains: int) -> list[Column]:
    """One column per grain, coarsest first: `<prefix>0`, `<prefix>1`, ..."""
    return [sf.col(f"{prefix}{grain}") for grain in range(n_grains)]


def grain_predictions(prefix: str, n_grains: int) -> list[Column]:
    """The prediction of each grain, as aggregates over the held-out rows of one row.

    Args:
        prefix: of the columns' names, which end in the index of the grain.
        n_grains: of the fleet.
    """
    predictions = []
    for grain in range(n_grains):
        own = sf.when(sf.col("grain") == grain, sf.col("prediction"))
        predictions.append(sf.max(own).alias(f"{prefix}{grain}"))
    return predictions


def constant_column(constants: Constants, classes: Sequence[str]) -> Column:
    """What answers a row, for multiclass a row's class, without any model.

    In link space less the offset, over the scale.
    """
    if not constants.prior:
        return sf.lit(constants.with_offset)
    shares = []
    for name, share in zip(classes, constants.prior, strict=True):
        shares += [sf.lit(name), sf.lit(share)]
    return sf.element_at(sf.create_map(*shares), sf.col("class_name"))


def mark_groups(rows: DataFrame, grain: int, groups: Collection[str], name: str) -> DataFrame:
    """The rows with a boolean column of that name: whether their group of a grain is listed.

    Args:
        rows: with the ids of their groups in group_ids.
        grain: index of the grain.
        groups: ids that are listed.
        name: of the column.
    """
    ids = [(group,) for group in sorted(groups)]
    listed = sf.broadcast(rows.sparkSession.createDataFrame(ids, f"_listed{grain} string"))
    id_of_listed = sf.col(f"_listed{grain}")
    joined = rows.join(listed, sf.col("group_ids")[grain] == id_of_listed, "left")
    return joined.withColumn(name, id_of_listed.isNotNull()).drop(f"_listed{grain}")


def blend(weight: Column, own: Column, parent: Column) -> Column:
    """A group's answer; its parent's where the weight or the own prediction is null."""
    is_parents = own.isNull() | weight.isNull()
    return sf.when(is_parents, parent).otherwise(weight * own + (1 - weight) * parent)


def with_weights(
    rows: DataFrame, skills: Mapping[GroupKey, GroupSkill], has_model: Sequence[Collection[str]]
) -> DataFrame:
    """The rows with what the blend says of their groups, one pair of columns per grain.

    Args:
        rows: with the ids of their groups in group_ids.
        skills: weights by group.
        has_model: per grain the groups that were trained.

    Returns:
        Beside the columns of the rows: _w0, _w1, ... (weight of the own model; null without one),
        and _cut0, _cut1, ... (whether the constant answers the group, whatever is above it).
    """
    for grain, trained in enumerate(has_model):
        weights = []
        for (level, group), skill in skills.items():
            if level == grain and (group in trained or skill.is_cut):
                weights.append((group, skill.weight, skill.is_cut))
        columns = f"_g{grain} string, _w{grain} double, _cut{grain} boolean"
        table = sf.broadcast(rows.sparkSession.createDataFrame(weights, columns))
        rows = rows.join(table, sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left")
    return rows


def level_answers(
    own: Sequence[Column], weights: Sequence[Column], is_cut: Sequence[Column], constant: Column
) -> list[Column]:
    """Each level's blended answer, link space less offset, over scale (for classes probabilities).

    Args:
        own: prediction of each grain's own model; null without one.
        weights: of the own models; null without one.
        is_cut: whether the level is answered by the constant, whatever is above it.
        constant: what answers without any model.
    """
    answers = []
    answer = constant
    for prediction, weight, cut in zip(own, weights, is_cut, strict=True):
        answer = sf.when(cut, constant).otherwise(blend(weight, prediction, answer))
        answers.append(answer)
    return answers


def blended_answers(n_grains: int, constant: Column) -> list[Column]:
    """Each level's answer to a judged row that has weights as from `with_weights`."""
    return level_answers(
        grain_columns("p", n_grains),
        grain_columns("_w", n_grains),
        grain_columns("_cut", n_grains),
        constant,
    )
