"""Tunes a job on this machine's device: reads a sample, loads the model, measures, judges."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gc2ray.core.arguments import check_count
from gc2ray.core.config.compression import CUSTOM, METHODS
from gc2ray.core.config.job import Job
from gc2ray.core.errors import ConfigError
from gc2ray.engine.device import own_device_name
from gc2ray.engine.engine import Engine, load_recipe_model
from gc2ray.engine.sample import sample_requests
from gc2ray.estimation.hardware import Prices
from gc2ray.estimation.input_profile import sample_spans
from gc2ray.estimation.recommendation import Criteria, Target, Tuning, judge
from gc2ray.estimation.retentions import DEFAULT_METHOD, TUNED_RETENTIONS
from gc2ray.estimation.trials import CompressionSetting, measure, references_of

DEFAULT_AGREEMENT = 0.95

MIN_ROWS = 4


@dataclass(frozen=True)
class TuneRequest:
    """Options of a tuning.

    Attributes:
        rows: Size of the sample.
        methods: To compare; empty for the recipe's.
        retentions: To compare; empty for `TUNED_RETENTIONS`.
        target: With at most one field set; none stands for an agreement of `DEFAULT_AGREEMENT`.
        reference: Column with reference answers.
        prices: Prices of device time.

    Raises:
        ConfigError: Fewer rows than `MIN_ROWS`.
    """

    rows: int
    methods: tuple[str, ...]
    retentions: tuple[float, ...]
    target: Target
    reference: str | None
    prices: Prices

    def __post_init__(self) -> None:
        check_count("rows", self.rows, MIN_ROWS)

    def checked_target(self) -> Target:
        """The target, or the default one.

        Raises:
            ConfigError: Several are set, or accuracy without a reference.
        """
        target = self.target
        given = [target.min_agreement, target.min_accuracy, target.budget_usd]
        if sum(value is not None for value in given) > 1:
            raise ConfigError("give one of --min-agreement, --min-accuracy and --budget-usd")
        if target.min_accuracy is not None and self.reference is None:
            raise ConfigError("--min-accuracy needs --reference, the column with right answers")
        if all(value is None for value in given):
            return Target(min_agreement=DEFAULT_AGREEMENT)
        return target


def compared_settings(job: Job, request: TuneRequest) -> list[CompressionSetting]:
    """The settings that are compared with no compression.

    Raises:
        ConfigError: No such method, or a retention out of range.
    """
    own = job.recipe.compression.method
    methods = request.methods or (own if own != "none" else DEFAULT_METHOD,)
    for method in methods:
        if method not in {*METHODS, own}:
            names = ", ".join(sorted({*METHODS, own}))
            raise ConfigError(f"--method: no method {method!r}; there are {names}")
    settings = []
    for method in methods:
        settable = METHODS.get(method, CUSTOM).takes_retention
        for retention in (request.retentions or TUNED_RETENTIONS) if settable else (1.0,):
            if not 0 < retention <= 1:
                raise ConfigError(f"--retention: the fraction KEPT, in (0, 1]; got {retention:g}")
            settings.append(CompressionSetting(method, retention))
    return settings


def tune_run(job: Job, request: TuneRequest) -> Tuning:
    """Measure settings on a sample of a job's rows, and recommend one.

    Raises:
        ConfigError: The options contradict each other, or model or input cannot be used.
    """
    target, settings = request.checked_target(), compared_settings(job, request)
    if request.reference is not None and request.reference not in job.recipe.input.kept():
        raise ConfigError(f"--reference: recipe.input.keep does not name {request.reference!r}")
    device = own_device_name()
    price = request.prices.per_hour(device)
    if target.budget_usd is not None and price is None:
        raise ConfigError(
            f"--budget-usd: no price of {device} is known; use --usd-per-hour, or --hardware FILE "
            "with your own"
        )
    sample, total_rows = sample_requests(job.recipe.input, request.rows, sample_spans)
    own = job.recipe.compression
    policies = {setting.name: setting.config(own) for setting in settings}
    engine = Engine(
        load_recipe_model(job.recipe, job.cluster), job.recipe, job.cluster, policies=policies
    )
    trials = measure(engine, sample, settings)
    references = references_of(sample, request.reference) if request.reference else {}
    criteria = Criteria(target, references, usd_per_hour=price, total_rows=total_rows)
    return replace(judge(trials, criteria), no_cost=request.prices.missing([device]))
