"""The compile cache: private, content-addressed, and never in the way of another process."""

import errno
import hashlib
import json
import mmap
import os
import pwd
import stat
import sys
import tempfile
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

from fusedopt.compile import cache

KEY = hashlib.sha256(b"a kernel").hexdigest()
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owner and mode are POSIX")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache folder of the test's own, not yet created."""
    path = tmp_path / "cache"
    use(monkeypatch, path)
    return path


def use(monkeypatch, path):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(path))
    monkeypatch.setattr(cache, "_opened", {})
    monkeypatch.setattr(cache, "_warned", set())


class Builder:
    """Stands for a compiler: copies the source, counts its calls, and takes its time."""

    def __init__(self, seconds=0.0):
        self.calls, self.seconds = 0, seconds

    def __call__(self, source, out):
        self.calls += 1
        time.sleep(self.seconds)
        out.write_bytes(b"code of " + source.read_bytes())
        return "compiler said nothing"


def get(build, *, name="adam", key=KEY, source="x = 1;", **more):
    return cache.load_or_build(name, key, source, "so", build, **more)


# ---------------------------------------------------------------- entries


def test_builds_once_then_finds(root):
    build = Builder()
    first, second = get(build), get(build)
    assert build.calls == 1
    assert (first.built, first.reason, first.log) == (True, "not in the cache", "compiler said nothing")
    assert (second.built, second.reason, second.log) == (False, "", "")
    assert second.path == first.path == root / f"adam_{KEY[:20]}.so"
    assert second.path.read_bytes() == b"code of x = 1;"
    assert second.source_path.read_text() == "x = 1;"


def test_sidecar_tells_what_and_why(root):
    entry = get(Builder(), meta={"compiler": "g++ 12", "flags": "-O3"})
    meta = json.loads(entry.path.with_suffix(".json").read_text())
    assert meta["key"] == KEY
    assert meta["sha256"] == hashlib.sha256(entry.path.read_bytes()).hexdigest()
    assert (meta["compiler"], meta["flags"], meta["reason"]) == ("g++ 12", "-O3", "not in the cache")
    assert meta["seconds"] >= 0
    assert meta["created"].endswith("+00:00")


def test_other_key_other_entry(root):
    build = Builder()
    other = hashlib.sha256(b"another").hexdigest()
    assert get(build).path != get(build, key=other).path
    assert build.calls == 2


def test_keys_that_agree_in_their_first_digits_are_told_apart(root):
    build = Builder()
    get(build)
    entry = get(build, key=KEY[:20] + "0" * 44, source="y = 2;")
    assert entry.reason == "the stored entry is of another kernel"
    assert entry.path.read_bytes() == b"code of y = 2;"


@pytest.mark.parametrize("key", ["", "abc", "../../../../etc/passwd", "G" * 64])
def test_a_key_must_be_a_digest(root, key):
    with pytest.raises(ValueError, match="hex digest"):
        get(Builder(), key=key)


def test_a_name_never_leaves_the_folder(root):
    assert get(Builder(), name="../lion step/é").path.parent == root


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".so", lambda data: data[:-3]),
        (".so", lambda data: b""),
        (".so", lambda data: b"\x00" + data[1:]),
        (".json", lambda data: data[: len(data) // 2]),
        (".json", lambda data: b""),
        (".json", lambda data: b"[]"),
        (".json", lambda data: b"\xff\xfe"),
    ],
)
def test_a_damaged_entry_is_built_again(root, suffix, damage):
    build = Builder()
    path = get(build).path
    victim = path.with_suffix(suffix)
    victim.write_bytes(damage(victim.read_bytes()))
    again = get(build)
    assert again.built
    assert again.reason.startswith("the stored entry is")
    assert path.read_bytes() == b"code of x = 1;"
    assert not get(build).built


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_half_an_entry_is_built_again(root, suffix):
    build = Builder()
    get(build).path.with_suffix(suffix).unlink()
    assert get(build).built
    assert not get(build).built


