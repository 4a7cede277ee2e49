"""Analysis of jaxprs: whether packing changes an update, updates in one pass, loops that need little memory."""
