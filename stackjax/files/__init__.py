"""Files of runs: disks and buckets, JSON, directories that are complete or absent."""
