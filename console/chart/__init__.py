"""The loss chart without a screen: numbers to envelopes, envelopes to dots, dots to text and files."""