def test_a_loaded_library_is_never_written_to(root):
    path = get(Builder()).path
    with open(path, "rb") as loaded:  # stands for a mapping: both hold the inode
        path.with_suffix(".json").unlink()
        assert get(Builder()).built
        assert loaded.read() == b"code of x = 1;"
        assert os.fstat(loaded.fileno()).st_ino != path.stat().st_ino


@posix
def test_a_file_others_could_have_written_is_not_trusted(root):
    build = Builder()
    path = get(build).path
    path.chmod(0o722)
    entry = get(build)
    assert "other users could have written" in entry.reason
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@posix
def test_a_link_in_place_of_a_library_is_not_followed(root, tmp_path):
    path = get(Builder()).path
    target = tmp_path / "elsewhere.so"
    path.rename(target)
    path.symlink_to(target)
    assert get(Builder()).built
    assert not path.is_symlink()
    assert target.exists()


def test_a_failed_build_keeps_its_source_and_nothing_else(root):
    def fail(source, out):
        out.write_bytes(b"half")
        raise cache.BuildError("no")

    with pytest.raises(cache.BuildError, match="no"):
        get(fail)
    kept = {path.suffix for path in root.iterdir()}
    assert kept == {".cpp", ".lock"}
    assert get(Builder()).built


def test_disk_errors_become_cache_errors(root, monkeypatch):
    cache.folder()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(cache.CacheError, match=r"No space left on device.*FUSEDOPT_CACHE_DIR"):
        get(Builder())


def test_a_discarded_entry_is_built_again(root):
    entry = get(Builder())
    cache.discard(entry)
    assert get(Builder()).built


def test_finding_takes_two_reads_and_no_lock(root, monkeypatch):
    get(Builder())
    read, right = [], cache._read
    monkeypatch.setattr(cache, "_read", lambda path: read.append(path.suffix) or right(path))
    monkeypatch.setattr(cache, "_locked", None)
    assert not get(Builder()).built
    assert read == [".json", ".so"]


def run_together(count, work):
    """Results of calls that start at the same moment."""
    barrier, results = threading.Barrier(count), []

    def run():
        barrier.wait()
        results.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_builders_of_one_kernel_wait_for_the_first(root):
    build = Builder(seconds=0.2)
    results = run_together(4, lambda: get(build))
    assert build.calls == 1
    assert sorted(entry.built for entry in results) == [False, False, False, True]


def test_builders_of_two_kernels_do_not_wait(root):
    both = threading.Barrier(2, timeout=20)

    def build(source, out):
        both.wait()  # broken unless both are in here at once
        return Builder()(source, out)

    keys = iter([KEY, KEY[::-1]])
    assert len(run_together(2, lambda: get(build, key=next(keys)))) == 2


def test_without_locks_everybody_builds_and_all_succeed(root, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks on this file system")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    build = Builder(seconds=0.1)
    results = run_together(3, lambda: get(build))
    assert len(results) == 3
    assert {entry.path.read_bytes() for entry in results} == {b"code of x = 1;"}
    assert not get(build).built


def test_a_stopped_holder_of_the_lock_does_not_stop_others(root, monkeypatch):
    monkeypatch.setattr(cache._locked.__wrapped__, "__defaults__", (0.05,))
    with cache._locked(cache.folder() / f"{cache.stem('adam', KEY)}.lock"):
        results = run_together(1, lambda: get(Builder()))
    assert results[0].built


# ---------------------------------------------------------------- the folder


@posix
def test_the_folder_is_made_private(tmp_path, monkeypatch):
    old = os.umask(0)  # even where the umask would let others in
    try:
        use(monkeypatch, tmp_path / "new" / "cache")
        entry = get(Builder())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "cache").stat().st_mode) == 0o700
    assert not any(path.stat().st_mode & 0o077 for path in entry.path.parent.iterdir())
    assert not get(Builder()).built


def test_the_platform_decides_without_the_variable(monkeypatch):
    import platformdirs

    monkeypatch.delenv("FUSEDOPT_CACHE_DIR", raising=False)
    assert str(cache.configured()) == platformdirs.user_cache_dir("fusedopt", appauthor=False)


