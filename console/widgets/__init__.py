"""What a screen is made of; each widget shows a view of a run and does nothing else."""
