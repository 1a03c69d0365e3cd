"""The pure core of a run: phases, train state, optimizer, compiled step."""
