"""Proves, update by update, that the trained batch is what the policy sampled, and how far the update moved it.

`certificate.json` says whether the run's batches came from the policy that they trained, with the figures;
`certificate.jsonl` holds the rows that it summarises. A run whose certificate does not hold ends.

1. *Delivered*: the digest of the values used for sampling equals that of the values being trained.
2. *Same distribution*: the sampler's log-probabilities match the trainer's, on the same tokens.
3. *Really drawn from it*: over many tokens, −log p of the drawn tokens matches the entropy, up to chance. Samples drawn
   from a part of the distribution (top-p, another temperature) but reported with probabilities of the whole agree token
   by token, and fail here: z, the standardised sum of N differences with known variances, is far from 0.
4. *One denominator*: the step's loss is that of the batch, summed over all tokens and divided once. It is known in
   advance, because every ratio is 1 on-policy, or is scored token by token with a teacher. A mean of the microbatches'
   means would differ.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.rollouts.collecting import Collected, Group
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.rewarding import Rewarded
from gemma4_tpu.tracking.metrics import MetricsFile, read_metrics
from gemma4_tpu.tracking.records import CERTIFICATE, CERTIFICATE_FILE, write_record

log = logging.getLogger(__name__)

ROWS_FILE = "certificate.jsonl"
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean |Δ log p| in nats per token. In float32 the two differ by 1e-6 (measured on `tiny`); quoted from halo#11, in
bfloat16: 0.02 with the softcap, 0.5 to 1.2 without.
"""
ROUNDING = 1e-5
"""Of a loss, in nats: float32 sums of terms of about 1."""
MAX_Z = 6.0
"""In standard errors; chance alone exceeds this about once in 10⁹."""
ROUNDED_SURPRISE = 0.02
"""Share of the allowed mean difference by which rounding can bias the surprise per token. *Assumed*; without it, a bias
of 0.001 nats in bfloat16 would end an honest run after 4·10⁷ compared tokens.
"""
LEAST_TOKENS = 500
"""Minimal number of tokens before the sum of differences is close enough to normal to be judged."""


class NotOnPolicy(UserError):
    """The certificate does not hold."""


class Drifted(UserError):
    """An update moved the policy out of its bands."""


@dataclass(frozen=True)
class Agreement:
    """How well sampler and trainer agree on the same tokens."""

    tokens: int
    mean_difference: float
    """Mean of |Δ log p|, in nats per token."""
    max_difference: float
    surprise: float
    """Sum of −log p of the tokens minus the entropies where they were drawn, in nats."""
    variance: float
    """Variance of that sum, if the tokens were drawn from the distributions with these entropies."""

    @classmethod
    def of(
        cls, mask: np.ndarray, sampled: np.ndarray, trained: np.ndarray, entropy: np.ndarray, variance: np.ndarray
    ) -> Agreement:
        """Computes the agreement from arrays of one shape: target mask, log-probabilities of both, and mean and
        variance of −log p under the trainer.
        """
        gap = np.abs(sampled - trained)[mask].astype(np.float64)
        surprise = (-trained - entropy)[mask].sum(dtype=np.float64)
        total = variance[mask].sum(dtype=np.float64)
        return cls(int(mask.sum()), float(gap.mean()), float(gap.max()), float(surprise), float(total))


@dataclass(frozen=True)
class ExpectedLoss:
    """The loss that the step must report."""

    value: float
    per_nat: float
    """Tolerance per nat per token of difference between sampler and trainer."""


