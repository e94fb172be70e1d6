"""Lists and deletes only what was launched here: resources with our name and our label."""

from __future__ import annotations

from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.launch import gcloud
from gemma4_tpu.launch.parcel import called
from gemma4_tpu.launch.record import PREFIX, saved
from gemma4_tpu.prices import ON_DEMAND, SPOT, price_in_zone, spoken

_PRICED = "ACTIVE"


def show(places: list[tuple[str, str]]) -> str:
    """A table of the slices and queued resources that were launched here, in these (project, zone)."""
    launches = saved()
    lines = []
    for project, zone in places:
        for resource in gcloud.queued(project, zone):
            if not gcloud.is_ours(resource):
                continue
            name, state = gcloud.name_of(resource), gcloud.state_of(resource)
            accelerator = gcloud.node_of(resource).get("acceleratorType", "?")
            kind = SPOT if "spot" in resource else ON_DEMAND
            money = _money(str(accelerator), kind, zone) if state == _PRICED else "costs nothing now"
            lines.append(f"{name}  {state}  {accelerator} {spoken(kind)}  {project} {zone}  {money}")
            if name in launches:
                lines.append(f"    run folder {launches[name].run_dir}")
    looked = ", ".join(f"{project} {zone}" for project, zone in places)
    return "\n".join(lines) if lines else f"nothing launched here is in {looked}"


def remove(name: str, project: str, zone: str, *, dry_run: bool) -> str:
    """Deletes one launch by its id; returns what was done.

    Raises:
      UserError: it is not ours, or Google refuses.
    """
    if not name.startswith(PREFIX):
        raise UserError(f"{name}: not launched here (ids begin with {PREFIX}); {called('tpu_vm')} list shows ours")
    command = gcloud.delete(name, project, zone)
    if dry_run:
        return f"gcloud {' '.join(command)}"
    resource = gcloud.describe(name, project, zone)
    if resource is None:
        return f"{name}: does not exist in {project} {zone} (any more), and costs nothing"
    if not gcloud.is_ours(resource):
        raise UserError(f"{name}: its label {gcloud.LABEL} is not ours; delete it with gcloud if you are sure")
    gcloud.gcloud(command)
    launched = saved().get(name)
    return f"{name}: deleted" + (
        f"; its run folder stays: {launched.run_dir}" if launched else "; its run folder stays"
    )


def places(project: str | None, zone: str | None) -> list[tuple[str, str]]:
    """Where to look: the given place, else all places to which this folder has launched something."""
    if project and zone:
        return [(project, zone)]
    known = sorted({(launched.project, launched.zone) for launched in saved().values()})
    found = [(p, z) for p, z in known if project in (None, p) and zone in (None, z)]
    if not found:
        raise UserError("nothing has been launched from this folder yet; give project=<project id> zone=<zone>")
    return found


def _money(accelerator: str, kind: str, zone: str) -> str:
    found = next((s for s in SLICES.values() if s.accelerator_type == accelerator), None)
    price = found and price_in_zone(found, kind, zone)
    if price:
        return f"${price.usd_per_hour:,.2f} per hour (estimated)"
    return "costs money; no price with a source is known"
