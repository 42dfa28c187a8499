"""Worker processes that may crash or hang without taking the caller with them.

`concurrent.futures` and `multiprocessing.Pool` break (or wait for ever) when a worker dies, and `spawn`
imports the caller's main module again, which for a training script means torch. Here each worker is a fresh
interpreter that imports only what its function needs, in a process group of its own: a worker that dies or
stops giving signs of life is killed together with whatever it started (game engines outlive their controller
otherwise), its item is tried once more in a fresh process, and then reported as a `Crash`. If the caller
dies, even by SIGKILL, the workers see their input close and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from longtake.errors import ConfigError, DataError

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from datamodules.writing.worker_pool import serve; serve()"
)  # fmt: skip
_STOP = b"stop"
_GRACE_S = 5.0
_START_S = 120.0

Beat = Callable[[str], None]
"""Called by a worker's function after each bit of progress, with a note on what is being worked on."""


@dataclass(frozen=True)
class Crash:
    """An item whose worker died or hung on every attempt.

    Attributes:
        reason: what happened, for a log line.
        note: the last note of the function before it happened, "" if there was none.
    """

    reason: str
    note: str


class WorkerPool:
    """Runs `function(context, item, beat)` for many items in worker processes.

    Args:
        function: a function of an importable module.
        context: what is the same for every item; pickled once a worker.
        num_workers: processes to keep.
        timeout_s: seconds without a call of `beat` after which a worker counts as hung; None waits for ever.
        timeout_key: configuration key of that limit, for messages.
        attempts: how often an item is tried before it is reported as a `Crash`.
    """

    def __init__(
        self,
        function: Callable[[Any, Any, Beat], Any],
        context: Any,
        *,
        num_workers: int,
        timeout_s: float | None,
        timeout_key: str,
        attempts: int = 2,
    ) -> None:
        self._start = _pickled((function, context))
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._timeout_key = timeout_key
        self._attempts = attempts
        self._inbox: queue.SimpleQueue[tuple[_Worker, str, Any]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._waiting: deque[tuple[Any, int]] = deque()

    def submit(self, item: Any) -> None:
        """Adds an item; may be called while `run` is being iterated."""
        self._waiting.append((item, 1))

    def run(self, items: Iterable[Any] = ()) -> Generator[tuple[Any, Any], None, None]:
        """Yields (item, result of the function, or a `Crash`) in the order in which items finish.

        Raises:
            ConfigError, DataError, OSError: as raised by the function.
            RuntimeError: the function raised anything else; the message holds its traceback.
        """
        for item in items:
            self.submit(item)
        try:
            while self._waiting or any(worker.busy for worker in self._workers):
                self._assign()
                yield from self._next_results()
        finally:
            for worker in self._workers:
                worker.tell_to_stop()
            for worker in self._workers:
                worker.stop()
            self._workers.clear()

    def _assign(self) -> None:
        idle = [worker for worker in self._workers if not worker.busy]
        while self._waiting and (idle or len(self._workers) < self._num_workers):
            if not idle:
                self._workers.append(_Worker(self._inbox, self._start))
                idle.append(self._workers[-1])
            idle.pop().assign(*self._waiting.popleft())

    def _next_results(self) -> Iterator[tuple[Any, Any]]:
        with contextlib.suppress(queue.Empty):
            worker, kind, payload = self._inbox.get(timeout=0.2)
            if worker in self._workers:  # not the last words of one that was given up
                yield from self._heard_from(worker, kind, payload)
        for slow in [worker for worker in self._workers if worker.busy and self._is_hung(worker)]:
            slow.kill()
            yield from self._lost(slow, f"no progress for {self._timeout_s:g} s ({self._timeout_key})")

    def _heard_from(self, worker: _Worker, kind: str, payload: Any) -> Iterator[tuple[Any, Any]]:
        if kind == "done":
            worker.busy = False
            yield worker.item, payload
        elif kind == "error":
            _raise(*payload)
        else:
            yield from self._lost(worker, f"worker process died ({_exit_words(worker.kill())})")

    def _is_hung(self, worker: _Worker) -> bool:
        if self._timeout_s is None:
            return False
        # Starting is not work: on a loaded machine it may take longer than a short limit allows.
        return worker.silent_s() > (self._timeout_s if worker.ready else max(self._timeout_s, _START_S))

    def _lost(self, worker: _Worker, reason: str) -> Iterator[tuple[Any, Any]]:
        self._workers.remove(worker)
        if not worker.ready:
            raise DataError(f"a worker process could not start: {reason}; expected it to import the source's module")
        if not worker.busy:
            return
        if worker.attempt < self._attempts:
            self._waiting.appendleft((worker.item, worker.attempt + 1))
        else:
            yield worker.item, Crash(reason, worker.note)


class _Worker:
    """One process and the thread that listens to it."""

    def __init__(self, inbox: queue.SimpleQueue[tuple[_Worker, str, Any]], start: bytes) -> None:
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.busy = False
        self.ready = False
        self.item: Any = None
        self.attempt = 0
        self.note = ""
        self._heard = time.monotonic()
        self._send(start)
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def assign(self, item: Any, attempt: int) -> None:
        self.busy, self.item, self.attempt, self.note = True, item, attempt, ""
        self._heard = time.monotonic()
        self._send(_pickled(item))

    def silent_s(self) -> float:
        return time.monotonic() - self._heard

    def tell_to_stop(self) -> None:
        if not self.busy:
            self._send(_STOP)

    def stop(self) -> None:
        """Ends the process; an idle one may first close what it holds (engines, shared memory)."""
        if not self.busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self.kill()

    def kill(self) -> int:
        """Kills the process and all that it started; returns its exit code (negative: a signal)."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        code = self._process.wait()
        with contextlib.suppress(OSError):
            self._stream(self._process.stdin).close()
        return code

    def _send(self, message: bytes) -> None:
        # A worker that is gone is reported by the listening thread.
        with contextlib.suppress(OSError, ValueError):
            _write(self._stream(self._process.stdin), message)

    def _listen(self, inbox: queue.SimpleQueue[tuple[_Worker, str, Any]]) -> None:
        try:
            with self._stream(self._process.stdout) as stream:
                while (message := _read(stream)) is not None:
                    kind, payload = pickle.loads(message)
                    self._heard = time.monotonic()
                    if kind == "ready":
                        self.ready = True
                    elif kind == "beat":
                        self.note = payload
                    else:
                        inbox.put((self, kind, payload))
        finally:
            inbox.put((self, "end", None))

    @staticmethod
    def _stream(stream: Any) -> BinaryIO:
        assert stream is not None, "worker processes are started with pipes"
        return stream


def serve() -> None:
    """Runs in the worker process: takes items from standard input until told to stop."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever libraries print must not mix with our messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start = _read(inbox)
        if start is None:
            return
        function, context = pickle.loads(start)
    except BaseException:
        _answer(outbox, "error", ("RuntimeError", None, traceback.format_exc()))
        return
    _answer(outbox, "ready", None)
    items: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_take_items, args=(inbox, items), daemon=True).start()
    while (message := items.get()) != _STOP:
        try:
            result = function(context, pickle.loads(message), lambda note: _answer(outbox, "beat", note))
            _answer(outbox, "done", result)
        except Exception as error:
            text = str(error) if isinstance(error, (ConfigError, DataError)) else traceback.format_exc()
            detail = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else None
            kind = "OSError" if isinstance(error, OSError) else type(error).__name__
            _answer(outbox, "error", (kind, detail, text))


def _take_items(inbox: BinaryIO, items: queue.SimpleQueue[bytes]) -> None:
    while (message := _read(inbox)) is not None:
        items.put(message)
        if message == _STOP:
            return
    # The caller is gone: end at once, with everything that was started from here.
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _raise(kind: str, detail: tuple[int, str, str | None] | None, text: str) -> None:
    if kind == "ConfigError":
        raise ConfigError(text)
    if kind == "DataError":
        raise DataError(text)
    if detail is not None:
        raise OSError(*detail)
    raise RuntimeError(f"a worker process failed:\n{text}")


def _answer(outbox: BinaryIO, kind: str, payload: Any) -> None:
    _write(outbox, _pickled((kind, payload)))


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _write(stream: BinaryIO, message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    message = stream.read(length)
    return message if len(message) == length else None


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
