"""Where daemons log: stderr, one line an event. stdout belongs to the program (with --stdio, to the NBD client)."""

from __future__ import annotations

import sys

import structlog


def log_to_stderr() -> None:
    """Send every structlog event of this process to stderr."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
