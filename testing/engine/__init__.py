"""The engine: runs checks on drawn cases, reduces a failing case, and reports it."""
