"""Programs read as jaxprs: whether packing changes an update, updates in one pass, lean loops."""
