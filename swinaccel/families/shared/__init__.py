"""Readings that several families share."""
