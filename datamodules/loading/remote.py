"""Shards that lie elsewhere: `dataset.json` and the indices are local, tars are fetched whole when first needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datamodules.shards import ShardInfo
from longtake.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardCache:
    """Fetches shards into a folder of bounded size, least recently used out first; safe for many processes.

    Attributes:
        url: where a shard lies, `{file}` in place of its name: "https://host/set/{file}" or "pipe:<command> {file}".
        folder: the cache.
        max_bytes: what the cache may hold.
        allow_remote: the user's word that these urls may be opened; a `pipe:` url runs a shell command.
    """

    url: str
    folder: Path
    max_bytes: int
    allow_remote: bool

    def __post_init__(self) -> None:
        if not self.allow_remote:
            raise ConfigError(
                f"data.shard_url is {self.url!r}, which opens the network or runs a command; expected null (shards "
                "beside "
                "dataset.json), or your consent with `data.allow_remote=true`."
            )
        if "{file}" not in self.url:
            raise ConfigError(f"data.shard_url is {self.url!r}; expected `{{file}}` in place of the shard's name.")

    def fetch(self, shard: ShardInfo) -> Path:
        """Returns the local path of a shard, fetched and checked against its checksum if it was not there."""
        path = self.folder / shard.file
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(shard.file):
                if not path.is_file():
                    self._evict(shard.bytes)
                    self._download(shard, path)
        os.utime(path)
        return path

    def _download(self, shard: ShardInfo, path: Path) -> None:
        from webdataset.gopen import gopen  # imports torch: only where a shard is really fetched

        url = self.url.replace("{file}", shard.file)
        digest, temporary = hashlib.sha256(), path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with gopen(url) as source, temporary.open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != shard.sha256:
                raise DataError(f"{url} does not have the checksum that dataset.json states for {shard.file}")
            temporary.replace(path)
        except OSError as error:
            raise DataError(f"shard {shard.file} could not be fetched from {url}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _evict(self, wanted: int) -> None:
        """Removes the least recently used shards; who still reads one keeps its open file."""
        files = sorted((file for file in self.folder.glob("*.tar")), key=lambda file: file.stat().st_mtime)
        held = sum(file.stat().st_size for file in files)
        for file in files:
            if held + wanted <= self.max_bytes:
                return
            held -= file.stat().st_size
            file.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
