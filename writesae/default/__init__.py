"""The embedded default: a small language model, one dictionary, and the split of the standard library behind both."""
