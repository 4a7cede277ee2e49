"""Arrays over the devices of a mesh."""
