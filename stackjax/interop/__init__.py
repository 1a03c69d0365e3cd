"""How models meet other software; nothing else here imports it."""
