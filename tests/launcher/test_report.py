"""Exceptions to messages and exit codes."""

from __future__ import annotations

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from launcher.report import JobFailed, report
from longtake.errors import ConfigError, DataError
from tests.configs import edited


def caused(outer: Exception, cause: BaseException) -> Exception:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a is 1; expected 2. Change `a`."), 2, "error: a is 1"),
        (DataError("the set is damaged"), 1, "error: the set is damaged"),
        (caused(InstantiationException("Error in call"), ConfigError("no such view")), 2, "error: no such view"),
        (caused(RuntimeError("worker died"), DataError("disk full")), 1, "error: disk full"),
        (
            OSError(28, "No space left on device", "a/metrics.jsonl"),
            1,
            "error: a/metrics.jsonl cannot be written: No space",
        ),
        (
            caused(RuntimeError("flush"), OSError(30, "Read-only file system")),
            1,
            "error: a file cannot be written: Read",
        ),
        (caused(InstantiationException("x\nfull_key: trainer"), MisconfigurationException("no")), 2, "trainer"),
        (caused(InstantiationException("x"), TypeError("got an unexpected keyword argument 'b'")), 2, "'b'"),
    ],
)
def test_what_a_user_can_change_is_one_message(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error, None) == code
    written = capsys.readouterr().err
    assert text in written
    assert "Traceback" not in written
    assert written.count("\n") == 1


def test_anything_else_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError) as caught:
        {}["missing"]
    assert report(caught.value, None) == 1
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert written.splitlines()[-1] == "error: KeyError: 'missing'"


def test_other_ranks_do_not_repeat_a_users_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert report(ConfigError("x"), None) == 2
    assert capsys.readouterr().err == ""
    assert report(DataError("mine"), None) == 1
    assert capsys.readouterr().err == "[rank 1] error: mine\n"


def test_a_traceback_from_a_worker_process_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise DataError("too many bad samples")

    wrapper = None
    try:
        fails()
    except DataError:
        import sys

        from torch._utils import ExceptionWrapper

        wrapper = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
    assert wrapper is not None
    with pytest.raises(DataError) as caught:
        wrapper.reraise()
    assert report(caught.value, None) == 1
    assert capsys.readouterr().err == "error: too many bad samples\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        caused(InstantiationException("x"), MemoryError()),
    ],
)
def test_out_of_memory_says_the_peak_and_what_lowers_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error, edited("data.batch_size=64")) == 1
    written = capsys.readouterr().err
    assert "GiB" in written
    assert "data.batch_size (now 64)" in written
    assert "video.num_frames (now 21)" in written


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(), 0),
        (SystemExit(3), 3),
        (SystemExit("gave up"), 1),
        (KeyboardInterrupt(), 130),
        (SIGTERMException(), 143),
        (JobFailed(2), 2),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert report(error, None) == code


def test_ctrl_c_that_lightning_turned_into_an_exit_is_still_ctrl_c() -> None:
    def stops_as_lightning_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    with pytest.raises(SystemExit) as caught:
        stops_as_lightning_does()
    assert report(caught.value, None) == 130


def test_an_error_raised_while_an_object_is_built_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "tests.launcher.test_report.picky", "value": 3})
    assert report(caught.value, None) == 2
    assert capsys.readouterr().err == "error: value is 3\n"


def picky(value: int) -> None:
    raise ConfigError(f"value is {value}")
