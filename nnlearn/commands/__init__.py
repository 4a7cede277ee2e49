"""The commands of the console: options, what they run, and what they print."""
