"""What went wrong in a past run, found in what it left."""
