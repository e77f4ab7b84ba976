"""Untrusted programs in a child process without network, files, environment or time."""

from monkeyjump.evaluation.sandbox.consent import allow_code, require_consent
from monkeyjump.evaluation.sandbox.runner import Limits, Verdict, check_sandbox, run_program

__all__ = ["Limits", "Verdict", "allow_code", "check_sandbox", "require_consent", "run_program"]
