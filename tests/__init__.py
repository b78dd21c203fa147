"""The tests mirror the package: `tests/models` tests `memcircuits/models`, and so on."""
