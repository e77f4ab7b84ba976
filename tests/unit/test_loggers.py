"""What other libraries say while they are imported."""

from __future__ import annotations

import logging

import pytest

import monkeyjump  # noqa: F401


def test_what_bitsandbytes_lacks_is_information_and_what_it_warns_of_is_not_hidden(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("something is wrong")
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
