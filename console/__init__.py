"""What the operator sees: command line, headless front end and the state both read. Never imports torch."""
