"""Fixtures of the unit tests."""

from fake_nvml import library_dir, nvml

__all__ = ["library_dir", "nvml"]
