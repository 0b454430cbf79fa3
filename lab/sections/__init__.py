"""The sections of the report (lab/report.py), one a file; each returns markup, or says what is missing."""
