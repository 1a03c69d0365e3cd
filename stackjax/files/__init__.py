"""Files on disks and in buckets: JSON, metrics rows, locks, and all-or-nothing directories."""
