"""What tests of different files share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt this process and those it starts, as in a terminal.

    What runs in the background of a script ignores it, and so does all that it starts.
    """
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)
