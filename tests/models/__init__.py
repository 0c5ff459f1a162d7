"""Tests of the model definitions."""
