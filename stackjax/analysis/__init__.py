"""What runs say when they are laid beside each other."""
