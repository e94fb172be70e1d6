"""The sources for a slice: this checkout as it is, with its history, so that the slice can record provenance."""

from __future__ import annotations

import logging
import subprocess
import tarfile
from pathlib import Path

import gemma4_tpu
from gemma4_tpu.children import end_with_parent
from gemma4_tpu.errors import UserError

log = logging.getLogger(__name__)

ARCHIVE, BUNDLE = "source.tar.gz", "source.bundle"
_ABOVE = Path(gemma4_tpu.__file__).resolve().parent.parent
CHECKOUT = _ABOVE if (_ABOVE / "launch/install.sh").is_file() else None
"""The checkout that contains this package; None: it is installed from a wheel."""
_LOCAL = "conf/local/default.yaml"
_MAX_BYTES = 200 << 20


def called(name: str) -> str:
    """The command that runs this launcher here, for messages from which commands are copied."""
    return f"python -m launch.{name}" if CHECKOUT else f"gemma4-tpu launch {name}"


def pack(folder: Path, checkout: Path) -> list[Path]:
    """Writes `source.bundle` (the commits) and `source.tar.gz` (the files as they are, except what git ignores; plus
    `conf/local/default.yaml`, so that the slice composes the same configuration) into `folder`; returns their paths.

    Raises:
      UserError: not a git checkout, or one with large files that git does not ignore.
    """
    names = files(checkout)
    sizes = {name: (checkout / name).stat().st_size for name in names}
    if sum(sizes.values()) > _MAX_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"{checkout}: {sum(sizes.values()) / 1e6:,.0f} MB of files would be uploaded, of which {largest} is the"
            " largest; move it, add it to .gitignore, or give git=<URL>@<ref>"
        )
    changed = _git(checkout, "status", "--porcelain").splitlines()
    log.info(
        "sources: commit %s, %d uncommitted changes", _git(checkout, "rev-parse", "HEAD").strip()[:12], len(changed)
    )
    archive, bundle = folder / ARCHIVE, folder / BUNDLE
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.add(checkout / name, arcname=name, recursive=False)
    _git(checkout, "bundle", "create", "--quiet", str(bundle), "HEAD")
    return [archive, bundle]


def files(checkout: Path) -> list[str]:
    """The files to upload: all that git does not ignore, as they are."""
    listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    names = {name for name in [*listed, _LOCAL] if name and (checkout / name).is_file()}
    return sorted(names)


def _git(checkout: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(checkout), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=end_with_parent)
        return done.stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(
            f"{checkout}: launching uploads a git checkout of gemma4-tpu, but git says: {said[:200]}; clone the"
            " repository, or give git=<URL>@<ref>"
        ) from None
