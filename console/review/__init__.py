"""A past run as a report: for people and for programs."""
