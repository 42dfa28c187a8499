"""Fixtures of the tests of the commands."""

import shutil
from pathlib import Path

import pytest

from datamodules.writing.build import WriterSettings, build_dataset
from tests.datamodules.synthetic import Squares


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clean") / "set"
    source = Squares(num_tasks=4, views=("front", "left"), control=("depth",), splits=("train", "train", "val"))
    settings = WriterSettings(max_samples_per_shard=5)
    build_dataset(source, root, request={}, settings=settings, num_workers=1, progress=False)
    return root


@pytest.fixture
def root(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "set"))


class _OneProcessPool:
    """Stands in for the pool where no crash is expected: a hundred interpreters need not be started."""

    def __init__(self, function, context, **options) -> None:
        self._function, self._context = function, context

    def run(self, items):
        for item in items:
            yield item, self._function(self._context, item, lambda note: None)


@pytest.fixture
def one_process_pool(monkeypatch):
    monkeypatch.setattr("datamodules.writing.check.WorkerPool", _OneProcessPool)
