"""From a loaded MODEL to calls of the attention floor, and back to a report of what happened."""

from .install import install
from .patch import installed_plan, last_learned, last_report
from .run_report import RunReport

__all__ = ["RunReport", "install", "installed_plan", "last_learned", "last_report"]
