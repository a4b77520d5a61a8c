"""Other ways to run a pruned net on a CPU, each behind one function."""
