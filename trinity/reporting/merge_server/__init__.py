"""A page on this machine's loopback address that makes recipes, checks them, merges, and shows the report."""
