"""Tests of reports, figures, comparisons and the table of traffic."""
