"""Activations moved between a clean and a corrupted run, exactly or to first order (section 5.2)."""
