"""Gradients: of a batch, of single examples, of whole runs, and how much they scatter."""
