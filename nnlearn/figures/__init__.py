"""Pictures, by matplotlib, which an extra brings."""
