"""Errors after the first step differ in type from mistakes in a config, and keep their message and cause."""

import errno

import pytest

from jepa_kit.engine.checkpoint.async_save import under_way
from jepa_kit.errors import RunError, SaveError, TooManySkippedError


@pytest.mark.parametrize("error", [ValueError("gone"), RuntimeError("gone"), ConnectionError("gone")])
def test_errors_of_parts(tmp_path, error):
    with pytest.raises(RunError, match=r"^gone$") as met, under_way(tmp_path):
        raise error
    assert met.value.__cause__ is error


@pytest.mark.parametrize("error", [TooManySkippedError("many"), SaveError("lost"), FloatingPointError("nan")])
def test_errors_that_a_run_tells_itself(tmp_path, error):
    with pytest.raises(type(error)) as met, under_way(tmp_path):
        raise error
    assert met.value is error


def test_a_folder_that_takes_no_more(tmp_path):
    message = "cannot be written to: No space left on device; there is no checkpoint"
    with pytest.raises(SaveError, match=message), under_way(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_mistake_of_ours_keeps_its_kind(tmp_path):
    with pytest.raises(KeyError), under_way(tmp_path):
        raise KeyError("ours")
