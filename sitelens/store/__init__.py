"""Results on disk: content-addressed, checksummed artifacts, and `cached`, which loads or computes one."""
