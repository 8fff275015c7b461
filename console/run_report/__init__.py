"""A report of one run as a file: what is said stands once, in `model` and `gather`; each format only writes it down."""
