import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.writing.worker_pool import Crash, WorkerPool
from longtake.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]


def work(context, item, beat):
    """What the workers do here: `item` says what."""
    kind, value = item
    beat(f"at {value}")
    if kind == "square":
        return context * value**2
    if kind == "engine":  # something that a worker starts and that would outlive it
        engine = subprocess.Popen(["sleep", "1000"])
        Path(value).write_text(str(engine.pid))
        if "hang" in Path(value).name:
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "print":
        print("hello")  # noqa: T201
        os.write(1, b"more")
        return value
    errors = {
        "config": ConfigError("a"),
        "data": DataError("b"),
        "os": OSError(28, "full", "f"),
        "other": KeyError("c"),
    }
    raise errors[kind]


def run(items, *, timeout_s=60.0, attempts=2, num_workers=2, function=work):
    pool = WorkerPool(
        function, 10, num_workers=num_workers, timeout_s=timeout_s, timeout_key="limit", attempts=attempts
    )
    return dict(pool.run(items))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_dies(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} is still alive"
        time.sleep(0.02)


def test_every_item_has_its_result():
    items = [("square", n) for n in range(20)]
    assert run(items, num_workers=3) == {("square", n): 10 * n**2 for n in range(20)}


def test_what_libraries_print_does_not_disturb(capfd):
    assert run([("print", 1), ("square", 2)], num_workers=1) == {("print", 1): 1, ("square", 2): 40}
    assert "hello" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("config", ConfigError, "^a$"),
        ("data", DataError, "^b$"),
        ("os", OSError, "full"),
        ("other", RuntimeError, "KeyError"),
    ],
)
def test_errors_come_through(kind, error, text):
    with pytest.raises(error, match=text):
        run([(kind, 0)])


def test_items_may_be_added_on_the_way():
    pool = WorkerPool(work, 1, num_workers=2, timeout_s=None, timeout_key="limit")
    results = []
    for (_, number), result in pool.run([("square", 5)]):
        results.append(result)
        if number:
            pool.submit(("square", number - 1))
    assert results == [25, 16, 9, 4, 1, 0]


@pytest.mark.parametrize("name", ["crash", "hang"])
def test_what_a_lost_worker_started_is_gone_too(name, tmp_path):
    item = ("engine", str(tmp_path / name))
    result = run([item, ("square", 3)], timeout_s=1.0, attempts=1)
    reason = "worker process died (SIGKILL)" if name == "crash" else "no progress for 1 s (limit)"
    assert result == {item: Crash(reason, f"at {tmp_path / name}"), ("square", 3): 90}
    assert_dies(int((tmp_path / name).read_text()))


def test_nothing_outlives_a_killed_caller(tmp_path):
    code = "import sys; from tests.datamodules.writing.test_worker_pool import run; run([('engine', sys.argv[1])])"
    command = [sys.executable, "-c", code, str(tmp_path / "hang")]
    caller = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 30
    while not (tmp_path / "hang").exists() or not (tmp_path / "hang").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int((tmp_path / "hang").read_text())
    assert is_alive(pid)
    caller.kill()
    caller.wait()
    assert_dies(pid)


def test_leaving_early_ends_the_workers(tmp_path):
    pool = WorkerPool(work, 1, num_workers=2, timeout_s=None, timeout_key="limit")
    results = pool.run([("square", 1), ("engine", str(tmp_path / "hang"))])
    assert next(results) == (("square", 1), 1)
    while not (tmp_path / "hang").exists() or not (tmp_path / "hang").read_text():
        time.sleep(0.02)
    results.close()
    assert_dies(int((tmp_path / "hang").read_text()))


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr("datamodules.writing.worker_pool._BOOT", "import no_such_module")
    with pytest.raises(DataError, match="could not start: worker process died"):
        run([("square", 1)])
    assert "no_such_module" in capfd.readouterr().err


def test_workers_import_neither_torch_nor_lightning_nor_hydra():
    code = "import sys, datamodules.writing.parts, datamodules.writing.check_shard; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "hydra", "omegaconf", "decord"} & set(modules.split())
