"""What a job will take and cost: hours from the model's arithmetic, dollars from AWS's price list.

Every figure says where it comes from; `instance_types.yaml` and `gpus` hold the tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config import TrainingConfig
from ..config_reader import load_config
from ..gpus import GPUS, Gpu, exchange_seconds, step_time

if TYPE_CHECKING:
    from .account import AwsAccount

TABLE = Path(__file__).with_name("instance_types.yaml")
REFERENCE = Path(__file__).parents[2] / "rnn_args_diphone_sagemaker.yaml"  # what was measured
START_HOURS = 0.1  # image download and start, billed
# Between machines the image has TCP alone, no EFA plugin: assumed at half the link, and at most
# half of one network card's 100 Gbit/s.
TCP_SHARE, TCP_MOST_GBIT = 0.5, 100
GAIN_WORTH_PAYING = 1.5  # times faster than a cheaper choice
SPOT_SHARE = 0.4  # of the on-demand price; AWS promises "up to 90 %" off, 60 % is common


@dataclass(frozen=True)
class InstanceType:
    """One row of the instance table; usd_per_hour None where it is not known."""

    gpu: str | None
    gpus: int
    ram_gib: float
    link_gbit: float
    usd_per_hour: float | None


@dataclass(frozen=True)
class Estimate:
    """Time and money of a whole job, as far as they are known.

    Attributes:
        seconds_per_step, measured: step time, None for types without a GPU in the table, and
            whether it was measured on that GPU.
        usd_per_hour, price_source: of one instance, and where the figure comes from.
    """

    instance_type: str
    instance_count: int
    steps: int
    seconds_per_step: float | None
    measured: bool
    usd_per_hour: float | None
    price_source: str

    @property
    def hours(self) -> float | None:
        """Wall-clock hours, start included."""
        seconds = self.seconds_per_step
        return None if seconds is None else self.steps * seconds / 3600 + START_HOURS

    @property
    def usd(self) -> float | None:
        """The whole job on demand."""
        if self.hours is None or self.usd_per_hour is None:
            return None
        return self.hours * self.usd_per_hour * self.instance_count

    def short(self) -> str:
        """Type, hours and, where it is known, the price."""
        price = "" if self.usd is None else f" and ${self.usd:.0f}"
        return f"{self.instance_count} x {self.instance_type}: {self.hours:.1f} h{price}"

    def lines(self) -> list[str]:
        """The estimate for people, one fact a line."""
        machines = f"{self.instance_count} x {self.instance_type}"
        if self.seconds_per_step is None:
            lines = [f"Time: not known for {self.instance_type} (no GPU in instance_types.yaml)"]
        else:
            how = "measured on this GPU" if self.measured else "estimated, measured on no GPU"
            lines = [
                f"Time: {self.hours:.1f} h = {self.steps:,} steps x {self.seconds_per_step:.3f} s "
                f"({how}) + start, on {machines}"
            ]
        if self.usd_per_hour is None:
            lines.append(f"Price: not known for {self.instance_type} ({self.price_source})")
        elif self.usd is None:
            lines.append(f"Price: ${self.usd_per_hour:.4g}/h ({self.price_source})")
        else:
            lines.append(
                f"Price: ${self.usd:.2f} on demand at ${self.usd_per_hour:.4g}/h "
                f"({self.price_source}); about ${self.usd * SPOT_SHARE:.2f} with --spot"
            )
        return lines


@cache
def instance_types() -> dict[str, InstanceType]:
    """The rows of `instance_types.yaml` by name."""
    return {name: InstanceType(**row) for name, row in _table()["types"].items()}


def prices() -> str:
    """Where the table's prices come from."""
    return f"table of {_table()['prices_collected']} for {_table()['prices_region']}, not verified"


