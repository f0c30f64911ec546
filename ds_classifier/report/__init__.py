"""The report of a run: report.html and its figures."""
