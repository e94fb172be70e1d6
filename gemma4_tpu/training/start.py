"""`lora.start`: the adapters that a new run starts from, from another run or from PEFT, instead of fresh ones.

The given adapters must be represented exactly, or the run is refused: every product scale · B @ A is preserved. A
smaller rank is filled up with fresh ranks, which add nothing at first. K and V share A here, so separate A matrices use
separate ranks. A scale that differs by a power of two goes into B. DoRA's magnitudes are kept; where there were none,
they start as the rows' lengths. What was given, where it went and what is fresh is logged and written to `start.json`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import in_full
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models.adapted import Adapted, scaled_by
from gemma4_tpu.models.adapter_files import CONFIG, MERGE_FIRST, Given, read_peft
from gemma4_tpu.models.layout import Layout, Leaf, build_tree, get
from gemma4_tpu.models.names import Tensor, adapted_tensors, some
from gemma4_tpu.models.weights import ROLES
from gemma4_tpu.storage import join, list_folder
from gemma4_tpu.tracking.records import START, read_record, write_record
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.start_in_full import StartInFull
from gemma4_tpu.training.start_of_run import read_run

log = logging.getLogger(__name__)

FILE = "start.json"
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Start:
    """Adapters to start from, checked against what this run trains."""

    source: str
    """A description: `update 40 of outputs/train/…`."""
    sha256: str
    """Identifies them."""
    base: str | None
    """Fingerprint of the base that they were trained on, if they are a run's."""
    lora: LoraConfig
    given: Mapping[str, Given]
    """By weight, those that add something."""
    whole: StartInFull
    idle: tuple[str, ...]
    """Weights whose B is zero and that this run does not adapt: omitted."""
    tensors: Mapping[str, Tensor]
    """The tensors that this run adapts, by Tunix name."""
    adapted: Mapping[str, Adapted]
    """How it adapts them."""

    @cached_property
    def fresh(self) -> list[str]:
        """Weights of this run for which nothing was given."""
        return sorted({name for t in self.tensors.values() for name in t.hf_names} - self.given.keys())

    def factors(self, tensor: Tensor) -> Factors:
        """(A, B) given for a tensor, with B scaled so that this run's scale gives the same product."""
        ours, found = self.adapted[tensor.name].scale, {}
        for name in tensor.hf_names:
            if name in self.given:
                a, b = self.given[name].read()
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise UserError(f"lora.start={self.lora.start}: {name} holds NaN or infinity; give another")
                found[name] = (a, b * np.float32(_ratio(self.given[name].scale, ours)))
        return found

    def place(self, initial: dict[str, Any], layout: Layout, mesh: Mesh, base: Any = None) -> dict[str, Any]:
        """The trained values on the mesh: given ones over the `initial` ones.

        DoRA's magnitudes that were not given start as the lengths of the rows of `base` with the given adapters.
        """
        places = adapters.shardings(layout, mesh)

        def arrays(adapter: adapters.Adapter) -> list[tuple[Any, jax.Array]]:
            values = [self._values(self.tensors[name]) for name in adapter.base.tunix_names]
            used = np.array([rank for _, _, rank in values], np.int32)
            a = _on_mesh(np.stack([a.reshape(adapter.a.shape) for a, _, _ in values]), adapter.a, places)
            b = _on_mesh(np.stack([b.reshape(adapter.b.shape) for _, b, _ in values]), adapter.b, places)
            a = jax.jit(_fill, out_shardings=get(places, adapter.a.path))(get(initial, adapter.a.path), a, used)
            found = [(adapter.a.path, a), (adapter.b.path, b)]
            if (magnitude := adapter.magnitude) is not None:
                given = _on_mesh(self._magnitudes(adapter).reshape(magnitude.array_shape), magnitude, places)
                begin = jax.jit(partial(_begin, adapter), out_shardings=get(places, magnitude.path))
                found.append((magnitude.path, begin(given, get(base, adapter.base.path), a, b)))
            return found

        pairs = (item for adapter in adapters.adapters(layout) for item in arrays(adapter))
        return build_tree(chain(pairs, self.whole.place(initial, layout, mesh)))

    def _magnitudes(self, adapter: adapters.Adapter) -> np.ndarray:
        """DoRA's magnitudes of a stack, [layers, pieces, out]; NaN where not given."""
        tensors = [self.tensors[name] for name in adapter.base.tunix_names]
        values = np.full((len(tensors), len(tensors[0].hf_names), tensors[0].hf_shape[0]), np.nan, np.float32)
        for of_layer, tensor in zip(values, tensors, strict=True):
            for i, name in enumerate(tensor.hf_names):
                if name in self.given and (magnitude := self.given[name].magnitude):
                    of_layer[i] = magnitude()
                    if not np.isfinite(of_layer[i]).all():
                        raise UserError(f"lora.start={self.lora.start}: {name} holds NaN or infinity; give another")
        return values

    def _values(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
        """A, B and the number of given ranks of A."""
        factors = self.factors(tensor)
        a, b = tensor.from_lora_factors(factors, self.adapted[tensor.name].rank)
        return a, b, tensor.lora_rank(factors) if factors else 0

    def tell(self, folder: RunFolder, base: str) -> None:
        """Logs what went where, and writes it to `start.json`; `base` is the fingerprint of this run's base."""
        log.info("lora.start: %s: loaded all %d adapted weights", self.source, len(self.given))
        if self.whole.given:
            log.info("lora.start: loaded %d weights trained in full", len(self.whole.given))
        if self.base not in (None, base):
            log.warning("lora.start: trained on another base (fingerprint %.12s, here %.12s)", self.base, base)
        if self.idle:
            log.info("lora.start: skipped %d weights whose B is zero: %s", len(self.idle), some(self.idle))
        if self.fresh:
            log.info(
                "lora.start: nothing given for %d weights, which start with B = 0: %s",
                len(self.fresh),
                some(self.fresh),
            )
        ours = {name: self.adapted[t.name].scale for t in self.tensors.values() for name in t.hf_names}
        scales = dict.fromkeys((given.scale, ours[name]) for name, given in self.given.items())
        if differing := [f"{there:g} there, {here:g} here" for there, here in scales if there != here]:
            log.info("lora.start: scale %s, by multiplying B", some(differing))
        if folder.write:
            record = {"source": self.source, "sha256": self.sha256, "base": self.base, "given": sorted(self.given)}
            ranks = dict(Counter(str(given.rank) for given in self.given.values()))
            left = {"ranks": ranks, "left_out": self.idle, "fresh": self.fresh, "in_full": sorted(self.whole.given)}
            write_record(folder.path / FILE, START, record | left)


def open_start(lora: LoraConfig, arch: Architecture, resume_from: int | None = None) -> Start | None:
    """Opens the adapters that `lora.start` names, reading as much as needed to know that they can be represented
    exactly.

    None: it names none, or the run resumes from a checkpoint, which holds more.

    Raises:
      UserError: there are no adapters, or this run cannot represent them; says which, and which settings would.
    """
    if lora.start is None:
        return None
    if resume_from is not None:
        log.info("lora.start is not read again: the checkpoint at update %d supersedes it", resume_from)
        return None
    present = list_folder(lora.start)
    if CONFIG in present:
        peft = read_peft(lora.start)
        source = f"PEFT adapter {lora.start}" + (f" (trained on {peft.base})" if peft.base else "")
        sha256, base, given, whole = peft.sha256, None, dict(peft.weights), peft.whole
    elif "config.yaml" in present:
        run = read_run(lora, arch)
        source, sha256, base, given, whole = run.source, run.sha256, run.base, dict(run.weights), run.whole
    else:
        found = f"it contains {some(present)}" if present else "no such folder, or an empty one"
        if below := [name for name in present if CONFIG in list_folder(join(lora.start, name))]:
            found = f"give one of the adapters below it: {some([join(lora.start, name) for name in below])}"
        raise UserError(
            f"lora.start={lora.start}: neither a run folder (config.yaml) nor a PEFT adapter ({CONFIG}): {found}"
        )
    layout = Layout.of(arch, lora)
    tensors = adapted_tensors(arch, layout.adapted)
    known = {name for t in tensors.values() for name in t.hf_names}
    idle = tuple(sorted(name for name in given.keys() - known if given[name].adds_nothing))
    taken = {name: one for name, one in given.items() if name not in idle}
    start = Start(source, sha256, base, lora, taken, StartInFull(lora, whole), idle, tensors, layout.adapted)
    if not start.given and not whole:
        raise UserError(f"lora.start={lora.start}: {source} adds nothing: B is zero everywhere")
    unfit = [*_unmatched(start, arch), *_lengths(start), *_shapes(start), *start.whole.problems(arch)]
    if problems := unfit or _unrepresentable(start, arch):
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"lora.start={lora.start}: this run can't start from {source}:{listed}")
    return start