@cache
def _table() -> dict[str, Any]:
    return dict(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def gpu_of(name: str) -> Gpu | None:
    """The GPU of an instance type; None for CPU types and unknown ones."""
    row = instance_types().get(name)
    return None if row is None or row.gpu is None else GPUS[row.gpu]


def tcp_bandwidth(name: str) -> float:
    """GB/s of an all-reduce between machines of that type, by TCP."""
    return TCP_SHARE * min(instance_types()[name].link_gbit, TCP_MOST_GBIT) / 8


def step_seconds(
    config: TrainingConfig, name: str, instances: int = 1
) -> tuple[float, bool] | None:
    """Seconds per step and whether they were measured; None for unknown or CPU types."""
    gpu = gpu_of(name)
    if gpu is None:
        return None
    row = instance_types()[name]
    gpus = row.gpus * instances
    seconds = step_time(config, gpu, config.dataset.batch_size / gpus).total
    if gpu.seconds_per_step is not None:
        # measured with the reference configuration; others scale as the model says
        seconds *= gpu.seconds_per_step / step_time(load_config(REFERENCE), gpu).total
    seconds += exchange_seconds(config, gpu, gpus, instances, tcp_bandwidth(name))
    return seconds, gpu.seconds_per_step is not None and gpus == 1


def estimate(
    config: TrainingConfig,
    name: str,
    instances: int = 1,
    account: AwsAccount | None = None,
) -> Estimate:
    """Hours and dollars of a job; asks the Price List API when an account is given."""
    seconds, measured = step_seconds(config, name, instances) or (None, False)
    price = hourly_price(name, account)
    return Estimate(name, instances, config.num_training_batches, seconds, measured, *price)


def cheaper_choice(config: TrainingConfig, name: str, instances: int = 1) -> str | None:
    """A sentence where fewer GPUs cost less and take hardly longer; by the table's prices."""
    asked, row = estimate(config, name, instances), instance_types().get(name)
    if row is None or asked.hours is None or row.gpus * instances == 1:
        return None
    fewer = [estimate(config, name)] if instances > 1 else []
    fewer += [
        estimate(config, other)
        for other, kind in instance_types().items()
        if kind.gpu == row.gpu and kind.gpus == 1
    ]
    for choice in sorted(fewer, key=lambda choice: choice.usd or float("inf")):
        assert choice.hours is not None  # it has the same GPU
        is_cheaper = choice.usd is not None and asked.usd is not None and choice.usd < asked.usd
        if choice.instance_type == name:  # whatever its price
            is_cheaper = choice.hours < asked.hours * instances
        if is_cheaper and choice.hours < GAIN_WORTH_PAYING * asked.hours:
            return (
                f"{row.gpus * instances} GPUs ({asked.short()}) gain little, because they exchange "
                f"gradients after every step: {choice.short()}; use --instance-type "
                f"{choice.instance_type} --instance-count 1."
            )
    return None


def hourly_price(name: str, account: AwsAccount | None = None) -> tuple[float | None, str]:
    """Dollars per hour of one training instance on demand, and where the figure comes from."""
    if account is not None:
        asked = _listed_price(name, account)
        if asked is not None:
            return asked, f"AWS Price List, {account.region}"
    row = instance_types().get(name)
    if row is None or row.usd_per_hour is None:
        return None, "not in the price table"
    return row.usd_per_hour, prices()


def _listed_price(name: str, account: AwsAccount) -> float | None:
    """The Price List API's answer; None when it may not be asked or knows no such product."""
    from .account import NO_ANSWER  # which needs botocore, and a trainer's report does not

    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value}
        for field, value in (("regionCode", account.region), ("instanceName", name))
    ]
    try:
        # the API has few endpoints; this one answers for every region
        answer = account.client("pricing", "us-east-1").get_products(
            ServiceCode="AmazonSageMaker", Filters=filters
        )
    except NO_ANSWER:
        return None
    for text in answer.get("PriceList", []):
        product = json.loads(text) if isinstance(text, str) else text
        usage = str(product["product"]["attributes"].get("usagetype", ""))
        if not usage.endswith(f"Train:{name}"):
            continue
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                price = float(dimension["pricePerUnit"].get("USD", 0))
                if price > 0:
                    return price
    return None
