"""Files that are on the disk, and whole, or not there."""
