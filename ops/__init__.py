"""Parameter-free sequence maps: one file a family of recurrences, one function a paradigm."""