def start_fingerprint(start: Start | None, folder: RunFolder, resume_from: int | None) -> dict[str, str]:
    """Fingerprint of the adapters that a run started from, for provenance; empty for fresh ones."""
    if start is not None:
        return {"start": start.sha256}
    if resume_from is None or not folder.provenance_path.exists():
        return {}
    recorded = read_record(folder.provenance_path).values.get("fingerprints") or {}
    return {"start": recorded["start"]} if "start" in recorded else {}


def _unmatched(start: Start, arch: Architecture) -> list[str]:
    """Given weights that this run does not adapt."""
    ours = {name for t in start.tensors.values() for name in t.hf_names}
    rest = sorted(start.given.keys() - ours)
    every = adapted_tensors(arch, Layout.of(arch, LoraConfig(targets=list(ROLES))).adapted)
    weights = {name: tensor.weight for tensor in every.values() for name in tensor.hf_names}
    full = [name for name in rest if name in weights and in_full.is_in_full(weights[name], start.lora)]
    untargeted, alien = [n for n in rest if n in weights and n not in full], [n for n in rest if n not in weights]
    lines = []
    if full:
        lines.append(
            f"lora.modules_to_train trains {len(full)} of its adapted weights in full ({some(full)}); leave them out of"
            " it, or merge first and give model.path=<merged folder>"
        )
    if untargeted:
        wanted = {*start.lora.targets, *(weights[name].role for name in untargeted)}
        layers = "" if start.lora.layers is None else f" lora.layers=[{','.join(start.lora.layers)}]"
        lines.append(
            f"lora.targets=[{','.join(start.lora.targets)}]{layers} leaves out {len(untargeted)} of its weights"
            f" ({some(untargeted)}); give lora.targets=[{','.join(role for role in ROLES if role in wanted)}]"
            f"{layers and ' lora.layers=null'}"
        )
    if alien:
        lines.append(
            f"{len(alien)} of its weights get no adapters on {arch.name} ({some(alien)}); use an adapter of"
            " the text model's attention, MLP and experts only, trained on this model"
        )
    return lines


