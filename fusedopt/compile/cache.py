"""The compile cache: one private folder per user that holds what the compilers made.

An entry is named by its content, `<name>_<first 20 hex digits of its key>`, and consists of

| file | holds |
|---|---|
| `.so` and the like | the binary |
| `.cpp` and the like | its source; kept when compiling fails, so that it can be looked at |
| `.json` | the sidecar: full key, sha256 of the binary, compiler, seconds, date, why it was built, what its code is |
| `.lock` | taken while the entry is built, so that processes starting together compile once |

What lies in this folder is loaded as code. So it must be a place that nobody else can write to; where it is
not, or where nothing can be written or executed, kernels go to a temporary folder for this process, with one
warning.

Sources that differ in their comments alone, as those of one rule under two names do, or of tensors of two sizes, are
entries of their own with the same binary: it is compiled for the first and copied for the others.

The lock only saves work. What keeps readers safe is that every file appears by an atomic rename: a library
that some process has loaded is never written to, and two builders of one entry cannot spoil each other's.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from .. import env

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KEY_DIGITS = 20
CODE_DIGITS = 12  # of those, where a key begins with what its code is
ROOM = 1 << 20  # bytes that a folder has to have left: a kernel and its source are up to a tenth of that
LOCK_SECONDS = 180.0  # longer than any compile: after that the holder is stopped, not busy
TEMPORARY = ".tmp-"
ENTRY_FILE = re.compile(rf"(?P<stem>[\w.-]+_[0-9a-f]{{{KEY_DIGITS}}})\.\w+")


class BuildError(RuntimeError):
    """A kernel could not be built. The message says why and what to do; callers may fall back on it."""


class CacheError(BuildError):
    """There is no folder that compiled code can be kept in."""


class CacheWarning(UserWarning):
    """The cache folder cannot be used, so this process compiles into a temporary one."""


class Problem(NamedTuple):
    """Why a folder cannot hold compiled code (reads after the folder's name), and what to do about it."""

    reason: str
    remedy: str


class Entry(NamedTuple):
    """One compiled kernel.

    path, source_path : the binary and its source
    built : compiled by this call, rather than found
    seconds : what this call took, compiling included
    reason : why it had to be compiled, "" when it was found
    log : what the compiler said, "" when it was found
    """

    path: Path
    source_path: Path
    built: bool
    seconds: float
    reason: str = ""
    log: str = ""


class Stored(NamedTuple):
    """One entry as it lies in the folder: files, their bytes, and the sidecar (empty if unreadable)."""

    stem: str
    files: tuple[Path, ...]
    size: int
    meta: dict[str, Any]


# ---------------------------------------------------------------- the folder

_opened: dict[Path, Path] = {}  # configured folder -> the one in use
_warned: set[Path] = set()


def configured() -> Path:
    """The folder the user wants: `FUSEDOPT_CACHE_DIR`, else the platform's cache folder.

    A user without a home, as in containers, has one where temporary files are.
    """
    wanted = env.cache_dir()
    if wanted is None:
        import platformdirs  # here, because most runs that name a folder never need it

        try:
            wanted = Path(platformdirs.user_cache_dir("fusedopt", appauthor=False))
        except (RuntimeError, KeyError):
            wanted = Path(tempfile.gettempdir(), f"fusedopt-of-{os.getuid()}")
    return wanted


def folder() -> Path:
    """The folder in use: the configured one, or this process's temporary one.

    Raises CacheError when there is neither.
    """
    wanted = configured()
    path = _opened.get(wanted)
    if path is None or not path.is_dir():  # removed while we ran, or by the parent of this forked process
        path = _opened[wanted] = _open(wanted)
    return path


def _open(wanted: Path) -> Path:
    problem = prepare(wanted)
    if problem is None:
        return Path(os.path.realpath(wanted))
    path = _temporary(f"{wanted} {problem.reason}", problem.remedy)
    if wanted not in _warned:
        _warned.add(wanted)
        text = (
            f"fusedopt's cache folder {wanted} {problem.reason}. This process compiles its kernels into a "
            f"temporary folder, and the next process again. Remedy: {problem.remedy}."
        )
        warnings.warn(text, CacheWarning, stacklevel=env.caller_level())
    return path


def _temporary(why: str, remedy: str) -> Path:
    """A fresh private folder that is removed when this process ends."""
    problems = [why]
    for base in dict.fromkeys((tempfile.gettempdir(), "/var/tmp", "/dev/shm")):
        try:
            path = Path(os.path.realpath(tempfile.mkdtemp(prefix="fusedopt-", dir=base)))
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
            continue
        problem = prepare(path)
        if problem is None:
            atexit.register(_remove, path, os.getpid())
            return path
        shutil.rmtree(path, ignore_errors=True)
        problems.append(f"{path} {problem.reason}")
    raise CacheError(f"no folder can hold compiled kernels: {'; '.join(problems)}. Remedy: {remedy}.")


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child runs our exit handlers too
        shutil.rmtree(path, ignore_errors=True)


def prepare(path: Path) -> Problem | None:
    """Create `path` (mode 0700) if need be, and say why it cannot hold compiled code; None when it can."""
    try:
        _make(path)
    except OSError as error:
        return Problem(f"cannot be created ({error.strerror})", _ELSEWHERE)
    # The resolved path is the one used from here on, so a link that somebody changes later changes nothing.
    real = Path(os.path.realpath(path))
    try:
        return _exposed(real) or _unusable(real)
    except OSError as error:
        return Problem(f"cannot be examined ({error.strerror})", _ELSEWHERE)


_ELSEWHERE = "set FUSEDOPT_CACHE_DIR to a folder that you own and can write to"


def _make(path: Path) -> None:
    for place in reversed((path, *path.parents)):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
    if not path.is_dir():
        raise NotADirectoryError(20, "it is a file")


def _exposed(path: Path) -> Problem | None:
    """Whether others could put code into `path`: by its own owner and mode, or by a parent's."""
    if not hasattr(os, "getuid"):  # Windows: the access list of the profile folder sees to it
        return None
    info = path.stat()
    if info.st_uid != os.getuid():
        return Problem(f"belongs to another user (uid {info.st_uid})", _ELSEWHERE)
    if info.st_mode & 0o022:
        remedy = f"run `chmod 700 {path}`, or set FUSEDOPT_CACHE_DIR to another folder"
        return Problem(f"can be written by other users (mode {stat.S_IMODE(info.st_mode):04o})", remedy)
    for parent in path.parents:
        info = parent.stat()
        if info.st_uid not in (0, os.getuid()):
            return Problem(f"lies in {parent}, which belongs to another user (uid {info.st_uid})", _ELSEWHERE)
        if _replaceable(info):
            mode = stat.S_IMODE(info.st_mode)
            return Problem(f"lies in {parent}, which other users can write to (mode {mode:04o})", _ELSEWHERE)
    return None


def _replaceable(info: os.stat_result) -> bool:
    """Whether others could exchange what lies in a parent folder; the sticky bit (as on /tmp) forbids it."""
    if info.st_mode & stat.S_ISVTX:
        return False
    if info.st_mode & stat.S_IWOTH:
        return True
    return bool(info.st_mode & stat.S_IWGRP) and not _private_group(info)


def _private_group(info: os.stat_result) -> bool:
    """Whether the group is the owner alone, as Debian and Fedora arrange it for every user."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(info.st_uid), grp.getgrgid(info.st_gid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}


def _unusable(path: Path) -> Problem | None:
    """Whether files in `path` cannot be written, or not mapped as code (what loading a library does)."""
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=TEMPORARY) as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            executable, full = _executable(file.fileno()), _is_full(file.fileno())
    except OSError as error:
        return Problem(f"cannot be written to ({error.strerror})", _ELSEWHERE)
    if full:
        return Problem("lies on a disk that is full", f"delete something there, or {_ELSEWHERE}")
    if not executable:
        remedy = "set FUSEDOPT_CACHE_DIR to a folder on a file system that is mounted without noexec"
        return Problem("does not allow code to be loaded from it (mounted noexec?)", remedy)
    return None


def _is_full(fd: int) -> bool:
    if not hasattr(os, "fstatvfs"):
        return False
    found = os.fstatvfs(fd)  # some file systems say nothing of their size
    return found.f_blocks > 0 and found.f_bavail * found.f_frsize < ROOM


def _executable(fd: int) -> bool:
    if sys.platform != "linux":  # elsewhere an unsigned page may not be mapped though a library may be loaded
        return True
    if os.fstatvfs(fd).f_flag & os.ST_NOEXEC:
        return False
    try:
        mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- entries


class _Files(NamedTuple):
    binary: Path
    sidecar: Path
    source: Path
    lock: Path


def load_or_build(
    name: str,
    key: str,
    source: str,
    suffix: str,
    build: Callable[[Path, Path], str],
    *,
    source_suffix: str = "cpp",
    meta: Mapping[str, object] | None = None,
    code: str = "",
) -> Entry:
    """Find the kernel with this key in the cache, or build it.

    name : what people see in file names and listings
    key : hex digest of at least 20 digits over all that decides the binary
    suffix : of the binary, "so" or "cubin"
    build : compiles its first argument (the source's path) into its second, and returns the compiler's words
    meta : more for the sidecar, such as the compiler's name
    code : hex digest over what decides the binary and nothing else, with whose first 12 digits the key begins. An entry
        of the same code has the same binary, so nothing is built. "": nobody else's will do

    What `build` raises passes through, and then the source stays in the folder. Raises CacheError when the
    folder cannot be written, ValueError for a key that is no digest.
    """
    start = time.perf_counter()
    base = str(folder() / stem(name, key))
    files = _Files(*(Path(f"{base}.{end}") for end in (suffix, "json", source_suffix, "lock")))
    reason, log = _why_build(files, key), ""
    if reason:
        with _locked(files.lock):
            reason = _why_build(files, key)  # somebody may have built it while we waited
            if reason:
                notes = {"name": name, "key": key, "code": code, "reason": reason, **(meta or {})}
                same = _same_code(files, code) if code else None
                log = _build(files, source, build if same is None else _copy(*same), notes)
                if same is not None:
                    reason = log = ""
    return Entry(files.binary, files.source, bool(reason), time.perf_counter() - start, reason, log)


def stem(name: str, key: str) -> str:
    """File name of an entry without its suffix."""
    if not re.fullmatch(rf"[0-9a-f]{{{KEY_DIGITS},}}", key):
        raise ValueError(f"cache key {key!r} is no hex digest of at least {KEY_DIGITS} digits")
    return f"{plain(name)}_{key[:KEY_DIGITS]}"


def plain(name: str) -> str:
    """A kernel's name as part of a file's: names are made of titles, which are any text."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name[:80])


def discard(entry: Entry) -> None:
    """Forget an entry that turned out not to load, so that the next call builds it."""
    entry.path.unlink(missing_ok=True)


def _why_build(files: _Files, key: str) -> str:
    """Why the stored entry cannot be used; "" when it can."""
    try:
        meta, code = json.loads(_read(files.sidecar)), _read(files.binary)
    except FileNotFoundError:
        return "not in the cache"
    except (OSError, ValueError) as error:
        return f"the stored entry is corrupt ({error})"
    if not isinstance(meta, dict) or meta.get("key") != key:
        return "the stored entry is of another kernel"
    if meta.get("sha256") != hashlib.sha256(code).hexdigest():
        return "the stored entry is corrupt (its checksum differs)"
    return ""


# No links, no waiting for a writer that never comes (a pipe), no line endings changed.
_READ_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def _read(path: Path) -> bytes:
    """The file's bytes. Refuses what others own or could write: the folder may once have been open."""
    fd = os.open(path, os.O_RDONLY | _READ_FLAGS)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise PermissionError(f"{path.name} is no ordinary file")
        if hasattr(os, "getuid") and (info.st_uid != os.getuid() or info.st_mode & 0o022):
            raise PermissionError(f"other users could have written {path.name}")
        return file.read()


def _same_code(files: _Files, code: str) -> tuple[str, bytes] | None:
    """Another entry's binary that has the same code, after the entry's name."""
    beginning = f"_{code[:CODE_DIGITS]}"
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(files.sidecar.parent)
    for name in names:
        if beginning not in name or not name.endswith(".json"):
            continue
        sidecar = files.sidecar.with_name(name)
        with contextlib.suppress(OSError, ValueError):
            meta, binary = json.loads(_read(sidecar)), _read(sidecar.with_suffix(files.binary.suffix))
            sound = isinstance(meta, dict) and meta.get("sha256") == hashlib.sha256(binary).hexdigest()
            if sound and meta.get("code") == code:
                return sidecar.stem, binary
    return None


def _copy(stem: str, binary: bytes) -> Callable[[Path, Path], str]:
    """What builds an entry that another one has built."""

    def build(source: Path, out: Path) -> str:
        out.write_bytes(binary)
        return f"the code is that of {stem}"

    return build


def _build(files: _Files, source: str, build: Callable[[Path, Path], str], meta: dict[str, object]) -> str:
    """Compile under a name of our own, then rename: an old file that is loaded somewhere keeps its bytes."""
    start = time.perf_counter()
    fresh = _fresh(files.binary)
    try:
        _write(files.source, source.encode())
        log = build(files.source, fresh)
        fresh.chmod(0o700)  # whatever the umask says, or _read would refuse it
        meta["sha256"] = hashlib.sha256(fresh.read_bytes()).hexdigest()
        meta["seconds"] = round(time.perf_counter() - start, 3)
        meta["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        meta["log"] = log[-4000:]
        os.replace(fresh, files.binary)
        _write(files.sidecar, json.dumps(meta, indent=1).encode())
    except OSError as error:
        folder = files.binary.parent
        raise CacheError(f"cannot store a kernel in {folder}: {error}. Remedy: {_ELSEWHERE}.") from error
    finally:
        _unlink(fresh)
    return log


def _fresh(path: Path) -> Path:
    """A name in the same folder that nobody else uses. Renaming it to `path` replaces that file at once."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _write(path: Path, data: bytes) -> None:
    fresh = _fresh(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(data)
        os.replace(fresh, path)
    except BaseException:
        _unlink(fresh)
        raise


@contextlib.contextmanager
def _locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold the lock; yields False when it cannot be had (no locks here, or its holder is stopped)."""
    fd = _lock(path, time.monotonic() + seconds)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            # Closing it is not enough: a process that was forked meanwhile has it open too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _lock(path: Path, deadline: float) -> int | None:
    """The locked file; None when it cannot be had. The package filelock takes a tenth of a first step to import."""
    while fcntl is not None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:  # else somebody removed it, and others lock another file
                return fd
        except BlockingIOError:
            pass
        except OSError:
            deadline = 0.0
        os.close(fd)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return None


# ---------------------------------------------------------------- for people


def entries() -> list[Stored]:
    """What lies in the configured folder, in the order of names."""
    grouped: dict[str, list[Path]] = {}
    for file in _files():
        match = ENTRY_FILE.fullmatch(file.name)
        if match and not file.name.startswith(TEMPORARY):
            grouped.setdefault(match["stem"], []).append(file)
    return [_stored(name, files) for name, files in sorted(grouped.items())]


def _files() -> list[Path]:
    path = configured()
    try:
        return sorted(path.iterdir()) if path.is_dir() else []
    except OSError:  # `prepare` says why
        return []


def _stored(name: str, files: list[Path]) -> Stored:
    meta: object = None
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads(_read(files[0].with_name(f"{name}.json")))
    size = 0
    for file in files:
        with contextlib.suppress(OSError):  # another process may be clearing the folder
            size += file.lstat().st_size
    return Stored(name, tuple(files), size, meta if isinstance(meta, dict) else {})


def clear() -> int:
    """Remove every entry not being built right now, and left-overs of killed builds; how many went.

    Nothing else in the folder is touched, and libraries already loaded stay usable.
    """
    gone = 0
    for entry in entries():
        with _locked(entry.files[0].with_name(f"{entry.stem}.lock"), seconds=0) as held:
            if held:
                _unlink(*entry.files)
                gone += 1
        if held:
            _unlink(entry.files[0].with_name(f"{entry.stem}.lock"))
    _unlink(*(file for file in _files() if file.name.startswith(TEMPORARY) and _abandoned(file)))
    return gone


def _unlink(*files: Path) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _abandoned(file: Path) -> bool:
    """Whether a temporary file is too old for the build that made it to be still running."""
    try:
        return time.time() - file.lstat().st_mtime > LOCK_SECONDS
    except OSError:
        return False


def show() -> str:
    """The folder and its entries as a table: name, size, seconds it took to compile, date, compiler."""
    stored = entries()
    kib = sum(entry.size for entry in stored) / 1024
    lines = [f"{configured()}: {len(stored)} kernels, {kib:.0f} KiB"]
    for entry in stored:
        meta = entry.meta
        made = f"{meta.get('seconds', '?'):>7} s  {meta.get('created', '?'):25}  {meta.get('compiler', '?')}"
        lines.append(
            f"  {entry.stem:44} {entry.size / 1024:7.1f} KiB  {made if meta else 'no binary (failed build?)'}"
        )
    return "\n".join(lines)
