"""FLOPs per update and dollars per second, for utilisation and cost in a run's metrics."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from gemma4_tpu.hardware import chip_of
from gemma4_tpu.models.flops import train_flops_per_token
from gemma4_tpu.prices import price_of, usd
from gemma4_tpu.training.recipe import Recipe


class Rates(NamedTuple):
    """Converts tokens and seconds to utilisation and cost; None where the chip or the price is unknown."""

    flops_per_token: float
    peak_flops_per_second: float | None
    """Over all devices."""
    usd_per_hour: float | None

    @staticmethod
    def of(recipe: Recipe, segment_tokens: float, mesh: Mesh) -> Rates:
        """As far as the mesh's chip and the machine's price are known; `segment_tokens` is a mean."""
        device = mesh.devices.flat[0]
        chip, price = chip_of(device.platform, device.device_kind), price_of(recipe.hardware)
        return Rates(
            flops_per_token=train_flops_per_token(
                recipe.arch, recipe.lora, segment_tokens, bool(recipe.new_tokens), recipe.beside
            ),
            peak_flops_per_second=chip.device.peak_flops_per_second * mesh.size if chip else None,
            usd_per_hour=price.usd_per_hour if price else None,
        )

    def mfu(self, real_tokens_per_second: float | None) -> float | None:
        """Model FLOP/s utilisation at this rate, over all devices."""
        if self.peak_flops_per_second is None or real_tokens_per_second is None:
            return None
        return real_tokens_per_second * self.flops_per_token / self.peak_flops_per_second

    def usd(self, seconds: float) -> float | None:
        """Cost of the machine for this long."""
        return usd(seconds, self.usd_per_hour)