def _lengths(start: Start) -> list[str]:
    """DoRA's magnitudes that this run could not hold."""
    dora = any(given.magnitude for given in start.given.values())
    return ["it also trained row lengths (DoRA); set lora.dora=true"] if dora and not start.lora.dora else []


def _shapes(start: Start) -> list[str]:
    found = {name: given.shape for name, given in start.given.items()}
    wrong = [
        f"{name} {list(found[name])} instead of {list(tensor.hf_shape)}"
        for tensor in start.tensors.values()
        for name in tensor.hf_names
        if found.get(name, tensor.hf_shape) != tensor.hf_shape
    ]
    return [f"{len(wrong)} of its weights have another shape: {some(wrong)}; it is another model's"] if wrong else []


def _unrepresentable(start: Start, arch: Architecture) -> list[str]:
    """Ranks and scales that could not be preserved exactly."""
    needed = {t.name: _rank_of(start, t) for t in start.tensors.values()}
    over, odd = _over(needed, start.adapted), _odd(start, start.adapted)
    if not over and not odd:
        return []
    experts = {name for name in needed if start.tensors[name].weight.each}
    lora = _fitting(start, needed, experts)
    fitting = f"lora.rank={lora.rank} lora.alpha={lora.alpha:.9g}"
    of_experts = [name for name in over if name in experts]
    if of_experts:
        fitting += f" lora.expert_rank={lora.expert_rank}"
    else:
        lora = replace(lora, expert_rank=start.lora.expert_rank)
    fitting += " without lora.ranks" if start.lora.ranks else ""
    with_it = Layout.of(arch, lora).adapted
    advice = MERGE_FIRST if _over(needed, with_it) or _odd(start, with_it) else f"give {fitting}"
    lines = []
    if of_experts:
        there = start.adapted[of_experts[0]].rank
        wanted = max(needed[name] for name in of_experts)
        lines.append(f"its experts need rank {wanted}, lora.expert_rank is {there}: {some(of_experts)}; {advice}")
    if over := [name for name in over if name not in experts]:
        shared = any(start.tensors[name].several for name in over)
        why = " (K and V share A here, its have one each, so their ranks add up)" if shared else ""
        rank = max(needed[name] for name in over)
        lines.append(f"it needs rank {rank}{why}, lora.rank is {start.lora.rank}: {some(over)}; {advice}")
    if odd:
        listed = "; ".join(f"its scale is {there:.9g}, here it is {here:.9g}" for there, here in odd)
        lines.append(f"{listed}: not a power of two apart, so that B would be rounded; {advice}")
    return lines


