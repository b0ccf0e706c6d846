"""Names of files from elsewhere, and where links lead."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from surgery.errors import CheckpointError, SurgeryError

# The Hugging Face cache: <kind>--<owner>--<name>/snapshots/<commit>/<file> is a link to
# <kind>--<owner>--<name>/blobs/<hash>.
_REPOSITORY = ("models--", "datasets--", "spaces--")
_SNAPSHOTS = "snapshots"
_BLOBS = "blobs"
_MAX_NAME = 255
_SHOWN = 120


def plain_name(
    name: object, where: str, *, suffix: str = "", error: type[SurgeryError] = CheckpointError
) -> str:
    """The name of a file right inside a folder, as a document gives it.

    Args:
        name: What the document says.
        where: What says it, for the message.
        suffix: How the name must end.
        error: What is raised.

    Raises:
        SurgeryError: of the kind ``error``; it is no text, is a path (absolute, upwards, into
            another folder, with a drive; by the rules of any system), has characters that no file
            name has, or another suffix.
    """
    if not isinstance(name, str):
        raise error(f"{where} gives {short(repr(name))} as a file name")
    # By the rules of every system: what is checked here may be used there.
    if name in ("", ".", "..") or any(character in "/\\:" for character in name):
        raise error(
            f"{where} gives the path {short(repr(name))}, which lies outside the folder",
            hint="only names of files right beside it are followed; do not use these files unless "
            "you know who made them",
        )
    if not name.isprintable() or len(name.encode()) > _MAX_NAME:
        raise error(f"{where} gives {short(repr(name))} as a file name")
    if not name.endswith(suffix):
        raise error(f"{where} gives {short(repr(name))}, expected a {suffix} file")
    return name


def checked_file(path: Path, *, error: type[SurgeryError] = CheckpointError) -> os.stat_result:
    """What the system says about a regular file; links are followed.

    Raises:
        SurgeryError: of the kind ``error``; there is none, or it is a folder, a pipe, a device,
            or a link that leads nowhere.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        reason = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
        raise error(f"{path} {reason}") from None
    except OSError as failed:
        raise error(f"{path} cannot be read: {failed.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, device or socket"
        raise error(f"{path} is a {kind}, expected a file")
    return found


def check_inside(path: Path, folder: Path, *, error: type[SurgeryError] = CheckpointError) -> None:
    """Refuse a file of a folder that is a link to somewhere outside of it.

    The links of the Hugging Face cache, from ``snapshots/<commit>/`` to the ``blobs/`` of the same
    repository, are what that cache consists of, and are followed.

    Args:
        path: A path right inside the folder or in a folder below; it may not exist.
        folder: The folder; that itself may be reached through a link.
        error: What is raised.

    Raises:
        SurgeryError: of the kind ``error``; it leads out, or in a circle.
    """
    try:
        root, real = folder.resolve(), path.resolve(strict=path.is_symlink())
    except (OSError, RuntimeError) as failed:
        raise error(f"{path} is a link that cannot be followed: {failed}") from None
    if real.is_relative_to(root) or real.parent == _blobs(root):
        return
    raise error(
        f"{path} is a link to {real}, outside of its folder",
        hint="copy the folder with what its links point to (cp -rL), if you trust them",
    )


def _blobs(folder: Path) -> Path | None:
    """Where the links of a snapshot in the Hugging Face cache lead; None for any other folder."""
    for snapshots in folder.parents:
        if snapshots.name == _SNAPSHOTS and snapshots.parent.name.startswith(_REPOSITORY):
            return snapshots.parent / _BLOBS
    return None


def short(text: str) -> str:
    """A piece of text for a message, cut where it gets long."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
