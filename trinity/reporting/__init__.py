"""The report of a run directory as one HTML page: `write_report`."""

from trinity.reporting.page import report_page, write_report

__all__ = ["report_page", "write_report"]
