"""What scripts that do many runs have in common: runs that are done, runs at a time, tables in a file, flags."""
