"""Whether the snapshots that lie here may be relied on: the writer process reads them.

A file from before this start counts when every part of it is what was written. That says nothing
of the state in it, which may have rotted after its check, just before it was copied. So a file that
counts already, but that a member could not use, is unpacked, and what comes of it thrown away.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from dengine.config import Snapshot
from dengine.errors import DataCorruption, StorageIO, TryAgain
from dengine.node.backoff import Backoff
from dengine.node.room import Room
from dengine.node.snapshot_files import SnapshotFiles
from dengine.node.snapshot_wants import Wanted
from dengine.node.writer_process import WriterProcess
from dengine.raft.types import SnapshotRef
from dengine.storage.directory import DataDirectory
from dengine.storage.snapshot_jobs import Done, Unpack, Verify
from dengine.storage.snapshots import put_aside


class Verifier:
    """Called by the one task of `Snapshots`, one job at a time."""

    def __init__(
        self,
        config: Snapshot,
        directory: DataDirectory,
        files: SnapshotFiles,
        wanted: Wanted,
        writer: WriterProcess,
        room: Room,
    ) -> None:
        self._config = config
        self._scratch = directory.scratch_path
        self._files = files
        self._wanted = wanted
        self._writer = writer
        self._room = room
        self._backoff = Backoff()
        self._unpacked: set[SnapshotRef] = set()

    @property
    def is_due(self) -> bool:
        return bool(self._wanted.unverified) and self._backoff.is_due

    async def verify(self, file: Path) -> None:
        """A file from before this start, where only what was read in full counts; or a suspect.

        Raises:
            TryAgain: it is damaged, and was put aside; or not this time.
            StorageIO: not this time.
        """
        known = next((ref for ref, path in self._files if path == file), None)
        try:
            if known is not None and self._may_unpack(known):
                done = await self._unpack(file, known)
            else:
                rate = self._config.max_bytes_per_s
                done = await self._writer.run(Verify(str(file), rate))
        except DataCorruption as error:
            if known is None:
                put_aside(file)
            else:
                self._files.put_aside(known)  # it is on its way to somebody, perhaps
            raise TryAgain(f"{error.message}; it was put aside") from error
        except (TryAgain, StorageIO):  # says nothing of the file
            self._later(file)
            raise
        self._backoff.succeeded()
        # One that counted before, and does not now, has been distrusted meanwhile.
        if done.ref != known and self._files.get(done.ref) is None:
            await self._files.add(done.ref, file, done.taken_at_s)

    def _may_unpack(self, ref: SnapshotRef) -> bool:
        """Is there room for it, and anything to learn? What a SHA-256 stands for stays the same:
        somebody who asks for a sound file over and over costs no more than reading it.
        """
        return ref not in self._unpacked and self._room.has(ref.size_bytes)

    async def _unpack(self, file: Path, ref: SnapshotRef) -> Done:
        try:
            rate = self._config.max_bytes_per_s
            done = await self._writer.run(Unpack(str(file), str(self._scratch), rate))
        finally:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, shutil.rmtree, self._scratch, True)
        self._unpacked = {*self._unpacked, ref}.intersection(self._files.refs)
        return done

    def _later(self, file: Path) -> None:
        """After the others; unless somebody has removed it."""
        self._backoff.failed()
        if file.exists():
            self._wanted.unverified.insert(0, file)
        else:
            self._files.drop(file)