def test_a_user_without_a_home_has_a_folder(monkeypatch, tmp_path):
    """As in containers that run as some number."""
    for name in ("FUSEDOPT_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert get(Builder()).built and not get(Builder()).built
    assert cache.folder() == tmp_path / f"fusedopt-of-{os.getuid()}"


def works_in_a_temporary_folder(root, reason):
    """One warning, naming folder, reason and remedy; then everything works, in a private folder elsewhere."""
    with pytest.warns(cache.CacheWarning) as caught:
        entry = get(Builder())
    (text,) = [str(warning.message) for warning in caught]
    assert caught[0].filename == __file__  # the user's line, not fusedopt's
    assert str(root) in text
    assert reason in text
    assert "Remedy: " in text
    assert entry.built
    assert root not in entry.path.parents
    if hasattr(os, "getuid"):
        assert stat.S_IMODE(entry.path.parent.stat().st_mode) == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not get(Builder()).built  # and no second warning
    return text


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "cache"
    use(monkeypatch, root)
    assert "FUSEDOPT_CACHE_DIR" in works_in_a_temporary_folder(root, "cannot be created (Not a directory)")


def test_a_file_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    use(monkeypatch, tmp_path / "cache")
    works_in_a_temporary_folder(tmp_path / "cache", "cannot be created (")


def test_a_read_only_folder(root, monkeypatch):
    real = tempfile.NamedTemporaryFile

    def read_only(*args, dir, **kwargs):  # mode bits would not stop root, who runs tests in containers
        if str(dir) == str(root):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    works_in_a_temporary_folder(root, "cannot be written to (Read-only file system)")


@pytest.mark.skipif(sys.platform != "linux", reason="only tried on Linux")
def test_a_folder_mounted_noexec(root, monkeypatch):
    root.mkdir(mode=0o700)
    real, refused = mmap.mmap, []

    def no_code(fd, *args, **kwargs):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(root)):
            refused.append(kwargs["prot"])
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(fd, *args, **kwargs)

    monkeypatch.setattr(mmap, "mmap", no_code)
    assert "without noexec" in works_in_a_temporary_folder(root, "does not allow code to be loaded from it")
    assert refused == [mmap.PROT_READ | mmap.PROT_EXEC]


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_others_can_write(root, mode):
    root.mkdir()
    root.chmod(mode)
    assert f"chmod 700 {root}" in works_in_a_temporary_folder(
        root, f"written by other users (mode {mode:04o})"
    )


@posix
def test_a_parent_others_can_write(tmp_path, monkeypatch):
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o777)
    use(monkeypatch, parent / "cache")
    works_in_a_temporary_folder(
        parent / "cache", f"lies in {parent}, which other users can write to (mode 0777)"
    )


@posix
@pytest.mark.parametrize(
    ("group", "members", "replaceable"), [("ann", [], False), ("ann", ["bob"], True), ("staff", [], True)]
)
def test_a_parent_of_the_users_own_group_is_safe(monkeypatch, group, members, replaceable):
    """Debian and Fedora make home folders writable by a group that holds the user alone."""
    import grp
    import pwd

    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    info = SimpleNamespace(st_mode=stat.S_IFDIR | 0o775, st_uid=1000, st_gid=1000)
    assert cache._replaceable(info) is replaceable


@posix
def test_a_sticky_parent_is_safe(tmp_path, monkeypatch):
    parent = tmp_path / "tmp"
    parent.mkdir()
    parent.chmod(0o1777)  # as /tmp: others cannot exchange what is ours
    use(monkeypatch, parent / "cache")
    assert get(Builder()).path.parent == parent / "cache"


@posix
def test_a_link_to_the_folder_is_resolved_once(tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    use(monkeypatch, tmp_path / "link")
    assert get(Builder()).path.parent == real


@posix
def test_a_folder_of_another_user_and_no_other_choice(root, monkeypatch):
    root.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)  # temporary folders are not ours either
    with pytest.raises(cache.CacheError, match=r"belongs to another user .*Remedy: set FUSEDOPT_CACHE_DIR"):
        get(Builder())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_a_parent_of_another_user(tmp_path, monkeypatch):
    parent = tmp_path / "theirs"
    parent.mkdir()
    os.chown(parent, 12345, -1)
    use(monkeypatch, parent / "cache")
    works_in_a_temporary_folder(
        parent / "cache", f"lies in {parent}, which belongs to another user (uid 12345)"
    )


