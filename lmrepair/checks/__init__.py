"""Tests that decide."""
