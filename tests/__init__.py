"""Tests; helper modules are imported by their full names."""
