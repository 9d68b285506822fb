"""The figures: each with a name, its targets, and what measures it."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.automation import automation_figures
from benchmarks.blending import blend_safety, blend_truth
from benchmarks.cluster import cluster_identical
from benchmarks.compose import compose
from benchmarks.first_run import first_run_answers
from benchmarks.first_run_kills import first_run_kills
from benchmarks.intervals import CASES, LEVELS, interval_coverage
from benchmarks.judging import (
    FLIGHTS,
    HOUSING,
    Conservation,
    group_errors,
    judge,
    ledger_conservation,
    predictions_conservation,
)
from benchmarks.kills import kills
from benchmarks.mistakes import message_lines
from benchmarks.poison import poison
from benchmarks.promotion import false_promotions, true_promotions
from benchmarks.runs import PROJECT, Runs
from benchmarks.scoring import score_vs_raw, score_vs_recipe, score_vs_spark_udf
from benchmarks.serving import cache_memory, open_cold, pack_bytes, rest_latency, row_warm
from benchmarks.shape import measure_shape
from benchmarks.sql_escapes import sql_escapes
from benchmarks.stream_kills import stream_kills
from benchmarks.tampering import tampered
from benchmarks.training import (
    AFTER_DECEMBER,
    against_pool,
    against_recipe_flights,
    against_recipe_thousand,
    blend_gain,
    busy_fraction,
    driver_memory,
    incremental,
    makespan_skew,
    overhead_growth,
    second_run_noise,
    tracking_requests,
)
from pipeline.crash_points import POINTS

HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Value:
    """One value of a figure, and what it must be.

    Args:
        part: follows the figure's name after a dot; empty for a figure's only value.
        unit: one word.
        op: one of `HOLDS`, or `-` for a value that is printed only.
        limit: what it is compared with; null with `-`.
    """

    part: str
    unit: str
    op: str = "-"
    limit: float | None = None

    def __post_init__(self) -> None:
        if (self.op in HOLDS) != (self.limit is not None) or (
            self.op != "-" and self.op not in HOLDS
        ):
            raise ValueError(
                f"{self.part!r}: target is {self.op} {self.limit}; expected one of "
                f"{', '.join(HOLDS)} with a limit, or - without one"
            )

    def holds(self, measured: float) -> bool:
        """Whether a measured value meets the target; one that is not a number does not."""
        return self.limit is None or HOLDS[self.op](measured, self.limit)

    def line(self, figure: str, measured: float) -> str:
        """`NAME VALUE UNIT target OP LIMIT ok|short`, or `NAME VALUE UNIT target - - printed`."""
        verdict = "printed" if self.limit is None else "ok" if self.holds(measured) else "short"
        name = f"{figure}.{self.part}" if self.part else figure
        return f"{name} {measured:.7g} {self.unit} target {self.target} {verdict}"

    @property
    def target(self) -> str:
        """`OP LIMIT`."""
        return "- -" if self.limit is None else f"{self.op} {self.limit:.7g}"


@dataclass(frozen=True)
class Figure:
    """Something that is measured.

    Args:
        name: short, unique.
        what: one line for people.
        minutes: how long it takes on two cores when nothing is shared with another figure.
        values: in the order they are printed.
        measure: gives each value by its part.
    """

    name: str
    what: str
    minutes: float
    values: tuple[Value, ...]
    measure: Callable[[Runs], Mapping[str, float]]


def _housing_mape(runs: Runs) -> Mapping[str, float]:
    judged = judge(runs.fleet("housing"), HOUSING)
    errors = group_errors(judged, grain=1)
    fleet, pooled, last_value, seasonal_naive = (
        errors[f"{name} mape"].mean()
        for name in ("fleet", "pooled", "last value", "seasonal naive")
    )
    return {
        "fleet": fleet,
        "pooled": pooled,
        "fleet-over-pooled": fleet / pooled,
        "last-value": last_value,
        "seasonal-naive": seasonal_naive,
        "rows": len(judged),
    }


def _housing_cities_won(runs: Runs) -> Mapping[str, float]:
    errors = group_errors(judge(runs.fleet("housing"), HOUSING), grain=1)

    def won(rival: str) -> float:
        return float((errors[f"fleet on {rival} mape"] < errors[f"{rival} mape"]).sum())

    return {
        "won": won("seasonal naive"),
        "compared": float(errors["seasonal naive mape"].count()),
        "won-against-last-value": won("last value"),
        "won-against-pooled": float((errors["fleet mape"] < errors["pooled mape"]).sum()),
    }


def _flights_rmse(runs: Runs) -> Mapping[str, float]:
    judged = judge(runs.fleet("flights", AFTER_DECEMBER), FLIGHTS)
    errors = group_errors(judged, grain=0)
    fleet, pooled, departure_delay = (
        errors[f"{name} rmse"].item() for name in ("fleet", "pooled", "departure delay")
    )
    return {
        "fleet": fleet,
        "rows": len(judged),
        "departure-delay": departure_delay,
        "fleet-over-departure-delay": fleet / departure_delay,
        "pooled": pooled,
        "fleet-over-pooled": fleet / pooled,
    }


def _ledger_conserved(runs: Runs) -> Mapping[str, float]:
    return _conserved(
        {
            "housing": ledger_conservation(runs.fleet("housing"), HOUSING),
            "flights": ledger_conservation(runs.fleet("flights"), FLIGHTS),
        }
    )


def _predictions_conserved(runs: Runs) -> Mapping[str, float]:
    return _conserved(
        {
            "housing": predictions_conservation(runs.fleet("housing"), HOUSING),
            "flights": predictions_conservation(runs.fleet("flights"), FLIGHTS),
        }
    )


def _conserved(counts: Mapping[str, Conservation]) -> Mapping[str, float]:
    for fleet, count in counts.items():
        print(f"  {fleet}: {count.found:,} there, {count.wanted:,} wanted")
    return {fleet: count.ratio for fleet, count in counts.items()} | {
        f"{fleet}-unmatched": count.unmatched for fleet, count in counts.items()
    }


_CONSERVED = (
    Value("housing", "ratio", "==", 1),
    Value("housing-unmatched", "rows", "==", 0),
    Value("flights", "ratio", "==", 1),
    Value("flights-unmatched", "rows", "==", 0),
)

FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "setup-seconds",
            "`make setup` in a fresh copy of the repository, downloads included",
            1,
            (Value("", "s", "<=", 180),),
            lambda runs: {"": runs.set_up()},
        ),
        Figure(
            "run-housing-seconds",
            "`make run` after set-up, from raw tables to predictions",
            1,
            (Value("", "s", "<=", 90),),
            lambda runs: {"": runs.fleet("housing").seconds},
        ),
        Figure(
            "run-flights-seconds",
            "`make run FLEET=flights` after set-up",
            3,
            (Value("", "s", "<=", 240),),
            lambda runs: {"": runs.fleet("flights").seconds},
        ),
        Figure(
            "housing-mape",
            "mean over cities of the error of next month's price, last twelve months, beside its "
            "rivals",
            1,
            (
                Value("fleet", "%", "<=", 5.3),
                Value("pooled", "%"),
                Value("fleet-over-pooled", "ratio", "<=", 1),
                Value("last-value", "%"),
                Value("seasonal-naive", "%"),
                Value("rows", "rows", "==", 546),
            ),
            _housing_mape,
        ),
        Figure(
            "housing-cities-won",
            "cities where the fleet's error is below that of last year's price",
            1,
            (
                Value("won", "cities", ">=", 44),
                Value("compared", "cities"),
                Value("won-against-last-value", "cities"),
                Value("won-against-pooled", "cities"),
            ),
            _housing_cities_won,
        ),
        Figure(
            "flights-rmse",
            "error of the arrival delay over all flights of December, beside its rivals",
            3,
            (
                Value("fleet", "minutes", "<=", 16.85),
                Value("rows", "rows", "==", 27020),
                Value("departure-delay", "minutes"),
                Value("fleet-over-departure-delay", "ratio", "<", 1),
                Value("pooled", "minutes"),
                Value("fleet-over-pooled", "ratio", "<=", 1),
            ),
            _flights_rmse,
        ),
        Figure(
            "ledger-conserved",
            "ledger rows over groups known at the as-of, counted apart",
            4,
            _CONSERVED,
            _ledger_conserved,
        ),
        Figure(
            "predictions-conserved",
            "finite predictions over rows to score, counted apart",
            4,
            _CONSERVED,
            _predictions_conserved,
        ),
        Figure(
            "train-vs-recipe-flights",
            "flights by route, features ready: training wall of the usual recipe over ours with "
            "all grains, errors on the same flights",
            12,
            (
                Value("", "times", ">=", 3),
                Value("error-ratio", "ratio", "<=", 0.995),
                Value("our-seconds", "s"),
                Value("recipe-seconds", "s"),
                Value("our-error", "minutes"),
                Value("recipe-error", "minutes"),
            ),
            against_recipe_flights,
        ),
        Figure(
            "train-vs-recipe-1000",
            "1,000 generated groups of 500 rows in which tuning pays: training wall of the usual "
            "recipe over ours",
            25,
            (
                Value("gain", "ratio", ">=", 1.05),
                Value("grains", "times", ">=", 3.5),
                Value("grains-error-ratio", "ratio", "<=", 1.002),
                Value("independent", "times", ">=", 4.5),
                Value("independent-error-ratio", "ratio", "<=", 1.002),
                Value("grains-seconds", "s"),
                Value("independent-seconds", "s"),
                Value("recipe-seconds", "s"),
                Value("pooled-seconds", "s"),
                Value("grains-error", "rmse"),
                Value("independent-error", "rmse"),
                Value("recipe-error", "rmse"),
                Value("pooled-error", "rmse"),
            ),
            against_recipe_thousand,
        ),
        Figure(
            "busy-fraction",
            "the 1,000 groups: share of the slots' seconds inside train_group, and inside LightGBM",
            5,
            (
                Value("train-group", "ratio", ">=", 0.9),
                Value("lightgbm", "ratio", ">=", 0.7),
                Value("train-group-of-whole-run", "ratio"),
            ),
            busy_fraction,
        ),
        Figure(
            "train-vs-pool",
            "the 1,000 groups: our throughput over that of a joblib process pool with the same "
            "function",
            7,
            (
                Value("", "ratio", ">=", 0.9),
                Value("our-seconds", "s"),
                Value("pool-seconds", "s"),
                Value("our-whole-run-seconds", "s"),
            ),
            against_pool,
        ),
        Figure(
            "makespan-skew",
            "500 groups of Zipf sizes: wall of the waves over what no plan can beat",
            3,
            (
                Value("", "ratio", "<=", 1.15),
                Value("plan", "ratio"),
                Value("seconds", "s"),
                Value("longest-group", "s"),
                Value("total-over-slots", "s"),
            ),
            makespan_skew,
        ),
        Figure(
            "overhead-growth",
            "what one more tiny group costs, 1,000 to 10,000 groups",
            6,
            (
                Value("", "ms", "<=", 15),
                Value("ratio", "ratio", "<=", 1.3),
                Value("early", "ms"),
                *(Value(f"seconds-{size}", "s") for size in (100, 1000, 10_000)),
            ),
            overhead_growth,
        ),
        Figure(
            "driver-memory-10000",
            "peak resident memory of the driver at 10,000 groups",
            6,
            (Value("", "GB", "<=", 2), Value("python", "GB"), Value("jvm", "GB")),
            driver_memory,
        ),
        Figure(
            "tracking-requests",
            "requests to a real MLflow server per training run, at 10, 100 and 1,000 groups",
            3,
            (
                Value("spread", "requests", "==", 0),
                *(Value(f"groups-{size}", "requests") for size in (10, 100, 1000)),
            ),
            tracking_requests,
        ),
        Figure(
            "incremental-1pct",
            "late rows in 1 % of the 1,000 groups: seconds of training over the first run's",
            5,
            (
                Value("finest", "ratio", "<=", 0.03),
                Value("whole", "ratio", "<=", 0.15),
                Value("unchanged-identical", "ratio", "==", 1),
                Value("wall", "ratio"),
                Value("trained-again", "groups"),
            ),
            incremental,
        ),
        Figure(
            "blend-gain",
            "held-out RMSE of the blend over plain per-group models (rows that have one), and over "
            "the pooled model",
            4,
            (
                Value("housing-over-per-group", "ratio", "<=", 0.97),
                Value("housing-over-pooled", "ratio", "<=", 1),
                Value("flights-over-per-group", "ratio", "<=", 0.97),
                Value("flights-over-pooled", "ratio", "<=", 1),
            ),
            blend_gain,
        ),
        Figure(
            "open-cold",
            "opening a local version and answering one row, libraries imported, nothing read yet: "
            "10, 1,000, 10,000 groups; "
            "and 1,000 whose boosters are in an object store on this machine",
            5,
            (
                *(Value(f"groups-{size}", "s", "<=", 0.5) for size in (10, 1000, 10_000)),
                Value("ratio", "ratio"),
                Value("remote-1000", "s"),
            ),
            open_cold,
        ),
        Figure(
            "row-warm",
            "one row through pyfunc.predict, warm, three grains blended, median",
            2,
            (Value("", "ms", "<=", 4), Value("without-mlflow", "ms")),
            row_warm,
        ),
        Figure(
            "rest-latency",
            "one row over REST from `mlflow models serve`, and requests per second at 8 "
            "connections; the same of a model that does nothing",
            3,
            tuple(
                Value(f"{whose}{part}", unit)
                for whose in ("", "floor-")
                for part, unit in (
                    ("median", "ms"),
                    ("p99", "ms"),
                    ("requests-per-second", "per-second"),
                )
            ),
            rest_latency,
        ),
        Figure(
            "score-vs-recipe",
            "1,000 groups of 120 rows, then of 30 and 300: our scoring throughput over the usual "
            "recipe's, whose workers load models from MLflow",
            8,
            (
                Value("", "times", ">=", 20),
                Value("rows-30", "times"),
                Value("rows-300", "times"),
                Value("cached", "times"),
                Value("cold", "times"),
                Value("our-rows-per-second", "per-second"),
                Value("recipe-rows-per-second", "per-second"),
                Value("cached-rows-per-second", "per-second"),
            ),
            score_vs_recipe,
        ),
        Figure(
            "score-vs-spark-udf",
            "1,000 groups of 300 rows: our scoring throughput over that of mlflow.pyfunc.spark_udf "
            "with our registered model",
            3,
            (
                Value("", "ratio", ">=", 1),
                Value("our-rows-per-second", "per-second"),
                Value("udf-rows-per-second", "per-second"),
            ),
            score_vs_spark_udf,
        ),
        Figure(
            "score-vs-raw",
            "the same rows: our scoring throughput over that of plain LightGBM in memory, a "
            "process per core, models loaded",
            3,
            (
                Value("", "ratio", ">=", 0.6),
                Value("shuffled", "ratio"),
                Value("our-rows-per-second", "per-second"),
                Value("shuffled-rows-per-second", "per-second"),
                Value("raw-rows-per-second", "per-second"),
            ),
            score_vs_raw,
        ),
        Figure(
            "cache-memory",
            (
                "peak resident memory of a process that has answered for 10,000 "
                "groups, cache of 256 MB"
            ),
            6,
            (Value("", "MB", "<=", 700), Value("cached-text", "MB")),
            cache_memory,
        ),
        Figure(
            "pack-bytes",
            "bytes of a whole pack of 200 groups over those of the native texts",
            1,
            (
                Value("", "ratio", "<=", 0.33),
                Value("native-per-group", "bytes"),
                Value("stored-per-group", "bytes"),
            ),
            pack_bytes,
        ),
        Figure(
            "blend-safety",
            "19 generated fleets and real panels: what is served over its pooled model alone, and "
            "over models per group alone, own loss on later rows",
            6,
            (
                Value("worst", "ratio", "<=", 1.01),
                Value("mean.public", "ratio", "<=", 0.99),
                Value("mean.generated", "ratio"),
                Value("mean.panels", "ratio"),
                Value("own", "ratio", "<=", 1.01),
            ),
            blend_safety,
        ),
        Figure(
            "blend-truth",
            "19 generated fleets: what is served over the best weight per grain in hindsight, "
            "worst",
            6,
            (Value("", "ratio", "<=", 1.03),),
            blend_truth,
        ),
        Figure(
            "second-run-noise",
            "5 fleets of 30 groups of pure noise, second run refreshed: mean weight of own models; "
            "error over the pooled model's",
            3,
            (
                Value("", "weight", "<=", 0.02),
                Value("first-run", "weight"),
                Value("fleet-over-pooled", "ratio", "<=", 1.0005),
                Value("worst-fleet-over-pooled", "ratio"),
            ),
            second_run_noise,
        ),
        Figure(
            "false-promotions",
            "share of 200 groups that are moved to a recipe that differs and is not better, 20 "
            "fleets",
            9,
            (
                Value("", "share", "<=", 0.05),
                Value("groups", "groups"),
                Value("loss-ratio", "ratio"),
            ),
            false_promotions,
        ),
        Figure(
            "true-promotions",
            "share of groups with 1,000 report rows that are moved to a recipe whose error is a "
            "tenth lower",
            2,
            (
                Value("", "share", ">=", 0.9),
                Value("groups", "groups"),
                Value("error-cut", "ratio"),
                Value("report-rows", "rows"),
            ),
            true_promotions,
        ),
        Figure(
            "sql-escapes",
            "6,000 generated statements and 60 escapes made by hand: accepted although Spark's "
            "plan has more than the checked tree",
            2,
            (
                Value("", "statements", "==", 0),
                Value("generated-accepted", "statements"),
                Value("generated-refused", "statements"),
                Value("hand-made-accepted", "statements"),
                Value("hand-made-refused", "statements"),
            ),
            sql_escapes,
        ),
        Figure(
            "tampered-boosters",
            "2,500 damaged packs, and 2,500 damaged texts whose digests fit, each loaded in a "
            "child process",
            4,
            (
                Value("died", "processes", "==", 0),
                Value("hung", "processes", "==", 0),
                Value("raised-something-else", "processes", "==", 0),
                Value("other-answers", "packs", "==", 0),
                Value("refused", "packs"),
                Value("unharmed", "packs"),
                Value("texts-refused", "texts"),
                Value("texts-with-other-answers", "texts"),
            ),
            tampered,
        ),
        Figure(
            "interval-coverage",
            "share of actual targets within intervals that were made before, in the year (housing) "
            "or month (flights) after: distance to the level",
            4,
            (
                *(
                    Value(f"{fleet}.{100 * level:g}", "ratio", "<=", 0.03)
                    for fleet in CASES
                    for level in LEVELS
                ),
                *(
                    Value(f"{fleet}.{100 * level:g}-coverage", "ratio")
                    for fleet in CASES
                    for level in LEVELS
                ),
                *(Value(f"{fleet}.rows", "rows") for fleet in CASES),
            ),
            interval_coverage,
        ),
        Figure(
            "kills-survived",
            "driver and workers killed at random moments, and the driver at every crash point: "
            "finished by the same command, results identical",
            25,
            (
                Value("survived", "kills", "==", 25),
                Value("points", "points", "==", len(POINTS)),
                Value("seconds-per-trial", "s"),
            ),
            lambda runs: kills(runs.new_folder()),
        ),
        Figure(
            "kill-first-run",
            "first run whose seconds were guessed 10 times too low, killed 10 times: work lost, in "
            "checkpoint_seconds per slot",
            6,
            (Value("worst", "checkpoints", "<=", 2), Value("mean", "checkpoints")),
            lambda runs: first_run_kills(runs.new_folder()),
        ),
        Figure(
            "automation",
            "schedules and sensors of the examples; ticks of a real daemon that launched the right "
            "assets; seconds until a killed run is failed",
            5,
            (
                Value("listed", "schedules and sensors", ">=", 4),
                Value("right", "of 3 ticks", "==", 3),
                Value("dead-run-seconds", "s", "<=", 60),
                Value("resumed", "of 1 dead run", "==", 1),
            ),
            lambda runs: automation_figures(runs.new_folder()),
        ),
        Figure(
            "compose",
            "services of docker-compose.yml, started natively from what it says, that are healthy; "
            "fleets materialised through all of them",
            4,
            (
                Value("services", "services", "==", 9),
                Value("of", "services"),
                Value("materialised", "fleets", "==", 1),
            ),
            lambda _: compose(),
        ),
        Figure(
            "cluster-identical",
            "chain, score and stream on a standalone master with two worker processes that lack "
            "our code: what differs from one machine",
            3,
            (
                Value("boosters", "groups", "==", 0),
                Value("weights", "groups", "==", 0),
                Value("answers", "rows", "==", 0),
                Value("groups", "groups"),
                Value("rows", "rows"),
            ),
            lambda runs: cluster_identical(runs.new_folder()),
        ),
        Figure(
            "stream-kills",
            "300 random actions (add, start, stop, kill -9, champion change, check) against "
            "streams that score: every row answered exactly once",
            10,
            (
                Value("lost", "rows", "==", 0),
                Value("doubled", "rows", "==", 0),
                Value("wrong", "rows", "==", 0),
                Value("actions", "actions"),
                Value("kills", "kills"),
                Value("restarts", "starts"),
                Value("champion-changes", "changes"),
                Value("rows", "rows"),
            ),
            lambda runs: stream_kills(runs.new_folder()),
        ),
        Figure(
            "message-lines",
            "32 mistakes of users through the real commands: longest message on the terminal, "
            "share that name file or column and the next step",
            8,
            (
                Value("", "lines", "<=", 12),
                Value("named", "share", "==", 1),
                Value("mistakes", "mistakes", "==", 32),
            ),
            lambda runs: message_lines(runs.new_folder()),
        ),
        Figure(
            "first-run-answers",
            "40 generated fleets of 20 to 400 groups (counts, heavy tails, zeros, offsets, l1, "
            "quantile, huber, classes), first launch: share that "
            "end green with every row answered",
            12,
            (
                Value("", "share", "==", 1),
                Value("fleets", "fleets", "==", 40),
                Value("groups", "groups"),
                Value("seconds-per-fleet", "s"),
            ),
            first_run_answers,
        ),
        Figure(
            "poison",
            "nine bad groups in a fleet of 200: every other one trained, each bad one with its own "
            "status and reason",
            2,
            (
                Value("trained", "groups", "==", 192),
                Value("right-status", "groups", "==", 8),
                Value("odd-key-trained", "groups", "==", 1),
                Value("pooled-trained", "groups", "==", 1),
                Value("violations", "invariants", "==", 0),
                Value("groups", "groups"),
                Value("seconds", "s"),
            ),
            lambda runs: poison(runs.new_folder()),
        ),
        Figure(
            "shape",
            "code under pipeline/, assets/ and resources/: long lines, density, long and wide "
            "functions, imports of a higher room",
            0.1,
            (
                Value("over-100", "%", "<=", 1),
                Value("comprehensions", "per-1000-lines", "<=", 25),
                Value("conditionals", "per-1000-lines", "<=", 14),
                Value("functions-over-60", "functions", "==", 0),
                Value("parameters-over-6", "functions", "<=", 6),
                Value("upward", "imports", "==", 0),
            ),
            lambda _: measure_shape(PROJECT),
        ),
    )
}
