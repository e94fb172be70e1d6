"""Dollars of a plan: kinds of capacity, and what preemptions add."""

import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.plan import PLAN
from gemma4_tpu.planning.money import chosen_usd, preemptions, usd_estimate

HOURS = {"low": 16.0, "mid": 12.0, "high": 8.0}
UPDATES = 1200
V5P8 = {"on_demand": 16.80, "spot": 3.122, "flex_start": 7.896}
"""USD per hour in us-central1."""


def planned(*words):
    loaded = load(["hardware=v5p8", "model=gemma4_31b", "lora.rank=64", "checkpoint.every=100", *words], PLAN)
    return loaded.root


def usd(config, hours=HOURS):
    return usd_estimate(config.hardware, config.plan, config.checkpoint, hours, UPDATES)


def test_each_kind_of_capacity_has_its_price():
    told = usd(planned())
    assert set(told) == set(V5P8)
    for kind in ("on_demand", "flex_start"):
        assert told[kind] == pytest.approx({key: hours * V5P8[kind] for key, hours in HOURS.items()})


def test_spot_pays_for_preemptions():
    config = planned()
    # 16 hours: two preemptions, each a restart of ten minutes and half of the 100 updates between two checkpoints
    expected = preemptions(config.plan, config.checkpoint, 16.0, UPDATES)
    assert expected == pytest.approx({"expected": 2.0, "hours_lost": 2 * (1 / 6 + 16 * 100 / 1200 / 2)})
    told = usd(config)["spot"]
    assert told["low"] == pytest.approx((16 + expected["hours_lost"]) * V5P8["spot"])
    rarely = planned("plan.hours_between_preemptions=1000", "plan.restart_minutes=0")
    assert usd(rarely)["spot"]["low"] < told["low"]


def test_flex_start_is_left_out_where_it_ends_too_early():
    assert set(usd(planned(), {**HOURS, "low": 169.0})) == {"on_demand", "spot"}


def test_a_configured_price_stands_alone():
    config = planned("hardware.usd_per_hour=2")
    told = usd(config)
    assert told == {"configured": {key: 2 * hours for key, hours in HOURS.items()}}
    assert chosen_usd(config.hardware, told) == told["configured"]


def test_the_configuration_chooses_kind_and_region():
    config = planned("hardware.spot=true", "hardware.region=europe-west4")
    told = usd(config)
    assert told["on_demand"]["mid"] == pytest.approx(12 * 17.01)
    assert chosen_usd(config.hardware, told) == told["spot"]
