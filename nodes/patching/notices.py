"""What a patched model tells a person in the log: everything once, whatever the number of runs."""

from __future__ import annotations

import logging

from .dense_reason import DenseReason, SparseNotPossible

logger = logging.getLogger(__name__)

RUNS_DENSE = "attention runs dense: {reason}"


def warn(text: str, with_traceback: bool = False) -> None:
    """Log what the person should know."""
    logger.warning("RoPeSLR: %s", text, exc_info=with_traceback)


class Notices:
    """Lives as long as the patched model, so that the second run repeats nothing."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self._logged: set[str] = set()

    def once(self, text: str, with_traceback: bool = False) -> None:
        """The same, unless it was logged before."""
        if text not in self._logged:
            self._logged.add(text)
            warn(text, with_traceback)

    def dense(self, reason: DenseReason, with_traceback: bool = False) -> None:
        """Log why calls stay dense; an error under strict, unless the person chose it."""
        if reason.chosen:
            return
        if self.strict:
            raise SparseNotPossible(reason)
        self.once(RUNS_DENSE.format(reason=reason), with_traceback)