def _fitting(start: Start, needed: Mapping[str, int], experts: Collection[str]) -> LoraConfig:
    """This run's settings with ranks and alpha that fit the given adapters if these have a single scale."""
    lora = start.lora
    rank = max([lora.rank, *(ranks for name, ranks in needed.items() if name not in experts)])
    scale, _ = Counter(given.scale for given in start.given.values()).most_common(1)[0]
    alpha = float(f"{scale * scaled_by(rank, lora.rslora):.9g}")
    of_experts = max((needed[name] for name in experts), default=None)
    return replace(lora, rank=rank, alpha=alpha, expert_rank=of_experts, ranks={})


def _over(needed: Mapping[str, int], adapted: Mapping[str, Adapted]) -> list[str]:
    """The tensors that need a higher rank."""
    return [name for name, rank in needed.items() if rank > adapted[name].rank]


def _odd(start: Start, adapted: Mapping[str, Adapted]) -> list[tuple[float, float]]:
    """(given scale, this run's) of weights whose B would be rounded."""
    ours = {name: adapted[t.name].scale for t in start.tensors.values() for name in t.hf_names}
    pairs = sorted({(given.scale, ours[name]) for name, given in start.given.items()})
    return [(there, here) for there, here in pairs if _ratio(there, here) is None]


def _rank_of(start: Start, tensor: Tensor) -> int:
    """The rank that a tensor needs; values are read only if K and V could share A."""
    names = [name for name in tensor.hf_names if name in start.given]
    if len(names) < 2:
        return max((start.given[name].rank for name in names), default=0)
    return tensor.lora_rank({name: start.given[name].read() for name in names})


def _ratio(given: float, ours: float) -> float | None:
    """`given / ours` if it is a power of two in float32, which multiplies without rounding; else None."""
    power = 2.0 ** round(math.log2(given / ours))
    return power if np.float32(ours * power) == np.float32(given) else None


def _on_mesh(value: np.ndarray, leaf: Leaf, places: Any) -> jax.Array:
    return jax.make_array_from_callback(value.shape, get(places, leaf.path), lambda index: value[index])


def _fill(initial: jax.Array, given: jax.Array, used: jax.Array) -> jax.Array:
    """A `[L, …, r]`: the first `used` [L] ranks of each layer as given, the others as initialised."""
    ranks = used.reshape(-1, *[1] * (given.ndim - 1))
    return jnp.where(jnp.arange(given.shape[-1]) < ranks, given, initial)


def _begin(adapter: adapters.Adapter, given: jax.Array, base: Any, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """DoRA's magnitudes of a stack as given; where NaN, the rows' lengths."""
    return jnp.where(jnp.isnan(given), adapters.magnitudes(adapter, base, lora_a, lora_b), given)
