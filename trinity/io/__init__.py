"""Files on disk: atomic writes, locks, checksums and JSON, one of each for the whole project."""
