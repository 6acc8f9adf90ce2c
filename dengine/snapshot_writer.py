"""The subprocess that reads, writes and fetches snapshots, so that no node ever waits for them.

    python -m dengine.snapshot_writer PARENT_PID < job.json

One job comes in as JSON on stdin. Events leave as JSON lines on stdout: progress a few times a
second, then one `Done` or `Failed`. It runs at low priority, keeps to a number of bytes per second,
and dies with the node that started it, even while stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from dengine.errors import DataCorruption, FatalError, StorageIO, TryAgain
from dengine.raft.types import SnapshotRef
from dengine.security import PeerSecret
from dengine.storage.environment import DATA_FILE, sync_directory
from dengine.storage.snapshot_file import (
    SnapshotInfo,
    snapshot_name,
    verify,
)
from dengine.storage.snapshot_frames import SyncedSteps, sound_prefix
from dengine.storage.snapshot_jobs import (
    Check,
    Credentials,
    Done,
    Event,
    Failed,
    Fetch,
    Progress,
    Take,
    Unpack,
    Verify,
    decode_job,
    encode_event,
)
from dengine.storage.snapshots import fetched_path, make_private, take, unpack
from dengine.storage.state_reader import StateReader

PROGRESS_EVERY_S: Final = 0.2
FETCH_TIMEOUT_S: Final = 10.0  # without a single byte
PIECE_BYTES: Final = 256 * 1024
NICENESS: Final = 10  # low, but not so low that a busy node starves it: an old reader is costly too
OOM_SCORE: Final = 900  # when memory runs out, this process goes before the node
_PR_SET_PDEATHSIG: Final = 1


def main(parent: int) -> int:
    """Carry out the job on stdin; 0 when it is done, else the error's exit code."""
    _die_with_parent(parent)
    _be_modest()
    job = decode_job(sys.stdin.buffer.read())
    try:
        done = _check(job) if isinstance(job, Check) else _done(_carry_out(job))
    except FatalError as error:
        _say(Failed(error.exit_code, error.message))
        return error.exit_code
    except OSError as error:
        _say(Failed(StorageIO.exit_code, f"{error.filename}: {error.strerror or error}"))
        return StorageIO.exit_code
    except MemoryError:
        _say(Failed(TryAgain.exit_code, "out of memory"))
        return TryAgain.exit_code
    _say(done)
    return 0


def _done(info: SnapshotInfo) -> Done:
    return Done(str(info.path), info.ref, info.header.taken_at_s)


def _check(job: Check) -> Done:
    path = Path(job.state)
    pace, size = _Pace(), (path / DATA_FILE).stat().st_size
    with StateReader(path) as reader:
        reader.check(lambda _: pace.report(0, size))
        applied = reader.applied
    return Done(job.state, SnapshotRef(applied.index, applied.term, "", size), 0)


def _carry_out(job: Take | Verify | Unpack | Fetch) -> SnapshotInfo:
    match job:
        case Take():
            return take(
                Path(job.state),
                Path(job.directory),
                node_id=job.node_id,
                chunk_bytes=job.chunk_bytes,
                progress=_Pace(job.max_bytes_per_s).report,
            )
        case Verify():
            file = Path(job.file)
            pace, total = _Pace(job.max_bytes_per_s), file.stat().st_size
            return verify(file, progress=lambda done: pace.report(done, total))
        case Unpack():
            return unpack(Path(job.file), Path(job.state), _Pace(job.max_bytes_per_s).report)
        case Fetch():
            return _fetch(job)


class _Pace:
    """Keeps a job to a number of bytes per second and reports how far it is.

    What it falls behind while the machine is busy it makes up for when it can: a take that lasts
    costs more than one in a hurry, for the state grows until its reader is gone.
    """

    def __init__(self, max_bytes_per_s: int | None = None) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._started = self._report_due = time.monotonic()

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._report_due:
            self._report_due = now + PROGRESS_EVERY_S
            _say(Progress(done, max(done, total)))
        if self._max_bytes_per_s:
            ahead_s = done / self._max_bytes_per_s - (now - self._started)
            if ahead_s > 0.001:
                time.sleep(min(ahead_s, 1.0))

    def lives(self, _: int) -> None:
        """A sign of life, and nothing that counts as done: what is here already is read again."""
        self.report(0, 0)


def _fetch(job: Fetch) -> SnapshotInfo:
    """Download, verify, unpack; what of an earlier attempt is sound is kept.

    The file keeps its temporary name: under its own it would say that this node has the entries up
    to there, which only the install makes true.

    Chunks of two files are never mixed: the partial file carries the SHA-256 of the one it will
    become, and the sender is asked for exactly that one.
    """
    directory = Path(job.directory)
    file = directory / snapshot_name(job.ref.log_id)
    partial = fetched_path(directory, job.ref.sha256)
    try:
        make_private(directory)
        if not _is_here(file, job.ref):
            info = _download(job, partial)
            if info.header.cluster_id != job.cluster_id:
                partial.unlink()
                raise DataCorruption(f"{partial} is from cluster {info.header.cluster_id}")
            file = partial
            sync_directory(directory)  # the log will begin behind it, so a power cut must leave it
        return unpack(file, Path(job.state), _Pace().report)
    except OSError as error:
        raise StorageIO(f"cannot fetch {file}: {error.strerror or error}") from error


