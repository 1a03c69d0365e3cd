"""The machine under a run: files, processes and hosts."""