class Certificate:
    """Records how each update came about, and ends a run that is not on-policy or leaves its bands."""

    def __init__(self, run: OnPolicyRun, dtype: Any):
        """Opens the certificate of a policy computed in `dtype`; a resumed run keeps the rows up to that update."""
        self._hosts, self._config, rows = run.hosts, run.config, run.folder / ROWS_FILE
        self._path = run.folder / CERTIFICATE_FILE
        self._limit = run.config.max_logprob_difference or MAX_DIFFERENCE[np.dtype(dtype).name]
        self._rows = MetricsFile(rows, after_update=run.resume_from, write=run.hosts.first)
        self._known: list[dict[str, Any]] = run.hosts.from_first(lambda: read_metrics(rows))

    def is_due(self, update: int, trained: str) -> bool:
        """Whether to compare the roll-outs of `update`, drawn from the values with this digest: every `check_every`
        updates, and at the first update of the first two distinct values, because a sampler that never receives new
        values agrees until then.
        """
        compared = {row["adapter"] for row in self._known if "compared" in row}
        return update % self._config.check_every == 0 or (len(compared) < 2 and trained not in compared)

    def sampled(
        self, update: int, collected: Collected, live: int, trained: str, compared: Agreement | None, lag: int = 0
    ) -> None:  # fmt: skip
        """Records the roll-outs of an update, before it is made.

        Args:
          update: from 1.
          collected: its roll-outs.
          live: groups that had something to learn from.
          trained: digest of the trainer's values when they were drawn.
          compared: the agreement, if due.
          lag: updates made since they were drawn.

        Raises:
          NotOnPolicy: the roll-outs are not the policy's.
        """
        row = {
            **described(collected.groups), "live": live, "dead": len(collected.groups) - live,
            "delivered": collected.adapters == {trained}, "adapter": trained, **({"lag": lag} if lag else {}),
        }  # fmt: skip
        self._take(row | ({"compared": vars(compared)} if compared else {}), update)
        self._check_bands(update - lag, last_good=update - lag - 2)

    def trained(self, update: int, loss: float, expected: ExpectedLoss) -> None:
        """Records the step's loss on the batch.

        Raises:
          NotOnPolicy: it is not the loss of this batch.
        """
        allowed = self._limit * expected.per_nat + ROUNDING
        self._take({"loss": loss, "expected_loss": expected.value, "allowed_error": allowed}, update)

    def moved(self, update: int, kl: float) -> None:
        """Records how far `update` moved the policy, in nats per token.

        Raises:
          Drifted: too far.
        """
        self._take({"kl": kl}, update)
        limit = self._config.max_kl
        if limit is not None and kl > limit:
            said = f"moved the policy by {kl:.3g} nats per token, more than rollouts.max_kl={limit:g}"
            raise Drifted(_drifted(update, said, update - 1))

    def _check_bands(self, update: int, last_good: int) -> None:
        """Compares entropy and form of the current answers with those at the start."""
        config, first, now = self._config, *(self._known[i] for i in (0, -1))
        told = []
        share = now["entropy"] / first["entropy"] if first["entropy"] else 1.0
        low, high = config.entropy_low, config.entropy_high
        if (low is not None and share < low) or (high is not None and share > high):
            bands = f"rollouts.entropy_low={low}, rollouts.entropy_high={high}"
            told.append(f"entropy is {now['entropy']:.3g} nats per token, {share:.3g} times what it was ({bands})")
        rise = now.get("malformed", 0.0) - first.get("malformed", 0.0)
        if config.max_malformed is not None and rise > config.max_malformed:
            told.append(
                f"{now['malformed']:.0%} of the answers are malformed, {rise:.0%} more than at first"
                f" (rollouts.max_malformed={config.max_malformed:g})"
            )
        if told:
            raise Drifted(_drifted(update - 1, f"left the policy where {'; '.join(told)}", last_good))

    def _take(self, row: dict[str, Any], update: int) -> None:
        self._rows.log(row, update)
        self._known.append({"update": update, **row})
        summary = summed_up(self._known, self._limit)
        if self._hosts.first:
            write_record(self._path, CERTIFICATE, summary)
        if not summary["holds"]:
            raise NotOnPolicy(f"update {update}: {'; '.join(summary['broken'])}. The run is ended: {self._path}")

    def close(self) -> None:
        """Closes the rows."""
        self._rows.close()


def described(groups: Sequence[Group]) -> dict[str, Any]:
    """Figures of an update's roll-outs, over live and dead groups."""
    drawn = [one for group in groups for one in group.drawn]
    rewarded = [one for group in groups for one in group.rewarded]
    tokens = sum(len(one.tokens) for one in drawn)
    distinct = sum(len({one.tokens.tobytes() for one in group.drawn}) for group in groups)
    figures: dict[str, Any] = {
        "answers": len(drawn), "distinct": distinct, "truncated": sum(not one.stopped for one in drawn),
        "tokens": tokens, "mean_tokens": tokens / len(drawn),
        "entropy": -sum(float(one.logprobs.sum(dtype=np.float64)) for one in drawn) / tokens,  # −log p of its own draws
    }  # fmt: skip
    return figures | (_of_rewards(rewarded) if rewarded else {})


def _of_rewards(rewarded: Sequence[Rewarded]) -> dict[str, Any]:
    kinds: dict[str, list[float]] = {}
    for one in rewarded:
        count, total = kinds.get(one.kind, (0, 0.0))
        kinds[one.kind] = [count + 1, total + one.reward]
    return {
        "reward": float(np.mean([one.reward for one in rewarded])),
        "malformed": float(np.mean([not one.well_formed for one in rewarded])),
        "kinds": kinds,
    }