def _is_here(file: Path, ref: SnapshotRef) -> bool:
    """Was it fetched by an earlier attempt, or taken by this node itself?"""
    with contextlib.suppress(DataCorruption, StorageIO):
        return verify(file, progress=_Pace().lives).sha256 == ref.sha256
    return False


def _download(job: Fetch, partial: Path) -> SnapshotInfo:
    """Append what is missing, make it durable and verify it; where that fails, only what is sound
    is kept for the next attempt.
    """
    lives = _Pace().lives  # a large file is read for longer than one that says nothing may live
    have = sound_prefix(partial, lives) if partial.exists() else 0
    try:
        _append(job, partial, have)
    except OSError as error:
        # The kernel may have dropped what it could not write, and would hide that from a later
        # fsync of this file: the next attempt must write another one, or all of its pages anew
        # where the disk does not even let go of it.
        with contextlib.suppress(OSError):
            os.truncate(partial, 0)
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageIO(f"cannot write {partial}: {error.strerror or error}") from error
    if partial.stat().st_size != job.ref.size_bytes:
        raise TryAgain(f"{job.address} ended the transfer early")
    try:
        info = verify(partial, progress=lives)
        if info.sha256 == job.ref.sha256:
            return info
        have = 0  # sound, but another file
    except DataCorruption:
        have = sound_prefix(partial, lives)
    os.truncate(partial, have)
    raise TryAgain(f"{job.address} sent something else; {have} bytes of it are sound")


def _append(job: Fetch, partial: Path, have: int) -> None:
    """Go on after `have` bytes, durably, as far as the sender does. Raises OSError, TryAgain."""
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.truncate(have)
        stream.seek(have)
        try:
            pace, steps = _Pace(), SyncedSteps(stream)
            for position, data in _pieces(job, have):
                stream.seek(position)
                stream.write(data)
                steps.wrote(len(data))
                pace.report(position + len(data), job.ref.size_bytes)
        finally:
            stream.flush()
            os.fsync(stream.fileno())


def _pieces(job: Fetch, have: int) -> Iterator[tuple[int, bytes]]:
    """Position and bytes of each piece from `have` on. An error of the network, or a silence, is a
    TryAgain.
    """
    if have >= job.ref.size_bytes:
        return
    sha = job.ref.sha256
    connection = http.client.HTTPConnection(job.address, timeout=FETCH_TIMEOUT_S)
    headers = {"Range": f"bytes={have}-", "Dengine-Receiver": str(job.receiver)}
    try:
        response = _ask(connection, f"/v1/snapshots/{sha}", headers, job.credentials)
        if response.status not in (200, 206) or response.getheader("ETag") != f'"{sha}"':
            reason = response.read(500).decode("utf-8", "replace")
            raise TryAgain(f"{job.address} answered {response.status}: {reason}")
        if response.status == 200:  # all of it, whatever was asked for
            have = 0
        while data := response.read1(PIECE_BYTES):
            yield have, data
            have += len(data)
    except (http.client.HTTPException, OSError) as error:
        raise TryAgain(f"{job.address}: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection,
    target: str,
    headers: dict[str, str],
    credentials: Credentials,
) -> http.client.HTTPResponse:
    """GET `target`, proving that this is a node, or with the token where there is no peer secret.

    The file needs no proof of the sender: its SHA-256 came over the peer stream.
    """
    if credentials.peer_secret is None and credentials.token is not None:
        headers = {**headers, "Authorization": f"Bearer {credentials.token}"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    if response.status != 401 or credentials.peer_secret is None:
        return response
    challenges = response.msg.get_all("WWW-Authenticate", [])
    response.read()
    answer = PeerSecret(credentials.peer_secret).answer(challenges, "GET", target, b"")
    if answer is None:
        raise TryAgain(f"{connection.host} asks for a token and knows no peer secret")
    connection.request("GET", target, headers={**headers, "Authorization": answer.header})
    return connection.getresponse()


def _say(event: Event) -> None:
    try:
        sys.stdout.buffer.write(encode_event(event) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(TryAgain.exit_code)  # the node was killed; so is this, in a moment


def _die_with_parent(parent: int) -> None:
    """The kernel kills this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(TryAgain.exit_code)  # it ended before the kernel was told


def _be_modest() -> None:
    """Low CPU and I/O priority; where the system forbids that, the bytes per second do it."""
    me = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError):
        me.nice(NICENESS)
    with contextlib.suppress(OSError):  # a batch job that wakes up waits for its turn
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(psutil.Error, OSError):
        me.ionice(psutil.IOPRIO_CLASS_BE, 7)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
