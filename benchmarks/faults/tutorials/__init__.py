"""Healthy programs after public tutorials, in which the diagnosis must find nothing."""
