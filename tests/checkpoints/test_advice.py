"""No message repeats a framework's advice to load a file with its code; our own words stand in its place."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plop_dist import errors
from plop_dist.errors import PlopError, as_cause, first_line, without_advice
from tests import payloads

ADVICE = ("weights_only", "allow_pickle", "TORCH_FORCE", "safe_globals", "trust the source")
INSTEAD = "the file is damaged, or holds objects other than tensors, which are never unpickled"
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PlopError)]


def _torch_refuses_an_object() -> None:
    torch.load(io.BytesIO(payloads.bytes_of(Path("marker"))))


def _torch_refuses_the_old_format() -> None:
    buffer = io.BytesIO()
    torch.save(payloads.Trap(Path("marker")), buffer, _use_new_zipfile_serialization=False)
    torch.load(io.BytesIO(buffer.getvalue()))


def _numpy_refuses_an_object() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    np.load(io.BytesIO(buffer.getvalue()))


REFUSALS: list[Callable[[], None]] = [_torch_refuses_an_object, _torch_refuses_the_old_format, _numpy_refuses_an_object]


@pytest.mark.parametrize("refuse", REFUSALS)
def test_our_words_stand_in_place_of_the_advice(refuse: Callable[[], None]) -> None:
    with pytest.raises(Exception, match=r"weights_only|allow_pickle") as caught:
        refuse()
    said = [first_line(caught.value), *(str(kind(f"rank 0: train failed: {caught.value}")) for kind in KINDS)]
    for text in said:
        assert text.endswith(INSTEAD)
        assert not [word for word in ADVICE if word in text]
    assert said[1] == f"rank 0: train failed: {INSTEAD}"
    assert as_cause(caught.value) is None
    outer = RuntimeError("the second")
    outer.__cause__ = caught.value
    assert as_cause(outer) is None


def test_other_messages_stay_as_they_are() -> None:
    for text in ("", "run_dir 'weights_only/x' is full.", "rank 1: ValueError: two\nlines", "pickle was truncated"):
        assert without_advice(text) == text
    error = ValueError("no such column.")
    assert as_cause(error) is error
    assert first_line(error) == "no such column"
