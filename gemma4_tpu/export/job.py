"""Exports one run: checks, writes next to the target, compares, publishes."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gemma4_tpu
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.companions import companions, write_config
from gemma4_tpu.export.hub import push_to_hub
from gemma4_tpu.export.merge import Delta, Merger
from gemma4_tpu.export.peft import adapter_bytes, check_peft, write_peft
from gemma4_tpu.export.place import Place, Unfinished, stamp, total_bytes
from gemma4_tpu.export.probe_prompts import write_probes
from gemma4_tpu.export.quantise import Quantiser, parts_of
from gemma4_tpu.export.schemes import SCHEMES
from gemma4_tpu.export.trained import Trained, open_trained
from gemma4_tpu.export.verify import fits_in_memory, refusal, verify
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.storage import join
from gemma4_tpu.tracking.records import PARITY, QUANTISED, write_record
from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)

MERGED, ADAPTER = "merged", "adapter"
KINDS = {
    "merged": (MERGED,),
    "peft": (ADAPTER,),
    "both": (MERGED, ADAPTER),
    **{name: (MERGED, name) for name in SCHEMES},
}
"""`export.format` → the folders that it writes; a quantised model is made from the merged one."""
Shown = Callable[[Sequence[Delta], RunFolder, str], Path]
"""Renders the deltas of a merge into the record, under a title; returns the page's path."""


