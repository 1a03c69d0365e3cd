"""The pure core: phases, train state, learning rates, compiled step."""
