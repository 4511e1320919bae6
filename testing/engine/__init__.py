"""The engine: runs checks on drawn cases, reduces one that fails, and reports it."""