@dataclass(frozen=True)
class ExportJob:
    """An export that has passed every check possible without writing."""

    trained: Trained
    export: ExportConfig
    places: dict[str, Place]
    """By the folder names in `KINDS`."""

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Locks the staging folders; raises `UserError` if there is too little space or another process is using them.

        A refusal removes them; after a full disk or a crash, the same export resumes from them.
        """
        try:
            needed_bytes = 0
            for kind, place in self.places.items():
                needed_bytes += 0 if place.published else _bytes(self.trained, kind, self.export)
                place.open(_identity(self.trained, kind, self.export), needed_bytes)
            try:
                yield
            except Unfinished:
                raise
            except UserError:
                for place in self.places.values():
                    place.discard()
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                targets = ", ".join(place.target for place in self.places.values())
                raise Unfinished(
                    f"target={targets}: the disk is full; free some space, and the same command resumes"
                ) from None
        finally:
            for place in self.places.values():
                place.close()

    def run(self, record: RunFolder, show: Shown) -> dict[str, Any]:
        """Exports into the staging folders, compares, publishes; returns the contents of `result.json`.

        `show` receives the deltas before the comparison.

        Raises:
          UserError: a comparison failed, or values are not finite; then nothing is published.
        """
        started = time.perf_counter()
        trained, result = self.trained, self._about()
        log.info("update %d of %s on %s", trained.state.update, trained.run.path, trained.base.folder)
        if place := self.places.get(MERGED):
            result |= _write_merged(trained, place, self.export.verify, record, show)
        if (place := self.places.get(ADAPTER)) and not place.published:
            write_probes(trained, place, result.get("parity"))
            write_peft(trained, place, self.export.peft_experts)  # its configuration, needed to load, is last
        result["targets"] = {kind: place.publish() for kind, place in self.places.items() if kind not in SCHEMES}
        for kind in SCHEMES.keys() & self.places.keys():
            place = self.places[kind]
            result["quantised"] = _write_quantised(trained, kind, place, result["targets"][MERGED], self.export, record)
            result["targets"][kind] = place.publish()
        for kind, target in result["targets"].items():
            log.info("%s: %s", kind, target)
        if self.export.push_to_hub:
            *_, target = result["targets"].values()  # the quantised one, if there is one
            result["hub"] = push_to_hub(target, self.export.push_to_hub)
        return result | {"seconds": time.perf_counter() - started}

    def _about(self) -> dict[str, Any]:
        trained = self.trained
        return {
            "status": "finished",
            "run": str(trained.run.path),
            "update": trained.state.update,
            "base": trained.base.folder,
            "base_fingerprint": trained.base.fingerprint,
            "made_by": gemma4_tpu.__version__,
        }


def prepare(run: Path | str, export: ExportConfig, *, several: bool) -> ExportJob:
    """Opens a run and checks it, its base and the targets; writes nothing.

    Raises:
      UserError: something does not fit together, or a target exists.
    """
    trained = open_trained(run, export)
    if ADAPTER in KINDS[export.format]:
        check_peft(trained, export.peft_experts)
    if export.prompts is not None:
        from gemma4_tpu.export.logits import prompts_of

        prompts_of(trained, export.prompts)
    places = {kind: Place(target) for kind, target in _targets(run, export, several).items()}
    for kind, place in places.items():
        place.check(_identity(trained, kind, export), export.overwrite, _made_from(trained, export))
    return ExportJob(trained, export, places)


def _targets(run: Path | str, export: ExportConfig, several: bool) -> dict[str, str]:
    kinds = KINDS[export.format]
    if export.target is None:
        place = run if isinstance(run, str) else str(run.absolute())  # a str: on gs://
        return {kind: join(place, kind) for kind in kinds}
    folder = join(export.target, Path(run).name) if several else export.target
    return {kind: join(folder, kind) if len(kinds) > 1 else folder for kind in kinds}


def _write_merged(trained: Trained, place: Place, mode: str, record: RunFolder, show: Shown) -> dict[str, Any]:
    """Merges into the staging folder and compares: everything except the rename."""
    deltas = Merger(trained).run(place)
    shown = show(deltas, record, f"{trained.run.path.name}, update {trained.state.update}")
    log.info("delta norms: %s", shown)
    report: dict[str, Any] | None = None
    if mode != "false":
        report = verify(trained, Checkpoint(place.target if place.published else place.staging), mode)
        write_record(record.path / "parity.json", PARITY, report)
        if not report["passed"]:
            raise refusal(report, str(record.path / "parity.json"))
        log.info("parity: %s", _told(report))
    write_probes(trained, place, report)
    if place.done("config.json") is None:  # nothing loads without it
        write_config(companions(trained)[0]["config.json"], place)
    return {"parity": report, "changed_weights": len(deltas)}


def _write_quantised(
    trained: Trained, kind: str, place: Place, merged_folder: str, export: ExportConfig, record: RunFolder
) -> dict[str, Any]:
    """Quantises the merged model into the staging folder and compares: everything except the rename."""
    from gemma4_tpu.export.quantised_parity import about_errors, compare_quantised, dequantised, within_half_a_step

    merged, arch = Checkpoint(merged_folder), trained.base.arch
    writer = Quantiser(merged, arch, trained.prefix, SCHEMES[kind])
    found = about_errors(kind, writer.run(place))
    folder = place.target if place.published else place.staging
    written = dequantised(folder, merged, arch, trained.prefix, SCHEMES[kind])
    if export.verify != "false":
        off = within_half_a_step(written, merged, parts_of(arch, trained.prefix), SCHEMES[kind])
        if off is not None:
            raise UserError(f"{off}: {place.target} reads back differently from what was written; check the disk")
        found = replace(found, passed=True)
    if export.verify == "true" and fits_in_memory(trained):
        from gemma4_tpu.export.logits import prompts_of

        found = replace(found, logits=compare_quantised(written, merged, arch, *prompts_of(trained, export.prompts)))
    elif export.verify == "true":
        log.info("the model does not fit into memory: compared weights, but not log-probabilities")
    write_record(record.path / "quantised.json", QUANTISED, found)
    log.info("%s: %s", kind, found.told)
    if place.done("config.json") is None:
        writer.write_config(place)
    return asdict(found)


def _told(report: dict[str, Any]) -> str:
    weights, logits = report["weights"], report["logits"]
    lines = [f"{weights['weights']} weights within {weights['worst']:.2f} of what rounding explains"]
    if logits:
        lines.append(
            f"logits off by {logits['merged_to_lora']:.1e} ({logits['rounded_to_lora']:.1e} is rounding to"
            f" {logits['dtype']}; the effect of training is {logits['base_to_lora']:.1e}), same most likely token at"
            f" {logits['top1_agreement']:.1%} of positions"
        )
    return "; ".join(lines)


def _made_from(trained: Trained, export: ExportConfig) -> list[str]:
    """What an export reads."""
    places = [trained.run.address, trained.base.folder, trained.base.tokenizer_folder, export.prompts]
    return [str(place) for place in places if place is not None]


def _identity(trained: Trained, kind: str, export: ExportConfig) -> dict[str, Any]:
    """The identity of an export: two exports with the same identity write the same bytes."""
    return {
        "kind": kind,
        "state": trained.state.identity,
        "update": trained.state.update,
        "base": trained.base.fingerprint,
        "lora": asdict(trained.lora),
        **_written(trained, kind, export),
        "version": gemma4_tpu.__version__,
    }


def _written(trained: Trained, kind: str, export: ExportConfig) -> dict[str, Any]:
    """What else the bytes depend on: the files copied, or what the adapter's configuration says."""
    if kind == ADAPTER:
        return {"peft_experts": export.peft_experts, "base_folder": trained.base.folder}
    return {"copied": {name: stamp(path) for name, path in companions(trained)[0].items()}}


def _bytes(trained: Trained, kind: str, export: ExportConfig) -> int:
    """Bytes that an export takes on disk."""
    if kind == ADAPTER:
        return adapter_bytes(trained, export.peft_experts)
    others = total_bytes(companions(trained)[0].values())
    if kind in SCHEMES:  # the base has the merged model's shapes
        return Quantiser(trained.checkpoint, trained.base.arch, trained.prefix, SCHEMES[kind]).needed_bytes + others
    return sum(file.size_bytes for file in trained.checkpoint.files.values()) + others


def prepare_all(runs: tuple[Path | str, ...], export: ExportConfig) -> list[ExportJob]:
    """`prepare` for each run of a sweep: all problems in one message, before anything is written."""
    jobs, problems = [], []
    for run in runs:
        try:
            jobs.append(prepare(run, export, several=len(runs) > 1))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return jobs
