"""The folder of a sweep: what has been found so far, so that a run that ends in whatever way can go on from there.

`effects/` holds the findings of finished chunks in Parquet files (see `parts`) and `manifest.json` says what they are
of. A file is written under another name, synced and then renamed, so that it is there whole or not at all.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyfastcircuits.arguments import describe
from pyfastcircuits.result import Label
from pyfastcircuits.sweeps.identity import difference, versions
from pyfastcircuits.sweeps.parts import Torn, decoded, encoded, is_part, part_name
from pyfastcircuits.sweeps.work import Cut, Findings

FORMAT = 1
WAIT = (5.0, 60.0)  # seconds of work that a part holds at least and at most; in between a hundredth of the sweep's
ROWS = 1 << 20  # of a part, at most
_MANIFEST, _EFFECTS, _LOCK = "manifest.json", "effects", ".lock"
GO_ON = "resume=True (--resume) goes on from there"


class StoreError(OSError):
    """A file of the store cannot be written."""


class Store:
    """See this module. It is locked from when it is opened until it is closed, or until its process ends.

    Args:
        folder: where; it is made if need be.
        identity: what the results are of, in JSON's types.
        cut: the sizes of chunks; those of a sweep that goes on stay as they were.
        labels: the experiments, in the order of chunks.
        resume: go on with what is there.
        force: delete what is there.
        leader: whether this process locks the folder and writes the manifest; others join a leader's, with its cut.

    Attributes:
        cut: the sizes of chunks.
        torn: names of the parts that were not what had been written; they are gone.
        shapes: of each chunk that is stored, by its number.

    Raises:
        ValueError: something is there, and neither resume nor force is given; what is there is of something else;
            another run is writing there.
        StoreError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        cut: Cut,
        labels: Sequence[Label],
        *,
        resume: bool = False,
        force: bool = False,
        leader: bool = True,
    ) -> None:
        self.folder, self.cut, self.labels, self.torn = folder, cut, labels, list[str]()
        self.shapes: dict[int, tuple[int, int]] = {}
        self._effects, self._leader = folder / _EFFECTS, leader
        self._waiting: list[Findings] = []
        self._opened = self._written = time.monotonic()
        self._parts: dict[int, str] = {}  # the part that holds each chunk
        self._read: dict[str, dict[int, Findings]] = {}
        self._lock: int | None = None
        try:
            self._effects.mkdir(parents=True, exist_ok=True)
            if leader:
                self._lock = self._locked()
        except (OSError, ValueError) as error:  # a path that is none
            raise error if str(error).startswith("out is") else self._failed(_EFFECTS, error) from error
        try:
            self._start(json.loads(json.dumps(identity)), resume, force)
        except BaseException:
            self._unlock()
            raise

    def _start(self, identity: dict[str, Any], resume: bool, force: bool) -> None:
        manifest = self.folder / _MANIFEST
        if self._leader and force:
            manifest.unlink(missing_ok=True)  # before the parts: without it they are of nothing
            shutil.rmtree(self._effects)
            self._effects.mkdir()
        there = _read(manifest) if manifest.exists() else None
        if there is None and any(map(is_part, os.listdir(self._effects))):
            raise self._refused("there are results, but no manifest.json that says what of")
        if there is None:
            cut = {"sequences": self.cut.sequences, "experiments": self.cut.experiments}
            told = {"format": FORMAT, "identity": identity, "cut": cut, "made_with": versions(), "started": _now()}
            self._write(manifest, json.dumps(told, indent=1).encode())
            return
        if self._leader and not resume:
            raise self._refused(f"a sweep is there already, started {there.get('started')}; {GO_ON}")
        differs = difference({"format": there.get("format"), **there["identity"]}, {"format": FORMAT, **identity})
        if differs:
            raise self._refused(f"another sweep is there: {differs}")
        self.cut = Cut(**there["cut"])
        self._scan()

    def _scan(self) -> None:
        """Look through the parts; what is torn, and what is there twice, is deleted."""
        for name in sorted(os.listdir(self._effects)):
            file = self._effects / name
            if name.endswith(".partial") and self._leader:
                file.unlink()
            elif is_part(name):
                try:
                    chunks = {x.chunk.index: x.chunk.shape for x in decoded(name, file.read_bytes())}
                    if not self._parts.keys().isdisjoint(chunks):
                        raise Torn(name)
                except Torn:
                    self.torn.append(name)
                    if self._leader:
                        file.unlink()
                else:
                    self._parts |= dict.fromkeys(chunks, name)
                    self.shapes |= chunks

    def __contains__(self, index: int) -> bool:
        """Whether a chunk is stored."""
        return index in self._parts

    def find(self, index: int) -> Findings:
        """The findings of a chunk that is stored; the parts whose chunks have not all been asked for stay in memory."""
        name = self._parts[index]
        if name not in self._read:
            content = (self._effects / name).read_bytes()
            self._read[name] = {x.chunk.index: x for x in decoded(name, content)}
        found = self._read[name].pop(index)
        if not self._read[name]:
            del self._read[name]
        return found

    def add(self, found: Findings) -> None:
        """Store the findings of a chunk, not later than WAIT says.

        Raises:
            StoreError: they cannot be written.
        """
        self._waiting.append(found)
        now = time.monotonic()
        wait = min(max(WAIT[0], (now - self._opened) / 100), WAIT[1])
        if now - self._written >= wait or sum(x.chunk.shape[0] * x.chunk.shape[1] for x in self._waiting) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what waits; errors as `add`."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        content = encoded(waiting, self.labels)
        name = part_name(waiting[0].chunk.index, content)
        self._write(self._effects / name, content)
        self._parts |= dict.fromkeys((x.chunk.index for x in waiting), name)
        self._written = time.monotonic()

    def __enter__(self) -> "Store":
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Write what waits, and let others write."""
        try:
            self.flush()
        finally:
            self._unlock()

    def _write(self, file: Path, content: bytes) -> None:
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            try:
                with partial.open("wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
                partial.replace(file)
                _sync_folder(file.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._failed(file.name, error) from error

    def _locked(self) -> int:
        lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(lock, 20).decode(errors="replace").strip()
            os.close(lock)
            raise self._refused(f"another run is writing there (process {other})", over=False) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refused(self, why: str, *, over: bool = True) -> ValueError:
        instead = "take another folder, or delete what is there: force=True (--force)" if over else "wait for its end"
        return ValueError(f"out is {describe(str(self.folder))}: {why}; {instead}")

    def _failed(self, name: str, error: Exception) -> StoreError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return StoreError(
            f"out is {describe(str(self.folder))}: {name} cannot be written ({reason}); what is stored is whole: make "
            f"room, or make the folder writable, and {GO_ON}"
        )


def _read(manifest: Path) -> dict[str, Any]:
    try:
        found = json.loads(manifest.read_text())
        assert isinstance(found["identity"], dict)
        assert isinstance(found["cut"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"out is {str(manifest.parent)!r}: its manifest.json is not readable; take another folder, or "
            "delete what is there: force=True (--force)"
        ) from error
    return dict(found)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