def summed_up(rows: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any]:
    """The contents of `certificate.json`, from the rows of all updates; `limit` applies to the mean |Δ log p|."""
    sampled = [row for row in rows if "answers" in row]
    compared = [row["compared"] | {"update": row["update"]} for row in sampled if "compared" in row]
    losses = [row for row in rows if "expected_loss" in row]
    moves = [row["kl"] for row in rows if "kl" in row]
    tokens, z = sum(one["tokens"] for one in compared), _surprise(compared)
    broken = [
        *_misdelivered(sampled),
        *_disagreeing(compared, limit),
        *_other_losses(losses),
        *_modified(compared, limit),
    ]
    kinds: Counter[str] = Counter()
    rewards: Counter[str] = Counter()
    for row in sampled:
        for kind, (count, total) in row.get("kinds", {}).items():
            kinds[kind] += count
            rewards[kind] += total
    return {
        "holds": not broken, "broken": broken, "updates": len(sampled),
        "compared": {
            "updates": [one["update"] for one in compared], "tokens": tokens, "limit": limit,
            "mean_difference": max((one["mean_difference"] for one in compared), default=None),
            "max_difference": max((one["max_difference"] for one in compared), default=None),
            "surprise_z": z, "surprise_limit": MAX_Z,
        },
        "max_loss_error": max((abs(row["loss"] - row["expected_loss"]) for row in losses), default=None),
        "adapters": len({row["adapter"] for row in sampled}),
        "max_lag": max(row.get("lag", 0) for row in sampled),
        "groups": {key: sum(row[key] for row in sampled) for key in ("live", "dead")},
        "answers": {key: sum(row[key] for row in sampled) for key in ("answers", "distinct", "truncated", "tokens")},
        "by_kind": {kind: {"answers": n, "mean_reward": rewards[kind] / n} for kind, n in kinds.most_common()},
        "kl": {"mean": float(np.mean(moves)) if moves else None, "max": max(moves, default=None)},
        **{when: _state(row) for when, row in zip(("first", "last"), (sampled[0], sampled[-1]), strict=True)},
    }  # fmt: skip


def _misdelivered(sampled: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"the samples were not drawn with the values being trained (update {row['update']})"
        for row in sampled
        if not row["delivered"]
    ]


def _disagreeing(compared: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    return [
        f"the sampler's log-probabilities are {one['mean_difference']:.3g} nats per token off the trainer's, more than"
        f" {limit:g} (update {one['update']})"
        for one in compared
        if not one["mean_difference"] <= limit
    ]


def _other_losses(losses: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"the step's loss is {row['loss']:.6g}, but that of its batch, summed over all tokens and divided once, is"
        f" {row['expected_loss']:.6g} (update {row['update']})"
        for row in losses
        if not abs(row["loss"] - row["expected_loss"]) <= row["allowed_error"]
    ]


def _modified(compared: Sequence[Mapping[str, Any]], limit: float) -> Iterator[str]:
    """All compared tokens together see the smallest faults; each update by itself, those that began late in a run."""
    alone = [([one], f" of update {one['update']}") for one in compared] if len(compared) > 1 else []
    for some, which in [(compared, ""), *alone]:
        tokens, z = sum(one["tokens"] for one in some), _surprise(some, ROUNDED_SURPRISE * limit)
        if tokens >= LEAST_TOKENS and not abs(z) <= MAX_Z:
            yield (
                f"the samples were not drawn from the reported distribution: {tokens} tokens{which} are"
                f" {'less' if z < 0 else 'more'} surprising than its entropy, by {abs(z):.1f} standard errors"
            )


def _surprise(compared: Sequence[Mapping[str, Any]], rounding: float = 0.0) -> float:
    """How many standard errors all compared tokens are more surprising than their distributions' entropies, beyond
    `rounding` nats per token.
    """
    variance, total = (sum(one[key] for one in compared) for key in ("variance", "surprise"))
    beyond = max(0.0, abs(total) - rounding * sum(one["tokens"] for one in compared))
    return math.copysign(beyond, total) / math.sqrt(variance) if variance else 0.0


def _state(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("update", "reward", "mean_tokens", "entropy", "malformed") if key in row}


def _drifted(update: int, said: str, last_good: int) -> str:
    kept = f"a checkpoint of update {last_good} or earlier, if one was saved," if last_good > 0 else "only the start"
    return (
        f"update {update} {said}; the run is ended, and {kept} is from before. Lower optimizer.learning_rate, or widen"
        " the band"
    )
