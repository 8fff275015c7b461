"""Everything that a run directory claims, computed anew."""
