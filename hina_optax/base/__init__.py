"""What every part stands on: arithmetic, paths, and the lift from a leaf to a tree."""
