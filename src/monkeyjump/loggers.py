"""What other libraries log while they are imported and that asks nothing of anybody.

bitsandbytes, which PEFT imports, warns on some processors that a kernel of another package cannot be loaded. Its own
code does the same work, so it is said on the level of information: shown to who asks for that, else not.
"""

from __future__ import annotations

import logging

SOURCE = "bitsandbytes.backends.cpu.ops"
OPENING = "Failed to load CPU gemm_4bit_forward"


def _as_information(record: logging.LogRecord) -> bool:
    if record.msg.startswith(OPENING):
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


logging.getLogger(SOURCE).addFilter(_as_information)
