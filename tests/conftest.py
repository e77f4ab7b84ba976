"""Settings that every test shares: one thread per worker, no Hub, quiet libraries, caches of their own."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from proofs import (  # noqa: F401  pytest finds hooks by name
    pytest_addoption,
    pytest_collection_finish,
    pytest_itemcollected,
    pytest_runtest_makereport,
)

torch.set_num_threads(1)

CACHES = tempfile.mkdtemp(prefix="monkeyjump-tests-")
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
os.environ["MONKEYJUMP_HOME"] = os.path.join(CACHES, "home")
os.environ["HF_DATASETS_CACHE"] = os.path.join(CACHES, "datasets")  # read when datasets is first imported

# Warnings are errors; each of these is another library's, about something that is not ours to change.
EXEMPT = (
    # PEFT 0.21 asks transformers 5 under a name that it has since renamed
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    # transformers 5.23 has renamed it; the name in all supported versions is the former
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",
    "ignore:.gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning",
    # BEFT on the tiny Llama, whose projections have no bias: says that merging is impossible
    "ignore:Detected that the base layer has no bias term:UserWarning",
    # FRoD keeps a sparse matrix
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    # BOFT without its CUDA extension works, slowly
    "ignore:Failed to load the CUDA extension:UserWarning",
    "ignore:Setting boft_n_butterfly_factor to 1:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in EXEMPT:
        config.addinivalue_line("filterwarnings", line)