def test_a_folder_removed_while_running_is_made_again(root):
    import shutil

    get(Builder())
    shutil.rmtree(root)
    assert get(Builder()).built


@posix
def test_the_temporary_folder_is_replaced_without_another_warning(root):
    import shutil

    root.mkdir()
    root.chmod(0o777)
    with pytest.warns(cache.CacheWarning):
        first = cache.folder()
    shutil.rmtree(first)  # as when the process this one was forked from has ended
    second = cache.folder()
    assert second.is_dir()
    assert root not in (second, *second.parents)


def test_the_temporary_folder_goes_with_its_process_only(tmp_path):
    path = tmp_path / "temporary"
    path.mkdir()
    cache._remove(path, os.getpid() + 1)  # in a forked child
    assert path.exists()
    cache._remove(path, os.getpid())
    assert not path.exists()


# ---------------------------------------------------------------- for people


def test_show_and_entries(root):
    assert cache.entries() == []
    assert cache.show().splitlines() == [f"{root}: 0 kernels, 0 KiB"]
    assert not root.exists()  # looking changes nothing
    get(Builder(), meta={"compiler": "g++ 12"})
    get(Builder(), name="lion", key=KEY[::-1])
    (root / "notes.txt").write_text("not ours")
    adam, lion = cache.entries()
    assert (adam.meta["name"], lion.meta["name"]) == ("adam", "lion")
    assert adam.size == sum(path.stat().st_size for path in root.glob("adam*"))
    head, first, second = cache.show().splitlines()
    assert head.startswith(f"{root}: 2 kernels")
    assert "adam_" in first
    assert "g++ 12" in first
    assert "lion_" in second


def test_show_survives_a_broken_sidecar(root):
    get(Builder()).path.with_suffix(".json").write_text("{")
    assert "no binary" in cache.show()


def test_clear_removes_ours_and_nothing_else(root):
    get(Builder())
    (root / "notes.txt").write_text("not ours")
    left_over = root / f"{cache.TEMPORARY}1-abc-adam.so"
    left_over.write_bytes(b"half")
    os.utime(left_over, (0, 0))
    running = root / f"{cache.TEMPORARY}2-def-adam.so"
    running.write_bytes(b"half")
    assert cache.clear() == 1
    assert {path.name for path in root.iterdir()} == {"notes.txt", running.name}
    assert cache.clear() == 0
    assert get(Builder()).built


def test_clear_leaves_what_is_being_built(root):
    get(Builder())
    with cache._locked(root / f"{cache.stem('adam', KEY)}.lock"):
        (cleared,) = run_together(1, cache.clear)
    assert cleared == 0
    assert not get(Builder()).built


def test_clear_without_a_folder(root):
    assert cache.clear() == 0


def test_a_full_disk(root, monkeypatch):
    real = os.fstatvfs

    def fstatvfs(fd):
        found = real(fd)
        full = os.readlink(f"/proc/self/fd/{fd}").startswith(f"{root}/")
        return SimpleNamespace(
            f_flag=found.f_flag, f_blocks=found.f_blocks, f_frsize=4096, f_bavail=10 if full else 1000
        )

    monkeypatch.setattr(os, "fstatvfs", fstatvfs)
    works_in_a_temporary_folder(root, "lies on a disk that is full")


@pytest.mark.parametrize("name", ["a" * 300, "locked"])
def test_a_folder_that_cannot_be_read_is_shown_as_empty(name, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / name))
    if name == "locked":
        (tmp_path / name).mkdir()
        monkeypatch.setattr(cache.Path, "iterdir", lambda self: os.listdir("/proc/none"))
    assert cache.entries() == [] and cache.clear() == 0
