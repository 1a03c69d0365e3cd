"""Programs of a run, compiled for devices that are not present."""
