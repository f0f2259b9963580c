"""Records on disk that no call depends on: what cannot be trusted is as if absent, and what fails is told once.

A record is trusted where nobody else can have written it: a regular file in a folder, both this user's, and writable
by nobody else. It appears in one step, so that no reader sees half of one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import warnings
from pathlib import Path

from ..config import cache_dir

logger = logging.getLogger("swinaccel")

_PART = ".part"  # of a record that is being written
_told: set[str] = set()
_WARNED = "the cache is not usable"


def folder_of(kind: str) -> Path | None:
    """Return the folder of a kind of records, which need not exist; None, with a warning, where there can be none."""
    try:
        return cache_dir() / kind
    except ValueError as error:
        warn_once(str(error))
        return None


def read(path: Path, most: int) -> bytes | None:
    """Return a record's contents, of more bytes the first `most`, or None where it is absent or not to be trusted."""
    try:
        reason = _doubt(os.lstat(path.parent))
        if reason is not None:
            warn_once(_unusable(path.parent, reason))
            return None
        # Not followed, where it is a link, and not waited for, where it is a pipe.
        handle = os.open(path, os.O_RDONLY | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_BINARY"))
        try:
            reason = _doubt(os.fstat(handle), is_file=True)
            if reason is None:
                with open(handle, "rb", closefd=False) as file:
                    return file.read(most)
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror
    tell_once(f"the record {path} is not used: {reason}")
    return None


def write(path: Path, content: bytes) -> None:
    """Put a record, for this user alone, in the place of what was there, in one step; OSError where that cannot be."""
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    reason = _doubt(os.lstat(path.parent))
    if reason is not None:
        raise PermissionError(_unusable(path.parent, reason))
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_PART)  # of mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is in its place, or somebody tidied up
            os.unlink(temporary)


def check(folder: Path) -> None:
    """Raise a ValueError where no record can be put into a folder; what is to be kept may take long to make."""
    path = folder / f"check{_PART}"
    try:
        write(path, b"")
        path.unlink(missing_ok=True)
    except OSError as error:
        reason = f"nothing can be kept in {folder}: {error.strerror or error}"
        raise ValueError(f"{reason}; set SWINACCEL_CACHE_DIR to a folder that you can write to") from None


def keep(path: Path, content: bytes) -> None:
    """Put a record in its place as `write` does, with one warning where that cannot be."""
    try:
        write(path, content)
    except OSError as error:
        reason = f"nothing is kept in {path.parent}: {error.strerror}" if error.strerror else str(error)
        warn_once(reason)


def _unusable(folder: Path, reason: str) -> str:
    return f"the cache folder {folder} is not usable: {reason}"


def _doubt(info: os.stat_result, is_file: bool = False) -> str | None:
    """Return why a record or a folder may be another's work, else None."""
    if not (stat.S_ISREG if is_file else stat.S_ISDIR)(info.st_mode):
        return "it is a link" if stat.S_ISLNK(info.st_mode) else f"it is no {'file' if is_file else 'folder'}"
    if os.name != "posix":
        return None
    if info.st_uid != os.getuid():
        return "it belongs to another user"
    if info.st_mode & 0o022:
        return f"others can write to it (chmod {'600' if is_file else '700'} ends that)"
    return None


def tell_once(text: str) -> None:
    """Log, once in a process, that a record is of no use."""
    if text not in _told:
        _told.add(text)
        logger.warning("%s; results are right without it", text)


def warn_once(reason: str) -> None:
    """Warn, once in a process whatever the reasons, that the cache is not usable."""
    if _WARNED not in _told:
        _told.add(_WARNED)
        warnings.warn(
            f"swinaccel: {reason}. Results are right without a cache; to have one, set SWINACCEL_CACHE_DIR to a folder"
            " that you can write to.",
            stacklevel=2,
        )


def _flag(name: str) -> int:
    return getattr(os, name, 0)
