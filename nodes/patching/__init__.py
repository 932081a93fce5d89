"""From a loaded MODEL to calls of the attention floor, and back to a report of what happened."""

from .patch import install, last_report
from .run_report import RunReport

__all__ = ["RunReport", "install", "last_report"]
