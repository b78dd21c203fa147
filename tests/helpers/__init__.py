"""What several tests share: tiny models, an independent oracle, calls of every public function."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
