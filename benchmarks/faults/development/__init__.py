"""Programs on which thresholds may be set."""
