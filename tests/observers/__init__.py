"""Tests of the observers that track runs."""
