"""Tests; each folder mirrors the folder of the same name."""
