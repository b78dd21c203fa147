"""`python -m memcircuits.organism_build`: rebuild the organism."""

from memcircuits.organism_build.pipeline import main

raise SystemExit(main())
