"""Small files that travel with the package: the tiny base checkpoint and the `verilog_smoke` data."""

from pathlib import Path

from gemma4_tpu.errors import UserError

PREFIX = "embedded:"
ROOT = Path(__file__).parent


def resolve(path: str) -> str:
    """`embedded:NAME` → the path of that asset; any other path unchanged.

    Raises:
      UserError: no such asset; lists those there are.
    """
    if not path.startswith(PREFIX):
        return path
    asset = ROOT / path.removeprefix(PREFIX)
    if not asset.exists():
        known = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if not p.name.startswith("__"))
        raise UserError(f"{path}: no such embedded asset; there are: {', '.join(known)}")
    return str(asset)
