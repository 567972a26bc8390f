"""A tuning of a job on this machine's device: reads the sample, loads the model, measures."""

from __future__ import annotations

from dataclasses import dataclass

from gc2ray.core.config.compression import METHODS
from gc2ray.core.config.job import Job
from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Request
from gc2ray.data.dataset import Source
from gc2ray.engine.engine import Engine, load_model
from gc2ray.estimate.hardware import Prices
from gc2ray.estimate.input_profile import HOST_BYTES, spread
from gc2ray.estimate.recommendation import CompressionSetting, Target, TuneQuestion, Tuning, judge
from gc2ray.estimate.trials import RETENTIONS, measure, references_of

DEFAULT_AGREEMENT = 0.95


@dataclass(frozen=True)
class TuneRequest:
    """What a person wants to know.

    Attributes:
        rows: Of the sample.
        methods: None: the recipe's.
        retentions: None: `RETENTIONS`.
        target: Exactly one; none is an agreement of `DEFAULT_AGREEMENT`.
        reference: Column with right answers.
        prices: What device time costs.
    """

    rows: int
    methods: tuple[str, ...]
    retentions: tuple[float, ...]
    target: Target
    reference: str | None
    prices: Prices

    def checked_target(self) -> Target:
        """The target, if it makes sense.

        Raises:
            ConfigError: There are several, or accuracy without a reference.
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


def settings_of(job: Job, wish: TuneRequest) -> list[CompressionSetting]:
    """What is compared with no compression.

    Raises:
        ConfigError: No such method, or a retention out of range.
    """
    own = job.recipe.compression.method
    methods = wish.methods or (own if own != "none" else "globalcom2",)
    for method in methods:
        if method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ConfigError(f"--method: no method {method!r}; there are {known}")
    settings = []
    for method in methods:
        settable = METHODS[method].takes_retention
        for retention in (wish.retentions or RETENTIONS) if settable else (1.0,):
            if not 0 < retention <= 1:
                raise ConfigError(f"--retention: the fraction KEPT, in (0, 1]; got {retention:g}")
            settings.append(CompressionSetting(method, retention))
    return settings


def tuned(job: Job, wish: TuneRequest) -> Tuning:
    """Measure, and judge.

    Raises:
        ConfigError: Something that was asked for makes no sense, or model or input cannot be used.
    """
    target, settings = wish.checked_target(), settings_of(job, wish)
    keep = job.recipe.input.kept()
    if wish.reference is not None and wish.reference not in keep:
        raise ConfigError(f"--reference: recipe.input.keep does not name {wish.reference!r}")
    source = Source(job.recipe.input)
    files, _ = source.scan()
    requests: list[Request] = []
    try:
        for span in spread(files, wish.rows):
            requests += source.read(span, HOST_BYTES)
    except ShardError as error:
        raise ConfigError(f"recipe.input: {error}") from error
    own = job.recipe.compression
    policies = {setting.name: setting.config(own) for setting in settings}
    engine = Engine(load_model(job.recipe, job.cluster), job.recipe, job.cluster, policies=policies)
    price = wish.prices.per_hour(engine.device)
    if target.budget_usd is not None and price is None:
        raise ConfigError(f"--budget-usd: no price of {engine.device} is known; --usd-per-hour")
    trials = measure(engine, requests, settings)
    references = references_of(requests, wish.reference) if wish.reference else {}
    total = sum(file.rows for file in files)
    return judge(trials, TuneQuestion(target, references, usd_per_hour=price, total_rows=total))
